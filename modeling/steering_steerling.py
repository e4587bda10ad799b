"""Steering: operations that push concepts up or down, as plain forward hooks that come off without a trace."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from .hooks_steerling import (
    HOOKS_LOCK,
    ChangeWeights,
    CustomHook,
    DropResidual,
    ForwardContext,
    ImitateFeatures,
    Injection,
    Places,
    Scope,
    SteeringHook,
    SteeringReport,
    SubtractFromLogits,
)
from .lookup_steerling import concept_direction, embed_concepts, head_name, project, split_concepts, target_profile


@dataclass(frozen=True)
class Condition:
    """
    Lets an operation act only in rows whose prompt shows a concept: the pooled weight of the concept over the prompt's
    tokens, of the unsteered model, is at least `threshold`. In `forward`, the prompt is all that is not masked.

    Args:
        concept: A known or discovered concept's id, as in operations.
        threshold: In 0..1; a concept outside the top k of a position has weight 0 there.
        pooling: "max" or "mean" over tokens.
    """

    concept: int
    threshold: float
    pooling: Literal["max", "mean"] = "max"

    def check(self, config: Any) -> None:
        """
        Raises:
            ValueError: The condition does not suit a model of this configuration; the message says why.
        """
        _check_concepts((self.concept,), config, "condition.concept")
        _check_number("condition.threshold", self.threshold)
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"`condition.threshold` is {self.threshold}: concepts have weights in 0..1, so choose from there."
            )
        _check_choice("condition.pooling", self.pooling, ("max", "mean"))

    def holds(
        self, model: Any, ids: torch.Tensor, text: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Whether it holds in each row.

        Args:
            model: The model.
            ids: (B, T) token ids.
            text: (B, T) bool, where they are text to be looked at.
            positions: (B, T) places in the row; by default text is counted.

        Returns:
            (B,) bool.
        """
        head, (index,) = split_concepts(model, (self.concept,))[0]
        outputs = model.transformer(
            input_ids=ids, attention_mask=text.long(), position_ids=positions, return_dict=True
        )
        hidden_states = outputs.last_hidden_state
        states = hidden_states[text.to(hidden_states.device)]
        output = head.forward(states)
        concept = torch.tensor([index], device=output.indices.device)
        weights = head.weights_of(states, output.indices, output.weights, concept)[:, 0]
        text = text.to(weights.device)
        pooled = weights.new_zeros(text.shape).masked_scatter(text, weights)
        pooled = pooled.amax(-1) if self.pooling == "max" else pooled.sum(-1) / text.sum(-1).clamp(min=1)
        return pooled >= self.threshold


@dataclass(frozen=True, kw_only=True)
class Operation(ABC):
    """
    A change that steering makes. Concepts have one number each: known ones count from 0, discovered ones go on behind
    them (`config.n_concepts + index`), as in the released label file.

    Args:
        condition: Act only in rows for which it holds.
        clean_rows: In `forward`, act on all positions of rows that hold no mask token; by default steering acts on
            masked positions only.
    """

    condition: Condition | None = None
    clean_rows: bool = False

    def __post_init__(self) -> None:
        # Lists, ranges and tensors of ids become tuples: operations are compared, kept and written to files.
        for field in fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "tolist"):
                value = value.tolist()
            if isinstance(value, (list, range)):
                value = tuple(value)
            object.__setattr__(self, field.name, value)

    @property
    def name(self) -> str:
        """Name of the operation, as recipes and reports have it."""
        return type(self).__name__

    def check(self, config: Any) -> None:
        """
        Raises:
            ValueError: The operation does not suit a model of this configuration; the message names the field.
        """
        if not config.interpretable:
            raise ValueError(
                "This checkpoint has no concept heads (interpretable=False), so it cannot be steered by concepts."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"`{field.name}` is {value!r}: give True or False.")
        if self.condition is not None:
            if not hasattr(self.condition, "holds"):
                raise ValueError(f"`condition` is {self.condition!r}: give a Condition.")
            self.condition.check(config)

    @abstractmethod
    def attach(self, model: Any, hooks: "HookBuilder") -> None:
        """Register the operation's hooks on a model."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields that differ from their defaults, and the name as `operation`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        if self.condition is not None:
            given["condition"] = dict(vars(self.condition))
        return {"operation": self.name, **{key: _as_json(value) for key, value in given.items()}}


class HookBuilder:
    """
    Registers an operation's hooks, and tells them where it acts.

    Args:
        operation: The operation.
        rows: Numbers of the rows that it is for, `None` for all.
        steering: The model's `Steering`.
        report: Is told of every change.
        owner: The thread, the block of `steer` or the call of `generate` in which the operation acts.
    """

    def __init__(self, operation: Operation, rows: set[int] | None, steering: Any, report: SteeringReport, owner: Any):
        self.operation, self.rows, self.steering, self.report, self.owner = operation, rows, steering, report, owner
        self.handles: list[Any] = []
        self.injections: list[Injection] = []
        self.scope = Scope(
            getattr(operation, "window", None), getattr(operation, "cutoff", None), operation.clean_rows
        )

    @property
    def context(self) -> ForwardContext:
        """This thread's present pass."""
        return self.steering.context

    def reach(self, places: Places) -> torch.Tensor:
        """Bool, of the shape of the places: where the operation acts in the present pass."""
        return self.scope.of(places, self.context.acting[self])

    def put(self, module: torch.nn.Module, hook: Any) -> None:
        """Register a hook on a module, behind all others."""
        own: Any = hook if isinstance(hook, SteeringHook) else CustomHook(hook, self)
        with HOOKS_LOCK:
            self.handles.append(module.register_forward_hook(own))

    def inject(self, direction: torch.Tensor, strength: float, layers: Sequence[int]) -> None:
        """Add `strength * direction` (D,) behind layers, which count from 1."""
        self.steering.hold_blocks(layers)
        self.injections.append(Injection(self, direction, strength, layers))

    def __getstate__(self) -> dict[str, Any]:
        """A copy's operations belong to the thread that copies."""
        return {**vars(self), "owner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, owner=threading.current_thread())

    def remove(self) -> None:
        """Take all hooks off."""
        handles, self.handles = self.handles, []
        injections, self.injections = self.injections, []
        with HOOKS_LOCK:
            for handle in handles:
                handle.remove()
        for injection in injections:
            self.steering.release_blocks(injection.layers)


@dataclass(frozen=True)
class Inject(Operation):
    """
    Adds a direction to the residual stream at masked positions, behind each of the chosen layers:

        d = sum_c E_c / |sum_c E_c|,    h <- h + alpha * d
        alpha = strength / max_v (lm_head[v] . d)  if normalized, so that the strength is a shift of logits
        alpha = strength                           if not

    Args:
        concepts: Ids of the concepts c, one or several.
        strength: Positive pushes towards the concepts, negative away from them.
        normalized: Whether the strength is in units of the most aligned token's logit.
        layers: A number: that layer, counted from 1, and all behind it (0: all layers, too); or the numbers of single
            layers. By default the second half, as in the reference.
        cutoff: Stop when so many tokens of a row are decided.
        window: Offsets behind the prompt where to act, (first, one after the last).
    """

    concepts: int | Sequence[int]
    strength: float
    normalized: bool = True
    layers: int | Sequence[int] | None = None
    cutoff: int | None = None
    window: tuple[int, int | None] | None = None

    def check(self, config: Any) -> None:
        super().check(config)
        _check_concepts(_as_tuple(self.concepts), config)
        _check_number("strength", self.strength)
        _check_layers(self.layers, config)
        _check_window(self.window)
        _check_count("cutoff", self.cutoff)

    def attach(self, model: Any, hooks: HookBuilder) -> None:
        """Those of the layers."""
        direction, peak = concept_direction(model, _as_tuple(self.concepts))
        count = model.config.n_layers
        layers = count // 2 if self.layers is None else self.layers
        chosen = range(max(layers, 1), count + 1) if isinstance(layers, int) else sorted(set(layers))
        strength = self.strength / peak if self.normalized else self.strength
        hooks.inject(direction.to(model.dtype), strength, list(chosen))


@dataclass(frozen=True)
class SuppressTokens(Operation):
    """
    Lowers the tokens that concepts promote, and no others: `logits <- logits - strength * sum_c relu(lm_head E_c)`.

    Args:
        concepts: Ids of the concepts c, one or several.
        strength: 0 or more.
        window: Offsets behind the prompt where to act, (first, one after the last).
    """

    concepts: int | Sequence[int]
    strength: float = 20.0
    window: tuple[int, int | None] | None = None

    def check(self, config: Any) -> None:
        super().check(config)
        _check_concepts(_as_tuple(self.concepts), config)
        _check_number("strength", self.strength, minimum=0)
        _check_window(self.window)

    def attach(self, model: Any, hooks: HookBuilder) -> None:
        """One hook on `lm_head`."""
        promoted = project(model, embed_concepts(model, _as_tuple(self.concepts)))
        hook = SubtractFromLogits(self.strength * promoted.relu().sum(dim=0), hooks)
        hooks.put(model.transformer.lm_head, hook)


@dataclass(frozen=True)
class SetConcepts(Operation):
    """
    Changes the weights of concepts in the decomposition of the last hidden state, behind the top-k selection:

        composed <- composed + sum_c (w'_c - w_c) E_c,    w' = value, value * w or w + value

    where w_c is 0 for a concept outside the top k. Epsilon is that of the untouched decomposition, and stays or goes.

    Args:
        concepts: Ids of the concepts c, known or discovered.
        value: What `mode` makes of it.
        mode: "set" the weights, "scale" them or "add" to them.
        keep_epsilon: Whether what the concepts do not explain remains in the sum.
        window: Offsets behind the prompt where to act, (first, one after the last).
    """

    concepts: int | Sequence[int]
    value: float
    mode: Literal["set", "scale", "add"] = "set"
    keep_epsilon: bool = True
    window: tuple[int, int | None] | None = None

    def check(self, config: Any) -> None:
        super().check(config)
        _check_concepts(_as_tuple(self.concepts), config)
        _check_number("value", self.value)
        _check_choice("mode", self.mode, ("set", "scale", "add"))
        _check_window(self.window)

    def attach(self, model: Any, hooks: HookBuilder) -> None:
        """A hook on each head that has some of the concepts, and one on the residual if it has to go."""
        for head, indices in split_concepts(model, _as_tuple(self.concepts)):
            hook = ChangeWeights(
                head_name(model, head), torch.tensor(indices, device="cpu"), self.mode, self.value, hooks
            )
            hooks.put(head, hook)
        if not self.keep_epsilon:
            hooks.put(model.residual, DropResidual(hooks))


@dataclass(frozen=True)
class Imitate(Operation):
    """
    Gives the generated positions the concepts of a target text:

        features <- (1 - strength) * features + strength * sum_c p_c E_c

    in both heads, with the weights p_c of the target's concepts: those that the model has when it writes the target,
    each of its positions masked in turn and all others given.

    Args:
        target: Token ids of the text.
        context: Token ids before it, such as the chat prompt that it would answer.
        strength: 0 (nothing) to 1 (the target's concepts only).
        top_n: Only so many of the strongest concepts of each head and position; by default the head's top k.
        pooled: The mean profile at all generated positions, instead of the target's i-th at the i-th.
        keep_epsilon: Whether what concepts do not explain of the model's own hidden state remains in the sum.
    """

    target: Sequence[int]
    context: Sequence[int] = ()
    strength: float = 1.0
    top_n: int | None = None
    pooled: bool = False
    keep_epsilon: bool = False

    def check(self, config: Any) -> None:
        super().check(config)
        for name, tokens in (("target", self.target), ("context", self.context)):
            if not isinstance(tokens, tuple):
                raise ValueError(f"`{name}` is {tokens!r}: give a list of token ids.")
        ids = [*self.target, *self.context]
        if not self.target or not all(_is_whole(token) and 0 <= token < config.vocab_size for token in ids):
            raise ValueError(
                f"`target` and `context` take token ids from 0 to {config.vocab_size - 1}, at least one in `target`."
            )
        if len(ids) > config.block_size:
            raise ValueError(
                f"`target` and `context` have {len(ids)} tokens, but the model's context is {config.block_size}."
            )
        _check_number("strength", self.strength)
        if not 0 < self.strength <= 1:
            raise ValueError(
                f"`strength` is {self.strength}: choose above 0 (nothing) and up to 1 (the target's concepts only)."
            )
        _check_count("top_n", self.top_n)

    @property
    def window(self) -> tuple[int, int | None]:
        """Offsets where the target has something to imitate."""
        return (0, None) if self.pooled else (0, len(self.target))

    def attach(self, model: Any, hooks: HookBuilder) -> None:
        """A hook on each head, and one on the residual if it has to go."""
        for head, profile in target_profile(model, self):
            hooks.put(head, ImitateFeatures(head_name(model, head), profile, self.strength, hooks))
        if not self.keep_epsilon:
            hooks.put(model.residual, DropResidual(hooks))


@dataclass(frozen=True)
class Amplify(Operation):
    """
    Writes about concepts: an `Inject` that plants them early and leaves the rest to the model.

    Args:
        concepts: Ids of the concepts, one or several.
        strength: In units of the most aligned token's logit.
        layers: As in `Inject`. By default from a quarter of the depth on, which are the reference's 8 of 32 layers.
        cutoff: Tokens until it stops.
    """

    concepts: int | Sequence[int]
    strength: float = 8.0
    layers: int | Sequence[int] | None = None
    cutoff: int | None = 32

    def check(self, config: Any) -> None:
        self._inject(config.n_layers).check(config)

    def attach(self, model: Any, hooks: HookBuilder) -> None:
        """Those of `Inject`."""
        self._inject(model.config.n_layers).attach(model, hooks)

    def _inject(self, n_layers: int) -> Inject:
        layers = max(1, n_layers // 4) if self.layers is None else self.layers
        return Inject(
            self.concepts,
            self.strength,
            layers=layers,
            cutoff=self.cutoff,
            condition=self.condition,
            clean_rows=self.clean_rows,
        )


@dataclass(frozen=True)
class Suppress(Operation):
    """
    Keeps off a concept: a negative `Inject` of it and of its group, and `SuppressTokens` of it alone.

    Args:
        concept: Id of the concept.
        group: Ids of its relatives.
        strength: Raw strength of the injection, 0 or less.
        layers: As in `Inject`.
        token_strength: Strength of `SuppressTokens`.
    """

    concept: int
    group: Sequence[int] = ()
    strength: float = -7.0
    layers: int | Sequence[int] | None = None
    token_strength: float = 20.0

    def check(self, config: Any) -> None:
        super().check(config)
        # By their own names, before the parts call them otherwise.
        _check_concepts((self.concept,), config, "concept")
        if len(_as_tuple(self.group)):
            _check_concepts(_as_tuple(self.group), config, "group")
        _check_number("strength", self.strength)
        if self.strength > 0:
            raise ValueError(
                f"`strength` is {self.strength}, which pushes towards the concept: give 0 or less (-7.0 by default)."
            )
        _check_number("token_strength", self.token_strength, minimum=0)
        for part in self._parts():
            part.check(config)

    def attach(self, model: Any, hooks: HookBuilder) -> None:
        """Those of the parts."""
        for part in self._parts():
            part.attach(model, hooks)

    def _parts(self) -> tuple[Operation, ...]:
        common: dict[str, Any] = {"condition": self.condition, "clean_rows": self.clean_rows}
        concepts = (self.concept, *(concept for concept in self.group if concept != self.concept))
        inject = Inject(concepts, self.strength, normalized=False, layers=self.layers, **common)
        return inject, SuppressTokens(self.concept, self.token_strength, **common)


OPERATIONS: dict[str, type[Operation]] = {
    kind.__name__: kind for kind in (Inject, SuppressTokens, SetConcepts, Imitate, Amplify, Suppress)
}


def operation_from_dict(values: dict[str, Any]) -> Operation:
    """
    The operation of `Operation.to_dict`.

    Raises:
        ValueError: There is no such operation, or it has no such field.
    """
    values = dict(values)
    name = values.pop("operation", None)
    if name not in OPERATIONS:
        raise ValueError(f"`operation` is {name!r}: choose one of {', '.join(OPERATIONS)}.")
    kind = OPERATIONS[name]
    try:
        if values.get("condition") is not None:
            values["condition"] = Condition(**values["condition"])
        return kind(**values)
    except TypeError as error:
        names = ", ".join(field.name for field in fields(kind))
        raise ValueError(f"{name} cannot have these fields: {error}; it has {names}.") from error


# Checks


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_concepts(concepts: tuple[int, ...], config: Any, name: str = "concepts") -> None:
    known = config.n_concepts
    count = known + config.n_discovered
    if not concepts:
        raise ValueError(f"`{name}` is empty: give one concept id or more.")
    seen: set[int] = set()
    for concept in concepts:
        if not _is_whole(concept) or not 0 <= concept < count:
            discovered = f", discovered ones {known} to {count - 1}" if count > known else ", and no others exist"
            raise ValueError(f"`{name}` has {concept!r}: known concepts have the ids 0 to {known - 1}{discovered}.")
        if concept in seen:
            raise ValueError(f"`{name}` has {concept} more than once: name each concept once.")
        seen.add(concept)


def _check_layers(layers: int | Sequence[int] | None, config: Any) -> None:
    if layers is None:
        return
    chosen, first = _as_tuple(layers), 0 if _is_whole(layers) else 1
    if not chosen:
        raise ValueError("`layers` is empty: give a first layer, or the numbers of single ones.")
    for layer in chosen:
        if not _is_whole(layer) or not first <= layer <= config.n_layers:
            raise ValueError(f"`layers` has {layer!r}, but the model has the layers 1 to {config.n_layers}.")


def _check_number(name: str, value: float, minimum: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < minimum:
        least = "" if minimum == -math.inf else f" of {minimum:g} or more"
        raise ValueError(f"`{name}` is {value!r}: give a finite number{least}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(choices)}.")


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (not _is_whole(count) or count < 1):
        raise ValueError(f"`{name}` is {count!r}: give a whole number of 1 or more, or leave it out.")


def _check_window(window: tuple[int, int | None] | None) -> None:
    if window is None:
        return
    start, stop = window if isinstance(window, tuple) and len(window) == 2 else (None, None)
    if not _is_whole(start) or start < 0 or not (stop is None or (_is_whole(stop) and stop > start)):
        raise ValueError(
            f"`window` is {window!r}: give (first, one after the last) in tokens behind the prompt, or (first, None)."
        )


__all__ = [
    "OPERATIONS",
    "Amplify",
    "Condition",
    "HookBuilder",
    "Imitate",
    "Inject",
    "Operation",
    "SetConcepts",
    "Suppress",
    "SuppressTokens",
    "operation_from_dict",
]
