"""What steering does inside a forward pass: plain forward hooks, and what they need to know of the pass."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch

from .concepts_steerling import (
    SteerlingConceptHead,
    SteerlingConceptOutput,
    SteerlingPartialOutput,
    weights_among,
)


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


@dataclass
class Scope:
    """
    Where an operation acts.

    Args:
        rows: Numbers of the rows, `None` for all.
        window: First offset behind the prompt and the one after the last, `None` for everywhere.
        cutoff: Act until so many tokens are decided, `None` for always.
        clean_rows: Act on all positions of rows in which nothing is undecided, instead of on none.
    """

    rows: set[int] | None = None
    window: tuple[int, int | None] | None = None
    cutoff: int | None = None
    clean_rows: bool = False

    def of(self, places: Places) -> torch.Tensor:
        """Bool, of the shape of the places."""
        reached = places.masked | places.clean if self.clean_rows else places.masked
        if self.rows is not None:
            reached = reached & torch.isin(
                places.row, torch.tensor(sorted(self.rows), dtype=places.row.dtype, device="cpu")
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


class ForwardContext:
    """Which places the heads and the vocabulary projection compute in the present pass; `None` where none is steered."""

    def __init__(self) -> None:
        self.states: Places | None = None  # of heads and residual
        self.logits: Places | None = None

    def forget(self) -> None:
        """The pass is over."""
        self.states = self.logits = None


class SteeringHook:
    """
    Base of the hooks: a module of an operation's choice hands over its output, and gets it back changed.

    Args:
        operation: Name of the operation.
        scope: Where it acts.
        report: Is told.
        context: The present pass.
    """

    def __init__(self, operation: str, scope: Scope, report: SteeringReport, context: ForwardContext):
        self.operation, self.scope, self.report, self.context = operation, scope, report, context

    def reach(self, places: Places | None, states: torch.Tensor) -> tuple[Places, tuple[torch.Tensor, ...]] | None:
        """
        Where to act of the places of states (..., F): as n places, and as an index of the states. `None` for nowhere, and
        for states whose places nobody knows.
        """
        if places is None or places.shape != states.shape[:-1]:
            return None
        reached = self.scope.of(places)
        # Indices rather than a mask: a device need not be waited for to count them.
        where = tuple(index.to(states.device) for index in reached.nonzero(as_tuple=True))
        return (places[reached], where) if len(where[0]) else None


class AddDirection(SteeringHook):
    """
    Adds `strength * direction` to the residual stream behind blocks.

    The amounts are made before the pass (`prepare`), so that compiled blocks only read a tensor.
    """

    def __init__(self, direction: torch.Tensor, strength: float, layers: tuple[str, ...], *args):
        super().__init__(*args)
        self.direction, self.strength, self.layers = direction, strength, layers
        self.amount: torch.Tensor | None = None

    def prepare(self, places: Places | None, device: torch.device | None) -> None:
        """Fix the amounts (rows, W, 1) of the next pass, or forget them."""
        if places is None:
            self.amount = None
            return
        reached = self.scope.of(places)
        self.amount = (self.strength * reached.to(self.direction.dtype))[..., None].to(device)
        touched = places[reached]
        self.report.note(
            self.operation,
            self.layers,
            touched,
            torch.full(touched.shape, abs(self.strength), dtype=torch.float32, device="cpu"),
        )

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        if self.amount is None:
            return None
        return output + self.amount.to(output.device) * self.direction.to(output.device)


class SubtractFromLogits(SteeringHook):
    """Subtracts a vector (V,) from logits."""

    def __init__(self, vector: torch.Tensor, *args):
        super().__init__(*args)
        self.vector = vector
        self.size = float(vector.abs().max())

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        found = self.reach(self.context.logits, output)
        if found is None:
            return None
        places, at = found
        self.report.note(
            self.operation,
            ("lm_head",),
            places,
            torch.full(places.shape, self.size, dtype=torch.float32, device="cpu"),
        )
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
        found = self.reach(self.context.states, hidden_states)
        if found is None:
            return None
        places, at = found
        indices = self.looks_at.to(hidden_states.device)
        old = _present_weights(module, hidden_states, output, at, indices)
        new = {"set": torch.full_like(old, self.value), "scale": old * self.value, "add": old + self.value}[self.mode]
        change = (new - old) @ module.embeddings(indices).to(new.device, torch.float32)
        self.report.note(self.operation, (self.name,), places, change.norm(dim=-1))
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
        found = self.reach(self.context.states, args[0])
        if found is None:
            return None
        places, at = found
        device = output.features.device
        line = places.offset.clamp(max=len(self.target.features) - 1).to(device)
        features, indices, weights = (values.to(device)[line] for values in self.target.values())
        change = self.strength * (features - output.features[at].float())
        self.report.note(self.operation, (self.name,), places, change.norm(dim=-1))
        faded = output.weights.index_put(at, output.weights[at] * (1 - self.strength))
        added = self.strength * weights
        return _change(output, at, change, indices, added, faded, added, 1 - self.strength)


class DropResidual(SteeringHook):
    """Leaves nothing of epsilon."""

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        found = self.reach(self.context.states, output)
        if found is None:
            return None
        places, at = found
        self.report.note(self.operation, ("residual",), places, output[at].float().norm(dim=-1))
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
    "AddDirection",
    "ChangeWeights",
    "DropResidual",
    "ForwardContext",
    "ImitateFeatures",
    "Places",
    "Scope",
    "SteeringHook",
    "SteeringReport",
    "SubtractFromLogits",
    "Touch",
]
