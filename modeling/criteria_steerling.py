"""Stopping criteria as transformers calls them, for rows that grow at different steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .canvas_steerling import Canvas, Rows


class RowCriteria:
    """
    Shows stopping criteria what transformers shows them: all rows of the batch, (rows, W + t) token ids, for t = 1, 2, 3 and so on
    once each, with the padding of the prompts, and with padding behind the end of a row.

    A row's new positions are decided in any order, and rows at different steps. So a column is shown once it is decided, and
    all before it, in every row that has not ended before. A row that is ahead of the others is cut back to what it was when the
    text that ends it was complete, so it is what it is alone.

    Args:
        criteria: Callables of ids and of `None`, as there are no scores; they return a truth value or (rows,) of them.
        rows: All rows, also those that have ended.
        device: Where the ids are shown.
    """

    def __init__(self, criteria: Sequence[Callable], rows: Rows, device: torch.device):
        self.criteria, self.rows, self.device = criteria, rows, device
        self.columns = 0  # new columns that have been shown

    def end_rows(self) -> None:
        """
        Show the columns that are decided, and end rows where a criterion says so.

        Raises:
            ValueError: A criterion returned something else than truth values, one or one for each row.
        """
        while self._next_is_decided():
            self.columns += 1
            for canvas, ends in zip(self.rows.canvases, self._verdict()):
                if ends and _new_tokens(canvas) >= self.columns:
                    canvas.cut(canvas.prompt_length + self.columns)

    def _next_is_decided(self) -> bool:
        lengths = [_new_tokens(canvas) for canvas in self.rows.canvases]
        going = [
            length
            for canvas, length in zip(self.rows.canvases, lengths)
            if not canvas.finished or length > self.columns
        ]
        return bool(going) and min(going) > self.columns

    def _verdict(self) -> list[bool]:
        ids = self.rows.tokens(stop=self.columns).to(self.device)
        verdict = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        for criterion in self.criteria:
            said: Any = criterion(ids, None)
            try:
                found = torch.as_tensor(said, device="cpu").bool()
            except (TypeError, ValueError, RuntimeError):
                found = torch.empty(0, 0, dtype=torch.bool, device="cpu")
            if found.shape not in ((), verdict.shape):
                raise ValueError(
                    f"`stopping_criteria`: {type(criterion).__name__} returned {said!r} for {len(ids)} rows: return True or False, "
                    "or one of them for each row."
                )
            verdict |= found
        return verdict.tolist()


def _new_tokens(canvas: Canvas) -> int:
    """New tokens of a row that are decided from left to right, as far as its text goes."""
    return (canvas.length if canvas.finished else canvas.decided_prefix) - canvas.prompt_length


__all__ = ["RowCriteria"]
