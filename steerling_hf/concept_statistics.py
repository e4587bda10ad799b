"""What a model says of its concepts: the tokens that one promotes, those active in texts, those that tell texts apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .checks import check_positive
from .concept_labels import Concept
from .modeling.lookup_steerling import device_of, embed_concepts, project
from .reading import HEAD_POSITIONS, encode_texts, hidden_states_of, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.concepts_steerling import SteerlingConceptHead
    from .modeling.modeling_steerling import SteerlingForDiffusionLM

# Padded positions that pass through the model at once.
BATCH_POSITIONS = 4096
# In units of a weight, which lies in 0..1. See `contrast`.
EFFECT_FLOOR = 0.1
PROGRESS_AFTER = 3  # seconds

ConceptOf = Callable[[int], Concept]


@dataclass(frozen=True)
class TokenScore:
    """A token and what a concept at full weight adds to its logit, at every position where it is active."""

    token: str
    token_id: int
    score: float


@dataclass(frozen=True)
class ActiveConcept:
    """
    A concept in a text.

    Args:
        weight: The highest weight (0..1) over the text's tokens.
        mean: The mean weight over the text's tokens, 0 where the concept is not among a token's strongest.
    """

    concept: Concept
    weight: float
    mean: float


@dataclass(frozen=True)
class Contrast:
    """
    How well a concept tells two sets of texts apart. A text's strength is the concept's highest weight over its tokens.

    Args:
        effect_size: Above 0 if the positive texts have more of the concept; see `contrast`.
        superiority: Probability that a positive text has more of it than a negative one, ties counting half: 1 or 0
            for perfect separation, 0.5 for none.
        positive, negative: Mean strength (0..1) in either set.
    """

    concept: Concept
    effect_size: float
    superiority: float
    positive: float
    negative: float


@dataclass(frozen=True)
class TextConcepts:
    """
    Strengths of concepts in N texts, only those that are not zero: P entries, sorted by text and then by concept.

    Args:
        n_texts: N.
        texts, concepts: (P,) which text, and the concept's id.
        highest, mean: (P,) float32, over the text's tokens; a concept that is not among a token's strongest counts as 0.
    """

    n_texts: int
    texts: torch.Tensor
    concepts: torch.Tensor
    highest: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True)
class TokenConcepts:
    """
    A batch of texts, read by the heads: N tokens without padding.

    Args:
        texts, tokens: (N,) which text, and the token's id; tokens of a text are together and in order.
        concepts, weights: (N, k) the strongest concepts' ids, and their weights, float32.
    """

    texts: torch.Tensor
    tokens: torch.Tensor
    concepts: torch.Tensor
    weights: torch.Tensor


def heads_of(model: SteerlingForDiffusionLM, head: str | None = None) -> dict[str, tuple[SteerlingConceptHead, int]]:
    """
    The model's heads by name, each with the id of its first concept.

    Args:
        head: "known" or "unknown" for that one only.

    Raises:
        ValueError: The model has no concept heads, or not the one that is asked for.
    """
    if model.known_head is None:
        raise ValueError("`model` has no concept heads (interpretable=False), so it has no concepts to ask about.")
    heads: dict[str, tuple[SteerlingConceptHead, int]] = {"known": (model.known_head, 0)}
    if model.unknown_head is not None:
        heads["unknown"] = (model.unknown_head, model.config.n_concepts)
    if head is None:
        return heads
    if not isinstance(head, str) or head not in heads:
        raise ValueError(
            f"`head` is {head!r}, which `model` does not have; choose one of {', '.join(heads)}, or None."
        )
    return {head: heads[head]}


@torch.no_grad()
def vocabulary_scores(model: SteerlingForDiffusionLM, concept: Concept) -> torch.Tensor:
    """
    What a concept at full weight adds to each token's logit: `E_c . lm_head`, of shape (V,), float32. The vocabulary
    projection reads the sum of weighted embeddings as it is, so this holds at every position.

    Raises:
        ValueError: The model has no head for this concept.
    """
    heads_of(model, concept.head)
    return project(model, embed_concepts(model, [concept.id]))[0]


def top_tokens(
    model: SteerlingForDiffusionLM, tokenizer: PreTrainedTokenizerBase, concept: Concept, k: int = 10
) -> list[TokenScore]:
    """
    The tokens that a concept promotes most, from `vocabulary_scores`.

    Raises:
        ValueError: `k` is not 1 or more, or the model has no head for this concept.
    """
    check_positive("k", k)
    scores = vocabulary_scores(model, concept)[: len(tokenizer)]  # the vocabulary's own padding has no tokens
    best, ids = scores.topk(min(k, len(scores)))
    return [TokenScore(token_text(tokenizer, i), i, score) for score, i in zip(best.tolist(), ids.tolist())]


def token_ids(
    model: SteerlingForDiffusionLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str = "texts"
) -> list[list[int]]:
    """
    The tokens of each text, of a length that the model can read.

    Args:
        texts: Text as the tokenizer takes it; special tokens may be written out.
        name: What error messages call the texts.

    Raises:
        ValueError: There are no texts, or one has no tokens or more than the model's context holds.
    """
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"`{name}` is {texts!r:.80}: give a list of texts, each of them a string.")
    if not texts:
        raise ValueError(f"`{name}` is empty: give one text or more.")
    return encode_texts(model, tokenizer, texts, name=name)


def read_tokens(
    model: SteerlingForDiffusionLM, ids: Sequence[Sequence[int]], head: str | None = None
) -> Iterator[TokenConcepts]:
    """
    Read texts through the concept heads, batch by batch; texts of like lengths share a batch. What is said of a text
    does not depend on the others.

    Args:
        ids: Of each text, from `token_ids`.
        head: "known" or "unknown" for that head only; by default both.

    Raises:
        ValueError: The model has no such head.
    """
    heads = heads_of(model, head)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with tqdm(total=len(ids), desc="reading", unit="text", delay=PROGRESS_AFTER) as progress:
        for batch in _batches(order, ids):
            with reading(model):
                read = _read_batch(model, heads, [ids[i] for i in batch], torch.tensor(batch, device="cpu"))
            yield read
            progress.update(len(batch))


def _batches(order: Sequence[int], ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:  # from short to long, so that the next text is the batch's width
        if batch and (len(batch) + 1) * len(ids[i]) > BATCH_POSITIONS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _read_batch(
    model: SteerlingForDiffusionLM,
    heads: dict[str, tuple[SteerlingConceptHead, int]],
    ids: Sequence[Sequence[int]],
    texts: torch.Tensor,
) -> TokenConcepts:
    hidden, device = hidden_states_of(model, ids), device_of(model)
    indices, weights = [], []
    for piece in hidden.split(HEAD_POSITIONS):
        found = [(head(piece), first) for head, first in heads.values()]
        indices.append(torch.cat([(output.indices + first).to(device) for output, first in found], dim=-1))
        weights.append(torch.cat([output.weights.float().to(device) for output, _ in found], dim=-1))
    return TokenConcepts(
        texts.repeat_interleave(torch.tensor([len(row) for row in ids], device="cpu")).to(device),
        torch.tensor([token for row in ids for token in row], device=device),
        torch.cat(indices),
        torch.cat(weights),
    )


def read_concepts(
    model: SteerlingForDiffusionLM, ids: Sequence[Sequence[int]], head: str | None = None
) -> TextConcepts:
    """
    Strengths of concepts in each text, on the CPU; for the arguments and errors see `read_tokens`. Only what the heads
    report is ever held, never a table of texts and concepts.
    """
    size = model.config.n_concepts + model.config.n_discovered
    parts = [_pool(batch, size) for batch in read_tokens(model, ids, head)]
    keys, highest, mean = (torch.cat(column) for column in zip(*parts))
    order = keys.argsort()
    keys = keys[order]
    return TextConcepts(len(ids), keys // size, keys % size, highest[order], mean[order])


def _pool(batch: TokenConcepts, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of text and concept as `text * size + concept`, with highest and mean weight: (P,) each."""
    pairs = batch.texts[:, None] * size + batch.concepts
    keys, inverse = pairs.flatten().unique(return_inverse=True)
    weights = batch.weights.flatten()
    highest = weights.new_zeros(len(keys)).scatter_reduce(0, inverse, weights, "amax")
    sums = weights.new_zeros(len(keys)).index_add(0, inverse, weights)
    lengths = torch.bincount(batch.texts)[keys // size]
    return keys.cpu(), highest.cpu(), (sums / lengths).cpu()


def active_in(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    concept_of: ConceptOf,
    texts: Sequence[str],
    k: int = 10,
    head: str | None = None,
) -> list[list[ActiveConcept]]:
    """
    The k strongest concepts of each text, by highest weight and then by mean.

    Args:
        concept_of: Gives the concept of an id.

    Raises:
        ValueError: See `token_ids` and `heads_of`; `k` is not 1 or more.
    """
    check_positive("k", k)
    read = read_concepts(model, token_ids(model, tokenizer, texts), head)
    result = []
    sizes = torch.bincount(read.texts, minlength=read.n_texts).tolist()
    columns = [column.split(sizes) for column in (read.concepts, read.highest, read.mean)]
    for concepts, highest, mean in zip(*columns):
        rows = zip(concepts.tolist(), highest.tolist(), mean.tolist())
        best = sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))[:k]
        result.append([ActiveConcept(concept_of(concept), weight, average) for concept, weight, average in best])
    return result


def contrast(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    concept_of: ConceptOf,
    positive: Sequence[str],
    negative: Sequence[str],
    k: int = 10,
    head: str | None = None,
) -> list[Contrast]:
    """
    The k concepts that tell the positive texts from the negative ones best, by the size of the effect, whatever its sign.

    The effect is Cohen's d with a floor under the spread, `d = (m+ - m-) / (s + 0.1)`, where m are the means of the two
    sets and s is their pooled standard deviation (Cohen 1988, "Statistical power analysis", section 2.2). The constant
    is that of Tusher, Tibshirani and Chu (2001, PNAS 98:5116, eq. 1): without it a concept that hardly moves, but always
    in the same way, comes first. The probability of superiority (McGraw and Wong 1992) is reported and not ranked by,
    because it ties all concepts that separate the sets perfectly, however weak they are.

    Args:
        concept_of: Gives the concept of an id.

    Raises:
        ValueError: See `token_ids` and `heads_of`; a set has fewer than 2 texts; `k` is not 1 or more.
    """
    check_positive("k", k)
    ids = []
    for name, texts in (("positive", positive), ("negative", negative)):
        ids += token_ids(model, tokenizer, texts, name)
        if len(texts) < 2:
            raise ValueError(
                f"`{name}` has {len(texts)} text: give 2 or more, since an effect size needs their spread."
            )
    read = read_concepts(model, ids, head)
    concepts, column = read.concepts.unique(return_inverse=True)
    strengths = read.highest.double()
    means, squares = [], torch.zeros(len(concepts), dtype=torch.float64, device="cpu")
    is_positive = read.texts < len(positive)
    for chosen, count in ((is_positive, len(positive)), (~is_positive, len(negative))):
        here, values = column[chosen], strengths[chosen]
        mean = torch.zeros_like(squares).index_add(0, here, values) / count
        # Squares around the mean: those of the entries, and the mean's own for each text that has no entry.
        absent = count - torch.bincount(here, minlength=len(concepts))
        squares = squares.index_add(0, here, (values - mean[here]).square()) + absent * mean.square()
        means.append(mean)
    spread = (squares / (read.n_texts - 2)).sqrt()
    effects = (means[0] - means[1]) / (spread + EFFECT_FLOOR)
    best = effects.abs().argsort(descending=True, stable=True)[:k].tolist()
    return [
        Contrast(
            concept_of(int(concepts[i])),
            float(effects[i]),
            _superiority(read.texts[column == i], strengths[column == i], len(positive), len(negative)),
            float(means[0][i]),
            float(means[1][i]),
        )
        for i in best
    ]


def _superiority(texts: torch.Tensor, strengths: torch.Tensor, n_positive: int, n_negative: int) -> float:
    """Share of pairs in which the positive text is the stronger one, ties counting half, from a concept's entries."""
    values = strengths.new_zeros(n_positive + n_negative).index_add(0, texts, strengths)
    positive, negative = values[:n_positive], values[n_positive:].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean() / (2 * n_negative))


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token as text, its leading space included."""
    text = tokenizer.decode([token_id])
    assert isinstance(text, str)  # a list only for several sequences
    return text
