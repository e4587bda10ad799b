"""Texts as vectors: the states that a model decomposes, pooled; and the concepts that it sees, as sparse vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch
from tqdm import tqdm

from .checks import check_choice, check_model, check_positive, check_switches, check_tokenizer, check_whole
from .concept_statistics import heads_of
from .reading import HEAD_POSITIONS, encode_texts, hidden_states_of, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.concepts_steerling import SteerlingConceptHead
    from .modeling.modeling_steerling import SteerlingForDiffusionLM

KINDS = ("hidden", "composed", "known", "unknown")
POOLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(dim=0),
    "first": lambda states: states[0],
    "last": lambda states: states[-1],
    "none": lambda states: states,
}
# Elements of one piece of what holds all concepts: 64 MB in float32.
SCORE_BUDGET = 1 << 24


@dataclass(frozen=True)
class ConceptVectors:
    """
    N texts as sparse vectors of length 1 over all concepts of a model.

    Args:
        ids: (N, K) the concepts that are not zero, -1 where a text has fewer than K. First come known concepts, then
            discovered ones, whose ids are offset by the number of known concepts; either part strongest first.
        weights: (N, K) float32, 0 where there is no concept.
        size: Concepts of the model, known and discovered ones together.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    size: int

    def __len__(self) -> int:
        return len(self.ids)

    def to_dense(self) -> torch.Tensor:
        """The vectors with all their zeros, (N, size): for a few texts."""
        return self.weights.new_zeros(len(self), self.size).scatter_add(1, self.ids.clamp(min=0), self.weights)

    def similarity(self, other: ConceptVectors) -> torch.Tensor:
        """
        Cosine of each text with each text of `other`, of shape (N, M), in 0..1: 1 for the same concepts in the same
        proportions, 0 for none in common.

        Raises:
            ValueError: `other` has another number of concepts, and so is of another model.
        """
        if not isinstance(other, ConceptVectors):
            raise ValueError(f"`other` is of the type {type(other).__name__}: give ConceptVectors.")
        if self.size != other.size:
            raise ValueError(
                f"`other` is over {other.size} concepts, these vectors over {self.size}: compare texts read by one model."
            )
        found = self.weights.new_empty(len(self), len(other))
        step = max(1, SCORE_BUDGET // self.size)
        for start in range(0, len(other), step):
            some = slice(start, start + step)
            table = ConceptVectors(other.ids[some], other.weights[some], other.size).to_dense().T.contiguous()
            # Places without a concept add 0 times some row.
            found[:, some] = torch.nn.functional.embedding_bag(
                self.ids.clamp(min=0), table, per_sample_weights=self.weights, mode="sum"
            )
        return found.clamp(max=1.0)


@overload
def embed(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    kind: str = ...,
    pooling: Literal["mean", "first", "last"] = ...,
    normalize: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
    max_length: int | None = ...,
) -> torch.Tensor: ...


@overload
def embed(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    kind: str = ...,
    pooling: str = ...,
    normalize: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
    max_length: int | None = ...,
) -> torch.Tensor | list[torch.Tensor]: ...


def embed(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    kind: str = "composed",
    pooling: str = "mean",
    normalize: bool = False,
    batch_size: int = 32,
    progress: bool = False,
    max_length: int | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """
    Embeddings of texts. What is said of a text does not depend on the others. Texts are read as they are, without special
    tokens around them; special tokens may be written out. Concept heads run only if the kind needs them.

    Args:
        texts: Texts, or one.
        kind: Which part of the last hidden states (see `SteerlingConcepts`): "composed", what the vocabulary projection
            reads, and "hidden", which with epsilon correction is the same; "known", what the known concepts explain;
            "unknown", what the discovered concepts explain, or without a head for them what the known ones leave.
        pooling: Over a text's T tokens: "mean", "first", "last", or "none".
        normalize: Bring vectors to length 1, after pooling.
        batch_size: Texts that are read at once; texts of like lengths share a batch.
        progress: Show a bar.
        max_length: Read no more than so many tokens of a text.

    Returns:
        (N, D), with pooling "none" a list of N tensors (T, D). For one text that is not in a list: (D,), or (T, D). All
        float32, on the CPU. No texts give (0, D), or an empty list.

    Raises:
        ValueError: There is no such kind or pooling, or not in this model; a text has no tokens, or more than the model's
            context while no `max_length` is given; a number is not 1 or more.
    """
    check_model(model)
    check_choice("kind", kind, KINDS)
    check_choice("pooling", pooling, tuple(POOLING))
    check_switches(normalize=normalize, progress=progress)
    if kind in ("known", "unknown") and model.known_head is None:
        raise ValueError(
            f"`kind` is {kind!r}, but `model` has no concept heads (interpretable=False): choose 'hidden' or 'composed'."
        )
    rows = rows_of(model, tokenizer, texts, batch_size, max_length)
    found: list[torch.Tensor] = [torch.empty(0, dtype=torch.float32, device="cpu")] * len(rows)
    with reading(model):
        for numbers, states in batches_of_states(model, rows, batch_size, progress):
            parts = torch.cat([part_of(model, piece, kind) for piece in states.split(HEAD_POSITIONS)])
            for i, part in zip(numbers, parts.split([len(rows[i]) for i in numbers])):
                # A copy: a view would keep the states of the whole batch.
                found[i] = POOLING[pooling](part.float()).to("cpu", copy=True)
    if normalize:
        found = [torch.nn.functional.normalize(vectors, dim=-1) for vectors in found]
    if isinstance(texts, str):
        return found[0]
    if pooling == "none":
        return found
    return torch.stack(found) if found else torch.empty(0, model.config.n_embd, dtype=torch.float32, device="cpu")


def concept_vectors(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    top_known: int = 32,
    top_unknown: int = 128,
    batch_size: int = 32,
    progress: bool = False,
    max_length: int | None = None,
) -> ConceptVectors:
    """
    The strongest concepts of texts, as sparse vectors whose inner product is a similarity that concepts explain.

    A concept's weight in a text is the mean, over the text's tokens, of the weight (0..1) with which it enters the
    features, 0 where it is not among a token's strongest. The strongest of either head stay, and what stays is brought to
    length 1, both heads together.

    Args:
        texts: Texts, or one; one gives N = 1.
        top_known, top_unknown: Concepts of either head that stay, at most; 0 leaves the head out.
        batch_size, progress, max_length: See `embed`.

    Raises:
        ValueError: The model has no concept heads; both numbers of concepts are 0, or one is negative; a text has no
            tokens, or more than the model's context while no `max_length` is given.
    """
    check_model(model)
    check_switches(progress=progress)
    check_whole("top_known", top_known)
    check_whole("top_unknown", top_unknown)
    tops = {"known": top_known, "unknown": top_unknown}
    heads = heads_of(model)
    if min(tops.values()) < 0 or not any(tops[name] for name in heads):
        raise ValueError(
            f"`top_known` is {top_known} and `top_unknown` is {top_unknown}: keep 1 concept or more, of a head that `model` "
            f"has ({', '.join(heads)})."
        )
    rows = rows_of(model, tokenizer, texts, batch_size, max_length)
    strongest = StrongestConcepts(model, tops, len(rows))
    with reading(model):
        for numbers, states in batches_of_states(model, rows, batch_size, progress):
            strongest.note(numbers, states, [len(rows[i]) for i in numbers])
    return strongest.vectors()


class StrongestConcepts:
    """
    Collects the strongest concepts of texts as they are read.

    Args:
        model: Reads them.
        tops: Concepts of either head that stay, at most.
        texts: Their number.
    """

    def __init__(self, model: SteerlingForDiffusionLM, tops: Mapping[str, int], texts: int):
        heads = heads_of(model)
        self.kept = [
            (head, first, min(tops[name], head.n_concepts)) for name, (head, first) in heads.items() if tops[name]
        ]
        self.size = sum(head.n_concepts for head, _ in heads.values())
        width = sum(top for _, _, top in self.kept)
        self.ids = torch.full((texts, width), -1, dtype=torch.long, device="cpu")
        self.weights = torch.zeros(texts, width, dtype=torch.float32, device="cpu")

    def note(self, numbers: Sequence[int], states: torch.Tensor, lengths: Sequence[int]) -> None:
        """Hidden states (N, D) of texts of these numbers and lengths, one text after another."""
        counts = torch.tensor(lengths, device=states.device)
        best = [mean_weights(head, states, counts).topk(top) for head, _, top in self.kept]
        shifted = [found.indices.cpu() + first for found, (_, first, _) in zip(best, self.kept)]
        self.ids[numbers] = torch.cat(shifted, dim=-1)
        self.weights[numbers] = torch.cat([found.values.cpu() for found in best], dim=-1)

    def vectors(self) -> ConceptVectors:
        """What was collected, of length 1."""
        ids = self.ids.masked_fill(self.weights == 0, -1)
        return ConceptVectors(ids, torch.nn.functional.normalize(self.weights, dim=-1), self.size)


def rows_of(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    batch_size: int,
    max_length: int | None,
) -> list[list[int]]:
    """Tokens of each text, once all arguments are in order."""
    check_tokenizer(tokenizer)
    check_positive("batch_size", batch_size)
    longest = model.config.block_size
    if max_length is not None:
        check_positive("max_length", max_length)
        if max_length > longest:
            raise ValueError(f"`max_length` is {max_length}: the model's context holds no more than {longest} tokens.")
    remedy = "split the text, or give `max_length` to read no more than its beginning"
    return encode_texts(model, tokenizer, [texts] if isinstance(texts, str) else texts, max_length, remedy=remedy)


def batches_of_states(
    model: SteerlingForDiffusionLM, rows: Sequence[Sequence[int]], batch_size: int, progress: bool
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Numbers of the texts of a batch and the last hidden states (N, D) of all their tokens, one text after another."""
    # The longest first: if memory is short, it shows at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with tqdm(total=len(rows), desc="embedding", unit="text", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            yield numbers, hidden_states_of(model, [rows[i] for i in numbers])
            bar.update(len(numbers))


def part_of(model: SteerlingForDiffusionLM, states: torch.Tensor, kind: str) -> torch.Tensor:
    """The part of last hidden states (N, D) that a kind names."""
    if kind == "hidden":
        return states
    if kind == "composed":
        return model.compose(states)
    if kind == "unknown" and model.unknown_head is not None:
        return model.unknown_head(states).features
    assert model.known_head is not None
    known = model.known_head(states).features.to(states.device)
    return known if kind == "known" else model.residual(states, known)


def mean_weights(head: SteerlingConceptHead, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, concepts) mean weights, float32, with which concepts enter the features of texts of (B,) lengths."""
    texts = torch.arange(len(lengths), device=states.device).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), head.n_concepts, device=states.device, dtype=torch.float32)
    entering = min(head.topk_features, head.n_concepts)
    reported = head.topk is not None and entering <= head.topk
    positions = HEAD_POSITIONS if reported else max(1, SCORE_BUDGET // head.n_concepts)
    for piece, text in zip(states.split(positions), texts.split(positions)):
        if reported:
            output = head(piece)
            indices, weights = output.indices, output.weights
        else:
            # All concepts: a head reports fewer than enter its features.
            weights, indices = head.logits(piece).sigmoid().topk(entering, dim=-1)
        sums.index_put_((text[:, None], indices.to(sums.device)), weights.to(sums), accumulate=True)
    return sums / lengths[:, None]


__all__ = ["ConceptVectors", "concept_vectors", "embed"]
