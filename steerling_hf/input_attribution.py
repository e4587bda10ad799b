"""Which input tokens caused a decided token, or switched a concept on: integrated gradients from the mask embedding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from tqdm import tqdm

from .checks import check_model, check_number, check_switches, check_trace, check_whole, short
from .modeling.lookup_steerling import split_concepts
from .modeling.steering_steerling import SetConcepts
from .modeling.trace_steerling import SteerlingTrace
from .replay import Replay, alike, replay, saved_bytes
from .torch_state import PlainTensors, check_differentiable, differentiable

# Captum's rules, whose points are the same for all targets.
EVEN_METHODS = ("gausslegendre", "riemann_right", "riemann_left", "riemann_middle")
METHODS = ("adaptive", *EVEN_METHODS)
# "adaptive" looks at the target at so many points between the ends of the path, without gradients, before it chooses.
PROBES = 16
# Share of the path's length, beside the target's change, in what its segments have equal parts of.
EVENNESS = 0.3
POINTS_PER_SEGMENT = 2
N_STEPS = 16
# Beside what autograd keeps of a row: its gradients, the path's points, and what a layer needs for a moment.
WORKSPACE = 2.0
# Rows of a pass beyond which a larger one is no faster.
MOST_ROWS = 32


@dataclass(frozen=True, eq=False)
class InputAttributions:
    """
    Scores of input tokens for targets, each on the canvas as it was when the target was decided.

    `scores[n].sum()` approaches `values[n] - baselines[n]`, the completeness of integrated gradients; `errors` says how
    closely. Masked positions and those that the target does not see have the score 0.

    Args:
        positions: (N,) positions of the targets, from the row's first token.
        scores: (N, T) signed, float32, over the positions of the canvas.
        values: (N,) the targets' logits (of the token, or of the concept).
        baselines: (N,) the same where all tokens are masked.
        prompt_length: Tokens of the prompt.
    """

    positions: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor
    baselines: torch.Tensor
    prompt_length: int

    @property
    def errors(self) -> torch.Tensor:
        """(N,) completeness errors, `scores.sum() - (values - baselines)`."""
        return self.scores.sum(dim=-1) - (self.values - self.baselines)

    def aggregate(self, start: int = 0, stop: int | None = None, scope: str = "prompt") -> torch.Tensor:
        """
        Scores of the input tokens for all targets at positions `start` to `stop`, as the reference has them: each target's
        scores over its own sum of absolute scores in the scope, then the mean over the targets.

        Args:
            start, stop: Positions; `stop` is not included, and `None` is the end.
            scope: "prompt", "answer" or "all".

        Returns:
            (T,) float32, 0 outside the scope. All 0 if there is no target.

        Raises:
            ValueError: The scope is none of these.
        """
        if scope not in ("prompt", "answer", "all"):
            raise ValueError(f"`scope` is {scope!r}: choose 'prompt', 'answer' or 'all'.")
        inside = torch.ones(self.scores.shape[1], dtype=torch.bool, device="cpu")
        inside[: self.prompt_length] = scope != "answer"
        inside[self.prompt_length :] = scope != "prompt"
        chosen = (self.positions >= start) & (self.positions < (self.scores.shape[1] if stop is None else stop))
        scores = self.scores[chosen] * inside
        if not len(scores):
            return torch.zeros(self.scores.shape[1], dtype=torch.float32, device="cpu")
        return (scores / scores.abs().sum(dim=-1, keepdim=True).clamp(min=1e-8)).mean(dim=0)


def attribute_inputs(
    model: Any,
    trace: SteerlingTrace,
    positions: Sequence[int] | None = None,
    *,
    concept: int | None = None,
    n_steps: int = N_STEPS,
    method: str = "adaptive",
    memory_budget: int = 1 << 30,
    progress: bool = False,
) -> InputAttributions:
    """
    Attribute decided tokens to the tokens that the model saw when it decided them.

    Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) by captum: for the embeddings e and the mask's
    embedding m, `score_t = (e_t - m) . integral of dF/de_t (m + a (e - m)) da` over a from 0 to 1, where F is the target's
    logit. The mask says "nothing is known here" to this model, so the path begins at a canvas without any text. Steering
    and guidance are those of the generation.

    Args:
        model: What wrote the trace.
        trace: One of `generate(..., return_dict_in_generate=True).traces`.
        positions: Positions of the targets; by default all that were decided.
        concept: Explain the logit of this concept (known or discovered, before the sigmoid) at the positions, instead of
            that of the token: which inputs switched it on.
        n_steps: Points on the path. With "riemann_right" one point is the input times the gradient.
        method: "adaptive" cuts the path into segments in which the target changes equally much (as 17 passes without
            gradients tell), and has two Gauss-Legendre points in each: logits often change all at once on a short stretch
            of the path, which evenly spread points miss. "riemann_right" is the reference's, "gausslegendre" and the
            others are captum's.
        memory_budget: Bytes beyond the weights that a pass may need; it holds as many points as fit.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: An argument cannot be used; raised before any work.
        ImportError: captum is not installed.
    """
    check_settings(n_steps, method, memory_budget)
    check_model(model)
    check_differentiable(model)
    check_trace(trace)
    check_switches(progress=progress)
    if concept is not None:
        check_whole("concept", concept)
    targets = trace.decided.tolist() if positions is None else _checked_positions(positions)
    if concept is not None:
        SetConcepts([concept], value=1.0).check(model.config)  # knows which concepts there are
    chosen = [] if concept is None else split_concepts(model, [concept])
    if not targets:
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        return InputAttributions(
            nothing.long(), nothing[:, None].expand(-1, len(trace.tokens)), nothing, nothing, trace.prompt_length
        )
    with differentiable(model), replay(model, trace, targets) as replaying:
        function = _Target(replaying, trace.tokens[targets], chosen)
        room = _positions_within(memory_budget, function, replaying)
        scores = torch.zeros(len(targets), len(trace.tokens), dtype=torch.float32, device="cpu")
        values, baselines = torch.zeros(2, len(targets), dtype=torch.float32, device="cpu")
        with tqdm(total=len(targets), desc="attributing", disable=not progress) as bar:
            for group in alike(replaying):
                settled, width = replaying.settled(group[0]), replaying.visible(group[0])
                together, rows = _rows_within(room, settled if method in EVEN_METHODS else 0, width, len(group))
                for start in range(0, len(group), together):
                    batch = group[start : start + together]
                    found = _integrate(_Path(function, replaying, batch), n_steps, method, rows)
                    scores[batch, :width], values[batch], baselines[batch] = (part.float().cpu() for part in found)
                    bar.update(len(batch))
    return InputAttributions(torch.tensor(targets, device="cpu"), scores, values, baselines, trace.prompt_length)


def _checked_positions(positions: Any) -> list[int]:
    given = positions.tolist() if isinstance(positions, torch.Tensor) else positions
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(f"`positions` is {short(positions)}: give a list of positions.")
    found = list(given)
    for position in found:
        if isinstance(position, bool) or not isinstance(position, Integral):
            raise ValueError(f"`positions` has {short(position)}: give whole numbers.")
    return [int(position) for position in found]


def check_settings(n_steps: int = N_STEPS, method: str = "adaptive", memory_budget: int = 1) -> None:
    """
    What can be said of the settings of `attribute_inputs` before there is a trace.

    Raises:
        ValueError: One cannot be used.
        ImportError: captum is not installed.
    """
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"`n_steps` is {n_steps!r}: choose a whole number of 1 or more.")
    check_number("memory_budget", memory_budget, 0)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"`method` is {method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    if method == "adaptive" and n_steps % POINTS_PER_SEGMENT:
        raise ValueError(
            f"`n_steps` is {n_steps}, but method='adaptive' has two points in each segment: choose an even number."
        )
    _captum()


class _Target:
    """(n,) logits of targets (n,), from the embeddings of what they see: of their tokens, or of a concept."""

    def __init__(self, replaying: Replay, tokens: torch.Tensor, concept: list[tuple[Any, list[int]]]):
        self.replaying, self.tokens, self.concept = replaying, tokens, concept

    def __call__(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        numbers = targets.tolist()
        if self.concept:
            head, ids = self.concept[0]
            states = self.replaying.states(numbers, embeddings)[0]
            return head.logits(states, torch.tensor(ids, device=states.device))[:, 0]
        return self.replaying.token_logits(numbers, embeddings, self.tokens[numbers])


class _Path:
    """The straight lines from a masked canvas to what targets see, which must be equally many positions."""

    def __init__(self, function: _Target, replaying: Replay, batch: list[int]):
        self.function, self.targets = function, torch.tensor(batch, device="cpu")
        tokens = replaying.tokens(batch)
        self.start = replaying.embed(torch.full_like(tokens, replaying.mask)).float()
        self.line = replaying.embed(tokens).float() - self.start

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """(n * m, W, D) points at (n, m) places between 0 and 1 on each target's line."""
        steps = places.to(self.line)[..., None, None]
        return (self.start[:, None] + steps * self.line[:, None]).flatten(0, 1)

    def values(self, places: torch.Tensor, rows: int) -> torch.Tensor:
        """(n, m) logits at (n, m) places."""
        columns = max(1, rows // len(places))
        pieces = [
            self.function(self.at(part), self.targets.repeat_interleave(part.shape[1])).view(len(places), -1)
            for part in places.split(columns, dim=1)
        ]
        return torch.cat(pieces, dim=1)


def _integrate(path: _Path, n_steps: int, method: str, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (n, W), logits (n,) and logits without any text (n,) of n targets; a pass has so many rows."""
    probes = torch.linspace(0, 1, PROBES + 1 if method == "adaptive" else 2, dtype=torch.float32, device="cpu").expand(
        len(path.targets), -1
    )
    values = path.values(probes, rows)
    edges, points = probes[:, [0, -1]], n_steps
    if method == "adaptive":
        edges, points = _even_segments(probes, values.cpu(), n_steps // POINTS_PER_SEGMENT), POINTS_PER_SEGMENT
    elif n_steps == 1:  # captum has no Riemann sum of one point, but a Gauss-Legendre one in the middle of a segment
        edges = edges + {"riemann_right": 0.5, "riemann_left": -0.5}.get(method, 0)
    segments = edges.shape[1] - 1
    integrals = _captum().IntegratedGradients(path.function)
    targets = path.targets.repeat_interleave(segments)
    # captum puts all segments that it is given into one pass, even if that has more rows than asked for.
    pieces = zip(path.at(edges[:, 1:]).split(rows), path.at(edges[:, :-1]).split(rows), targets.split(rows))
    # captum makes tensors as the defaults are.
    with PlainTensors():
        scores = [
            integrals.attribute(
                stops,
                starts,
                additional_forward_args=(owners,),
                n_steps=points,
                method="gausslegendre" if method == "adaptive" or n_steps == 1 else method,
                internal_batch_size=rows,
            )
            for stops, starts, owners in pieces
        ]
    summed = torch.cat(scores).sum(dim=-1).unflatten(0, (-1, segments)).sum(dim=1)
    return summed, values[:, -1], values[:, 0]


def _even_segments(places: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """(n, count + 1) edges of segments with equal parts of the change in (n, m) values at (n, m) places, and of the way."""
    change = values.diff(dim=-1).abs()
    change = change / change.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    parts = (1 - EVENNESS) * change + EVENNESS * places.diff(dim=-1)
    reached = torch.nn.functional.pad((parts / parts.sum(dim=-1, keepdim=True)).cumsum(dim=-1), (1, 0))
    wanted = torch.linspace(0, 1, count + 1, dtype=torch.float32, device="cpu").expand(len(values), -1).contiguous()
    right = torch.searchsorted(reached.contiguous(), wanted).clamp(1, places.shape[1] - 1)
    low, high = reached.gather(1, right - 1), reached.gather(1, right)
    share = (wanted - low) / (high - low)
    edges = places.gather(1, right - 1).lerp(places.gather(1, right), share)
    edges[:, 0], edges[:, -1] = 0, 1
    return edges


def _positions_within(budget: int, function: _Target, replaying: Replay) -> int:
    """How many positions of passes fit the budget."""
    widest = max(range(len(replaying.positions)), key=replaying.visible)
    embeddings = replaying.embed(replaying.tokens([widest])).float().requires_grad_()
    needed = int(WORKSPACE * saved_bytes(replaying.model, function, embeddings, torch.tensor([widest], device="cpu")))
    if needed > budget:
        raise ValueError(
            f"`memory_budget` is {budget:,} bytes, and a single pass over {replaying.visible(widest)} positions needs about "
            f"{needed:,}: allow that much."
        )
    return budget * replaying.visible(widest) // needed


def _rows_within(room: int, shared: int, width: int, targets: int) -> tuple[int, int]:
    """
    How many targets to attribute together, and how many rows a pass may have, so that its positions fit the room. Targets
    share the first positions at each point of the path; of those a row then needs little more than keys, values and gradients.
    """
    own = width - shared + shared // 4
    together = max(1, min(MOST_ROWS, targets, (room - shared) // own))
    return together, together * max(1, min(MOST_ROWS // together, room // (shared + together * own)))


def _captum() -> Any:
    """The library for integrated gradients; an extra, because it brings matplotlib with it."""
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(
            "Input attribution needs captum: pip install 'steerling-hf[explain]'; explain() has `inputs=False`."
        ) from error
    return captum.attr
