"""Configuration of Steerling, the interpretable block-causal masked-diffusion language model."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

SWITCHES = (
    "interpretable",
    "use_rms_norm",
    "use_qk_norm",
    "use_rope",
    "rope_full_precision",
    "use_bias",
    "weight_sharing",
    "use_attention_known",
    "use_attention_unknown",
    "use_unknown",
    "apply_topk_to_unknown",
    "topk_on_logits",
    "factorize_unknown",
    "use_epsilon_correction",
    "store_unknown_weights",
)
# Of the library, which takes None for False.
LIBRARY_SWITCHES = ("return_dict", "output_hidden_states", "output_attentions")
# Concept tables are padded for the sake of hardware, which wants no more than this; the rest would be memory for nothing.
LARGEST_PAD_MULTIPLE = 4096
CONCEPT_KEYS_RENAMED = {"block_size": "concept_block_size"}
TRAINING_ONLY_KEYS = ("max_concepts",)


class SteerlingConfig(PreTrainedConfig):
    r"""
    Everything that fixes the shapes and the arithmetic of a Steerling checkpoint. The defaults are those of the released
    8.4-billion-parameter model.

    Two forms are read: the flat form of the Hub repositories, and the older nested one, in which the concept keys lie
    under `concept` (there, `block_size` is `concept_block_size`) and `model_type` says "causal_diffusion". Saving always
    writes the flat form.

    Args:
        interpretable: Whether the model has concept heads. `False` is the bare backbone.
        vocab_size: Rows of the token embedding and of the vocabulary projection.
        n_layers, n_head, n_embd: Depth, query heads and width of the transformer.
        n_kv_heads: Key and value heads of grouped-query attention; `None` means one per query head.
        block_size: Context length in tokens.
        diff_block_size: Tokens of an attention block: attention is bidirectional inside one and causal across them.
        use_rms_norm: RMSNorm with `norm_eps`, or else LayerNorm (weight and bias, epsilon fixed at 1e-5).
        norm_order: "post" normalises what a sublayer returns, "pre" what it receives.
        use_qk_norm: Whether queries and keys are normalised per head.
        use_rope, rope_base, rope_full_precision: Rotary positions, their base, and whether they rotate in float32.
        clip_qkv: Bound of the packed queries, keys and values, or `None`.
        mlp_type: "swiglu" (gated; `activation` is not used) or "standard".
        activation: "gelu" (tanh approximation), "relu" or "silu", for the standard MLP.
        mlp_ratio, intermediate_size: Width of the MLP: `intermediate_size`, or else `mlp_ratio * n_embd`.
        use_bias: Biases in attention and MLP; norms, heads and embeddings never follow it.
        weight_sharing: Whether the vocabulary projection is the token embedding.
        n_concepts, n_unknown_concepts: Known concepts, and discovered ("unknown") ones.
        concept_dim: Width of the concept embeddings; must equal `n_embd`.
        use_attention_known, use_attention_unknown: Score concepts by attention over their embeddings, not linearly.
        topk_known: Known concepts that a position reports, at most `topk_known_features`; `None` sums all concepts.
        topk_known_features: Known concepts that form the features; `None` means `topk_known`.
        use_unknown, unknown_topk, apply_topk_to_unknown: The discovered head, its k, and whether it is sparse at all.
        topk_on_logits: Rank concepts by logit rather than by its sigmoid (they differ only in exact ties).
        factorize_unknown, factorize_rank: Store the discovered head as two thin matrices of this rank.
        use_epsilon_correction: Add what both heads leave over, so that the composed state is the hidden state.
        concept_block_size: Concepts that are scored at a time; bounds memory, changes nothing else.
        pad_multiple: Concept tables are padded to a multiple of this many rows; padded rows never take part.
        store_unknown_weights, inject_layer, inject_alpha: Kept for the checkpoints that carry them.
        known_loss_coef, reconstruction_loss_coef, known_reconstruction_loss_coef: Weights of the concept losses in
            training, see `loss_steerling.py`.
        initializer_range: Standard deviation of fresh weights.
        pad_token_id, bos_token_id, eos_token_id, mask_token_id, endofchunk_token_id: Special tokens.
        start_header_id, end_header_id, eot_id: Further special tokens of instruct checkpoints.

    Raises:
        ValueError: A value is out of range; the message names the key, the value and the remedy.
    """

    model_type = "steerling"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "weight_sharing",
    }

    interpretable: bool = True
    vocab_size: int = 100281
    n_layers: int = 32
    n_head: int = 32
    n_embd: int = 4096
    n_kv_heads: int | None = 4
    block_size: int = 4096
    diff_block_size: int = 64
    use_rms_norm: bool = True
    norm_eps: float = 1e-5
    norm_order: str = "post"
    use_qk_norm: bool = True
    use_rope: bool = True
    rope_base: float = 500000.0
    rope_full_precision: bool = True
    clip_qkv: float | None = 10.0
    mlp_type: str = "swiglu"
    activation: str = "gelu"
    mlp_ratio: int = 4
    intermediate_size: int | None = None
    use_bias: bool = False
    weight_sharing: bool = True
    n_concepts: int = 33732
    n_unknown_concepts: int | None = 101196
    concept_dim: int | None = None
    use_attention_known: bool = False
    use_attention_unknown: bool = False
    topk_known: int | None = 32
    topk_known_features: int | None = 32
    use_unknown: bool = True
    unknown_topk: int | None = 128
    apply_topk_to_unknown: bool = True
    topk_on_logits: bool = False
    factorize_unknown: bool = True
    factorize_rank: int = 256
    use_epsilon_correction: bool = True
    concept_block_size: int = 4096
    pad_multiple: int = 16
    store_unknown_weights: bool = False
    inject_layer: int = 16
    inject_alpha: float = 1.0
    known_loss_coef: float = 0.05
    reconstruction_loss_coef: float = 1.0
    known_reconstruction_loss_coef: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int | None = 100277
    bos_token_id: int | None = 100278
    eos_token_id: int | list[int] | None = 100257
    mask_token_id: int = 100280
    endofchunk_token_id: int | None = 100279
    start_header_id: int | None = None
    end_header_id: int | None = None
    eot_id: int | None = None

    def __post_init__(self, concept: Any = None, **kwargs):
        kwargs.pop("model_type", None)
        # The library sets every class default after the keyword, so an alias that names a field of its own is lost.
        if "tie_word_embeddings" in kwargs:
            self.weight_sharing = kwargs.pop("tie_word_embeddings")
        if concept is not None and not isinstance(concept, Mapping):
            _fail("concept", concept, "give the concept keys as a dictionary, or flat")
        for key, value in (concept or {}).items():
            if key not in TRAINING_ONLY_KEYS:
                setattr(self, CONCEPT_KEYS_RENAMED.get(key, key), value)
        super().__post_init__(**kwargs)
        if self.concept_dim is None:
            self.concept_dim = self.n_embd
        self.check()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's inner layer."""
        return self.intermediate_size if self.intermediate_size is not None else self.mlp_ratio * self.n_embd

    @property
    def n_discovered(self) -> int:
        """Discovered concepts, of which there are none without their head."""
        return (self.n_unknown_concepts or 0) if self.interpretable and self.use_unknown else 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, of which `eos_token_id` may name several, one or none."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)

    def check(self) -> None:
        """Raise a `ValueError` that names the first key whose value no Steerling model can have."""
        for key in (*SWITCHES, *LIBRARY_SWITCHES):
            value = getattr(self, key)
            if not isinstance(value, bool) and not (value is None and key in LIBRARY_SWITCHES):
                _fail(key, value, "choose True or False")
        for key in ("vocab_size", "n_layers", "n_head", "n_embd", "block_size", "diff_block_size", "mlp_ratio"):
            self._check_positive(key)
        for key in ("n_kv_heads", "intermediate_size"):
            self._check_positive(key, optional=True)
        self._check_choice("norm_order", ("post", "pre"))
        self._check_choice("mlp_type", ("swiglu", "standard"))
        self._check_choice("activation", ("gelu", "relu", "silu"))
        self._check_above_zero("norm_eps")
        self._check_above_zero("rope_base")
        self._check_above_zero("clip_qkv", optional=True)
        self._check_above_zero("initializer_range")
        if self.diff_block_size > self.block_size:
            _fail(
                "diff_block_size",
                self.diff_block_size,
                f"choose no more than the context, block_size ({self.block_size})",
            )
        if self.n_embd % self.n_head:
            _fail("n_embd", self.n_embd, f"choose a multiple of n_head ({self.n_head})")
        if self.n_kv_heads is not None and self.n_head % self.n_kv_heads:
            _fail("n_kv_heads", self.n_kv_heads, f"choose a divisor of n_head ({self.n_head})")
        if self.use_rope and self.head_dim % 2:
            _fail("n_embd", self.n_embd, f"rotary positions need an even n_embd / n_head, this is {self.head_dim}")
        if not _is_integer(self.inject_layer) or self.inject_layer < 0:
            _fail("inject_layer", self.inject_layer, "choose a whole number of 0 or more")
        if not _is_number(self.inject_alpha):
            _fail("inject_alpha", self.inject_alpha, "choose a finite number")
        self._check_token_ids()
        if self.interpretable:
            self._check_concepts()

    def _check_concepts(self) -> None:
        for key in ("n_concepts", "concept_block_size", "pad_multiple"):
            self._check_positive(key)
        if self.pad_multiple > LARGEST_PAD_MULTIPLE:
            _fail("pad_multiple", self.pad_multiple, f"choose no more than {LARGEST_PAD_MULTIPLE}")
        for key in ("topk_known", "topk_known_features", "unknown_topk"):
            self._check_positive(key, optional=True)
        if self.concept_dim != self.n_embd:
            _fail("concept_dim", self.concept_dim, f"it must equal n_embd ({self.n_embd}); leave it out")
        if self.use_unknown:
            if self.n_unknown_concepts is None:
                _fail("n_unknown_concepts", None, "give the number of discovered concepts, or set use_unknown=False")
            self._check_positive("n_unknown_concepts")
            if self.factorize_unknown:
                self._check_positive("factorize_rank")
        for key in ("known_loss_coef", "reconstruction_loss_coef", "known_reconstruction_loss_coef"):
            if not _is_number(getattr(self, key)) or getattr(self, key) < 0:
                _fail(key, getattr(self, key), "choose a number of 0 or more")

    def _check_token_ids(self) -> None:
        optional = ("pad_token_id", "bos_token_id", "eos_token_id", "endofchunk_token_id")
        for key in (*optional, "start_header_id", "end_header_id", "eot_id", "mask_token_id"):
            value = getattr(self, key)
            if value is None and key != "mask_token_id":
                continue
            for token in self.eos_token_ids if key == "eos_token_id" else [value]:
                if not _is_integer(token) or not 0 <= token < self.vocab_size:
                    _fail(key, value, f"choose an id from 0 to vocab_size - 1 ({self.vocab_size - 1})")

    def _check_positive(self, key: str, optional: bool = False) -> None:
        value = getattr(self, key)
        if not (optional and value is None) and (not _is_integer(value) or value < 1):
            _fail(key, value, "choose a whole number of 1 or more" + (", or None" if optional else ""))

    def _check_above_zero(self, key: str, optional: bool = False) -> None:
        value = getattr(self, key)
        if not (optional and value is None) and (not _is_number(value) or not value > 0):
            _fail(key, value, "choose a number above 0" + (", or None" if optional else ""))

    def _check_choice(self, key: str, choices: tuple[str, ...]) -> None:
        if not isinstance(getattr(self, key), str) or getattr(self, key) not in choices:
            _fail(key, getattr(self, key), f"choose one of {', '.join(map(repr, choices))}")


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fail(key: str, value, remedy: str):
    raise ValueError(f"SteerlingConfig: `{key}` is {value!r}: {remedy}.")


__all__ = ["SteerlingConfig"]
