"""What an index keeps of a text: its embedding and its concepts, from one pass through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .embeddings import ConceptVectors, StrongestConcepts, batches_of_states, part_of, rows_of
from .reading import HEAD_POSITIONS, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.modeling_steerling import SteerlingForDiffusionLM

TOP_CONCEPTS = {"known": 32, "unknown": 128}


@dataclass(frozen=True)
class TraceVectors:
    """
    N texts as an index compares them.

    Args:
        dense: (N, D) float32 of length 1.
        concepts: The texts' strongest concepts, of length 1.
    """

    dense: torch.Tensor
    concepts: ConceptVectors

    def __len__(self) -> int:
        return len(self.dense)

    def sparse(self) -> list[dict[int, float]]:
        """Concepts of each text with their weights."""
        pairs = zip(self.concepts.ids.tolist(), self.concepts.weights.tolist())
        return [{i: weight for i, weight in zip(ids, weights) if i >= 0} for ids, weights in pairs]


def trace_vectors(
    model: SteerlingForDiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    embedding: str = "composed",
    batch_size: int = 32,
    max_length: int | None = None,
) -> TraceVectors:
    """
    The same as `embed(model, tokenizer, texts, embedding, normalize=True)` and `concept_vectors(model, tokenizer, texts)`, but
    the texts pass through the model once.

    Raises:
        ValueError: The model has no concept heads; see also `embed`.
    """
    rows = rows_of(model, tokenizer, texts, batch_size, max_length)
    dense = torch.zeros(len(rows), model.config.n_embd, dtype=torch.float32, device="cpu")
    strongest = StrongestConcepts(model, TOP_CONCEPTS, len(rows))
    with reading(model):
        for numbers, states in batches_of_states(model, rows, batch_size, progress=False):
            lengths = [len(rows[i]) for i in numbers]
            parts = torch.cat([part_of(model, piece, embedding) for piece in states.split(HEAD_POSITIONS)])
            means = [part.float().mean(dim=0) for part in parts.split(lengths)]
            dense[numbers] = torch.stack(means).cpu()
            strongest.note(numbers, states, lengths)
    return TraceVectors(torch.nn.functional.normalize(dense, dim=-1), strongest.vectors())


__all__ = ["TraceVectors", "trace_vectors"]
