"""
The training objective: masked diffusion conditional on clean earlier blocks, and the losses of the concept heads.

For a block of n target tokens, draw k uniformly from 1..n and a set of k positions uniformly, replace them by the mask
token, and weight their cross-entropy by n / k. In expectation this is the mean, over all orders of decoding the block, of
the autoregressive negative log-likelihood in that order, hence an upper bound on `-log p(block | earlier blocks)` by
Jensen's inequality: Ou et al. 2024 (arXiv:2406.03736, "any-order autoregressive"), and equation 6 of LLaDA (Nie et al. 2025,
arXiv:2502.09992). Summed over blocks and divided by the number of target tokens, it bounds the loss per token.

All blocks of a row train in one pass, as in block diffusion (Arriola et al. 2025, arXiv:2503.09573): the noised row is
followed by its clean copy, and a noised block sees itself and the clean copies of earlier blocks. Texts packed into a row
(`position_ids` that start again at 0) have blocks of their own and see nothing of each other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from .concepts_steerling import SteerlingConceptHead
from .outputs_steerling import SteerlingBackboneOutput
from .texts_steerling import number_blocks, number_texts

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
class Layout:
    """
    How rows divide into texts and attention blocks.

    Args:
        positions: Places in the texts, (batch, time).
        texts: Each token's text, counted in its row, (batch, time).
        blocks: Each token's attention block, counted in its row, (batch, time).
        size: Positions of an attention block.
    """

    positions: torch.Tensor
    texts: torch.Tensor
    blocks: torch.Tensor
    size: int

    @classmethod
    def of(cls, input_ids: torch.Tensor, position_ids: torch.Tensor | None, attention_mask, size: int) -> "Layout":
        """The layout of a batch whose arguments are checked."""
        if position_ids is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            return cls(positions, torch.zeros_like(positions), positions // size, size)
        positions = position_ids.to(input_ids.device).expand_as(input_ids)
        texts = number_texts(positions, attention_mask)
        return cls(positions, texts, number_blocks(texts, positions, size), size)

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one text."""
        return bool(self.texts.any())

    def followed(self) -> torch.Tensor:
        """Bool, (time,): the columns in which a later block of the same text sees the token of some row."""
        last = _group_max(self.blocks, self.texts)
        return (self.blocks < last).any(dim=0)

    def draw_noise(self, targets: torch.Tensor) -> torch.Tensor:
        """`draw_noise` in the blocks of each text."""
        # Where each token lies if every block has all its columns.
        columns = self.blocks * self.size + self.positions % self.size
        grid = torch.zeros(
            len(targets), (int(self.blocks.max()) + 1) * self.size, dtype=torch.int, device=targets.device
        )
        # Padding may share a column with a token.
        grid = grid.scatter_reduce(1, columns, targets.int(), "amax").bool()
        return draw_noise(grid, self.size).gather(1, columns) & targets

    def block_weights(self, targets: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
        """n / k of each token's block, float32, (batch, time): its targets, and those that are noised."""
        return _group_sum(targets, self.blocks) / _group_sum(noised, self.blocks).clamp(min=1)

    def text_shares(self, targets: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """A text's targets, shared out over all its tokens, float32, (batch, time)."""
        return present * (_group_sum(targets, self.texts) / _group_sum(present, self.texts).clamp(min=1))


def _group_sum(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """For each token, the sum over the tokens of its row that are in its group: float32, (batch, time)."""
    sums = torch.zeros(groups.shape, device=groups.device, dtype=torch.float32)
    return sums.scatter_add(1, groups, values.float()).gather(1, groups)


def _group_max(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(values).scatter_reduce(1, groups, values, "amax").gather(1, groups)


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
        layout: The rows' texts and blocks.
    """

    noised: torch.Tensor
    clean: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor
    noisy_context: torch.Tensor
    layout: Layout

    def concept_weights(self) -> torch.Tensor:
        """
        What each position counts in the concept losses, (batch, time): prompts are annotated too, so a text's targets are
        shared out over all its tokens, and a text weighs the same whatever row and batch it is in.
        """
        return self.layout.text_shares(self.targets, self.attention_mask.float())


def noise_batch(
    config,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise_mask: torch.Tensor | None = None,
    noisy_context: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> NoisedBatch:
    """
    Decide which positions are masked and what they weigh; see `SteerlingForDiffusionLM.forward` for the arguments.

    Raises:
        TypeError: An argument is no tensor, or one of the wrong kind of numbers.
        ValueError: Shapes differ, labels hold the mask token or ids outside the vocabulary, a row has left padding, or a
            text's positions do not start at 0.
    """
    if input_ids is None:
        raise ValueError("`input_ids` is None, but `labels` need them: the loss cannot start from `inputs_embeds`.")
    _check_batch(config, input_ids, labels, attention_mask, noise_mask, noisy_context, position_ids)
    layout = Layout.of(input_ids, position_ids, attention_mask, config.diff_block_size)
    if position_ids is not None:
        _check_texts(layout, labels, attention_mask, noisy_context)
    targets = labels != IGNORE_INDEX
    masked = input_ids == config.mask_token_id
    if noise_mask is None:
        noise_mask = masked & targets
        # Each text that holds no mask is noised here.
        clean_texts = _group_max(noise_mask.long(), layout.texts) == 0
        if clean_texts.any():
            noise_mask = torch.where(clean_texts, layout.draw_noise(targets), noise_mask)
    noise_mask = noise_mask.bool()
    clean = torch.where(masked & targets, labels, input_ids)
    noised_targets = noise_mask & targets
    if noisy_context is None:
        blocks = int(layout.blocks.max()) + 1
        noisy_context = torch.zeros(len(input_ids), blocks, dtype=torch.bool, device=input_ids.device)
    return NoisedBatch(
        noised=clean.masked_fill(noise_mask, config.mask_token_id),
        clean=clean,
        labels=labels.masked_fill(~noised_targets, IGNORE_INDEX),
        weights=layout.block_weights(targets, noised_targets),
        targets=targets,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        noisy_context=noisy_context.bool(),
        layout=layout,
    )


def encode(transformer: PreTrainedModel, config, batch: NoisedBatch, **kwargs) -> SteerlingBackboneOutput:
    """The backbone's output for the noised tokens, each block seeing itself and clean earlier blocks: (batch, time, D)."""
    layout = batch.layout
    time = batch.noised.shape[1]
    # Nobody sees the clean copy of a text's last block; a text of a single block needs none at all.
    columns = torch.arange(time, device=batch.noised.device)
    columns = torch.cat((columns, columns[layout.followed()]))
    is_noised = torch.arange(len(columns), device=columns.device) < time
    input_ids = torch.where(is_noised, batch.noised[:, columns], batch.clean[:, columns])
    mask = create_bidirectional_mask(
        config,
        # Only the shape, the type and the device count here.
        inputs_embeds=torch.empty(*input_ids.shape, 1, dtype=transformer.dtype, device=input_ids.device),
        attention_mask=batch.attention_mask[:, columns],
        and_mask_function=_visibility(layout.texts[:, columns], layout.blocks[:, columns], batch.noisy_context, time),
    )
    outputs = transformer(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=layout.positions[:, columns],
        use_cache=False,
        return_dict=True,
        **kwargs,
    )
    outputs.last_hidden_state = outputs.last_hidden_state[:, :time]
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(states[:, :time] for states in outputs.hidden_states)
    return outputs


def _visibility(text: torch.Tensor, block: torch.Tensor, noisy_context: torch.Tensor, time: int) -> Callable:
    """Which key a query sees in the row of `time` noised columns that are followed by clean ones."""

    def visible(batch_idx, head_idx, q_idx, kv_idx):
        q_block, kv_block = block[batch_idx, q_idx], block[batch_idx, kv_idx]
        straddles = noisy_context[batch_idx, q_block]
        noised_query, noised_key = q_idx < time, kv_idx < time
        noised_sees_noised = (kv_block == q_block) | (straddles & (kv_block == q_block - 1))
        noised_sees_clean = kv_block < torch.where(straddles, q_block - 1, q_block)
        from_noised = torch.where(noised_key, noised_sees_noised, noised_sees_clean)
        seen = torch.where(noised_query, from_noised, ~noised_key & (kv_block <= q_block))
        return seen & (text[batch_idx, q_idx] == text[batch_idx, kv_idx])

    return visible


def weighted_nll(logits: torch.Tensor, batch: NoisedBatch) -> torch.Tensor:
    """
    What adds up to the bound on the negative log-likelihood of all targets, in nats: (masked targets,).

    Args:
        logits: (masked targets, vocabulary), in the order of `batch.labels != IGNORE_INDEX`.
        batch: What was masked.
    """
    chosen = batch.labels != IGNORE_INDEX
    nll = F.cross_entropy(logits.float(), batch.labels[chosen].to(logits.device), reduction="none")
    return nll * batch.weights[chosen].to(nll.device)


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


def _check_batch(config, input_ids, labels, attention_mask, noise_mask, noisy_context, position_ids) -> None:
    batch, time = input_ids.shape
    given = {"labels": labels, "attention_mask": attention_mask, "noise_mask": noise_mask}
    shapes = {name: [(batch, time)] for name in given}
    given |= {"position_ids": position_ids, "noisy_context": noisy_context}
    shapes["position_ids"] = [(batch, time), (1, time)]
    if position_ids is None:  # otherwise texts begin anywhere, and `noisy_context` is checked with them
        shapes["noisy_context"] = [(batch, -(-time // config.diff_block_size))]
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` is a {type(value).__name__}; give a tensor.")
        if name in ("labels", "position_ids") and (value.is_floating_point() or value.dtype == torch.bool):
            raise TypeError(f"`{name}` is a tensor of {value.dtype}; give whole numbers (torch.long).")
        if name in shapes and tuple(value.shape) not in shapes[name]:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; `input_ids` ask for {shapes[name][0]}.")
    if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("`attention_mask` shows left padding; pad on the right for training (padding_side='right').")
    targets = labels != IGNORE_INDEX
    if (labels == config.mask_token_id).any():
        raise ValueError(
            f"`labels` hold the mask token {config.mask_token_id}, which is never a target; put the clean token there, or "
            f"{IGNORE_INDEX} for a position without loss."
        )
    if (targets & ((labels < 0) | (labels >= config.vocab_size))).any():
        raise ValueError(f"`labels` hold ids outside 0..{config.vocab_size - 1}; tokenize with the model's tokenizer.")


def _check_texts(layout: Layout, labels, attention_mask, noisy_context) -> None:
    begins = F.pad(layout.texts.diff(dim=1) != 0, (1, 0), value=True)
    real = torch.ones_like(begins) if attention_mask is None else attention_mask.bool()
    misplaced = begins & real & (layout.positions != 0)
    if misplaced.any():
        raise ValueError(
            f"`position_ids` hold a text that starts at {layout.positions[misplaced][0].item()}; with `labels` every text is "
            "whole: count its tokens from 0 (a new text begins where positions do not grow by one)."
        )
    if noisy_context is not None and (layout.packed or tuple(noisy_context.shape) != _blocks_of(layout)):
        if layout.packed:
            raise ValueError(
                "`noisy_context` is for rows of one text, whose blocks it counts by columns; give packed texts without it."
            )
        raise ValueError(
            f"`noisy_context` has shape {tuple(noisy_context.shape)}; `input_ids` ask for {_blocks_of(layout)}."
        )
    if ((labels != IGNORE_INDEX) & ~real).any():
        raise ValueError(f"`labels` hold targets where `attention_mask` is 0; put {IGNORE_INDEX} at padding.")


def _blocks_of(layout: Layout) -> tuple[int, int]:
    return len(layout.texts), -(-layout.texts.shape[1] // layout.size)


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
    "Layout",
    "NoisedBatch",
    "annotation_loss",
    "check_concept_labels",
    "concept_loss",
    "draw_noise",
    "encode",
    "noise_batch",
    "unexplained",
    "weighted_nll",
]
