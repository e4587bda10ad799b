"""Names proposed for discovered concepts, from the texts in which they are active and the tokens that they promote."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .checks import check_positive
from .concept_labels import Concept
from .concept_statistics import TokenConcepts, read_tokens, token_ids, token_text, vocabulary_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.modeling_steerling import SteerlingForDiffusionLM

WORDS_IN_A_NAME = 3
SHOWN_WORDS = 10
SHOWN_TEXTS = 3
# Reciprocal rank fusion's constant (Cormack, Clarke and Buettcher 2009).
FUSION = 60


@dataclass(frozen=True)
class LabelProposal:
    """
    A name for a concept that has none, and the evidence for it. `dataclasses.replace(proposal.concept,
    name=proposal.name)` accepts it.

    Args:
        concept: The concept as it is, unnamed.
        name: The best words, separated by commas.
        words: Words of the texts that speak for it, best first.
        tokens: The tokens that it promotes most, as text.
        texts: The texts in which it is strongest, strongest first.
        weight: Its highest weight (0..1) in any of the texts.
    """

    concept: Concept
    name: str
    words: tuple[str, ...]
    tokens: tuple[str, ...]
    texts: tuple[str, ...]
    weight: float


def propose_labels(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    concepts: Sequence[Concept],
    texts: Sequence[str],
    limit: int = 20,
) -> list[LabelProposal]:
    """
    Propose a name for each of the discovered concepts that are strongest in the texts, by highest weight.

    A word of the texts has two ranks: by class-based TF-IDF (Grootendorst 2022, arXiv:2203.05794, eq. 2) with concepts
    as classes and weights as counts, `tf(w, c) ln(1 + A / f(w))`, where `tf` sums the concept's weight over the word's
    tokens, `f` sums that over all discovered concepts, and A is the mean of a concept's total weight; and by the highest
    score that the concept gives one of the word's tokens (`vocabulary_scores`). The name has the words that are best by
    both, by reciprocal rank fusion. Words with a character that is split between tokens are left out.

    Args:
        concepts: Discovered concepts to choose from; those that are active on no word of the texts get no name.
        limit: At most so many proposals.

    Raises:
        ValueError: See `token_ids`; the model has no discovered head; `limit` is not 1 or more.
    """
    check_positive("limit", limit)
    ids = token_ids(model, tokenizer, texts)
    words = [_words(tokenizer, row) for row in ids]
    counts = _Counts({concept.id for concept in concepts})
    for batch in read_tokens(model, ids, "unknown"):
        counts.add(batch, words)
    named = [concept for concept in concepts if counts.of_concept.get(concept.id)]
    named.sort(key=lambda concept: (-max(counts.strongest[concept.id].values()), concept.id))
    return [_propose(model, tokenizer, concept, counts, texts) for concept in named[:limit]]


class _Counts:
    """Weights of discovered concepts, summed over words; only the chosen concepts' own sums are kept apart."""

    def __init__(self, chosen: set[int]):
        self.chosen = torch.tensor(sorted(chosen), dtype=torch.long, device="cpu")
        self.of_concept: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.of_word: dict[str, float] = defaultdict(float)
        self.tokens_of_word: dict[str, set[int]] = defaultdict(set)
        self.strongest: dict[int, dict[int, float]] = defaultdict(dict)  # highest weight by concept and text
        self.active: set[int] = set()

    @property
    def mean_total(self) -> float:
        return sum(self.of_word.values()) / len(self.active)

    def add(self, batch: TokenConcepts, words: Sequence[Sequence[str]]) -> None:
        texts, tokens = batch.texts.tolist(), batch.tokens.tolist()
        # Tokens of a text are together and in order, as its words are.
        spelled = [word for text in dict.fromkeys(texts) for word in words[text]]
        for word, token, weight in zip(spelled, tokens, batch.weights.sum(-1).tolist()):
            if word:
                self.of_word[word] += weight
                self.tokens_of_word[word].add(token)
        self.active.update(batch.concepts.unique().tolist())
        positions, columns = torch.isin(batch.concepts.cpu(), self.chosen).nonzero(as_tuple=True)
        concepts, weights = (table.cpu()[positions, columns] for table in (batch.concepts, batch.weights))
        for position, concept, weight in zip(positions.tolist(), concepts.tolist(), weights.tolist()):
            if spelled[position]:
                self.of_concept[concept][spelled[position]] += weight
            highest = self.strongest[concept]
            highest[texts[position]] = max(weight, highest.get(texts[position], 0.0))


def _propose(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    concept: Concept,
    counts: _Counts,
    texts: Sequence[str],
) -> LabelProposal:
    scores = vocabulary_scores(model, concept)[: len(tokenizer)].cpu()
    found = counts.of_concept[concept.id]
    mean = counts.mean_total
    frequency = {w: n * math.log1p(mean / counts.of_word[w]) for w, n in found.items()}
    promoted = {w: scores[list(counts.tokens_of_word[w])].max().item() for w in found}
    fused: dict[str, float] = defaultdict(float)
    for score in (frequency, promoted):
        for rank, word in enumerate(sorted(score, key=lambda w: (-score[w], w)), start=1):
            fused[word] += 1 / (FUSION + rank)
    words = sorted(fused, key=lambda w: (-fused[w], w))[:SHOWN_WORDS]
    strongest = counts.strongest[concept.id]
    order = sorted(strongest, key=lambda i: (-strongest[i], i))
    return LabelProposal(
        concept=concept,
        name=", ".join(words[:WORDS_IN_A_NAME]),
        words=tuple(words),
        tokens=tuple(token_text(tokenizer, i) for i in scores.topk(min(SHOWN_WORDS, len(scores))).indices.tolist()),
        texts=tuple(texts[i] for i in order[:SHOWN_TEXTS]),
        weight=strongest[order[0]],
    )


def _words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The word that each token is part of, in lower case; "" for what is no word."""
    pieces = [token_text(tokenizer, i) for i in ids]
    starts = [i for i, piece in enumerate(pieces) if i == 0 or not _continues(pieces[i - 1], piece)]
    words = []
    for start, end in zip(starts, [*starts[1:], len(ids)]):
        word = "".join(pieces[start:end]).strip().casefold()
        words += [word if word.isalpha() else ""] * (end - start)
    return words


def _continues(before: str, piece: str) -> bool:
    return piece[:1].isalpha() and before[-1:].isalpha()
