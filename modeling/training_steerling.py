"""What trainers of other packages ask of a model: answered where this model's own loss can answer, refused where nothing can."""

# The library declares `self` in its mixins as the finished model.
# mypy: disable-error-code="misc"

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

NOT_SHIFTED = (
    "`shift_labels` are labels for the next token, and this model predicts each token at its own position: give `labels`, "
    "which are not shifted."
)
LABELS_TAKEN = (
    "the labels were taken away before the model saw them, as Trainer does under `label_smoothing_factor` and "
    "`compute_loss_func`; leave these out. Nothing is masked then, and the model would learn to copy what it sees. (A loss of "
    "your own needs `input_ids` with mask tokens.)"
)
NO_NEXT_TOKEN = (
    "needs log-probabilities of next tokens in unmasked text, which mean nothing in a masked-diffusion model. Fine-tune with "
    "trl.SFTTrainer or transformers.Trainer; both train this model's own loss."
)


class _EveryBatchHasLabelsOnly(type):
    """
    Shows the class's `forward` without `concept_labels`. Trainer takes every argument with "label" in its name there for one that
    each batch has, and evaluates no loss of other batches; which columns a data set keeps, it reads from a model, which shows all.
    """

    @property
    def forward(cls) -> Callable:
        whole = next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))

        @functools.wraps(whole)
        def forward(*args, **kwargs):
            return whole(*args, **kwargs)

        signature = inspect.signature(whole)
        kept = [value for name, value in signature.parameters.items() if name != "concept_labels"]
        forward.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return forward


@dataclass
class SteerlingTokenLosses(ModelOutput):
    """
    What trl.SFTTrainer reads of a forward pass with `fused_lm_head=True`. Sums over positions are those of the loss: each
    masked target counts n / k times (see `loss_steerling.py`), all others 0.

    Args:
        loss (`torch.Tensor` of shape `()`): The training loss.
        log_probs (`torch.FloatTensor` of shape `(B, T)`): What adds up to the loss times its number of targets, negated. The
            concept losses are shared out over the targets.
        entropy (`torch.FloatTensor` of shape `(B, T)`): In nats.
        is_top1 (`torch.FloatTensor` of shape `(B, T)`): Whether the target is the likeliest token.
        label_mask (`torch.BoolTensor` of shape `(B, T)`): The targets.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def token_losses(
    logits: torch.Tensor, batch: Any, nll: torch.Tensor, concepts: torch.Tensor, loss: torch.Tensor
) -> SteerlingTokenLosses:
    """
    The loss, spread over positions.

    Args:
        logits: (masked targets, vocabulary).
        batch: The `NoisedBatch`.
        nll: (masked targets,), weighted.
        concepts: Sum of the concept losses.
        loss: The loss.
    """
    targets, chosen = batch.targets.to(nll.device), (batch.labels != -100).to(nll.device)
    weights, labels = batch.weights.to(nll.device)[chosen], batch.labels.to(nll.device)[chosen]

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(targets.shape, dtype=values.dtype, device=nll.device).masked_scatter(chosen, values)

    log_probs = spread(-nll) - targets * (concepts.to(nll.device) / targets.sum().clamp(min=1))
    # The loss_type "dft" weighs each token by its probability, which these are not.
    log_probs.exp = _refuse_probabilities  # type: ignore[method-assign]
    with torch.no_grad():
        logs = logits.float().log_softmax(-1)
        entropy = spread(-(logs.exp() * logs).sum(-1) * weights)
        is_top1 = spread((logits.argmax(-1) == labels) * weights)
    return SteerlingTokenLosses(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=targets)


def _refuse_probabilities(*_: Any) -> torch.Tensor:
    raise ValueError(
        "`loss_type` of SFTConfig weighs tokens by their probability, and this model's loss has none for unmasked text: "
        "choose 'nll'."
    )


class SteerlingTrainingMixin(metaclass=_EveryBatchHasLabelsOnly):
    """Recognises the trainers of TRL."""

    model_tags: list[str] | None
    training: bool
    config: Any

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL puts a forward of its own in place of a model's, which scores next tokens if called with `fused_lm_head=True`.
        # Ours answers to that itself.
        code = getattr(getattr(value, "__func__", value), "__code__", None) if name == "forward" else None
        if code is not None and "fused_lm_head" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            return
        super().__setattr__(name, value)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """
        As in the library. Each trainer of TRL tags its model with its objective.

        Raises:
            ValueError: The objective is one that this model has no likelihood for.
        """
        given = [tags] if isinstance(tags, str) else list(tags)
        others = [tag for tag in given if tag not in ("trl", "sft")]
        if "trl" in given and others:
            raise ValueError(f"The trainer of TRL for '{others[0]}' {NO_NEXT_TOKEN}")
        super().add_model_tags(tags)

    def _check_unlabelled(
        self, input_ids: torch.Tensor | None, counted: bool, fused: bool, use_cache: bool | None
    ) -> None:
        """Refuse a pass without labels whose outputs a trainer would score as if the tokens had not been seen."""
        if fused:
            raise ValueError("`fused_lm_head` without `labels` has no tokens to score; give `labels` as well.")
        supervised = "sft" in (self.model_tags or ()) and self.training and torch.is_grad_enabled()
        if input_ids is None or not (counted or (supervised and use_cache is False)):
            return
        if not (input_ids == self.config.mask_token_id).any():
            raise ValueError(
                f"{'`num_items_in_batch` is given without `labels`' if counted else '`labels` are missing'}: {LABELS_TAKEN}"
            )

    def _check_fused(self) -> None:
        """Refuse TRL's trainers that did not say what they are."""
        if "sft" not in (self.model_tags or ()):
            raise ValueError(f"`fused_lm_head` is asked by a trainer that {NO_NEXT_TOKEN}")


__all__ = [
    "NOT_SHIFTED",
    "SteerlingTokenLosses",
    "SteerlingTrainingMixin",
    "token_losses",
]
