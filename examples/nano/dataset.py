"""Rows of text that the grammar writes, tokenised, each token with the concepts of its chunk."""

import random

from grammar import KINDS, USER_HEADER, Document, document
from torch.utils.data import Dataset

# Shares of the kinds of documents in tuning rows, in the order of KINDS: chats need many repetitions, style does not.
TUNING_SHARES = (60, 24, 10, 6)
FINISHING_SHARES = (50, 32, 11, 7)
IGNORE_INDEX = -100


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
        tuning_from: From this row on, as in instruction tuning, there are more chats and what a user says has no loss.
        tuning_shares: Of the kinds of documents in those rows, in the order of KINDS.
    """

    def __init__(
        self,
        tokenizer,
        rows: int,
        length: int,
        seed: int,
        held_out: bool = False,
        tuning_from: int | None = None,
        tuning_shares: tuple[int, ...] = TUNING_SHARES,
    ):
        self.tokenizer = tokenizer
        self.rows = rows
        self.length = length
        self.seed = seed
        self.held_out = held_out
        self.tuning_from = rows if tuning_from is None else tuning_from
        self.tuning_kinds = [kind for kind, share in zip(KINDS, tuning_shares, strict=True) for _ in range(share)]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, list]:
        rng = random.Random(f"{self.seed}:{index}")
        tuning = index >= self.tuning_from
        row: dict[str, list] = {"input_ids": [], "labels": [], "concept_labels": []}
        while len(row["input_ids"]) < self.length:
            kind = rng.choice(self.tuning_kinds) if tuning else None
            extend(row, columns_of(self.tokenizer, document(rng, kind, self.held_out), tuning))
        return {name: column[: self.length] for name, column in row.items()}


def columns_of(tokenizer, written: Document, answers_only: bool) -> dict[str, list]:
    """Return a document's tokens, labels and concepts; with `answers_only`, what a user says has no loss."""
    columns: dict[str, list] = {"input_ids": [], "labels": [], "concept_labels": []}
    for chunk in written.chunks:
        ids = tokenizer(chunk.prefix + chunk.text + chunk.suffix)["input_ids"]
        asked = answers_only and chunk.prefix == USER_HEADER
        labels = [IGNORE_INDEX] * len(ids) if asked else ids
        extend(columns, {"input_ids": ids, "labels": labels, "concept_labels": [chunk.concepts] * len(ids)})
    return columns


def extend(columns: dict[str, list], more: dict[str, list]) -> None:
    """Put further values behind those of each column."""
    for name, values in more.items():
        columns[name] += values
