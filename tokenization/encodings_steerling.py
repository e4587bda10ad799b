"""Encodings that know where their tokens stand in a text."""

from types import SimpleNamespace
from typing import Any

from transformers import BatchEncoding


class TracedEncoding(BatchEncoding):
    """
    A BatchEncoding that knows where its tokens stand, which the base class can say for Rust tokenizers only.

    Args:
        data: See the base class.
        rendered_offsets: For each row, the range of characters of each token in the text that was given; of a chat, in
            what the template made of marked messages.
    """

    def __init__(self, data: dict[str, Any], rendered_offsets: list[list[tuple[int, int]]], **kwargs: Any):
        super().__init__(data, **kwargs)
        self._rendered_offsets = rendered_offsets

    @property
    def encodings(self) -> list[Any]:
        """What transformers 5.24 asks for the `offsets` of each row, to find what the assistant wrote."""
        return [SimpleNamespace(offsets=offsets) for offsets in self._rendered_offsets]

    def char_to_token(  # type: ignore[override]  # the base class returns None as well, but does not say so
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Index of the first token that covers a character, or None. Called as the method of BatchEncoding is."""
        batch, character = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        offsets = self._rendered_offsets[batch]
        return next((i for i, (start, end) in enumerate(offsets) if start <= character < end), None)


def moved_offsets(
    offsets: list[list[tuple[int, int]]] | None, places: list[list[int]]
) -> list[list[tuple[int, int]]] | None:
    """Offsets in texts as offsets among the places of their characters."""
    if offsets is None:
        return None
    return [
        [(row[start], row[end - 1] + 1) if end > start else (0, 0) for start, end in ranges]
        for ranges, row in zip(offsets, places)
    ]
