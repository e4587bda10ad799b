"""The backbone: embeddings, block-causal attention, and the vocabulary projection."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compatibility_steerling import CACHE_NAME, accept_past_key_values
from .concepts_steerling import SteerlingConceptTable
from .configuration_steerling import SteerlingConfig, name_embedding_for_peft
from .outputs_steerling import SteerlingBackboneOutput
from .packing_steerling import multiply
from .texts_steerling import drop_packing_hints, number_blocks, number_texts

# Beyond this, a position's inner MLP state is scaled down in float16, which ends at 65,504.
LARGEST_INNER = 1024.0
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}


class SteerlingRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        variance = hidden_states.square().mean(-1, keepdim=True)
        return (self.weight * (hidden_states * torch.rsqrt(variance + self.eps))).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def make_norm(config, width: int) -> nn.Module:
    """The configuration's norm over `width` features; the released LayerNorm variant fixes its epsilon at 1e-5."""
    return SteerlingRMSNorm(width, config.norm_eps) if config.use_rms_norm else nn.LayerNorm(width)


class SteerlingRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32, of shape (B, 1, T, head size)."""
        # No buffer, which model.to(torch.bfloat16) would round: at position 4,000 by whole turns.
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device) / size
        angles = position_ids[:, None, :, None].float() * (1.0 / self.config.rope_base**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, full_precision: bool) -> torch.Tensor:
    """Half-split rotary embedding (Su et al. 2021, arXiv:2104.09864) of (B, heads, T, head size)."""
    dtype = states.dtype
    if full_precision:
        states = states.float()
    else:
        cos, sin = cos.to(dtype), sin.to(dtype)
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(dtype)


def eager_attention_forward(
    module: "SteerlingAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def residual_projection(width: int, out_width: int, bias: bool) -> nn.Linear:
    """A linear layer whose output is added to the residual stream; it differs in its fresh weights only."""
    layer: Any = nn.Linear(width, out_width, bias)
    # A class of its own would say so too, but quantisers convert nothing but the very class nn.Linear.
    layer.adds_to_residual = True
    return layer


class SteerlingAttention(nn.Module):
    """Grouped-query attention over packed projections; the mask says which blocks are visible."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.kv_heads = config.n_kv_heads or config.n_head
        self.num_key_value_groups = config.n_head // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * self.kv_heads) * self.head_dim, config.use_bias)
        self.c_proj = residual_projection(config.n_embd, config.n_embd, config.use_bias)
        if config.use_qk_norm:
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        packed = multiply(self.c_attn, hidden_states)
        if self.config.clip_qkv is not None:
            packed = packed.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        heads = packed.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split((self.config.n_head, self.kv_heads, self.kv_heads), dim=1)
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query = rotate(query, *position_embeddings, self.config.rope_full_precision)
            key = rotate(key, *position_embeddings, self.config.rope_full_precision)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs
        )
        return multiply(self.c_proj, output.reshape(hidden_states.shape)), weights


class SteerlingMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp_type == "swiglu"
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width * (2 if self.gated else 1), config.use_bias)
        self.c_proj = residual_projection(config.mlp_width, config.n_embd, config.use_bias)
        self.activation = ACT2FN["silu" if self.gated else ACTIVATIONS[config.activation]]
        # The norm behind takes out any factor, as long as no bias was added to it.
        self.scale_free = self.gated and config.norm_order == "post" and not config.use_bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = multiply(self.c_fc, hidden_states)
        if not self.gated:
            return multiply(self.c_proj, self.activation(inner))
        up, gate = inner.chunk(2, dim=-1)
        if self.scale_free and inner.dtype == torch.float16:
            return multiply(self.c_proj, self._product_in_range(up, gate))
        return multiply(self.c_proj, self.activation(gate) * up)

    def _product_in_range(self, up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """
        The gated product of float16 states. It grows with the square of the hidden states, so strong steering drives it, or its
        projection, out of range; such positions are divided by a number each.
        """
        product = self.activation(gate.float()) * up.float()
        return (product / (product.abs().amax(dim=-1, keepdim=True) / LARGEST_INNER).clamp(min=1)).to(up.dtype)


class SteerlingBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.norm_first = config.norm_order == "pre"
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = SteerlingAttention(config, layer_idx)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = SteerlingMLP(config)

    def forward(self, hidden_states: torch.Tensor, injections: Any = None, **kwargs) -> torch.Tensor:
        """`injections` are for the hook of `hooks_steerling.add_injections`, which adds them to the output."""
        if self.norm_first:
            hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
            return hidden_states + self.mlp(self.ln_2(hidden_states))
        hidden_states = hidden_states + self.ln_1(self.attn(hidden_states, **kwargs)[0])
        return hidden_states + self.ln_2(self.mlp(hidden_states))


class SteerlingPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of Steerling models."""

    config: SteerlingConfig
    config_class = SteerlingConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SteerlingBlock", "SteerlingConceptHead"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SteerlingBlock, "attentions": SteerlingAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if getattr(module, "adds_to_residual", False):
            # What a residual branch adds starts small, as in GPT-2 (Radford et al. 2019, section 2.3).
            std = std / (2 * self.config.n_layers) ** 0.5
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Embedding, SteerlingConceptTable)):
            init.normal_(module.weight, std=std)
        elif isinstance(module, (SteerlingRMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_submodule("tok_emb")

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.tok_emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.base_model.get_submodule("lm_head")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base_model.lm_head = new_embeddings

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in the library; a vocabulary projection that was trained apart from the embedding is stored beside it."""
        self.note_untied()
        super().save_pretrained(*args, **kwargs)

    def note_untied(self) -> None:
        """Let the configuration say whether the vocabulary projection is still the token embedding."""
        modules = (self.get_input_embeddings(), self.get_output_embeddings())
        embedding, head = (cast(Any, getattr(module, "weight", None)) for module in modules)
        alone = getattr(self, "_hf_peft_config_loaded", False)  # adapters are stored without these
        # What is sharded, quantised or offloaded cannot be compared here.
        plain = all(type(weight) is nn.Parameter and not weight.is_meta for weight in (embedding, head))
        untied = plain and embedding is not head and not torch.equal(embedding, head.to(embedding))
        if self.config.weight_sharing and untied and not alone:
            warnings.warn(
                "The vocabulary projection differs from the token embedding, which the configuration ties: it now says "
                "tie_word_embeddings=False, and both are stored.",
                stacklevel=3,
            )
            self.config.weight_sharing = False
        if not self.config.weight_sharing:
            self._keys_to_ignore_on_save = set()


class SteerlingModel(SteerlingPreTrainedModel):
    """
    The backbone: block-causal transformer and, because released checkpoints keep it here, the vocabulary projection.

    Position i sees position j iff `i // diff_block_size >= j // diff_block_size`: both ways inside a block, causally
    across blocks, on a grid fixed to absolute positions.
    """

    _tied_weights_keys = {"lm_head.weight": "tok_emb.weight"}

    def __init__(self, config):
        super().__init__(config)
        config.check()
        name_embedding_for_peft()
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(SteerlingBlock(config, layer_idx) for layer_idx in range(config.n_layers))
        self.ln_f = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.rotary_emb = SteerlingRotaryEmbedding(config)
        self.gradient_checkpointing = False
        # The tied copy is left out of files, and Trainer is told not to miss it there.
        self._keys_to_ignore_on_save = ["lm_head.weight"] if config.weight_sharing else None
        self.post_init()

    @accept_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        injections: dict[int, Any] | None = None,
        **kwargs,
    ) -> SteerlingBackboneOutput:
        """
        Last hidden states; the arguments are those of `SteerlingForDiffusionLM.forward`. A prepared mask of shape
        (B, 1, T, keys) is used as it is, with the `position_ids` given; so is whatever mask the attention implementation
        reads under the key "full_attention" of a dictionary, `None` if all is visible. Rows of packed texts have no cache.
        `injections` is what steering adds behind blocks, by their numbers from 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        drop_packing_hints(kwargs, position_ids)
        if inputs_embeds is None:
            inputs_embeds = self.tok_emb(input_ids)
        texts = self._packed_texts(inputs_embeds, attention_mask, position_ids)
        if texts is not None and (cache is not None or use_cache):
            name = "use_cache" if cache is None else "cache"
            raise ValueError(
                f"`{name}` is given with `position_ids` that do not grow by one, which are several texts in a row: a cache holds "
                "one text a row. Leave it out, or give each text a row of its own."
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache = None  # a layer that is computed twice would write it twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        mask, position_ids = self._mask_and_positions(inputs_embeds, attention_mask, position_ids, cache, texts)
        rotation = self.rotary_emb(position_ids) if self.config.use_rope else None
        hidden_states = inputs_embeds
        for number, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states,
                injections=None if injections is None else injections.get(number),
                attention_mask=mask,
                position_embeddings=rotation,
                cache=cache,
                **kwargs,
            )
        return SteerlingBackboneOutput(last_hidden_state=self.ln_f(hidden_states), cache=cache)

    @staticmethod
    def _packed_texts(inputs_embeds, attention_mask, position_ids) -> torch.Tensor | None:
        """Number of each token's text in its row, (B, T), or `None` if each row is one text."""
        flat = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)
        if position_ids is None or not flat:
            return None
        batch, time = inputs_embeds.shape[:2]
        texts = number_texts(
            position_ids.expand(batch, -1), None if attention_mask is None else attention_mask[:, -time:]
        )
        # What is compiled for any positions takes them for several texts, which is right for one as well.
        return texts if torch.compiler.is_compiling() or texts.any() else None

    def _mask_and_positions(self, inputs_embeds, attention_mask, position_ids, cache, texts):
        """The mask that attention reads, and the (B, T) positions of the tokens."""
        if isinstance(attention_mask, dict):
            return attention_mask["full_attention"], position_ids
        batch, time = inputs_embeds.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        key_positions = self._key_positions(attention_mask, position_ids, batch, past + time, inputs_embeds.device)
        # Blocks join what the other rules part, so those of packed texts have numbers of their own.
        size = self.config.diff_block_size
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            and_mask_function=None if texts is None else _same_text(texts),
            block_sequence_ids=key_positions // size if texts is None else number_blocks(texts, key_positions, size),
        )
        return mask, key_positions[:, past:] if position_ids is None else position_ids

    @staticmethod
    def _key_positions(attention_mask, position_ids, batch: int, length: int, device) -> torch.Tensor:
        """Position in its row of every cached or new token: (B, length)."""
        if position_ids is not None and position_ids.shape[1] == length:
            return position_ids.expand(batch, -1)
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.arange(length, device=device).expand(batch, -1)


def _same_text(texts: torch.Tensor) -> Callable:
    """Which key a query may see in rows of several texts."""

    def visible(batch_idx, head_idx, q_idx, kv_idx):
        return texts[batch_idx, q_idx] == texts[batch_idx, kv_idx]

    return visible


__all__ = ["SteerlingModel", "SteerlingPreTrainedModel"]
