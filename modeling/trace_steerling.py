"""How a row was written: enough to see it again as it was at any step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .canvas_steerling import Canvas
from .steering_steerling import Operation, operation_from_dict


@dataclass(frozen=True, eq=False)
class SteerlingTrace:
    """
    One row of a generation. Positions count from the row's first token, without padding.

    Args:
        tokens: (T,) the whole canvas, also what was decided behind the text's end; undecided positions hold the mask token.
        step_map: (T,) step that decided a position; -1 for what was given and what is undecided.
        prompt_length: Tokens of the prompt.
        length: Tokens of the text, prompt included.
        grid: Positions of an attention block.
        mask_token: Id of the mask token.
        align_blocks, guidance_scale, seed: As in `generate`; `None` for no guidance, and for no seed.
        steering: Operations that `generate` was given for the row.
        attached: Operations that the model had besides.
    """

    tokens: torch.Tensor
    step_map: torch.Tensor
    prompt_length: int
    length: int
    grid: int
    mask_token: int
    align_blocks: bool = False
    guidance_scale: float | None = None
    seed: int | None = None
    steering: Sequence[Operation] = ()
    attached: Sequence[Operation] = ()

    @classmethod
    def of(cls, canvas: Canvas, **settings: Any) -> "SteerlingTrace":
        """The trace of a canvas on which nothing is left to decide."""
        return cls(
            canvas.tokens.clone(),
            canvas.step_map.clone(),
            canvas.prompt_length,
            canvas.length,
            canvas.grid,
            canvas.mask_token,
            **settings,
        )

    @property
    def decided(self) -> torch.Tensor:
        """(n,) positions of the text that were decided, from left to right."""
        return (self.step_map[: self.length] >= 0).nonzero()[:, 0]

    def before(self, position: int, index: int = 0) -> Canvas:
        """
        The row as it was when a position was about to be decided.

        Args:
            position: The position.
            index: Number that the canvas gets.

        Raises:
            ValueError: The position was never decided.
        """
        step = int(self.step_map[position]) if 0 <= position < len(self.tokens) else -1
        if step < 0:
            raise ValueError(f"`position` is {position}, which was not decided: choose one of trace.decided.")
        first = self.tokens.masked_fill(self.step_map >= 0, self.mask_token)
        canvas = Canvas(
            index,
            first[: self.prompt_length],
            len(first) - self.prompt_length,
            grid=self.grid,
            mask_token=self.mask_token,
            aligned=self.align_blocks,
        )
        known = (self.step_map >= 0) & (self.step_map < step)
        canvas.tokens[known] = self.tokens[known]
        canvas.step_map[known] = self.step_map[known]
        canvas.undecided &= ~known
        canvas.forwards = step
        canvas.blocks = [block for block in canvas.blocks if block.stop > position]
        return canvas

    def to_dict(self) -> dict[str, Any]:
        """What a JSON file can hold."""
        values = {**vars(self), "tokens": self.tokens.tolist(), "step_map": self.step_map.tolist()}
        for name in ("steering", "attached"):
            values[name] = [operation.to_dict() for operation in values[name]]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SteerlingTrace":
        """The trace of `to_dict`."""
        read = dict(values)
        for name in ("tokens", "step_map"):
            read[name] = torch.tensor(values[name], dtype=torch.long, device="cpu")
        for name in ("steering", "attached"):
            read[name] = tuple(operation_from_dict(operation) for operation in values[name])
        return cls(**read)


__all__ = ["SteerlingTrace"]
