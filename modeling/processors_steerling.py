"""What changes a step's logits before positions are chosen: the user's processors, and biases of sequences."""

from collections.abc import Callable, Mapping, Sequence

import torch

from .canvas_steerling import Canvas, Rows
from .unmasking_steerling import completions


class OwnProcessors:
    """
    The user's logits processors, which are called as transformers calls them: with all rows of the batch.

    The scores of a column, (rows, V), come with what stands left of it, (rows, W + t): padding and prompts as they were given, and
    undecided positions as mask tokens. A step calls a processor once for each column in which some row has a masked position;
    scores of the other rows are 0 and lead to nothing. So whatever a processor keeps for each row stays with that row; but what
    it counts from call to call is no number of tokens.

    A processor with a true attribute `sees_canvas` is called once a step instead, with the scores of all masked positions, (n, V),
    and with the canvas of each position's row, (n, T), so it sees both sides.

    Args:
        processors: Callables of ids and scores that return scores.
        rows: All rows, also those that have ended.
    """

    def __init__(self, processors: Sequence[Callable], rows: Rows):
        self.processors, self.rows = processors, rows
        # (n,) highest scores of the present step, to tell who made them what cannot be used.
        self.before: torch.Tensor | None = None
        self.after: torch.Tensor | None = None

    @property
    def names(self) -> str:
        """Their classes."""
        return ", ".join(type(processor).__name__ for processor in self.processors)

    def process(
        self, canvases: Sequence[Canvas], masked: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        """(n, V) processed logits of the (n_i,) masked positions of some canvases."""
        self.before = logits.amax(dim=-1)
        for processor in self.processors:
            if getattr(processor, "sees_canvas", False):
                logits = _called(processor, canvases_of(canvases, masked, logits.device), logits)
            else:
                logits = self._by_column(processor, canvases, masked, logits)
        self.after = logits.amax(dim=-1)
        return logits

    def _by_column(
        self, processor: Callable, canvases: Sequence[Canvas], masked: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        columns = torch.cat([positions - canvas.prompt_length for canvas, positions in zip(canvases, masked)])
        numbers = torch.cat([positions.new_full((len(positions),), c.index) for c, positions in zip(canvases, masked)])
        result = torch.empty_like(logits)
        for column in columns.unique().tolist():
            here = (columns == column).nonzero()[:, 0]
            places, rows = here.to(logits.device), numbers[here].to(logits.device)
            scores = logits.new_zeros(len(self.rows.canvases), logits.shape[-1])
            scores[rows] = logits[places]
            left = self.rows.tokens(stop=column).to(logits.device)
            result[places] = _called(processor, left, scores)[rows]
        return result


def _called(processor: Callable, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    shape = scores.shape
    processed = processor(ids, scores)
    if not isinstance(processed, torch.Tensor) or processed.shape != shape or not processed.is_floating_point():
        found = tuple(processed.shape) if isinstance(processed, torch.Tensor) else repr(processed)
        raise ValueError(
            f"`logits_processor`: {type(processor).__name__} returned {found} for scores of shape {tuple(shape)}: return scores of "
            "that shape."
        )
    return processed.to(scores.dtype)


def canvases_of(canvases: Sequence[Canvas], masked: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """(n, T) canvas of each of n masked positions; mask tokens follow on the shorter ones."""
    rows = [canvas.tokens for canvas in canvases]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=canvases[0].mask_token)
    counts = torch.tensor([len(positions) for positions in masked], device="cpu")
    return padded.to(device).repeat_interleave(counts.to(device), dim=0)


class SequenceBias:
    """
    `sequence_bias` of transformers for positions that are decided in any order: a bias is added to the logit of whichever token
    would complete its sequence. From left to right that is the last one; a sequence of one token is biased everywhere.

    Args:
        biases: Sequences of token ids, and what is added to the logit.
        vocabulary: Number of tokens.
        device: Where logits are.
    """

    def __init__(self, biases: Mapping[tuple[int, ...], float], vocabulary: int, device: torch.device):
        single = {sequence[0]: bias for sequence, bias in biases.items() if len(sequence) == 1}
        self.sequences = [
            (torch.tensor(sequence, device="cpu"), bias) for sequence, bias in biases.items() if len(sequence) > 1
        ]
        self.everywhere = torch.zeros(vocabulary, dtype=torch.float32, device="cpu")
        for token, bias in single.items():
            self.everywhere[token] = bias
        self.everywhere = self.everywhere.to(device)

    def add(self, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor) -> None:
        """Add to (n, V) logits, in place, what belongs to n positions of a (T,) canvas."""
        logits += self.everywhere
        for sequence, bias in self.sequences:
            for token, completed in completions(sequence, tokens, positions):
                logits[completed.nonzero()[:, 0].to(logits.device), token] += bias


__all__ = ["OwnProcessors", "SequenceBias", "canvases_of"]
