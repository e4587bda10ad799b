"""Steerling: a block-causal masked-diffusion language model whose last hidden state is a sum of named concepts."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache
from transformers.utils import can_return_tuple

from .backbone_steerling import SteerlingModel, SteerlingPreTrainedModel
from .compatibility_steerling import accept_past_key_values
from .concepts_steerling import SteerlingConceptHead, SteerlingResidual
from .generation_steerling import SteerlingGenerationMixin
from .hooks_steerling import FirstLook, active_hooks
from .inputs_steerling import check_inputs, check_labels
from .loss_steerling import (
    IGNORE_INDEX,
    NoisedBatch,
    check_concept_labels,
    concept_loss,
    encode,
    noise_batch,
    weighted_nll,
)
from .outputs_steerling import SteerlingConcepts, SteerlingFeatureOutput, SteerlingOutput
from .packing_steerling import multiply
from .texts_steerling import drop_packing_hints
from .training_steerling import (
    NOT_SHIFTED,
    SteerlingTokenLosses,
    SteerlingTrainingMixin,
    token_losses,
)

# Of more concepts than these, some are most likely among a position's strongest, and their head is scored as a whole anyway.
FEW_CONCEPTS = 64

# Arguments that the loss would ignore, and why it cannot take them.
NOT_WITH_LABELS = {
    "cache": "a row of training is computed as a whole",
    "inputs_embeds": "training masks tokens, so it needs `input_ids`; in place of prompt tuning, which brings embeddings, use LoRA",
    "output_concepts": "training returns its losses alone",
    "output_attentions": "a row is computed beside a clean copy of its blocks, so that its attention has more keys than tokens",
}


class SteerlingForDiffusionLM(SteerlingTrainingMixin, SteerlingGenerationMixin, SteerlingPreTrainedModel):
    """Steerling with its concept heads: loss, logits, concepts and `generate`."""

    transformer: SteerlingModel
    known_head: SteerlingConceptHead | None
    unknown_head: SteerlingConceptHead | None
    _tied_weights_keys = {"transformer.lm_head.weight": "transformer.tok_emb.weight"}
    # Whether outputs begin with `last_hidden_state`, as those of whatever AutoModel loads do.
    states_first = False

    def __init__(self, config):
        super().__init__(config)
        self.transformer = SteerlingModel(config)
        self.known_head = self.unknown_head = None
        if config.interpretable:
            self.known_head = SteerlingConceptHead(
                config,
                config.n_concepts,
                topk=config.topk_known,
                topk_features=config.topk_known_features,
                use_attention=config.use_attention_known,
                factorized=False,
            )
            if config.use_unknown:
                topk = config.unknown_topk if config.apply_topk_to_unknown else None
                self.unknown_head = SteerlingConceptHead(
                    config,
                    config.n_unknown_concepts,
                    topk=topk,
                    topk_features=topk,
                    use_attention=config.use_attention_unknown,
                    factorized=config.factorize_unknown,
                )
            self.residual = SteerlingResidual()
        self.post_init()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args,
        **kwargs,
    ) -> None:
        """
        As everywhere in transformers; a bare backbone is stored under its released names, without a prefix.

        Raises:
            ValueError: The weights are quantised in a way that has no files.
        """
        # With adapters the library picks theirs from the model itself.
        adapters = getattr(self, "_hf_peft_config_loaded", False)
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None and not adapters and not quantizer.is_serializable():
            method = quantizer.quantization_config.quant_method
            raise ValueError(
                f"Weights quantised by {getattr(method, 'value', method)} cannot be saved: save the model as it is before, and "
                "quantise it when it is loaded, or use bitsandbytes or torchao, whose weights can be saved."
            )
        if not self.config.interpretable and not adapters:
            self.note_untied()
            prefix = f"{self.base_model_prefix}."
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name.removeprefix(prefix): weight for name, weight in state_dict.items()}
            if self.config.weight_sharing:
                state_dict.pop("lm_head.weight", None)
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs) -> Any:
        """As in torch; a bare backbone's names may lack their prefix, as `save_pretrained` stores them."""
        if not self.config.interpretable:
            prefix, metadata = f"{self.base_model_prefix}.", getattr(state_dict, "_metadata", None)
            state_dict = OrderedDict(
                (prefix + name.removeprefix(prefix), weight) for name, weight in state_dict.items()
            )
            if metadata is not None:
                state_dict._metadata = metadata  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, *args, **kwargs)

    @accept_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        concept_labels: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        noisy_context: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_concepts: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SteerlingOutput | SteerlingFeatureOutput | SteerlingTokenLosses:
        """
        Logits of every position for the token at that position, or the training loss.

        Args:
            input_ids: (B, T) token ids; positions to predict hold the mask token.
            attention_mask: (B, T), 1 for tokens and 0 for padding on either side, or a prepared (B, 1, T, keys) mask.
            position_ids: (B, T) or (1, T) places in the row, less than `block_size`, from which the attention grid follows. By
                default tokens are counted, padding left out. Where they do not grow by one a new text begins: packed texts see
                nothing of each other, have no cache, and with `labels` start at 0.
            cache: Cache of earlier tokens. Exact only if it holds whole attention blocks.
            inputs_embeds: (B, T, D) in place of `input_ids`.
            labels: (B, T) clean target tokens, -100 where there is no loss; the loss is that of `loss_steerling.py`, and
                `logits` are not computed. A batch without labelled positions has the loss 0. Refused beside them: `cache`,
                `inputs_embeds`, `output_concepts` and `output_attentions`. Where `input_ids` hold the mask token at labelled
                positions, these are the noise of the text; for other texts it is drawn from torch's global generator. Other
                masks stay masks for every block.
            concept_labels: (B, T, K) ids of the known concepts of each position, each once, filled up with -100; a position without
                any is not annotated. Positions without a label may be annotated, as a prompt is. Needs `labels`.
            noise_mask: (B, T) bool, the positions to mask, in place of drawn noise (a collator's choice).
            noisy_context: (B, ceil(T / diff_block_size)) bool, blocks that see the block before them as noised, as
                happens at generation when a generation block straddles the attention grid. Not for packed texts.
            use_cache: Whether to return a cache.
            output_concepts: Whether to return the decomposition of the hidden states.
            logits_to_keep: Compute logits of the last so many positions (0: all), or of these positions (1-D tensor).
            num_items_in_batch: Target tokens of the whole optimisation step, which Trainer gives under gradient accumulation.

        Raises:
            ValueError: An argument has the wrong type, shape or values, or comes from a trainer whose loss this model has not. Values
                are looked at where they are on the CPU, and nothing is while `torch.compile` or an export traces the call.
        """
        fused = kwargs.pop("fused_lm_head", False)
        if kwargs.pop("shift_labels", None) is not None:
            raise ValueError(NOT_SHIFTED)
        drop_packing_hints(kwargs, position_ids)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            inputs = (input_ids, attention_mask, position_ids, cache, inputs_embeds)
            if labels is None or input_ids is not None:
                check_inputs(self.config, *inputs, use_cache, output_concepts, logits_to_keep)
            check_labels(labels, noise_mask, noisy_context, concept_labels)
        if labels is not None:
            attentions = kwargs.get("output_attentions", self.config.output_attentions)
            beside = {"cache": cache, "inputs_embeds": inputs_embeds, "output_concepts": output_concepts or None}
            for name, given in {**beside, "output_attentions": attentions or None}.items():
                if given is not None:
                    raise ValueError(f"`{name}` cannot be given with `labels`: {NOT_WITH_LABELS[name]}.")
            if fused:
                self._check_fused()
            return self._training_forward(
                noise_batch(self.config, input_ids, labels, attention_mask, noise_mask, noisy_context, position_ids),
                concept_labels,
                num_items_in_batch,
                fused,
                **kwargs,
            )
        training = {"concept_labels": concept_labels, "noise_mask": noise_mask, "noisy_context": noisy_context}
        for name, given in training.items():
            if given is not None:
                raise ValueError(
                    f"`{name}` without `labels` has no loss to enter; give `labels` as well. (Trainer takes them away under "
                    "`label_smoothing_factor` and `compute_loss_func`: leave these out.)"
                )
        self._check_unlabelled(input_ids, num_items_in_batch is not None, fused, use_cache)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.to(hidden.device)
        concepts = None
        if output_concepts:
            concepts = self.decompose(hidden)
            logits = multiply(self.transformer.lm_head, concepts["composed"][:, keep])
        else:
            logits = self.compute_logits(hidden[:, keep])
        found = {
            "logits": logits,
            "cache": outputs.cache,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "concepts": concepts,
        }
        if self.states_first:
            return SteerlingFeatureOutput(last_hidden_state=hidden, **found)
        return SteerlingOutput(**found)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of last hidden states (..., D); the concept heads run only if something depends on them."""
        return multiply(self.transformer.lm_head, self.compose(hidden_states))

    def concept_heads(self) -> list[SteerlingConceptHead]:
        """Known and discovered head, as far as this checkpoint has them."""
        return [head for head in (self.known_head, self.unknown_head) if head is not None]

    def hooked_heads(self) -> list[SteerlingConceptHead]:
        """The heads that run in generation because forward hooks can change what they say, or what is made of it."""
        return [head for head in self.concept_heads() if _is_hooked(head) or _is_hooked(self.residual)]

    def compose(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        `decompose(...).composed`, by way of what can make it differ from the hidden states. If all hooks on a head say by an
        attribute `looks_at` (ids of the head) which concepts they look at, and these are few, it computes no others, unless
        gradients are wanted or the residual has hooks.
        """
        if self.known_head is None:
            return hidden_states
        if self.unknown_head is not None and not self.config.use_epsilon_correction:
            return self.decompose(hidden_states)["composed"]
        residual_counts = _is_hooked(self.residual)
        whole = residual_counts or torch.is_grad_enabled()
        runs = [_run(head, hidden_states, only=None if whole else _looked_at(head)) for head in self.hooked_heads()]
        # Epsilon closes the sum to the hidden states, so only what hooks change is left.
        composed = hidden_states
        for untouched, output in runs:
            composed = composed + (output.features - untouched)
        if residual_counts:
            explained = torch.stack([untouched for untouched, _ in runs]).sum(dim=0)
            untouched, epsilon = _run(self.residual, hidden_states, explained)
            changed = (epsilon != untouched).any(dim=-1, keepdim=True)
            composed = torch.where(changed, sum(output.features for _, output in runs) + epsilon, composed)
        return composed

    def decompose(self, hidden_states: torch.Tensor) -> SteerlingConcepts:
        """
        Known, discovered and residual parts of last hidden states (..., D). Epsilon is that of the untouched heads, so
        that what a forward hook changes in a head's features reaches `composed`.

        Raises:
            ValueError: The model has no concept heads.
        """
        if self.known_head is None:
            raise ValueError(
                "This checkpoint has no concept heads (interpretable=False), so it has no concepts to show."
            )
        untouched, known = _run(self.known_head, hidden_states)
        features, unknown_features = known.features, torch.zeros_like(hidden_states)
        unknown = None
        if self.unknown_head is not None:
            untouched_unknown, unknown = _run(self.unknown_head, hidden_states)
            untouched, unknown_features = untouched + untouched_unknown, unknown.features
        _, epsilon = _run(self.residual, hidden_states, untouched)
        # Without a discovered head the residual takes its place, whatever the configuration says of epsilon.
        if unknown is not None and not self.config.use_epsilon_correction:
            epsilon = torch.zeros_like(hidden_states)
        return SteerlingConcepts(
            hidden=hidden_states,
            known_features=features,
            unknown_features=unknown_features,
            epsilon=epsilon,
            composed=features + unknown_features + epsilon,
            known_indices=known.indices,
            known_weights=known.weights,
            unknown_indices=unknown.indices if unknown is not None else None,
            unknown_weights=unknown.weights if unknown is not None else None,
        )

    def _training_forward(
        self, batch: NoisedBatch, concept_labels, num_items_in_batch, fused: bool, **kwargs
    ) -> SteerlingOutput | SteerlingTokenLosses:
        if concept_labels is not None:
            check_concept_labels(self.config, concept_labels, batch.noised)
        outputs = encode(self.transformer, self.config, batch, **kwargs)
        hidden = cast(torch.Tensor, outputs.last_hidden_state)
        noised = (batch.labels != IGNORE_INDEX).to(hidden.device)
        logits = self.compute_logits(hidden[noised])
        total = batch.targets.sum() if num_items_in_batch is None else num_items_in_batch
        # A batch without targets has the loss 0, and gradients of 0.
        total = torch.as_tensor(total, device=logits.device).clamp(min=1)
        nll = weighted_nll(logits, batch)
        bound = nll.sum() / total
        concepts = torch.zeros_like(bound)
        if self.known_head is not None:
            weights = batch.concept_weights().to(hidden.device)
            heads = (self.known_head, self.unknown_head)
            concepts = concept_loss(self.config, *heads, hidden, weights, concept_labels).to(bound.device)
        loss = bound + concepts / total
        if fused:
            return token_losses(logits, batch, nll, concepts, loss)
        return SteerlingOutput(loss=loss, diffusion_loss=bound.detach(), hidden_states=outputs.hidden_states)


class SteerlingAutoModel(SteerlingForDiffusionLM):
    """
    What AutoModel loads by: a `SteerlingForDiffusionLM` whose outputs begin with the last hidden state. The library takes the first
    output of such models for their features, as in `pipeline("feature-extraction")`.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the library."""
        loaded = SteerlingForDiffusionLM.from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # beside it, what `output_loading_info` asks for
        model.states_first = True
        return loaded

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> SteerlingForDiffusionLM:
        model = SteerlingForDiffusionLM._from_config(config, **kwargs)
        model.states_first = True
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Of the class that is loaded, so that its code is saved with it."""
        SteerlingForDiffusionLM.register_for_auto_class(auto_class)


def _is_hooked(module: nn.Module) -> bool:
    return any(part._forward_pre_hooks or active_hooks(part) for part in module.modules())


def _looked_at(head: nn.Module) -> torch.Tensor | None:
    """Ids of the concepts of a head that its hooks look at, `None` if they may be all or are too many to look at one by one."""
    hooks = active_hooks(head)
    inside = head._forward_pre_hooks or any(_is_hooked(part) for part in head.children())
    if inside or not all(hasattr(hook, "looks_at") for hook in hooks):
        return None
    ids = torch.cat([hook.looks_at for hook in hooks]).unique()
    return ids if len(ids) <= FEW_CONCEPTS else None


def _run(module: nn.Module, *inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
    """
    Features (or a tensor) that a module gives before any hook on it changes them, and its output after all hooks. Both are
    on the device of its inputs, and hooks get it there, wherever a device map may have put the module.
    """
    device = inputs[0].device

    def features_of(output: Any) -> torch.Tensor:
        return output if isinstance(output, torch.Tensor) else output.features

    if not active_hooks(module):
        output = _on(device, module(*inputs, **options))
        return features_of(output), output
    untouched = []

    def bring(output: Any) -> Any:
        output = _on(device, output)
        untouched.append(features_of(output).clone())
        return output

    with FirstLook(module, bring):
        output = module(*inputs, **options)
    return untouched[0], output


def _on(device: torch.device, output: Any) -> Any:
    """A tensor, or an output of tensors, on a device."""
    if isinstance(output, torch.Tensor):
        return output.to(device)
    if all(values.device == device for values in output.values()):
        return output
    return type(output)(**{name: values.to(device) for name, values in output.items()})


__all__ = [
    "SteerlingAutoModel",
    "SteerlingConcepts",
    "SteerlingForDiffusionLM",
    "SteerlingOutput",
]
