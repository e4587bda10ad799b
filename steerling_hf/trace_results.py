"""What an index finds: hits with their scores, why they are alike, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .catalog import ConceptCatalog

MEANING = (
    "Scores are similarities in the model's own concept space. They say which training documents a text is like, not which "
    "documents caused it."
)
# Of a hit, those with the largest parts.
SHARED_CONCEPTS = 10


@dataclass(frozen=True)
class SharedConcept:
    """
    A concept of both texts.

    Args:
        id: The concept's.
        name: From the catalog, if one was given and it has one.
        part: The product of its weights in both texts. The parts of all shared concepts sum to the sparse score.
    """

    id: int
    name: str | None
    part: float


@dataclass(frozen=True)
class TraceHit:
    """
    A chunk of a training document, and how like the query it is; this is similarity, not causal influence.

    Args:
        text, source, metadata: The chunk, and its document's.
        score: 0..1, by which hits are ranked: the dense score, the sparse score, or the mean of both ("hybrid").
        dense_score: (1 + cosine of the embeddings) / 2: 1 for the same direction, 0.5 for unrelated ones.
        sparse_score: Cosine of the concepts' weights, none of which is negative: 1 for the same concepts in the same
            proportions, 0 for none in common.
        concepts: The shared concepts with the largest parts of the sparse score, largest first.
    """

    text: str
    source: str
    metadata: dict[str, Any]
    score: float
    dense_score: float
    sparse_score: float
    concepts: tuple[SharedConcept, ...]


@dataclass(frozen=True)
class SourceShare:
    """
    Hits of one source.

    Args:
        source: The source, or the value of the metadata field that hits were grouped by.
        share: Its part of the sum of all hits' scores.
        score: Its best hit's score.
        hits: Number of its hits.
    """

    source: Any
    share: float
    score: float
    hits: int


@dataclass(frozen=True)
class Trace:
    """
    Training documents like a text; this is similarity, not causal influence (see `meaning`).

    Args:
        text: The query; None if vectors were given.
        kind: "dense", "sparse" or "hybrid".
        hits: Best first.
        sources: The distribution over sources, largest share first.
        meaning: What scores say, and what they do not.
    """

    text: str | None
    kind: str
    hits: tuple[TraceHit, ...]
    sources: tuple[SourceShare, ...]
    meaning: str = MEANING

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)


def hit_of(
    row: dict[str, Any], dense: torch.Tensor, sparse: dict[int, float], kind: str, catalog: ConceptCatalog | None
) -> TraceHit:
    """
    How like a query a row of the index is.

    Args:
        row: As `TraceIndex.rows` gives it.
        dense, sparse: The query's vectors: (D,), and weights by concept.
        kind: By which score it is ranked.
        catalog: Where names of concepts come from.
    """
    # From the vectors themselves, so that scores do not depend on how an index rounds.
    cosine = float(
        torch.nn.functional.cosine_similarity(
            dense, torch.tensor(row["dense"], dtype=torch.float32, device="cpu"), dim=0
        )
    )
    scores = {"dense": _unit((1 + cosine) / 2)}
    parts = {int(i): weight * sparse[int(i)] for i, weight in row["sparse"].items() if int(i) in sparse}
    scores["sparse"] = _unit(sum(parts.values()))
    scores["hybrid"] = (scores["dense"] + scores["sparse"]) / 2
    best = sorted(parts, key=lambda i: (-parts[i], i))[:SHARED_CONCEPTS]
    return TraceHit(
        text=row["text"],
        source=row["source"],
        metadata=dict(row["metadata"] or {}),
        score=scores[kind],
        dense_score=scores["dense"],
        sparse_score=scores["sparse"],
        concepts=tuple(SharedConcept(i, (catalog[i].name or None) if catalog else None, parts[i]) for i in best),
    )


def ranked(text: str | None, kind: str, hits: list[TraceHit], k: int, by: str) -> Trace:
    """The k best hits of a query, and their distribution over sources or the field `by` of their metadata."""
    # Equal scores keep one order, whatever the engine's.
    best = sorted(hits, key=lambda hit: (-hit.score, hit.source, hit.text))[:k]
    return Trace(text, kind, tuple(best), sources_of(best, by))


def sources_of(hits: Sequence[TraceHit], by: str = "source") -> tuple[SourceShare, ...]:
    """The distribution of hits over sources, or over the values of a field of their metadata; the largest share first."""
    groups: dict[Any, list[float]] = {}
    for hit in hits:
        value = hit.source if by == "source" else hit.metadata.get(by)
        groups.setdefault(value if isinstance(value, str | int | float | bool | None) else str(value), []).append(
            hit.score
        )
    total = sum(hit.score for hit in hits) or 1.0
    shares = [SourceShare(name, sum(scores) / total, max(scores), len(scores)) for name, scores in groups.items()]
    return tuple(sorted(shares, key=lambda one: -one.share))


def _unit(score: float) -> float:
    return min(1.0, max(0.0, score))


__all__ = ["MEANING", "SharedConcept", "SourceShare", "Trace", "TraceHit"]
