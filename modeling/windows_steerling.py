"""Forward passes over the windows of unfinished rows, on an exact block cache or without one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .cache_steerling import SteerlingCache
from .canvas_steerling import Canvas

PIECE = 512  # positions of a long prompt that are computed at a time


class WindowEncoder:
    """
    Computes the last hidden states of each canvas's window: from its first block that is not cached, as far as its
    current block can see. Without a cache, windows begin at the start of the row.

    A guided canvas has two rows in every pass; in the second one, the tokens of its prompt are masked.

    Args:
        transformer: The backbone.
        config: Its configuration.
        canvases: All rows.
        copies: So many canvases in a row have the same prompt, which is computed once.
        device: Where token ids go.
        cache: Its rows, if there are any, are those of the canvases.
        guided: Whether canvases have second rows.
        width: Length of every window, in passes of all rows, so that shapes never change. By default windows are as
            short as they can be, and finished rows leave the batch.
        step: Computes windows of that length, such as the compiled backbone.
    """

    def __init__(
        self,
        transformer: Any,
        config: Any,
        canvases: Sequence[Canvas],
        *,
        copies: int,
        device: torch.device,
        cache: SteerlingCache | None,
        guided: bool,
        width: int | None = None,
        step: Callable | None = None,
    ):
        self.transformer, self.config, self.device = transformer, config, device
        self.cache, self.width, self.step = cache, width, step or transformer
        self.lanes = 2 if guided else 1
        self.grid = config.diff_block_size
        # A block that is decided rides along with the next ones, in windows up to this length.
        self.longest = width or 3 * self.grid
        # The canvases in the order of their rows in the cache.
        self.order = list(canvases)
        self.copies = copies

    def encode(self, live: Sequence[Canvas]) -> tuple[torch.Tensor, list[int], list[int]]:
        """
        One forward pass.

        Args:
            live: The unfinished canvases; none may come back that was left out before.

        Returns:
            (rows, W, D) last hidden states; for each canvas, the number of its row (the second one of a guided canvas
            comes next) and the first position of its window.
        """
        if self.cache is not None:
            self._commit(self.cache, live, self.longest)
            self._move_to_the_front(self.cache, live)
        canvases = list(live) if self.width is None else self.order
        starts = [canvas.cached for canvas in canvases]
        stops = [start + 1 if canvas.finished else canvas.visible for canvas, start in zip(canvases, starts)]
        width = self.width or max(stop - start for start, stop in zip(starts, stops))
        hidden_states = self._forward(
            canvases, len(canvases) * self.lanes, width, stops, static=self.width is not None
        )
        starts = [canvas.cached for canvas in live]
        if self.cache is not None:
            for canvas in live:
                final = canvas.final
                if final > canvas.cached:
                    self._note_final(self.cache, canvas, final)
        return hidden_states, [self.lanes * canvases.index(canvas) for canvas in live], starts

    def restore_order(self, canvases: Sequence[Canvas]) -> None:
        """Bring the rows of the cache back into the order of the canvases."""
        if self.cache is not None:
            self.cache.take(self._rows(canvases))
            self.order = list(canvases)

    def fill(self) -> None:
        """Compute what the cache does not have of the prompts' blocks, unless they are few enough to ride along."""
        if self.cache is None:
            return
        cache, canvases, copies = self.cache, self.order, self.copies
        if cache.rows == len(canvases) * self.lanes:  # a chat that has had several answers before
            copies = 1
        self.order = canvases[::copies]
        cache.start(len(self.order) * self.lanes)
        for row, canvas in enumerate(self.order):
            agreed = min(cache.agreement(row * self.lanes + i, ids) for i, ids in enumerate(self._ids(canvas)))
            self._note_final(cache, canvas, min(agreed, canvas.final) // self.grid * self.grid)
        self._commit(cache, self.order, self.longest if copies == 1 else 0)
        if copies > 1:
            leaders = [leader for leader in self.order for _ in range(copies)]
            cache.take(self._rows(leaders))
            for canvas, leader in zip(canvases, leaders):
                canvas.cached = leader.cached
        self.order = canvases
        if self.width is not None:
            kind = self.device.type
            autocast = torch.is_autocast_enabled(kind)
            cache.pin(self.transformer.blocks, torch.get_autocast_dtype(kind) if autocast else self.transformer.dtype)

    def _commit(self, cache: SteerlingCache, canvases: Sequence[Canvas], longest: int) -> None:
        """Passes for nothing but the keys and values of decided blocks, for windows that would get too long with them."""
        piece = max(1, PIECE // self.grid) * self.grid
        while waiting := [
            c for c in canvases if not c.finished and c.final > c.cached and c.visible - c.cached > longest
        ]:
            # No longer than the shortest need, so that no row is padded.
            width = min(piece, *(canvas.final - canvas.cached for canvas in waiting))
            stops = [canvas.cached + width for canvas in waiting]
            self._forward(waiting, torch.tensor(self._rows(waiting)), width, stops)
            for canvas, stop in zip(waiting, stops):
                self._note_final(cache, canvas, stop)

    def _forward(
        self,
        canvases: Sequence[Canvas],
        rows: int | torch.Tensor,
        width: int,
        stops: list[int],
        static: bool = False,
    ) -> torch.Tensor:
        """(rows, width, D) of windows that begin where the cache ends and see all positions before their `stops`."""
        ids = torch.stack([row for canvas in canvases for row in self._ids(canvas, canvas.cached, width)])
        starts = torch.tensor([canvas.cached for canvas in canvases]).repeat_interleave(self.lanes)
        positions = (starts[:, None] + torch.arange(width)).to(self.device)
        ends = torch.tensor(stops).repeat_interleave(self.lanes)
        visible = self.cache.columns if static and self.cache is not None else max(stops)
        if self.cache is not None:
            self.cache.seek(rows, positions, visible, needed=int(starts.max()) + width)
        needs_mask = static or width > self.grid or len(set(stops)) > 1
        mask = self._attention_mask(positions, ends.to(self.device), visible) if needs_mask else None
        hidden_states = (self.step if static else self.transformer)(
            input_ids=ids.to(self.device),
            attention_mask={"full_attention": mask},
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        ).last_hidden_state
        if self.cache is not None:
            self.cache.window = None
        return hidden_states

    def _attention_mask(self, positions: torch.Tensor, ends: torch.Tensor, keys: int) -> Any:
        """Mask of the attention implementation: earlier blocks and the own one, but nothing behind a row's end."""

        own_block, key_block = positions // self.grid, torch.arange(keys, device=self.device) // self.grid

        def sees(batch_idx, head_idx, q_idx, kv_idx):
            return (key_block[kv_idx] <= own_block[batch_idx, q_idx]) & (kv_idx < ends[batch_idx])

        make = ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return make(
            batch_size=len(positions),
            q_length=positions.shape[1],
            kv_length=keys,
            mask_function=sees,
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=self.transformer.dtype,
            config=self.config,
            use_vmap=True,
            device=self.device,
        )

    def _ids(self, canvas: Canvas, start: int = 0, width: int | None = None) -> list[torch.Tensor]:
        """(width,) tokens of each of a canvas's rows; masks follow behind its end."""
        stop = len(canvas.tokens) if width is None else start + width
        tokens, given = canvas.tokens[start:stop], canvas.given[start:stop]
        lanes = [tokens] if self.lanes == 1 else [tokens, tokens.masked_fill(given, canvas.mask_token)]
        missing = stop - start - len(tokens)
        return [torch.nn.functional.pad(row, (0, missing), value=canvas.mask_token) for row in lanes]

    def _note_final(self, cache: SteerlingCache, canvas: Canvas, columns: int) -> None:
        canvas.cached = columns
        for row, ids in zip(self._rows([canvas]), self._ids(canvas, 0, columns)):
            cache.note_final(row, ids)

    def _move_to_the_front(self, cache: SteerlingCache, live: Sequence[Canvas]) -> None:
        """Unless all rows take part anyway, those of finished canvases go behind the others."""
        if self.width is None and self.order[: len(live)] != list(live):
            order = [*live, *(canvas for canvas in self.order if canvas not in live)]
            cache.take(self._rows(order))
            self.order = order

    def _rows(self, canvases: Sequence[Canvas]) -> list[int]:
        numbers = [self.order.index(canvas) for canvas in canvases]
        return [number * self.lanes + lane for number in numbers for lane in range(self.lanes)]


__all__ = ["WindowEncoder"]
