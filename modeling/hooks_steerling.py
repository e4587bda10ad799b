"""What steering does inside a forward pass: plain forward hooks, and what they need to know of the pass."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch

from .concepts_steerling import (
    SteerlingConceptHead,
    SteerlingConceptOutput,
    SteerlingPartialOutput,
    weights_among,
)

# torch counts the hooks of all modules with one number, which two threads must not read at once.
HOOKS_LOCK = threading.RLock()


@dataclass
class Places:
    """
    Positions that a module computes, with what steering may depend on there. All tensors have one shape, that of the
    module's output without its features, and are on the CPU.

    Args:
        row: Number of the row in the batch.
        position: Place in the row.
        offset: Places behind the end of the prompt; negative inside it.
        masked: Whether the position is undecided.
        clean: Whether nothing in the whole row is undecided.
        committed: Tokens that have been decided in this generation.
        step: Steps of the row before this one.
        blind: Whether this is the row without the prompt, beside a guided one.
    """

    row: torch.Tensor
    position: torch.Tensor
    offset: torch.Tensor
    masked: torch.Tensor
    clean: torch.Tensor
    committed: torch.Tensor
    step: torch.Tensor
    blind: torch.Tensor

    def __getitem__(self, index: Any) -> "Places":
        return Places(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def shape(self) -> torch.Size:
        """Shape of all tensors."""
        return self.row.shape


@dataclass(frozen=True)
class Scope:
    """
    Where an operation acts in its rows.

    Args:
        window: First offset behind the prompt and the one after the last, `None` for everywhere.
        cutoff: Act until so many tokens are decided, `None` for always.
        clean_rows: Act on all positions of rows in which nothing is undecided, instead of on none.
    """

    window: tuple[int, int | None] | None = None
    cutoff: int | None = None
    clean_rows: bool = False

    def of(self, places: Places, rows: set[int] | None) -> torch.Tensor:
        """Bool, of the shape of the places; `rows` are the numbers of the operation's rows, `None` for all."""
        reached = places.masked | places.clean if self.clean_rows else places.masked
        if rows is not None:
            reached = reached & torch.isin(
                places.row, torch.tensor(sorted(rows), dtype=places.row.dtype, device="cpu")
            )
        if self.window is not None:
            start, stop = self.window
            reached = reached & (places.offset >= start)
            if stop is not None:
                reached = reached & (places.offset < stop)
        if self.cutoff is not None:
            reached = reached & (places.committed < self.cutoff)
        return reached


class Touch(NamedTuple):
    """One change that steering made: its size is the Euclidean norm of what was added, for logits the largest change."""

    operation: str
    layer: str
    row: int
    step: int
    position: int
    size: float


class SteeringReport:
    """
    What operations changed, in the order of the forward passes; iterate for `Touch`es. It grows with every pass: `clear`
    it now and then if a model stays steered for long.
    """

    def __init__(self) -> None:
        # Operation, layers, (row, step, position) as (3, n), sizes (n,) wherever they were computed.
        self._entries: list[tuple[str, tuple[str, ...], torch.Tensor, torch.Tensor]] = []

    def note(self, operation: str, layers: tuple[str, ...], places: Places, sizes: torch.Tensor) -> None:
        """Note changes of (n,) sizes at (n,) places; those of blind rows are nobody's text, and left out."""
        seen = (~places.blind).nonzero()[:, 0]
        if len(seen):
            where = torch.stack([places.row, places.step, places.position])[:, seen].int()
            self._entries.append((operation, layers, where, sizes.detach()[seen.to(sizes.device)]))

    def __iter__(self) -> Iterator[Touch]:
        for operation, layers, where, sizes in self._entries:
            for layer in layers:
                for row, step, position, size in zip(*where.tolist(), sizes.tolist()):
                    yield Touch(operation, layer, row, step, position, size)

    def __len__(self) -> int:
        return sum(len(layers) * len(sizes) for _, layers, _, sizes in self._entries)

    def __repr__(self) -> str:
        names = sorted({operation for operation, *_ in self._entries})
        return f"SteeringReport({len(self)} touches by {', '.join(names) or 'nothing'})"

    def clear(self) -> None:
        """Forget all touches."""
        self._entries.clear()


class ForwardContext(threading.local):
    """
    What each thread is computing on one model: threads share the model's modules and the hooks on them, and each thread's passes
    are its own.

    Attributes:
        acting: The operations (`HookBuilder`) that act in the present pass, each with the numbers of its rows, `None` for all.
        states: The places of heads and residual in the present pass, `None` where none is steered.
        logits: Those of the vocabulary projection.
        call: The present call of generate.
        announced: Whether the present pass of the backbone is known without a look at its arguments.
        whole, keep: Whether `forward` decomposes all positions, and its `logits_to_keep`.
        outer: What `now` was before each `forward` that is under way.
    """

    def __init__(self) -> None:
        self.acting: dict[Any, set[int] | None] = {}
        self.states: Places | None = None
        self.logits: Places | None = None
        self.call: Any = None
        self.announced = self.whole = False
        self.keep: int | torch.Tensor = 0
        self.outer: list[tuple] = []

    def now(self) -> tuple[dict[Any, set[int] | None], Places | None, Places | None]:
        """What the present pass is."""
        return self.acting, self.states, self.logits

    def set(self, acting: dict[Any, set[int] | None], states: Places | None, logits: Places | None) -> None:
        """Go on with another pass."""
        self.acting, self.states, self.logits = acting, states, logits


class OwnedHook(ABC):
    """A hook on modules that threads share, in passes of its owner's alone."""

    @abstractmethod
    def acts(self) -> bool:
        """Whether this thread's present pass is one of them."""


class FirstLook(OwnedHook):
    """
    Shows a function the output of a module in this thread's passes, before any other hook changes it, for the length of a
    `with` block; the function may return another output.
    """

    def __init__(self, module: torch.nn.Module, function: Callable):
        self.module, self.function, self.thread = module, function, threading.get_ident()

    def acts(self) -> bool:
        return threading.get_ident() == self.thread

    def __call__(self, module, args, output: Any) -> Any:
        return self.function(output) if self.acts() else None

    def __enter__(self) -> None:
        with HOOKS_LOCK:
            self.handle = self.module.register_forward_hook(self, prepend=True)

    def __exit__(self, *_: Any) -> None:
        with HOOKS_LOCK:
            self.handle.remove()


class SteeringHook(OwnedHook):
    """
    Base of the hooks: a module of an operation's choice hands over its output, and gets it back changed. In passes in which
    the operation does not act, such as another thread's, nothing happens.

    Args:
        source: The `HookBuilder` of the operation, with its scope, its report and the thread's present pass.
    """

    def __init__(self, source: Any):
        self.source = source

    def acts(self) -> bool:
        return self.source in self.source.context.acting

    def reach(self, places: Places | None, states: torch.Tensor) -> tuple[Places, tuple[torch.Tensor, ...]] | None:
        """
        Where to act of the places of states (..., F): as n places, and as an index of the states. `None` for nowhere, and
        for states whose places nobody knows.
        """
        if places is None or places.shape != states.shape[:-1] or not self.acts():
            return None
        reached = self.source.reach(places)
        # Indices rather than a mask: a device need not be waited for to count them.
        where = tuple(index.to(states.device) for index in reached.nonzero(as_tuple=True))
        return (places[reached], where) if len(where[0]) else None

    def note(self, layer: str, places: Places, sizes: torch.Tensor) -> None:
        """Tell the report of changes of (n,) sizes at (n,) places."""
        self.source.report.note(self.source.operation.name, (layer,), places, sizes)


class CustomHook(SteeringHook):
    """A hook of an operation of the user's own, called only in passes in which the operation acts."""

    def __init__(self, function: Callable, source: Any):
        super().__init__(source)
        self.function = function

    def __call__(self, module, args, output: Any) -> Any:
        return self.function(module, args, output) if self.acts() else None


def active_hooks(module: torch.nn.Module) -> list[Any]:
    """A module's forward hooks in order, without those that do not act in this thread's present pass."""
    hooks: list[Any] = list(module._forward_hooks.values())  # at once: other threads attach operations meanwhile
    return [hook for hook in hooks if not isinstance(hook, OwnedHook) or hook.acts()]


# Amounts (rows, W, 1) and directions (D,) by the block behind which they are added.
Injections = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]


class Injection:
    """
    Adds `strength * direction` to the residual stream behind layers.

    Args:
        source: The `HookBuilder` of the operation.
        direction: (D,).
        strength: Times the direction.
        layers: Numbers of the layers, from 1.
    """

    def __init__(self, source: Any, direction: torch.Tensor, strength: float, layers: Sequence[int]):
        self.source, self.direction, self.strength, self.layers = source, direction, strength, layers

    def prepare(self, places: Places, device: torch.device, amounts: Injections) -> None:
        """Put what is added in a pass over these places into `amounts`."""
        reached = self.source.reach(places)
        amount = (self.strength * reached.to(self.direction.dtype))[..., None].to(device)
        for layer in self.layers:
            amounts.setdefault(layer - 1, []).append((amount, self.direction))
        touched = places[reached]
        names = tuple(f"layer {layer}" for layer in self.layers)
        sizes = torch.full(touched.shape, abs(self.strength), dtype=torch.float32, device="cpu")
        self.source.report.note(self.source.operation.name, names, touched, sizes)


def add_injections(
    block: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor | None:
    """
    The forward hook of all injections. A pass brings its own as the block's argument `injections`, so that passes of other threads
    and what is computed again in a backward pass have theirs, and compiled blocks only read tensors.
    """
    for amount, direction in kwargs.get("injections") or ():
        # In the output's precision, whatever the model's was when the direction was made.
        output = output + (amount.to(output.device) * direction.to(output.device)).to(output.dtype)
    return output


class SubtractFromLogits(SteeringHook):
    """Subtracts a vector (V,) from logits."""

    def __init__(self, vector: torch.Tensor, *args):
        super().__init__(*args)
        self.vector = vector
        self.size = float(vector.abs().max())

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        found = self.reach(self.source.context.logits, output)
        if found is None:
            return None
        places, at = found
        self.note("lm_head", places, torch.full(places.shape, self.size, dtype=torch.float32, device="cpu"))
        vector = self.vector.to(output.device, output.dtype)
        if len(at[0]) == output[..., 0].numel():
            return output - vector
        return output.index_put(at, output[at] - vector)


@dataclass
class ChangedConceptOutput(SteerlingConceptOutput):
    """
    Output of a head whose weights have been changed, for the next hook to go on from.

    Args:
        untouched: The head's own output.
        factor: (..., 1), what is left of all of its weights.
        concepts, added: (..., m), and what has been added to those of some concepts since; some are named twice.
    """

    untouched: Any = None
    factor: Any = None
    concepts: Any = None
    added: Any = None


class ChangeWeights(SteeringHook):
    """
    Changes the weights of concepts in a head: with weights w of concepts c and their new weights w', features become
    `features + sum_c (w'_c - w_c) E_c`. A concept outside the head's top k has `w_c = 0`.

    By its attribute `looks_at` a hook says that it looks at these concepts of the head alone (see `compose`).
    """

    def __init__(self, name: str, indices: torch.Tensor, mode: str, value: float, *args):
        super().__init__(*args)
        self.name, self.looks_at, self.mode, self.value = name, indices, mode, value

    def __call__(self, module: SteerlingConceptHead, args, output: Any) -> SteerlingConceptOutput | None:
        hidden_states = args[0]
        found = self.reach(self.source.context.states, hidden_states)
        if found is None:
            return None
        places, at = found
        indices = self.looks_at.to(hidden_states.device)
        old = _present_weights(module, hidden_states, output, at, indices)
        new = {"set": torch.full_like(old, self.value), "scale": old * self.value, "add": old + self.value}[self.mode]
        change = (new - old) @ module.embeddings(indices).to(new.device, torch.float32)
        self.note(self.name, places, change.norm(dim=-1))
        # The new weights come behind what the head shows, where the old ones become 0: the sum stays that of the features.
        gone = torch.zeros_like(output.weights, dtype=torch.bool)
        gone[at] = torch.isin(output.indices[at], indices)
        return _change(
            output, at, change, indices.expand(len(old), -1), new, output.weights.masked_fill(gone, 0), new - old
        )


class ImitateFeatures(SteeringHook):
    """
    Draws a head's features towards those of a target: `(1 - strength) * features + strength * target`, where the target
    has features (L, D), concepts (L, k) and weights (L, k) for the first L offsets behind the prompt, or for all if L is 1.
    """

    def __init__(self, name: str, target: Any, strength: float, *args):
        super().__init__(*args)
        self.name, self.target, self.strength = name, target, strength

    def __call__(self, module, args, output: Any) -> SteerlingConceptOutput | None:
        found = self.reach(self.source.context.states, args[0])
        if found is None:
            return None
        places, at = found
        device = output.features.device
        line = places.offset.clamp(max=len(self.target.features) - 1).to(device)
        features, indices, weights = (values.to(device)[line] for values in self.target.values())
        change = self.strength * (features - output.features[at].float())
        self.note(self.name, places, change.norm(dim=-1))
        faded = output.weights.index_put(at, output.weights[at] * (1 - self.strength))
        added = self.strength * weights
        return _change(output, at, change, indices, added, faded, added, 1 - self.strength)


class DropResidual(SteeringHook):
    """Leaves nothing of epsilon."""

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        found = self.reach(self.source.context.states, output)
        if found is None:
            return None
        places, at = found
        self.note("residual", places, output[at].float().norm(dim=-1))
        return output.index_put(at, output.new_zeros(()))


def _spread(values: torch.Tensor, at: tuple[torch.Tensor, ...], shape: torch.Size) -> torch.Tensor:
    """(*shape, F) of (n, F) values at n places, zero elsewhere."""
    return values.new_zeros(*shape, values.shape[-1]).index_put(at, values)


def _present_weights(
    head: SteerlingConceptHead,
    hidden_states: torch.Tensor,
    output: Any,
    at: tuple[torch.Tensor, ...],
    concepts: torch.Tensor,
) -> torch.Tensor:
    """(n, m) weights, float32, of concepts (m,) at n places, as the hooks before this one have left them."""
    if isinstance(output, SteerlingPartialOutput):
        weights, indices = cast(torch.Tensor, output.weights), cast(torch.Tensor, output.indices)
        return weights_among(indices[at], weights[at], concepts)
    if not isinstance(output, ChangedConceptOutput):
        return head.weights_of(hidden_states[at], output.indices[at], output.weights[at], concepts)
    weights = _present_weights(head, hidden_states, output.untouched, at, concepts)
    return output.factor[at] * weights + weights_among(output.concepts[at], output.added[at], concepts)


def _change(
    output: Any,
    at: tuple[torch.Tensor, ...],
    features: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    others: torch.Tensor,
    added: torch.Tensor,
    factor: float = 1.0,
) -> ChangedConceptOutput:
    """
    A head's output after a change at n places.

    Args:
        output: The head's output so far.
        at: The places.
        features: (n, D) that come to the features.
        indices, weights: (n, m) concepts and weights that come behind those of the head.
        others: (..., k), what becomes of the latter.
        added: (n, m), what comes to the weights of the concepts, once all weights have been multiplied by `factor`.
    """
    shape = output.features.shape[:-1]
    untouched, left = output, output.weights.new_ones(*shape, 1)
    concepts, sums = _spread(indices, at, shape), _spread(added, at, shape)
    if isinstance(output, ChangedConceptOutput):
        untouched, left = output.untouched, output.factor
        concepts = torch.cat([output.concepts, concepts], dim=-1)
        sums = torch.cat([output.added.index_put(at, output.added[at] * factor), sums], dim=-1)
    shown: dict[str, Any] = {
        "indices": torch.cat([output.indices, _spread(indices, at, shape)], dim=-1),
        "weights": torch.cat([others, _spread(weights.to(others.dtype), at, shape)], dim=-1),
    }
    return ChangedConceptOutput(
        features=output.features + _spread(features, at, shape).to(output.features.dtype),
        **shown,
        untouched=untouched,
        factor=left.index_put(at, left[at] * factor),
        concepts=concepts,
        added=sums,
    )


__all__ = [
    "HOOKS_LOCK",
    "ChangeWeights",
    "CustomHook",
    "DropResidual",
    "FirstLook",
    "ForwardContext",
    "ImitateFeatures",
    "Injection",
    "Injections",
    "Places",
    "Scope",
    "SteeringHook",
    "SteeringReport",
    "SubtractFromLogits",
    "Touch",
    "active_hooks",
    "add_injections",
]
