"""Forward passes over the windows of unfinished rows, on an exact block cache or without one."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .cache_steerling import SteerlingCache
from .canvas_steerling import Canvas
from .hooks_steerling import Injections
from .steered_steerling import Steering

PIECE = 512  # positions of a long prompt that are computed at a time
PASS_COST = 16  # positions that a CPU could compute in the time that a pass takes beside its positions


class WindowEncoder:
    """
    Computes the last hidden states of each canvas's window: from its first attention block with a token that the pass
    before did not see, as far as its current block can see. What lies before the window cannot see it, and is as it was.
    Without a cache, windows begin at the start of the row.

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
    ):
        self.transformer, self.config, self.device = transformer, config, device
        self.cache, self.width = cache, width
        self.step: Callable = transformer  # computes windows of a fixed length; may be compiled
        self.lanes = 2 if guided else 1
        self.grid = config.diff_block_size
        # A block that is decided rides along with the next ones, in windows up to this length.
        self.longest = width or 3 * self.grid
        # The canvases in the order of their rows in the cache.
        self.order = list(canvases)
        self.copies = copies
        self.steering: Steering | None = None  # is told of every pass
        # Last hidden states (1 or 2, block, D) of each canvas's current block, by the canvas's number.
        self.states: dict[int, torch.Tensor] = {}
        # Masks of the last passes, a step's at most, by what they depend on: most steps move no window.
        self._masks: OrderedDict[Any, Any] = OrderedDict()

    def encode(self, live: Sequence[Canvas], masked: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        One forward pass.

        Args:
            live: The unfinished canvases; none may come back that was left out before.
            masked: Positions (n_i,) of each one's current block.

        Returns:
            (1 or 2, n, D) last hidden states at these positions, one canvas after the other; those of the second rows of
            guided canvases come second.
        """
        if self.cache is not None:
            self._forget_what_changed(self.cache, live)
            self._commit(self.cache, live, self.longest)
            self._move_to_the_front(self.cache, live)
        canvases = list(live) if self.width is None else self.order
        stops = [canvas.computed + 1 if canvas.finished else canvas.visible for canvas in canvases]
        windows = self._compute(canvases, stops)
        if self.steering is not None:
            self.steering.choose(live, self.lanes, masked)
        chosen = []
        for canvas, stop, window in zip(canvases, stops, windows):
            if not canvas.finished:
                self._keep_states(canvas, window)
                self._note_computed(canvas, stop)
        for canvas, positions in zip(live, masked):
            states = self.states[canvas.index]
            chosen.append(states[:, (positions - canvas.blocks[0].start).to(states.device)])
        return torch.cat(chosen, dim=1)

    def _compute(self, canvases: Sequence[Canvas], stops: list[int]) -> list[torch.Tensor]:
        """The window (1 or 2, W, D) of each canvas."""
        if self.width is not None:
            hidden_states = self._forward(canvases, len(canvases) * self.lanes, self.width, stops, static=True)
            return list(hidden_states.split(self.lanes))
        needs = [stop - canvas.computed for canvas, stop in zip(canvases, stops)]
        # Flex attention is compiled for its shapes, so it sees few.
        apart = self.device.type == "cpu" and self.config._attn_implementation != "flex_attention"
        windows: list[Any] = [None] * len(canvases)
        for own in _share_passes(needs) if apart else [range(len(needs))]:
            group = [canvases[number] for number in own]
            every = len(own) == len(canvases)
            rows = len(group) * self.lanes if every else torch.tensor(self._rows(group), device="cpu")
            width = max(needs[number] for number in own)
            hidden_states = self._forward(group, rows, width, [stops[number] for number in own])
            for number, window in zip(own, hidden_states.split(self.lanes)):
                windows[number] = window
        return windows

    def _forget_what_changed(self, cache: SteerlingCache, live: Sequence[Canvas]) -> None:
        """Where operations have begun or ended, masked positions have other keys and values now."""
        for canvas in live:
            if self.steering is not None and self.steering.changed(canvas):
                # In the second row of a guided canvas the whole prompt is masked.
                self._note_final(cache, canvas, canvas.cached if self.lanes == 1 else 0)

    def _keep_states(self, canvas: Canvas, window: torch.Tensor) -> None:
        """Take over what a window (1 or 2, W, D) has of the current block; what it has not is as it was."""
        block, start = canvas.blocks[0], canvas.computed
        if start <= block.start:
            own = window[:, block.start - start : block.stop - start]
            # What a compiled step gives may be memory that the next one writes to (CUDA graphs).
            self.states[canvas.index] = own if self.width is None else own.clone()
        else:
            # Into a new tensor: the old one may be a part of an earlier window.
            kept = self.states[canvas.index][:, : start - block.start]
            self.states[canvas.index] = torch.cat([kept, window[:, : block.stop - start]], dim=1)

    def _note_computed(self, canvas: Canvas, stop: int) -> None:
        """After a pass over all positions of a canvas before `stop` that were not computed."""
        if self.cache is None:
            return
        if canvas.final > canvas.cached:
            self._note_final(self.cache, canvas, canvas.final)
        # In a window of fixed length, there is nothing to be gained by a later start.
        canvas.computed = stop if self.width is None else canvas.cached

    def restore_order(self, canvases: Sequence[Canvas]) -> None:
        """Bring the rows of the cache back into the order of the canvases."""
        if self.cache is not None:
            self.cache.take(self._rows(canvases))
            self.order = list(canvases)

    def forget_steered(self) -> None:
        """What steering made of a masked prompt is no use to another call."""
        if self.cache is not None and self.steering is not None and self.lanes == 2:
            for row in range(1, self.cache.rows, 2):
                self.cache.note_final(row, torch.empty(0, dtype=torch.long, device="cpu"))

    def fill(self) -> None:
        """Compute what the cache does not have of the prompts' blocks, unless they are few enough to ride along."""
        if self.cache is None:
            return
        cache, canvases, copies = self.cache, self.order, self.copies
        if cache.rows == len(canvases) * self.lanes:  # a chat that has had several answers before
            copies = 1
        self.order = canvases[::copies]
        cache.start(len(self.order) * self.lanes)
        # Steering makes something else of a masked prompt.
        reusable = self.steering is None or self.lanes == 1
        for row, canvas in enumerate(self.order):
            agreed = min(cache.agreement(row * self.lanes + i, ids) for i, ids in enumerate(self._ids(canvas)))
            self._note_final(cache, canvas, min(agreed, canvas.final) // self.grid * self.grid if reusable else 0)
        self._commit(cache, self.order, self.longest if copies == 1 else 0)
        if copies > 1:
            leaders = [leader for leader in self.order for _ in range(copies)]
            cache.take(self._rows(leaders))
            for canvas, leader in zip(canvases, leaders):
                canvas.cached = canvas.computed = leader.cached
        self.order = canvases
        if self.width is not None:
            kind = self.device.type
            autocast = torch.is_autocast_enabled(kind)
            cache.pin(self.transformer.blocks, torch.get_autocast_dtype(kind) if autocast else self.transformer.dtype)

    def _commit(self, cache: SteerlingCache, canvases: Sequence[Canvas], longest: int) -> None:
        """Passes for nothing but the keys and values of decided blocks, for windows that would get too long with them."""
        piece = max(1, PIECE // self.grid) * self.grid
        while waiting := [
            c for c in canvases if not c.finished and c.final > c.computed and c.visible - c.computed > longest
        ]:
            # No longer than the shortest need, so that no row is padded.
            width = min(piece, *(canvas.final - canvas.computed for canvas in waiting))
            stops = [canvas.computed + width for canvas in waiting]
            self._forward(waiting, torch.tensor(self._rows(waiting), device="cpu"), width, stops)
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
        """(rows, width, D) of windows that begin with what is not computed and see all positions before their `stops`."""
        ids = torch.stack([row for canvas in canvases for row in self._ids(canvas, canvas.computed, width)])
        starts = torch.tensor([canvas.computed for canvas in canvases], device="cpu").repeat_interleave(self.lanes)
        places = starts[:, None] + torch.arange(width, device="cpu")
        positions = places.to(self.device)
        ends = torch.tensor(stops, device="cpu").repeat_interleave(self.lanes)
        visible = self.cache.columns if static and self.cache is not None else max(stops)
        needs_mask = static or width > self.grid or len(set(stops)) > 1
        try:
            if self.cache is not None:
                self.cache.seek(rows, positions, visible, needed=int(starts.max()) + width)
            mask = self._attention_mask(starts, ends, width, visible) if needs_mask else None
            with self._announced(canvases, ids, places, ends) as injections:
                return (self.step if static else self.transformer)(
                    input_ids=ids.to(self.device),
                    attention_mask={"full_attention": mask},
                    position_ids=positions,
                    cache=self.cache,
                    use_cache=self.cache is not None,
                    injections=injections,
                    return_dict=True,
                ).last_hidden_state
        finally:
            if self.cache is not None:
                self.cache.window = None

    def _announced(
        self, canvases: Sequence[Canvas], ids: torch.Tensor, places: torch.Tensor, ends: torch.Tensor
    ) -> AbstractContextManager[Injections | None]:
        """Tell steering of a pass; what lies behind the `ends` (rows,), as in rows that have finished, is no text."""
        if self.steering is None:
            return nullcontext()
        live = torch.tensor([not canvas.finished for canvas in canvases], device="cpu").repeat_interleave(self.lanes)
        masked = (ids == self.config.mask_token_id) & (places < ends[:, None]) & live[:, None]
        return self.steering.window(canvases, self.lanes, places, masked, self.device)

    def _attention_mask(self, starts: torch.Tensor, ends: torch.Tensor, width: int, keys: int) -> Any:
        """
        Mask of the attention implementation for `width` positions from `starts` (rows,): earlier blocks and the own one,
        but nothing behind `ends` (rows,).
        """
        wanted = (tuple(starts.tolist()), tuple(ends.tolist()), width, keys)
        if wanted in self._masks:
            self._masks.move_to_end(wanted)
            return self._masks[wanted]
        own_block = ((starts[:, None] + torch.arange(width, device="cpu")) // self.grid).to(self.device)
        key_block, ends = torch.arange(keys, device=self.device) // self.grid, ends.to(self.device)

        def sees(batch_idx, head_idx, q_idx, kv_idx):
            return (key_block[kv_idx] <= own_block[batch_idx, q_idx]) & (kv_idx < ends[batch_idx])

        make = ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mask = make(
            batch_size=len(starts),
            q_length=width,
            kv_length=keys,
            mask_function=sees,
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=self.transformer.dtype,
            config=self.config,
            use_vmap=True,
            device=self.device,
        )
        self._masks[wanted] = mask
        while len(self._masks) > len(self.order):
            self._masks.popitem(last=False)
        return mask

    def _ids(self, canvas: Canvas, start: int = 0, width: int | None = None) -> list[torch.Tensor]:
        """(width,) tokens of each of a canvas's rows; masks follow behind its end."""
        stop = len(canvas.tokens) if width is None else start + width
        tokens, given = canvas.tokens[start:stop], canvas.given[start:stop]
        lanes = [tokens] if self.lanes == 1 else [tokens, tokens.masked_fill(given, canvas.mask_token)]
        missing = stop - start - len(tokens)
        return [torch.nn.functional.pad(row, (0, missing), value=canvas.mask_token) for row in lanes]

    def _note_final(self, cache: SteerlingCache, canvas: Canvas, columns: int) -> None:
        canvas.cached = canvas.computed = columns
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


def _share_passes(needs: Sequence[int]) -> list[list[int]]:
    """
    Which rows share a pass, so that the sum over passes of rows times the widest row's need, and of `PASS_COST` for each, is
    least. A CPU's time goes with the positions that it computes, padding included; an accelerator's, at least for few rows,
    with the passes.

    Args:
        needs: Positions that each row has to compute.

    Returns:
        Numbers of rows, in their order, by pass.
    """
    order = sorted(range(len(needs)), key=lambda number: needs[number])
    # Of the first so many rows of the order: the least cost, and where its last pass begins.
    best = [(0, 0)]
    for stop in range(1, len(order) + 1):
        width = needs[order[stop - 1]]
        best.append(min((best[start][0] + PASS_COST + (stop - start) * width, start) for start in range(stop)))
    passes, stop = [], len(order)
    while stop:
        start = best[stop][1]
        passes.append(sorted(order[start:stop]))
        stop = start
    return passes


__all__ = ["WindowEncoder"]
