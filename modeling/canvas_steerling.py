"""A row of text while it is unmasked: its tokens, what is undecided, and the generation blocks that decide it in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .unmasking_steerling import share_steps


@dataclass
class Block:
    """
    Positions that are decided together.

    Args:
        start, stop: Its positions.
        counts: How many each step decides at least; further steps, as many as are needed, decide one each.
    """

    start: int
    stop: int
    counts: list[int]


class Canvas:
    """
    One row: a prompt, then positions to be decided. Everything is kept on the CPU.

    The mask tokens of the prompt are decided first, one attention block after the other; then the new positions, in
    generation blocks of `grid` positions that count from the end of the prompt or, if `aligned`, end where attention
    blocks do.

    Args:
        index: Number of the row.
        prompt: (P,) token ids without padding.
        new_tokens: Positions to add.
        grid: Positions of an attention block.
        mask_token: What undecided positions hold.
        steps: Forward passes in all; by default one for each position.
        aligned: Whether generation blocks lie on the attention grid.
    """

    def __init__(
        self,
        index: int,
        prompt: torch.Tensor,
        new_tokens: int,
        *,
        grid: int,
        mask_token: int,
        steps: int | None = None,
        aligned: bool = False,
    ):
        self.index, self.prompt_length, self.grid, self.mask_token = index, len(prompt), grid, mask_token
        self.tokens = torch.cat([prompt, prompt.new_full((new_tokens,), mask_token)])
        self.undecided = self.tokens == mask_token
        self.given = ~self.undecided
        self.step_map = torch.full_like(self.tokens, -1)
        self.log_probabilities = torch.zeros(len(self.tokens), dtype=torch.float32, device="cpu")
        # (V,) of decided positions, processed and unprocessed, if anybody asks for them.
        self.scores: dict[int, torch.Tensor] = {}
        self.logits: dict[int, torch.Tensor] = {}
        self.blocks = self._plan(steps or int(self.undecided.sum()), aligned)
        self.length = len(self.tokens)  # of the text, once an end has been found
        self.cached = 0  # first positions whose keys and values are final
        self.computed = 0  # first positions whose keys, values and hidden states are those of the present tokens
        self.forwards = 0

    def _plan(self, steps: int, aligned: bool) -> list[Block]:
        edges = []
        for start in range(0, self.prompt_length, self.grid):
            stop = min(start + self.grid, self.prompt_length)
            if self.undecided[start:stop].any():
                edges.append((start, stop))
        start = self.prompt_length
        while start < len(self.tokens):
            stop = start + self.grid - (start % self.grid if aligned else 0)
            edges.append((start, min(stop, len(self.tokens))))
            start = stop
        sizes = [int(self.undecided[start:stop].sum()) for start, stop in edges]
        schedule = share_steps(sizes, steps)
        return [Block(start, stop, counts) for (start, stop), counts in zip(edges, schedule)]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to decide."""
        return not self.blocks

    @property
    def committed(self) -> int:
        """Number of tokens that have been decided."""
        return int((self.step_map >= 0).sum())

    @property
    def planned(self) -> int:
        """Number of forward passes that the schedule still has."""
        return sum(len(block.counts) for block in self.blocks)

    @property
    def final(self) -> int:
        """Number of first positions in attention blocks that are decided altogether."""
        return self.decided_prefix // self.grid * self.grid

    @property
    def visible(self) -> int:
        """Number of first positions that the current block can see: up to the end of its last attention block."""
        return min(-(-self.blocks[0].stop // self.grid) * self.grid, len(self.tokens))

    def masked(self) -> torch.Tensor:
        """(n,) undecided positions of the current block."""
        start, stop = self.blocks[0].start, self.blocks[0].stop
        return self.undecided[start:stop].nonzero()[:, 0] + start

    def count(self) -> int:
        """How many positions the next step decides at least."""
        return self.blocks[0].counts[0] if self.blocks[0].counts else 1

    def decide(self, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write (k,) tokens at (k,) positions; that ends a step."""
        self.tokens[positions] = tokens
        self.undecided[positions] = False
        # Earlier attention blocks do not see the change.
        self.computed = min(self.computed, int(positions.min()) // self.grid * self.grid)
        self.step_map[positions] = self.forwards
        self.forwards += 1
        del self.blocks[0].counts[:1]

    def advance(self, ends: torch.Tensor | None) -> None:
        """
        Look for the end of the text, and go on to the next block if the current one is decided.

        What lies behind the first of the `ends` tokens is not decided any more, what lies before it still is, and the row
        ends with the block; its other positions see until then what was decided behind the end.

        Args:
            ends: (n,) tokens that end a row.
        """
        end = self._end_token(ends)
        self.undecided[end:] = False
        if not self.undecided[self.blocks[0].start : self.blocks[0].stop].any():
            self.blocks.pop(0)
            if end < len(self.tokens) or not self.blocks:
                self.finish(end)

    def cut(self, length: int) -> None:
        """End the row after so many positions, as it was after the step that decided the last of them."""
        step = int(self.step_map[:length].max())
        later = self.step_map > step
        self.tokens[later], self.step_map[later] = self.mask_token, -1
        self.forwards = step + 1
        self.finish(length)

    def finish(self, length: int) -> None:
        """End the row after so many positions."""
        self.blocks, self.length = [], length

    @property
    def decided_prefix(self) -> int:
        """Number of first positions before the first undecided one."""
        undecided = self.undecided.nonzero()
        return int(undecided[0]) if len(undecided) else len(self.tokens)

    def _end_token(self, ends: torch.Tensor | None) -> int:
        """Length of the text with the first end token among the new positions."""
        if ends is None:
            return len(self.tokens)
        found = torch.isin(self.tokens[self.prompt_length :], ends).nonzero()
        return self.prompt_length + int(found[0]) + 1 if len(found) else len(self.tokens)


class Rows:
    """
    The canvases side by side, as `generate` returns them: prompts padded on the left, then the new positions, padded
    behind the end of a row.

    Args:
        prompts: (rows, W) token ids with their padding.
        canvases: One for each row.
        filler: The token behind the end of a row.
    """

    def __init__(self, prompts: torch.Tensor, canvases: Sequence[Canvas], filler: int):
        self.prompts, self.canvases, self.filler = prompts.cpu(), canvases, filler
        self.width = prompts.shape[1]

    def tokens(self, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """(rows, T) token ids, or those of some columns, counted from the end of the prompts."""
        return self.gather([canvas.tokens for canvas in self.canvases], self.filler, start, stop, self.prompts)

    def columns(self, values: Sequence[dict[int, torch.Tensor]], padding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        (rows, V) for each new column, of values (V,) of the positions of each canvas, which are taken away; `padding` (V,) stands
        behind the end of a row.
        """
        lengths = [canvas.length - canvas.prompt_length for canvas in self.canvases]
        return tuple(
            torch.stack(
                [
                    own.pop(canvas.prompt_length + column) if column < length else padding
                    for canvas, own, length in zip(self.canvases, values, lengths)
                ]
            )
            for column in range(max(lengths))
        )

    def gather(
        self,
        values: Sequence[torch.Tensor],
        filler: float,
        start: int | None = None,
        stop: int | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(rows, T, ...) of values (T_i, ...) of the positions of each canvas; `padding` (rows, W) has those of the padding."""
        start = -self.width if start is None else start
        stop = max(canvas.length - canvas.prompt_length for canvas in self.canvases) if stop is None else stop
        result = values[0].new_full((len(values), self.width + stop, *values[0].shape[1:]), filler)
        if padding is not None:
            result[:, : self.width] = padding[:, : result.shape[1]]
        for row, canvas, own in zip(result, self.canvases, values):
            first = self.width - canvas.prompt_length
            last = max(0, min(canvas.length, canvas.prompt_length + stop))
            row[first : first + last] = own[:last]
        return result[:, self.width + start :]


__all__ = ["Block", "Canvas", "Rows"]
