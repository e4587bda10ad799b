"""
The exact block cache: keys and values of attention blocks in which nothing is left to decide.

Later blocks are invisible to a block, so its keys and values are final once all its tokens are. A forward pass computes
a window of each row, from its first unfinished block on, over the columns that are cached. A column is a position in the
row, whatever the other rows of the batch are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

GROWTH = 256  # columns


@dataclass
class Window:
    """
    Where the next forward pass writes and reads.

    Args:
        rows: Cache rows of the pass: so many from the first on, or their numbers, (rows,).
        columns: (rows, W) columns that it writes.
        visible: It reads so many columns from the first on.
    """

    rows: int | torch.Tensor
    columns: torch.Tensor
    visible: int


class SteerlingCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, key/value heads, columns, head size); the cache says where to write."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: "SteerlingCache"):
        super().__init__()
        self.cache = cache
        self.is_compileable = cache.fixed

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for `cache.rows` rows; zeros, since what is invisible is still multiplied by zero."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.cache.rows, key_states.shape[1], self.cache.columns, key_states.shape[3])
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def grow(self, columns: int) -> None:
        """Make room for `columns` columns."""
        if self.is_initialized and self.keys.shape[2] < columns:
            missing = (0, 0, 0, columns - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, missing)
            self.values = torch.nn.functional.pad(self.values, missing)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the window's keys and values, (rows, heads, W, head size), and return all that are visible."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.cache.window
        if window is None:
            raise ValueError(
                "`cache` (`past_key_values`) is a SteerlingCache, which only generate() fills, since rows have columns of their own: "
                "pass a DynamicCache to forward()."
            )
        columns = window.columns.to(self.keys.device)
        chosen: slice | torch.Tensor
        if isinstance(window.rows, int):
            numbers, chosen = torch.arange(window.rows, device=columns.device), slice(window.rows)
        else:
            numbers = chosen = window.rows.to(self.keys.device)
        self.keys[numbers[:, None], :, columns] = key_states.transpose(1, 2)
        self.values[numbers[:, None], :, columns] = value_states.transpose(1, 2)
        return self.keys[chosen, :, : window.visible], self.values[chosen, :, : window.visible]

    def get_seq_length(self) -> int:
        """Columns that are final in every row."""
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        """Columns that there is room for, -1 if it grows."""
        return self.cache.columns if self.cache.fixed else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible columns, and the first of them."""
        window = self.cache.window
        return (self.cache.get_seq_length() + query_length if window is None else window.visible), 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows of these numbers, some perhaps more than once."""
        if self.is_initialized:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))


class SteerlingCache(Cache):
    """
    Keys and values of finished attention blocks, and the tokens that they belong to.

    `generate` makes one by itself and returns it as `cache`. Given again with a longer prompt, as in the turns
    of a chat, it spares the computation of the blocks that agree with that prompt; what differs is computed anew. It
    knows its tokens but not the weights and hooks that it was made with: after changing those, start with a new one.

    Args:
        config: The model's configuration.
        columns: Make room for so many positions at once and never grow; by default the cache grows as it is filled.
    """

    # Of SteerlingCacheLayer; the base class allows no narrower list.
    layers: list[Any]

    def __init__(self, config, columns: int | None = None):
        self.fixed = columns is not None
        self.columns = columns or 0
        super().__init__(layers=[SteerlingCacheLayer(self) for _ in range(config.n_layers)])
        # Token ids of the final columns of each row.
        self.tokens: list[torch.Tensor] = []
        self.window: Window | None = None

    @property
    def rows(self) -> int:
        """Number of rows; a guided row has a second one, in which the prompt is masked."""
        return len(self.tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are final in every row."""
        return min(map(len, self.tokens), default=0)

    def start(self, rows: int) -> None:
        """Have so many rows, empty if there were none; and be written to, where it was made in inference mode and that is over."""
        for layer in self.layers:
            if layer.is_initialized and layer.keys.is_inference() and not torch.is_inference_mode_enabled():
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        if not self.tokens:
            self.tokens = [torch.empty(0, dtype=torch.long, device="cpu")] * rows

    def agreement(self, row: int, tokens: torch.Tensor) -> int:
        """Number of first tokens of (T,) ids whose keys and values a row has."""
        length = min(len(self.tokens[row]), len(tokens))
        differs = (self.tokens[row][:length] != tokens[:length]).nonzero()
        return int(differs[0]) if len(differs) else length

    def pin(self, blocks: Iterable[Any], dtype: torch.dtype) -> None:
        """Make room now, and tell compilers that keys and values stay where they are and are written in place."""
        for layer, block in zip(self.layers, blocks):
            attention, device = block.attn, block.attn.c_attn.weight.device
            if not layer.is_initialized and device.type != "meta":
                states = torch.empty(0, attention.kv_heads, 0, attention.head_dim, dtype=dtype, device=device)
                layer.lazy_initialization(states, states)
            if layer.is_initialized:
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)

    def seek(self, rows: int | torch.Tensor, columns: torch.Tensor, visible: int, needed: int) -> None:
        """Say where the next forward pass writes and reads, and how many columns that needs."""
        if needed > self.columns:
            self.columns = -(-needed // GROWTH) * GROWTH
            for layer in self.layers:
                layer.grow(self.columns)
        self.window = Window(rows, columns, visible)

    def note_final(self, row: int, tokens: torch.Tensor) -> None:
        """Note that the columns of (T,) token ids are final in a row, and no others are."""
        self.tokens[row] = tokens

    def take(self, rows: Sequence[int]) -> None:
        """Keep the rows of these numbers, in this order, some perhaps more than once."""
        if list(rows) != list(range(self.rows)):
            self.reorder_cache(torch.LongTensor(rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """`take`, as the library calls it."""
        super().reorder_cache(beam_idx)
        self.tokens = [self.tokens[row] for row in beam_idx.tolist()]

    def reset(self) -> None:
        """Forget everything."""
        self.tokens, self.window = [], None
        self.columns = self.columns if self.fixed else 0
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False


__all__ = ["SteerlingCache", "SteerlingCacheLayer"]
