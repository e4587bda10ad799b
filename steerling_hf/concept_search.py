"""Ranked search over the names and descriptions of concepts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .concept_labels import Concept

WORDS = r"(?u)\w+"
# BM25F with weighted term frequencies (Robertson, Zaragoza and Taylor 2004, "Simple BM25 extension to multiple weighted
# fields", section 3): a word of the name counts as often as three words of the description.
NAME_WEIGHT = 3


class ConceptIndex:
    """
    BM25 (Robertson and Zaragoza 2009, "The probabilistic relevance framework", with Lucene's never negative idf) over
    stems of words, so that "garden" finds "gardening". Made by bm25s (Lu 2024, arXiv:2407.03618).

    Args:
        concepts: What can be found; those without a name and a description never are.

    Raises:
        ImportError: The extra `concepts` is not installed.
    """

    def __init__(self, concepts: Sequence[Concept]):
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ImportError(
                "Search needs bm25s and PyStemmer: pip install 'steerling-hf[concepts]' (lookup by name does not)."
            ) from error
        self._tokenize = bm25s.tokenize
        self._stemmer = Stemmer.Stemmer("english")
        self._ids = np.array([concept.id for concept in concepts], dtype=np.int64)
        self._ranking = bm25s.BM25(method="lucene")
        texts = [" ".join([concept.name] * NAME_WEIGHT + [concept.description]) for concept in concepts]
        words = self._words(texts)
        # bm25s cannot index what holds no word at all.
        self._empty = not any(words)
        if not self._empty:
            self._ranking.index(words, show_progress=False)

    def scores(self, query: str) -> dict[int, float]:
        """Scores above 0 by concept id, highest first and lowest id first among equals."""
        words = [word for word in self._words([query])[0] if not self._empty and word in self._ranking.vocab_dict]
        if not words:
            return {}
        scores = self._ranking.get_scores(words)
        order = np.lexsort((self._ids, -scores))
        return {int(self._ids[i]): float(scores[i]) for i in order[: int((scores > 0).sum())]}

    def _words(self, texts: list[str]) -> Any:
        # No stop words: idf does their work, and some concepts are about nothing but an "if" or a "because".
        return self._tokenize(
            texts, token_pattern=WORDS, stopwords=[], stemmer=self._stemmer, return_ids=False, show_progress=False
        )
