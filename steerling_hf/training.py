"""Fine-tuning and training: the collator that noises rows for `SteerlingForDiffusionLM` under transformers' Trainer."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .modeling.loss_steerling import IGNORE_INDEX, draw_noise


@dataclass
class DiffusionCollator:
    """
    Pads rows on the right and decides what is masked, so that the noise of an example does not depend on its batch.

    Every attention block is noised as the loss asks (`loss_steerling.draw_noise`). Since generation begins wherever the
    prompt ends, and its blocks of `diff_block_size` tokens then straddle the attention grid, some blocks are noised the
    way generation will meet them:

    - prompt: the block's first tokens stay clean and without loss; sometimes its last tokens stay masked and without loss;
    - straddle: the end of one block and the start of the next are noised together, the second sees the first as noised,
      and the rest of the second stays masked.

    Each remains an upper bound on the negative log-likelihood of its targets given what the model sees.

    Args:
        config: The model's configuration.
        prompt_probability: Share of the blocks that begin with a clean prompt.
        straddle_probability: Share of the blocks that continue a window begun in the block before.
        seed: `None` draws fresh noise from torch's global generator, example by example, so that gradient accumulation
            over the same examples changes nothing. A number makes the noise a function of the seed and the tokens, as
            evaluation wants it.

    Raises:
        ValueError: A probability or the seed is out of range, or an example is empty or too long or has columns of other lengths.
    """

    config: Any
    prompt_probability: float = 0.0
    straddle_probability: float = 0.0
    seed: int | None = None

    def __post_init__(self):
        for name in ("prompt_probability", "straddle_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; choose a share from 0 to 1.")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"`seed` is {self.seed}; choose a number from 0 to {2**31 - 1}, or None.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collate examples with `input_ids` (T), optionally `labels` (T, -100 for no loss; by default all tokens are targets),
        `concept_labels` (T lists of concept ids, each once in a list), and `attention_mask` (T), where 0 is padding, which is
        taken out first.

        Returns:
            `input_ids`, `attention_mask`, `labels`, `noise_mask` of shape (batch, time), `noisy_context` (batch, blocks),
            and `concept_labels` (batch, time, K), where K may be 0: the arguments of the model's forward.
        """
        examples = [_unpadded(example) for example in examples]
        rows = [self._noise(example) for example in examples]

        def padded(name: str, value: int) -> torch.Tensor:
            return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

        pad = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        batch = {
            "input_ids": padded("input_ids", pad),
            "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", IGNORE_INDEX),
            "noise_mask": padded("noise_mask", False),
            "noisy_context": padded("noisy_context", False),
        }
        # Even if there are none: Trainer's evaluation finds a loss only where all of a model's labels are.
        found = [example.get("concept_labels") for example in examples]
        batch["concept_labels"] = _pad_concepts(
            [[[]] * len(row["input_ids"]) if concepts is None else concepts for row, concepts in zip(rows, found)]
        )
        return batch

    def _noise(self, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(example["input_ids"], dtype=torch.long, device="cpu")
        self._check(ids, example)
        given = example.get("labels")
        labels = ids if given is None else torch.as_tensor(given, dtype=torch.long, device="cpu")
        generator = torch.Generator("cpu")
        generator.manual_seed(self._seed_of(ids))
        window, tail, noisy_context = self._windows(len(ids), generator)
        targets = (labels != IGNORE_INDEX) & window
        if not targets.any():
            # The windows missed all that there is to learn: noise every target, as without windows.
            targets = labels != IGNORE_INDEX
            tail, noisy_context = torch.zeros_like(tail), torch.zeros_like(noisy_context)
        noise = draw_noise(targets[None], self.config.diff_block_size, generator)[0]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels.masked_fill(~targets, IGNORE_INDEX),
            "noise_mask": noise | (tail & (labels != IGNORE_INDEX)),
            "noisy_context": noisy_context,
        }

    def _seed_of(self, ids: torch.Tensor) -> int:
        # Processes that train together draw the same numbers, but for other examples. Of a seed, torch's generator on the
        # CPU takes 32 bits, which both have to share.
        seed = int(torch.randint(2**32, (), device="cpu")) if self.seed is None else self.seed
        return zlib.crc32(ids.numpy().tobytes(), seed)

    def _windows(self, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Targets' windows and masked tails, (length,), and which blocks see their predecessor as noised, (blocks,)."""
        size = self.config.diff_block_size
        blocks = -(-length // size)
        straddles, prompts, tails, starts, ends = torch.rand(
            5, blocks, generator=generator, dtype=torch.float32, device="cpu"
        ).tolist()
        first, last = [0] * blocks, [size] * blocks
        noisy_context = [False] * blocks
        for block in range(blocks):
            previous = block - 1
            if block and not noisy_context[previous] and straddles[block] < self.straddle_probability:
                noisy_context[block] = True
                first[previous], last[previous] = 1 + int(starts[block] * (size - 1)), size
                last[block] = first[previous]
            elif prompts[block] < self.prompt_probability:
                first[block] = int(starts[block] * size)
                if tails[block] < 0.5:
                    last[block] = first[block] + 1 + int(ends[block] * (size - first[block]))
        column = torch.arange(blocks * size, device="cpu").view(blocks, size) % size
        from_start = column >= torch.tensor(first, device="cpu")[:, None]
        to_end = column < torch.tensor(last, device="cpu")[:, None]
        window, tail = (from_start & to_end).flatten(), (~to_end).flatten()
        return window[:length], tail[:length], torch.tensor(noisy_context, device="cpu")

    def _check(self, ids: torch.Tensor, example: Mapping[str, Any]) -> None:
        if ids.dim() != 1 or not len(ids):
            raise ValueError(
                f"`input_ids` of an example have shape {tuple(ids.shape)}; give a list of at least one id."
            )
        if len(ids) > self.config.block_size:
            raise ValueError(
                f"`input_ids` of an example hold {len(ids)} tokens, more than the context of {self.config.block_size}; cut "
                "it first."
            )
        # Tables have None where an example has nothing.
        given = {name: example[name] for name in ("labels", "concept_labels") if example.get(name) is not None}
        for name, values in given.items():
            if len(values) != len(ids):
                raise ValueError(f"`{name}` of an example has length {len(values)}; `input_ids` have {len(ids)}.")
        if "concept_labels" in given and not self.config.interpretable:
            raise ValueError(
                "`concept_labels` of an example need concept heads, and this model has none; leave them out."
            )


def _unpadded(example: Mapping[str, Any]) -> dict[str, Any]:
    """The example without what its own attention mask says is padding."""
    mask = example.get("attention_mask")
    if mask is None:
        return dict(example)
    names = ("input_ids", "labels", "concept_labels")
    columns = {name: example[name] for name in names if example.get(name) is not None}
    for name, values in columns.items():
        if len(values) != len(mask):
            raise ValueError(f"`attention_mask` of an example has length {len(mask)}; `{name}` has {len(values)}.")
    real = torch.as_tensor(mask, device="cpu").bool()
    if real.dim() != 1 or real.all():
        return dict(example)
    text = real.nonzero()[:, 0].tolist()
    return {name: [values[i] for i in text] for name, values in columns.items()}


def _pad_concepts(rows: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    time = max(map(len, rows))
    width = max((len(concepts) for row in rows for concepts in row), default=0)
    padded = torch.full((len(rows), time, width), IGNORE_INDEX, dtype=torch.long, device="cpu")
    for i, row in enumerate(rows):
        for j, concepts in enumerate(row):
            padded[i, j, : len(concepts)] = torch.as_tensor(concepts, dtype=torch.long, device="cpu")
    return padded


__all__ = ["DiffusionCollator"]
