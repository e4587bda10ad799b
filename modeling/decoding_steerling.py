"""The unmasking loop: step by step until every canvas is decided."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import BaseStreamer

from .attribution_steerling import ConceptRecorder
from .canvas_steerling import Canvas, Rows
from .criteria_steerling import RowCriteria
from .processors_steerling import OwnProcessors, SequenceBias, canvases_of
from .unmasking_steerling import ForbiddenPhrases, TokenSampler, UndecidableError
from .windows_steerling import WindowEncoder


@dataclass
class Decisions:
    """
    How a step decides.

    Args:
        rule: Chooses positions from (n, V) logits.
        sampler: Chooses tokens.
        processors: Change (n, V) logits in turn, given the (n, T) canvases of the positions; none if empty or `None`.
        forbidden: (n,) tokens that are never written.
        bias: What is added before the processors, `None` for nothing.
        own: The user's processors, which come after the others, `None` for none.
        phrases: What must not be written, `None` for nothing.
        guidance_scale: Weight of the prompt, `None` for a forward pass without guidance.
        ends: (n,) tokens that end a row.
        least: New tokens before which no end token is written.
        criteria: Stopping criteria, `None` for none.
        deadline: Time of `time.monotonic` at which all rows end, with what is decided from left to right.
        log_probabilities: Whether to keep those of the decided tokens.
        keep_scores, keep_logits: Whether to keep the (V,) processed and unprocessed logits of decided new positions.
        computed: Says how logits are computed, for errors.
        constraints: Names of the arguments that rule tokens out, for errors.
    """

    rule: Callable
    sampler: TokenSampler
    processors: Callable | None
    forbidden: torch.Tensor
    phrases: ForbiddenPhrases | None = None
    bias: SequenceBias | None = None
    own: OwnProcessors | None = None
    guidance_scale: float | None = None
    ends: torch.Tensor | None = None
    least: int = 0
    criteria: RowCriteria | None = None
    deadline: float | None = None
    log_probabilities: bool = False
    keep_scores: bool = False
    keep_logits: bool = False
    computed: Callable[[], str] = str
    constraints: Sequence[str] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether more happens to logits than that tokens are ruled out."""
        return bool(self.processors) or self.own is not None or self.bias is not None


def unmask(
    compute_logits: Callable,
    encoder: WindowEncoder,
    canvases: Sequence[Canvas],
    decisions: Decisions,
    stream: "BlockStream",
    recorder: ConceptRecorder | None = None,
) -> None:
    """
    Decide all positions of the canvases, in place.

    Args:
        compute_logits: (n, V) logits of (n, D) last hidden states.
        encoder: Forward passes of the canvases.
        canvases: The rows.
        decisions: How a step decides.
        stream: Is shown the canvases after every step.
        recorder: Is told of what is decided, and computes the logits in place of `compute_logits`.
    """
    if recorder is not None:
        compute_logits = recorder.compute_logits
    stream.show(canvases)
    encoder.fill()
    while live := [canvas for canvas in canvases if not canvas.finished]:
        masked = [canvas.masked() for canvas in live]
        logits = masked_logits(compute_logits, encoder, live, masked, decisions.guidance_scale)
        # Processors may write into their input.
        changed = decisions.keep_logits or (recorder is not None and decisions.changes_logits)
        raw = logits.clone() if changed else logits
        logits = _process(decisions, live, masked, logits)
        place = 0
        for canvas, positions, scores in zip(live, masked, logits.split([len(rows) for rows in masked])):
            try:
                chosen, tokens = _decide(canvas, positions, scores, decisions)
            except UndecidableError as error:
                raise ValueError(_why_undecidable(decisions, canvas, positions, scores, place, error.index)) from None
            if recorder is not None:
                places = chosen + place
                recorder.note(canvas, positions[chosen.cpu()], tokens, places, raw[places, tokens])
            if decisions.keep_logits:
                canvas.logits.update(zip(positions[chosen.cpu()].tolist(), raw[chosen + place]))
            place += len(positions)
            canvas.advance(decisions.ends)
            if decisions.deadline is not None and time.monotonic() >= decisions.deadline:
                canvas.finish(max(canvas.prompt_length, min(canvas.decided_prefix, canvas.length)))
        if decisions.criteria is not None:
            decisions.criteria.end_rows()
        stream.show(canvases)


def masked_logits(
    compute_logits: Callable,
    encoder: WindowEncoder,
    canvases: Sequence[Canvas],
    masked: Sequence[torch.Tensor],
    guidance_scale: float | None,
) -> torch.Tensor:
    """
    (n, V) float32 logits at the masked positions of the canvases, one canvas after the other; no others are projected.

    Guidance is the classifier-free one (Ho and Salimans 2022, arXiv:2207.12598) against the canvas whose prompt is
    masked; the reference's `cfg_scale` is `guidance_scale - 1`.
    """
    hidden_states = encoder.encode(canvases, masked)
    logits = compute_logits(hidden_states.flatten(0, 1)).to(encoder.device, torch.float32)
    if guidance_scale is None:
        return logits
    full, blind = logits.chunk(2)
    return blind + guidance_scale * (full - blind)


def _process(
    decisions: Decisions, canvases: Sequence[Canvas], masked: Sequence[torch.Tensor], logits: torch.Tensor
) -> torch.Tensor:
    """Run the processors, and rule out what is never written."""
    if decisions.bias is not None:
        for canvas, positions, own in zip(canvases, masked, logits.split([len(rows) for rows in masked])):
            decisions.bias.add(canvas.tokens, positions, own)
    if decisions.processors:
        logits = decisions.processors(canvases_of(canvases, masked, logits.device), logits)
    if decisions.own is not None:
        logits = decisions.own.process(canvases, masked, logits)
    # In place: logits are large, and nobody needs them as they were.
    logits.index_fill_(-1, decisions.forbidden, -torch.inf)
    if decisions.ends is not None:  # which would end nothing inside a prompt
        early = [positions < canvas.prompt_length + decisions.least for canvas, positions in zip(canvases, masked)]
        places = torch.cat(early).nonzero()
        logits[places.to(logits.device), decisions.ends.to(logits.device)] = -torch.inf
    return logits


def _decide(
    canvas: Canvas, positions: torch.Tensor, logits: torch.Tensor, decisions: Decisions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide some of (n,) masked positions: which of the n, (c,), and their tokens (c,)."""
    if decisions.phrases is not None:
        decisions.phrases.forbid(canvas.tokens, positions, logits)
    chosen = decisions.rule(logits, min(canvas.count(), len(positions))).to(logits.device)
    scores = logits[chosen]
    tokens = decisions.sampler.draw(canvas.index, canvas.tokens, scores)
    if decisions.phrases is not None:
        kept = decisions.phrases.compatible(canvas.tokens, positions[chosen.cpu()], tokens.cpu())
        chosen, tokens, scores = chosen[:kept], tokens[:kept], scores[:kept]
    positions = positions[chosen.cpu()]
    if decisions.log_probabilities:
        drawn = scores.gather(-1, tokens[:, None])[:, 0] - scores.logsumexp(dim=-1)
        canvas.log_probabilities[positions] = drawn.cpu()
    if decisions.keep_scores:
        canvas.scores.update(zip(positions.tolist(), scores))
    canvas.decide(positions, tokens.cpu())
    return chosen, tokens


def _why_undecidable(
    decisions: Decisions, canvas: Canvas, positions: torch.Tensor, logits: torch.Tensor, first: int, index: int
) -> str:
    """
    What made the logits of a position useless, and what helps.

    Args:
        decisions: How the step decides.
        canvas: The row.
        positions: (n,) its masked positions.
        logits: (n, V) their processed logits.
        first: Number of its first logits among those of the step.
        index: Which of the positions.
    """
    where = f"at step {canvas.forwards}, position {int(positions[index])} of row {canvas.index}"
    nothing_left = bool((logits[index] == -torch.inf).all())
    own = decisions.own
    if own is not None and own.before is not None and own.after is not None:
        before, after = own.before[first + index], own.after[first + index]
        if before.isfinite() and not after.isfinite():
            fault = "rules out every token" if after == -torch.inf else "makes logits inf or NaN"
            return (
                f"`logits_processor` ({own.names}) {fault} {where}: leave a token finite, and rule out by -inf only."
            )
    if nothing_left:
        names = " and ".join(f"`{name}`" for name in decisions.constraints) or "The model's own -inf"
        return f"{names} leave no token to write {where}: allow more."
    return f"The logits are not finite {where}: {decisions.computed()}."


class BlockStream:
    """
    Shows a streamer the prompts, then each block of new positions once it is complete in all rows, (rows, tokens), and
    at every step the undecided block to a streamer of drafts (`put_draft`).

    Args:
        streamer: `None` shows nothing.
        rows: The canvases as (rows, T) tokens.
    """

    def __init__(self, streamer: BaseStreamer | None, rows: Rows):
        self.streamer: Any = streamer
        self.rows = rows
        self.shown: int | None = None  # new columns that have been put; None before the prompts

    def show(self, canvases: Sequence[Canvas]) -> None:
        """Put what has been completed since, and a draft of what has not."""
        if self.streamer is None:
            return
        complete = min(_complete(canvas) for canvas in canvases)
        if complete < 0:  # a prompt is being filled in
            return
        if self.shown is None:
            self.streamer.put(self.rows.tokens(stop=0))
            self.shown = 0
        longest = max(canvas.length - canvas.prompt_length for canvas in canvases)
        complete = min(complete, longest)
        if complete > self.shown:
            self.streamer.put(self.rows.tokens(self.shown, complete))
            self.shown = complete
        unfinished = [canvas for canvas in canvases if not canvas.finished]
        if unfinished and hasattr(self.streamer, "put_draft"):
            block = unfinished[0].blocks[0]
            self.streamer.put_draft(self.rows.tokens(self.shown, block.stop - unfinished[0].prompt_length))


def _complete(canvas: Canvas) -> int:
    """New positions that are complete in a row; those behind its end are, and negative while its prompt is not."""
    stop = len(canvas.tokens) if canvas.finished else canvas.blocks[0].start
    return stop - canvas.prompt_length


__all__ = ["BlockStream", "Decisions", "masked_logits", "unmask"]
