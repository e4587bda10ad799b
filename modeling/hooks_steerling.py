"""What steering does inside a forward pass: plain forward hooks, and what they need to know of the pass."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from .concepts_steerling import SteerlingConceptHead, SteerlingConceptOutput


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
            reached = reached & torch.isin(places.row, torch.tensor(sorted(self.rows), dtype=places.row.dtype))
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
    """What operations changed, in the order of the forward passes; iterate for `Touch`es."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, tuple[str, ...], Places, torch.Tensor]] = []

    def note(self, operation: str, layers: tuple[str, ...], places: Places, sizes: torch.Tensor) -> None:
        """Note changes of (n,) sizes at (n,) places; those of blind rows are nobody's text, and left out."""
        seen = ~places.blind
        if seen.any():
            self._entries.append((operation, layers, places[seen], sizes[seen.to(sizes.device)].detach()))

    def __iter__(self) -> Iterator[Touch]:
        for operation, layers, places, sizes in self._entries:
            for layer in layers:
                where = zip(places.row.tolist(), places.step.tolist(), places.position.tolist(), sizes.tolist())
                for row, step, position, size in where:
                    yield Touch(operation, layer, row, step, position, size)

    def __len__(self) -> int:
        return sum(len(layers) * len(places.row) for _, layers, places, _ in self._entries)

    def __repr__(self) -> str:
        names = sorted({operation for operation, *_ in self._entries})
        return f"SteeringReport({len(self)} touches by {', '.join(names) or 'nothing'})"

    def clear(self) -> None:
        """Forget all touches."""
        self._entries.clear()


class ForwardContext:
    """Which places the backbone and what follows it compute in the present forward pass."""

    def __init__(self) -> None:
        self.window: Places | None = None  # (rows, W), of the backbone
        self.chosen: Places | None = None  # (n,), of heads and logits, where generate chose some
        self.keep: int | torch.Tensor = 0  # `logits_to_keep` of forward
        self.suspended = False

    def places(self, shape: torch.Size) -> Places | None:
        """The places of states of that shape, without their features; `None` where nothing may be steered."""
        candidates = [self.chosen] if self.chosen is not None else [self.window, self._kept()]
        for places in candidates:
            if not self.suspended and places is not None and places.shape == shape:
                return places
        return None

    def _kept(self) -> Places | None:
        if self.window is None:
            return None
        kept = slice(-self.keep, None) if isinstance(self.keep, int) else self.keep.cpu()
        return self.window[:, kept]


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

    def reach(self, shape: torch.Size) -> tuple[Places, torch.Tensor] | None:
        """Places of a module's output and, as bool of the same shape, where to act; `None` for nowhere."""
        places = self.context.places(shape)
        if places is None:
            return None
        reached = self.scope.of(places)
        return (places, reached) if reached.any() else None


class AddDirection(SteeringHook):
    """
    Adds `strength * direction` to the residual stream behind blocks.

    The amounts are made before the pass (`prepare`), so that compiled blocks only read a tensor.
    """

    def __init__(self, direction: torch.Tensor, strength: float, layers: tuple[str, ...], *args):
        super().__init__(*args)
        self.direction, self.strength, self.layers = direction, strength, layers
        self.amount: torch.Tensor | None = None

    def prepare(self, places: Places, device: torch.device) -> None:
        """Fix the amounts (rows, W, 1) of the pass."""
        reached = self.scope.of(places)
        self.amount = (self.strength * reached)[..., None].to(device, self.direction.dtype)
        if reached.any():
            self.report.note(
                self.operation, self.layers, places[reached], torch.full((int(reached.sum()),), abs(self.strength))
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
        found = self.reach(output.shape[:-1])
        if found is None:
            return None
        places, reached = found
        self.report.note(self.operation, ("lm_head",), places[reached], torch.full((int(reached.sum()),), self.size))
        vector = self.vector.to(output.device, output.dtype)
        return output - (vector if reached.all() else reached.to(output.device)[..., None] * vector)


class ChangeWeights(SteeringHook):
    """
    Changes the weights of concepts in a head: with weights w of concepts c and their new weights w', features become
    `features + sum_c (w'_c - w_c) E_c`. A concept outside the head's top k has `w_c = 0`.
    """

    def __init__(self, name: str, indices: torch.Tensor, mode: str, value: float, *args):
        super().__init__(*args)
        self.name, self.indices, self.mode, self.value = name, indices, mode, value

    def __call__(
        self, module: SteerlingConceptHead, args, output: SteerlingConceptOutput
    ) -> SteerlingConceptOutput | None:
        hidden_states = args[0]
        found = self.reach(hidden_states.shape[:-1])
        if found is None:
            return None
        places, reached = found
        at = reached.to(hidden_states.device)
        indices = self.indices.to(hidden_states.device)
        old = module.weights_of(hidden_states[at], output.indices[at], output.weights[at], indices)
        new = {"set": torch.full_like(old, self.value), "scale": old * self.value, "add": old + self.value}[self.mode]
        change = (new - old) @ module.embeddings(indices).float()
        self.report.note(self.operation, (self.name,), places[reached], change.norm(dim=-1))
        return SteerlingConceptOutput(
            features=output.features + _spread(change, at).to(output.features.dtype),
            **_reported(output, at, indices.expand(len(old), -1), new),
        )


class ImitateFeatures(SteeringHook):
    """
    Draws a head's features towards those of a target: `(1 - strength) * features + strength * target`, where the target
    has features (L, D), concepts (L, k) and weights (L, k) for the first L offsets behind the prompt, or for all if L is 1.
    """

    def __init__(self, name: str, target: SteerlingConceptOutput, strength: float, *args):
        super().__init__(*args)
        self.name, self.target, self.strength = name, target, strength

    def __call__(self, module, args, output: SteerlingConceptOutput) -> SteerlingConceptOutput | None:
        found = self.reach(args[0].shape[:-1])
        if found is None:
            return None
        places, reached = found
        device = output.features.device
        at, line = reached.to(device), places.offset[reached].clamp(max=len(self.target.features) - 1).to(device)
        target = SteerlingConceptOutput(**{key: value.to(device)[line] for key, value in self.target.items()})
        change = self.strength * (target.features - output.features[at].float())
        self.report.note(self.operation, (self.name,), places[reached], change.norm(dim=-1))
        kept = torch.where(at[..., None], 1 - self.strength, 1.0).to(output.weights.dtype)
        faded = SteerlingConceptOutput(indices=output.indices, weights=output.weights * kept)
        return SteerlingConceptOutput(
            features=output.features + _spread(change, at).to(output.features.dtype),
            indices=torch.cat([faded.indices, _spread(target.indices, at)], dim=-1),
            weights=torch.cat([faded.weights, _spread(self.strength * target.weights, at)], dim=-1),
        )


class DropResidual(SteeringHook):
    """Leaves nothing of epsilon."""

    def __call__(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        found = self.reach(output.shape[:-1])
        if found is None:
            return None
        places, reached = found
        at = reached.to(output.device)
        self.report.note(self.operation, ("residual",), places[reached], output[at].float().norm(dim=-1))
        return output.masked_fill(at[..., None], 0)


def _spread(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(..., F) of (n, F) values at the n true places of (...), zero elsewhere."""
    spread = values.new_zeros(*at.shape, values.shape[-1])
    spread[at] = values
    return spread


def _reported(
    output: SteerlingConceptOutput, at: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Concepts and weights of a head after (n, m) of them have (n, m) new weights at the n true places of `at`: they come behind
    the head's own k, where their old weights become 0, so that weights and embeddings still sum to the features.
    """
    gone = (output.indices[at][..., None] == indices[:, None, :]).any(dim=-1)
    return {
        "indices": torch.cat([output.indices, _spread(indices, at)], dim=-1),
        "weights": torch.cat(
            [output.weights.masked_fill(_spread(gone, at), 0), _spread(weights.to(output.weights.dtype), at)], dim=-1
        ),
    }


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
