"""Rows of text that the grammar writes, tokenised, each token with the concepts of its chunk."""

import random

from grammar import document
from torch.utils.data import Dataset


class GrammarRows(Dataset):
    """
    Row i is a fixed number of tokens of documents written one after another from the seed "seed:i", so that any row can
    be made again without the others. The first document of a row begins at its start, the last one may be cut.

    Args:
        tokenizer: Turns text with control tokens into ids.
        rows: Number of rows.
        length: Tokens of a row.
        seed: Seed of all rows.
        held_out: Write the text that training never sees.
    """

    def __init__(self, tokenizer, rows: int, length: int, seed: int, held_out: bool = False):
        self.tokenizer = tokenizer
        self.rows = rows
        self.length = length
        self.seed = seed
        self.held_out = held_out

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, list]:
        rng = random.Random(f"{self.seed}:{index}")
        input_ids: list[int] = []
        concept_labels: list[tuple[int, ...]] = []
        while len(input_ids) < self.length:
            for chunk in document(rng, held_out=self.held_out).chunks:
                ids = self.tokenizer(chunk.prefix + chunk.text + chunk.suffix)["input_ids"]
                input_ids += ids
                concept_labels += [chunk.concepts] * len(ids)
        return {"input_ids": input_ids[: self.length], "concept_labels": concept_labels[: self.length]}
