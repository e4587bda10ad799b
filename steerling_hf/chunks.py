"""Pieces of a text, and what concepts made of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from .modeling.attribution_steerling import SteerlingAttributions

SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
CLOSERS = "\"')]\u00bb\u2019\u201d"
KINDS = ("chunk", "sentence")

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class ChunkConcepts:
    """
    What concepts made of a piece of text; parts of a whole if it was normalised, else of the sum of the logits.

    Args:
        ids: (m,) concepts, the strongest first; discovered ones are numbered behind the known ones.
        contributions: (m,) signed.
        known, unknown, residual: Sums of either head's contributions, and what is left.
    """

    ids: torch.Tensor
    contributions: torch.Tensor
    known: float
    unknown: float
    residual: float


def split(
    tokens: Sequence[int], texts: Sequence[str], config: Any, by: str | Spans = "chunk", start: int = 0
) -> list[tuple[int, int]]:
    """
    Cut a text into pieces.

    Args:
        tokens: Token ids of the text, prompt included.
        texts: What each token writes; control tokens are recognised by their ids.
        config: The model's configuration.
        by: "chunk", which the model ends itself by `<|endofchunk|>`; "sentence"; or spans [start, stop) of positions.
        start: First position behind the prompt.

    Returns:
        Spans [start, stop) of positions from left to right, without the control tokens between them. The text ends with the
        first token that ends a turn or a text.

    Raises:
        ValueError: `by` is none of these, or spans lie outside the text behind the prompt, overlap or are not in order.
    """
    check_by(by, start, len(tokens))
    if not isinstance(by, str):
        return [(int(first), int(stop)) for first, stop in by]
    final = {config.eot_id, config.pad_token_id, *config.eos_token_ids} - {None}
    end = next((place for place in range(start, len(tokens)) if tokens[place] in final), len(tokens))
    spans = []
    for place in range(start, end):
        separates = tokens[place] == config.endofchunk_token_id
        closes = by == "sentence" and texts[place].rstrip().rstrip(CLOSERS).endswith(SENTENCE_ENDS)
        if separates or closes:
            spans.append((start, place if separates else place + 1))
            start = place + 1
    return [(first, stop) for first, stop in [*spans, (start, end)] if first < stop]


def check_by(by: str | Spans, start: int = 0, end: int | None = None) -> None:
    """
    Check a way to cut an answer, as far as it is known where that begins and ends.

    Raises:
        ValueError: There is no such way, or spans lie outside the answer, overlap or are not in order.
    """
    if isinstance(by, str):
        if by not in KINDS:
            raise ValueError(f"`by` is {by!r}: choose 'chunk', 'sentence' or a list of spans.")
        return
    if not isinstance(by, Sequence) or not all(_is_span(span) for span in by):
        raise ValueError(f"`by` is {by!r:.80}: choose 'chunk', 'sentence' or a list of spans, each of two positions.")
    free = start
    for first, stop in cast(Sequence[tuple[int, int]], by):
        if not free <= first < stop or (end is not None and stop > end):
            raise ValueError(
                f"`by` has the span ({first}, {stop}): give spans in their order, without overlaps, from position {start} on, "
                f"where the answer begins (the prompt counts, too)" + (f", to {end}." if end is not None else ".")
            )
        free = stop


def _is_span(span: Any) -> bool:
    pair = isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2
    return pair and all(isinstance(place, int) and not isinstance(place, bool) for place in span)


def aggregate(
    attributions: SteerlingAttributions, row: int, start: int, stop: int, n_known: int, normalize: bool = True
) -> ChunkConcepts:
    """
    Contributions of concepts to a piece of text.

    Args:
        attributions: Of `generate` or `attribute_concepts`.
        row: The text.
        start, stop: Columns [start, stop) of the attributions.
        n_known: Known concepts of the model, behind which the discovered ones are numbered.
        normalize: As the reference does it: at each token over the sum of all absolute contributions, then the mean over
            the columns. Otherwise plain sums of contributions to the logits.
    """
    parts = {"residual": attributions["residual"][row, start:stop]}
    ids, contributions = [], []
    mass = parts["residual"].abs()
    for name, offset in (("known", 0), ("unknown", n_known)):
        values = attributions.get(f"{name}_contributions")
        parts[name] = torch.zeros_like(mass)
        if values is None:
            continue
        ids.append(attributions[f"{name}_indices"][row, start:stop] + offset)
        contributions.append(values[row, start:stop])
        parts[name] = contributions[-1].sum(dim=-1)
        mass = mass + contributions[-1].abs().sum(dim=-1)
    share = 1 / (mass.clamp(min=1e-8) * (stop - start)) if normalize else torch.ones_like(mass)
    found, places = torch.cat(ids, dim=-1).unique(return_inverse=True)
    sums = mass.new_zeros(len(found)).index_add_(
        0, places.flatten(), (torch.cat(contributions, dim=-1) * share[:, None]).flatten()
    )
    order = sums.abs().argsort(descending=True, stable=True)
    totals = {name: float((values * share).sum()) for name, values in parts.items()}
    return ChunkConcepts(found[order], sums[order], **totals)
