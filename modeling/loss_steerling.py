"""
The training objective: masked diffusion conditional on clean earlier blocks, and the losses of the concept heads.

For a block of n target tokens, draw k uniformly from 1..n and a set of k positions uniformly, replace them by the mask
token, and weight their cross-entropy by n / k. In expectation this is the mean, over all orders of decoding the block, of
the autoregressive negative log-likelihood in that order, hence an upper bound on `-log p(block | earlier blocks)` by
Jensen's inequality: Ou et al. 2024 (arXiv:2406.03736, "any-order autoregressive"), and equation 6 of LLaDA (Nie et al. 2025,
arXiv:2502.09992). Summed over blocks and divided by the number of target tokens, it bounds the loss per token.

All blocks of a row train in one pass, as in block diffusion (Arriola et al. 2025, arXiv:2503.09573): the noised row is
followed by its clean copy, and a noised block sees itself and the clean copies of earlier blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from .concepts_steerling import SteerlingConceptHead

IGNORE_INDEX = -100
# Concept scores that the annotation loss holds at a time: 64 MB in float32.
SCORE_BUDGET = 1 << 24


def draw_noise(targets: torch.Tensor, block_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Positions to mask: in each block of `block_size` columns, a uniform subset of uniform size k in 1..n of its n targets.

    Args:
        targets: Bool, (batch, time): the positions that carry a loss.
        block_size: Columns of an attention block.
        generator: Source of randomness; torch's global one without it.

    Returns:
        Bool, (batch, time). A block without targets has no noise.
    """
    device = generator.device if generator is not None else targets.device
    blocks = F.pad(targets, (0, -targets.shape[1] % block_size)).unflatten(1, (-1, block_size))
    count = blocks.sum(-1)
    shape = (*count.shape, block_size + 1)
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32).to(targets.device)
    size = (uniform[..., 0] * count).long().clamp(max=count - 1) + 1
    rank = uniform[..., 1:].masked_fill(~blocks, 2.0).argsort(-1).argsort(-1)
    return ((rank < size[..., None]) & blocks).flatten(1)[:, : targets.shape[1]]


@dataclass
class NoisedBatch:
    """
    One training batch in which every block is noised.

    Args:
        noised: Token ids with masks, (batch, time).
        clean: Token ids that later blocks see, (batch, time).
        labels: Targets at masked positions, `IGNORE_INDEX` elsewhere, (batch, time).
        weights: n / k of each position's block, float32, (batch, time).
        targets: Bool, (batch, time): positions that count, masked or not.
        attention_mask: (batch, time), 1 for tokens.
        noisy_context: Bool, (batch, blocks): blocks that see the block before them as noised.
    """

    noised: torch.Tensor
    clean: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor
    noisy_context: torch.Tensor

    def concept_weights(self) -> torch.Tensor:
        """
        What each position counts in the concept losses, (batch, time): prompts are annotated too, so a row's targets are
        shared out over all its tokens, and a row weighs the same whatever batch it is in.
        """
        present = self.attention_mask.float()
        return present * (self.targets.sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1))


def noise_batch(
    config,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise_mask: torch.Tensor | None = None,
    noisy_context: torch.Tensor | None = None,
) -> NoisedBatch:
    """
    Decide which positions are masked and what they weigh; see `SteerlingForDiffusionLM.forward` for the arguments.

    Raises:
        ValueError: Shapes differ, labels hold the mask token or ids outside the vocabulary, a row has left padding, or
            no position has a label.
    """
    if input_ids is None:
        raise ValueError("`input_ids` is None, but `labels` need them: the loss cannot start from `inputs_embeds`.")
    _check_batch(config, input_ids, labels, attention_mask, noise_mask, noisy_context)
    targets = labels != IGNORE_INDEX
    masked = input_ids == config.mask_token_id
    if noise_mask is None:
        noise_mask = masked & targets
        clean_rows = ~noise_mask.any(dim=-1, keepdim=True)
        if clean_rows.any():
            noise_mask = torch.where(clean_rows, draw_noise(targets, config.diff_block_size), noise_mask)
    noise_mask = noise_mask.bool()
    clean = torch.where(masked & targets, labels, input_ids)
    noised_targets = noise_mask & targets
    blocks = -(-input_ids.shape[1] // config.diff_block_size)
    if noisy_context is None:
        noisy_context = torch.zeros(len(input_ids), blocks, dtype=torch.bool, device=input_ids.device)
    return NoisedBatch(
        noised=clean.masked_fill(noise_mask, config.mask_token_id),
        clean=clean,
        labels=labels.masked_fill(~noised_targets, IGNORE_INDEX),
        weights=_block_weights(targets, noised_targets, config.diff_block_size),
        targets=targets,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        noisy_context=noisy_context.bool(),
    )


def encode(transformer: PreTrainedModel, config, batch: NoisedBatch, **kwargs) -> torch.Tensor:
    """Last hidden states of the noised tokens, each block seeing itself and clean earlier blocks: (batch, time, D)."""
    size = config.diff_block_size
    time = batch.noised.shape[1]
    # Nobody sees the last block's clean copy; a single block needs none at all.
    seen = (time - 1) // size * size
    columns = torch.arange(time, device=batch.noised.device)
    positions = torch.cat((columns, columns[:seen]))
    input_ids = torch.cat((batch.noised, batch.clean[:, :seen]), dim=1)
    mask = create_bidirectional_mask(
        config,
        # Only the shape, the type and the device count here.
        inputs_embeds=torch.empty(*input_ids.shape, 1, dtype=transformer.dtype, device=input_ids.device),
        attention_mask=torch.cat((batch.attention_mask, batch.attention_mask[:, :seen]), dim=1),
        and_mask_function=_visibility(positions // size, batch.noisy_context, time),
    )
    positions = positions.expand_as(input_ids)
    outputs = transformer(input_ids=input_ids, attention_mask=mask, position_ids=positions, return_dict=True, **kwargs)
    return outputs.last_hidden_state[:, :time]


def _visibility(block: torch.Tensor, noisy_context: torch.Tensor, time: int) -> Callable:
    """Which key a query sees in the row of `time` noised columns that are followed by clean ones."""

    def visible(batch_idx, head_idx, q_idx, kv_idx):
        q_block, kv_block = block[q_idx], block[kv_idx]
        straddles = noisy_context[batch_idx, q_block]
        noised_query, noised_key = q_idx < time, kv_idx < time
        noised_sees_noised = (kv_block == q_block) | (straddles & (kv_block == q_block - 1))
        noised_sees_clean = kv_block < torch.where(straddles, q_block - 1, q_block)
        from_noised = torch.where(noised_key, noised_sees_noised, noised_sees_clean)
        return torch.where(noised_query, from_noised, ~noised_key & (kv_block <= q_block))

    return visible


def diffusion_loss(logits: torch.Tensor, batch: NoisedBatch, total: torch.Tensor | float) -> torch.Tensor:
    """
    Bound on the negative log-likelihood per target token, in nats.

    Args:
        logits: (masked targets, vocabulary), in the order of `batch.labels != IGNORE_INDEX`.
        batch: What was masked.
        total: Target tokens to average over.
    """
    chosen = batch.labels != IGNORE_INDEX
    nll = F.cross_entropy(logits.float(), batch.labels[chosen].to(logits.device), reduction="none")
    return (nll * batch.weights[chosen].to(nll.device)).sum() / total


def concept_loss(
    config,
    known_head: SteerlingConceptHead,
    unknown_head: SteerlingConceptHead | None,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    concept_labels: torch.Tensor | None,
) -> torch.Tensor:
    """
    Annotation and reconstruction losses of both heads, summed over positions.

    Args:
        config: The model's configuration, whose coefficients weigh the parts.
        known_head, unknown_head: The heads.
        hidden: (batch, time, D) last hidden states.
        weights: (batch, time), what each position counts.
        concept_labels: (batch, time, K) ids of the true concepts, `IGNORE_INDEX` where there are fewer.
    """
    counted = weights > 0
    states, weights = hidden[counted], weights[counted]
    known = known_head(states).features.to(states.device)
    # The known head explains what it can of a given state; then both shape the state into what they can explain.
    missing = config.known_reconstruction_loss_coef * unexplained(states.detach(), known)
    if unknown_head is not None:
        both = known + unknown_head(states).features.to(states.device)
        missing = missing + config.reconstruction_loss_coef * unexplained(states, both)
    loss = (weights * missing).sum()
    if concept_labels is not None:
        concepts = concept_labels.to(states.device)[counted]
        annotated = (concepts != IGNORE_INDEX).any(-1)
        if annotated.any():
            parts = (states[annotated], concepts[annotated], weights[annotated])
            loss = loss + config.known_loss_coef * annotation_loss(known_head, *parts).to(loss.device)
    return loss


def annotation_loss(
    head: SteerlingConceptHead, hidden: torch.Tensor, concept_labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """
    Binary cross-entropy between the head's logits and the annotated concepts, summed over concepts and positions.

    `sum_c softplus(logit_c) - sum_{c true} logit_c`, over pieces of rows that are scored again in the backward pass.

    Args:
        head: The known head.
        hidden: (rows, D).
        concept_labels: (rows, K) ids of the true concepts, each at most once a row, `IGNORE_INDEX` where there are fewer.
        weights: (rows), what each position counts.
    """

    def piece(states: torch.Tensor, concepts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = head.logits(states)
        concepts, weights = concepts.to(logits.device), weights.to(logits.device)
        true = logits.gather(-1, concepts.clamp(min=0)).masked_fill(concepts < 0, 0.0)
        return (weights * (F.softplus(logits).sum(-1) - true.sum(-1))).sum()

    rows = max(1, SCORE_BUDGET // head.n_concepts)
    if len(hidden) <= rows:
        return piece(hidden, concept_labels, weights)
    pieces = zip(hidden.split(rows), concept_labels.split(rows), weights.split(rows))
    return sum(checkpoint(piece, *part, use_reentrant=False) for part in pieces)


def unexplained(hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Share of each row's squared norm that the features miss: `|h - f|^2 / |h|^2`, of shape (rows)."""
    hidden, features = hidden.float(), features.float()
    return (hidden - features).square().sum(-1) / hidden.square().sum(-1).clamp(min=1e-6)


def _block_weights(targets: torch.Tensor, noised: torch.Tensor, block_size: int) -> torch.Tensor:
    def per_block(mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, -mask.shape[1] % block_size)).unflatten(1, (-1, block_size)).sum(-1)

    weights = per_block(targets).float() / per_block(noised).clamp(min=1)
    return weights.repeat_interleave(block_size, dim=1)[:, : targets.shape[1]]


def _check_batch(config, input_ids, labels, attention_mask, noise_mask, noisy_context) -> None:
    batch, time = input_ids.shape
    blocks = -(-time // config.diff_block_size)
    shapes = {"labels": (batch, time), "attention_mask": (batch, time), "noise_mask": (batch, time)}
    shapes["noisy_context"] = (batch, blocks)
    given = {"labels": labels, "attention_mask": attention_mask, "noise_mask": noise_mask}
    given["noisy_context"] = noisy_context
    for name, value in given.items():
        if value is not None and tuple(value.shape) != shapes[name]:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; `input_ids` ask for {shapes[name]}.")
    if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("`attention_mask` shows left padding; pad on the right for training (padding_side='right').")
    targets = labels != IGNORE_INDEX
    if not targets.any():
        raise ValueError(f"`labels` are {IGNORE_INDEX} everywhere; leave at least one position to learn from.")
    if (labels == config.mask_token_id).any():
        raise ValueError(
            f"`labels` hold the mask token {config.mask_token_id}, which is never a target; put the clean token there, or "
            f"{IGNORE_INDEX} for a position without loss."
        )
    if (targets & ((labels < 0) | (labels >= config.vocab_size))).any():
        raise ValueError(f"`labels` hold ids outside 0..{config.vocab_size - 1}; tokenize with the model's tokenizer.")


def check_concept_labels(config, concept_labels: torch.Tensor, input_ids: torch.Tensor) -> None:
    """Raise a `ValueError` for concept labels that no known head can learn."""
    if not config.interpretable and concept_labels.numel():
        raise ValueError("`concept_labels` need concept heads, but this configuration has interpretable=False.")
    if concept_labels.dim() != 3 or concept_labels.shape[:2] != input_ids.shape:
        expected = f"({input_ids.shape[0]}, {input_ids.shape[1]}, K)"
        raise ValueError(f"`concept_labels` have shape {tuple(concept_labels.shape)}; expected {expected}.")
    unknown = (concept_labels != IGNORE_INDEX) & ((concept_labels < 0) | (concept_labels >= config.n_concepts))
    if unknown.any():
        raise ValueError(
            f"`concept_labels` hold {concept_labels[unknown][0].item()}; known concepts are 0..{config.n_concepts - 1}, and "
            f"{IGNORE_INDEX} fills the rest."
        )
    ordered = concept_labels.sort(dim=-1).values
    doubled = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != IGNORE_INDEX)
    if doubled.any():
        raise ValueError(
            f"`concept_labels` name {ordered[..., 1:][doubled][0].item()} twice at a position; name each concept once."
        )


__all__ = [
    "IGNORE_INDEX",
    "NoisedBatch",
    "annotation_loss",
    "check_concept_labels",
    "concept_loss",
    "diffusion_loss",
    "draw_noise",
    "encode",
    "noise_batch",
    "unexplained",
]
