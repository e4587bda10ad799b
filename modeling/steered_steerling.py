"""A model under steering: attaching operations, and telling their hooks about each forward pass."""

import inspect
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from transformers.utils import logging

from .canvas_steerling import Canvas
from .compatibility_steerling import OLD_NAME
from .hooks_steerling import (
    HOOKS_LOCK,
    FirstLook,
    ForwardContext,
    Injections,
    Places,
    SteeringHook,
    SteeringReport,
    add_injections,
)
from .lookup_steerling import device_of
from .steering_steerling import HookBuilder, Operation

logger = logging.get_logger(__name__)

# Of `ForwardContext.now`, that no pass is under way.
NOTHING: tuple[dict, None, None] = ({}, None, None)

# Positions of texts in which conditions are weighed at a time.
POSITIONS = 4096

# The blocks of `steer` that are open in the present context: those of a thread, of a task of asyncio, or of what copied its context.
_OPEN_BLOCKS: ContextVar[tuple[object, ...]] = ContextVar("open blocks of steer", default=())


class SteeringHandle:
    """
    Operations that are attached to a model.

    Attributes:
        report: What they have changed so far, a `SteeringReport`.
    """

    def __init__(self, steering: "Steering", builders: list[HookBuilder], report: SteeringReport):
        self._steering, self._builders, self.report = steering, builders, report

    def remove(self) -> None:
        """Take the operations off; a second time does nothing."""
        builders, self._builders = self._builders, []
        self._steering.detach(builders)


class Call:
    """
    A call of generate under steering.

    Attributes:
        rows: The rows in which each operation acts, `None` for all.
        states: Of each canvas's number, what `Steering.changed` saw last.
    """

    def __init__(self) -> None:
        self.rows: dict[HookBuilder, set[int] | None] = {}
        self.states: dict[int, tuple[bool, ...]] = {}


class Steering:
    """
    The operations on one model, and what each thread is computing with them.

    Threads share the model, its modules and the hooks on these; an operation acts only in the passes of its owner: the thread that
    attached it (`add_steering`), a context (`steer`), or a call of generate. In `generate`, the loop announces every pass
    (`window`, `choose`). Any other call of the backbone is seen by hooks of its own (`_watch`), and there the prompt of a row ends
    with its first masked position.

    Args:
        model: The model.
    """

    def __init__(self, model: Any):
        self.model = model
        self.context = ForwardContext()
        # All owners' operations in the order in which they were attached. Never changed in place: other threads read it.
        self.builders: list[HookBuilder] = []
        self.held_blocks: Counter[int] = Counter()
        self.block_hooks: dict[int, Any] = {}
        self.watches: list[Any] = []

    def present(self, call: Call | None = None) -> list[HookBuilder]:
        """What acts here and now, in the order in which it was attached; of calls, what came with this one."""
        owners = {id(owner) for owner in (threading.current_thread(), call, *_OPEN_BLOCKS.get())}
        return [builder for builder in self.builders if id(builder.owner) in owners]

    def in_call(self) -> list[HookBuilder]:
        """`present` in this thread's present call of generate."""
        return self.present(self.context.call)

    def attach(
        self,
        operations: Sequence[tuple[Operation, set[int] | None]],
        owner: object,
    ) -> SteeringHandle:
        """Register hooks for checked operations, each for the rows of these numbers or for all; all or none."""
        report, builders = SteeringReport(), []
        try:
            for operation, rows in operations:
                builder = HookBuilder(operation, rows, self, report, owner)
                builders.append(builder)
                with self.announce(None):
                    operation.attach(self.model, builder)
        except BaseException:
            for builder in builders:
                builder.remove()
            raise
        with HOOKS_LOCK:
            self.builders = [*self.builders, *builders]
            self._watch()
        return SteeringHandle(self, builders, report)

    def detach(self, builders: list[HookBuilder]) -> None:
        """Take operations off, and with the last of them everything else."""
        for builder in builders:
            builder.remove()
        with HOOKS_LOCK:
            self.builders = [builder for builder in self.builders if builder not in builders]
            self._watch()

    def hold_blocks(self, layers: Sequence[int]) -> None:
        """Have the hook of injections on these layers."""
        with HOOKS_LOCK:
            for layer in layers:
                if not self.held_blocks[layer]:
                    # In front of what transformers hangs there to record hidden states, and leaves there.
                    self.block_hooks[layer] = self.model.transformer.blocks[layer - 1].register_forward_hook(
                        add_injections, prepend=True, with_kwargs=True
                    )
                self.held_blocks[layer] += 1

    def release_blocks(self, layers: Sequence[int]) -> None:
        """The reverse of `hold_blocks`, once for each time."""
        with HOOKS_LOCK:
            for layer in layers:
                self.held_blocks[layer] -= 1
                if not self.held_blocks[layer]:
                    self.block_hooks.pop(layer).remove()

    def warn_of_others(self) -> None:
        """Say once that operations are attached which do not act here."""
        if any(not isinstance(builder.owner, Call) for builder in self.builders):
            logger.warning_once(
                "This model is steered in another thread or context, and not in this one: operations act where they were attached. "
                "To steer a single call, in any thread, use generate(steering=...)."
            )

    @contextmanager
    def announce(self, places: Places | None, device: torch.device | None = None) -> Iterator[Injections | None]:
        """
        Passes of the backbone in this context compute these places, and steer nothing if there are none. Gives the backbone's
        argument `injections`.
        """
        before, self.context.announced = self.context.announced, True
        try:
            yield None if places is None or device is None else self._injections(places, device)
        finally:
            self.context.announced = before

    def _injections(self, places: Places, device: torch.device) -> Injections | None:
        amounts: Injections = {}
        for builder in self.context.acting:
            for injection in builder.injections:
                injection.prepare(places, device, amounts)
        return amounts or None

    # In generate

    @contextmanager
    def call(self, call: Call, canvases: Sequence[Canvas]) -> Iterator[None]:
        """A call of generate, perhaps inside another one."""
        context = self.context
        outer = context.call, context.now()
        try:
            self._start(call, canvases)
            context.call = call
            yield
        finally:
            context.call = outer[0]
            context.set(*outer[1])

    def _start(self, call: Call, canvases: Sequence[Canvas]) -> None:
        """Before the first pass: which rows meet the conditions of which operations."""
        same: dict[tuple[int, ...], list[int]] = {}
        for canvas in canvases:
            same.setdefault(tuple(canvas.tokens[: canvas.prompt_length].tolist()), []).append(canvas.index)
        prompts = [torch.tensor(prompt, dtype=torch.long, device="cpu") for prompt in same]
        mask = self.model.config.mask_token_id
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=mask)
        positions = torch.arange(ids.shape[1], device="cpu").expand(ids.shape)
        call.rows = self._weigh_conditions(self.present(call), ids, ids != mask, positions, list(same.values()))
        call.states = {canvas.index: self._state(call, canvas) for canvas in canvases}

    def changed(self, canvas: Canvas) -> bool:
        """Whether operations have begun or ended in a row since this was last asked."""
        call = self.context.call
        before, call.states[canvas.index] = call.states[canvas.index], self._state(call, canvas)
        return call.states[canvas.index] != before

    def _state(self, call: Call, canvas: Canvas) -> tuple[bool, ...]:
        scopes = ((builder.scope, call.rows.get(builder, builder.rows)) for builder in self.present(call))
        return tuple(
            scope.cutoff is None or canvas.committed < scope.cutoff
            for scope, rows in scopes
            if rows is None or canvas.index in rows
        )

    def _act_in(self, rows: dict[HookBuilder, set[int] | None], call: Call | None = None) -> None:
        """Have operations act in these rows; what was attached since they were weighed, wherever it was attached for."""
        self.context.acting = {builder: rows.get(builder, builder.rows) for builder in self.present(call)}

    def window(
        self,
        canvases: Sequence[Canvas],
        lanes: int,
        positions: torch.Tensor,
        masked: torch.Tensor,
        device: torch.device,
    ) -> AbstractContextManager[Injections | None]:
        """
        Announce a pass over windows of canvases, each of which has `lanes` rows: (rows, W) positions, and bool where they
        are masked and seen. Gives the backbone's argument `injections`.
        """
        call = self.context.call
        self._act_in(call.rows, call)
        if not any(builder.injections for builder in self.context.acting):
            return self.announce(None)
        places = _places(canvases, [lanes] * len(canvases), positions, masked)
        if lanes == 2:
            places.blind[1::2] = True
        return self.announce(places, device)

    def choose(self, canvases: Sequence[Canvas], lanes: int, masked: Sequence[torch.Tensor]) -> None:
        """Announce the heads and logits of masked positions (n_i,) of canvases, lane by lane."""
        call = self.context.call
        self._act_in(call.rows, call)
        positions = torch.cat(list(masked))
        places = _places(
            canvases, [len(own) for own in masked], positions, torch.ones_like(positions, dtype=torch.bool)
        )
        if lanes == 2:
            places = places[torch.arange(len(positions), device="cpu").repeat(2)]
            places.blind[len(positions) :] = True
        self.context.states = self.context.logits = places

    # In forward

    def _watch(self) -> None:
        """See calls of the model and of its backbone that nobody announces, as long as something may act in them."""
        wanted = any(not isinstance(builder.owner, Call) for builder in self.builders)
        if wanted and not self.watches:
            self.watches = [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.model.register_forward_hook(self._after_model, always_call=True),
                self.model.transformer.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            ]
        elif not wanted:
            for watch in self.watches:
                watch.remove()
            self.watches = []

    def _before_model(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        context = self.context
        context.outer.append(context.now())
        if not self.present():
            return
        given = _bound(module, args, kwargs)
        if given.get("labels") is not None:
            raise ValueError("`labels` cannot be given while the model is steered: compute the loss from the logits.")
        context.keep, context.whole = given.get("logits_to_keep", 0), given.get("output_concepts", False)

    def _after_model(self, *_: Any) -> None:
        context = self.context
        context.keep, context.whole = 0, False
        outer = context.outer.pop() if context.outer else None
        # Inside a call of generate, its own pass goes on.
        context.set(*(outer if outer is not None and context.call is not None else NOTHING))

    def _before_backbone(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        context = self.context
        if context.announced:
            return None
        if not self.present():
            context.set(*NOTHING)
            self.warn_of_others()
            return None
        given = _bound(module, args, kwargs)
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError(
                "A steered model needs `input_ids`: `inputs_embeds` do not tell which positions are masked."
            )
        device, ids = ids.device, ids.cpu()
        cache = given.get("cache")
        if (
            cache is not None
            and cache.get_seq_length()
            and any(builder.operation.condition for builder in self.present())
        ):
            raise ValueError(
                "`cache` (`past_key_values`) cannot be given to a model that is steered under a condition, which needs the whole text: "
                "pass all of it, or use generate()."
            )
        text, positions = self._text_and_positions(ids, given)
        masked = (ids == self.model.config.mask_token_id) & text
        with torch.no_grad():
            rows = [[row] for row in range(len(ids))]
            self._act_in(self._weigh_conditions(self.present(), ids, text & ~masked, positions, rows))
        noised = masked.any(-1, keepdim=True)
        first = positions.gather(1, masked.long().argmax(-1, keepdim=True))
        zero = torch.zeros_like(positions)
        places = Places(
            row=torch.arange(len(ids), device="cpu")[:, None].expand_as(ids),
            position=positions,
            offset=positions - torch.where(noised, first, 0),
            masked=masked,
            clean=~noised & text,
            committed=zero,
            step=zero,
            blind=torch.zeros_like(masked),
        )
        kept = places[:, slice(-context.keep, None) if isinstance(context.keep, int) else context.keep.cpu()]
        context.states, context.logits = places if context.whole else kept, kept
        return args, {**kwargs, "injections": self._injections(places, device)}

    @staticmethod
    def _text_and_positions(ids: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) bool, where a backbone's ids are no padding, and their places in the rows."""
        mask, positions, cache = map(given.get, ("attention_mask", "position_ids", "cache"))
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            text = mask.cpu().bool()
        else:
            text = torch.ones(len(ids), past + ids.shape[1], dtype=torch.bool, device="cpu")
        counted = (text.long().cumsum(-1) - 1)[:, past:]
        return text[:, past:], counted if positions is None else positions.cpu().expand(ids.shape)

    def _weigh_conditions(
        self,
        builders: Sequence[HookBuilder],
        ids: torch.Tensor,
        text: torch.Tensor,
        positions: torch.Tensor,
        rows: list[list[int]],
    ) -> dict[HookBuilder, set[int] | None]:
        """The rows in which each operation may act, by texts (B, T) that each stand in some rows."""
        device, at_once = device_of(self.model), max(1, POSITIONS // ids.shape[1])
        found: dict[HookBuilder, set[int] | None] = {}
        for builder in builders:
            condition = builder.operation.condition
            found[builder] = builder.rows
            if condition is not None:
                pieces = zip(*(whole.split(at_once) for whole in (ids, text, positions.clamp(min=0))))
                with self.announce(None):
                    holds = [
                        condition.holds(self.model, *(part.to(device) for part in piece)).tolist() for piece in pieces
                    ]
                allowed = {row for own, held in zip(rows, chain(*holds)) if held for row in own}
                found[builder] = allowed if builder.rows is None else allowed & builder.rows
        return found

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what acts here outside of calls."""
        return {**vars(self), "builders": self.present(), "context": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, context=ForwardContext())
        _drop_hooks_of_others(self.model)


def _drop_hooks_of_others(model: Any) -> None:
    """Copied modules bring along the hooks of all owners; those that the copy's `Steering` does not have go."""
    steering = vars(model).get("_steering")
    if "_modules" not in vars(model) or (steering is not None and "builders" not in vars(steering)):
        return  # one of the two is not there yet, and will ask again
    builders = [] if steering is None else steering.builders
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FirstLook) or (isinstance(hook, SteeringHook) and hook.source not in builders):
                del module._forward_hooks[number]
    if steering is not None:
        own = Counter(layer for builder in builders for injection in builder.injections for layer in injection.layers)
        for layer in set(steering.held_blocks) - set(own):
            steering.release_blocks([layer] * steering.held_blocks[layer])
        steering.held_blocks = own
        steering._watch()


class SteerableMixin:
    """`steer` and `add_steering` for a model that has `transformer`, heads and a Steerling configuration."""

    config: Any
    _steering: Steering | None = None

    @property
    def attached_operations(self) -> tuple[Operation, ...]:
        """The operations that `steer` and `add_steering` have attached, as far as they act in this thread and context."""
        return () if self._steering is None else tuple(builder.operation for builder in self._steering.present())

    def add_steering(self, *operations: Any) -> SteeringHandle:
        """
        Attach operations (or recipes) to the model until the handle removes them. They act in `generate` and in
        `forward`, at masked positions, after those that were attached before.

        They act in this thread alone: other threads that use the model get what they would get without. To steer one call, in
        whatever thread, use `generate(steering=...)`.

        Raises:
            ValueError: An operation does not suit the model; nothing is attached then.
        """
        return self._attach(operations, threading.current_thread())

    @contextmanager
    def steer(self, *operations: Any) -> Iterator[SteeringHandle]:
        """
        `add_steering` for the length of a `with` block, which gives the handle. The operations act in the context
        (`contextvars`) of the block: a thread or a task of asyncio, and whatever runs in a copy of its context, as `asyncio.to_thread`
        does.
        """
        block = object()
        handle = self._attach(operations, block)
        outer = _OPEN_BLOCKS.get()
        _OPEN_BLOCKS.set((*outer, block))
        try:
            yield handle
        finally:
            _OPEN_BLOCKS.set(tuple(one for one in _OPEN_BLOCKS.get() if one is not block))
            handle.remove()

    @contextmanager
    def _steered(
        self, steering: Any, canvases: Sequence[Canvas], copies: int, replayed: bool = False
    ) -> Iterator[tuple[Steering | None, SteeringReport | None]]:
        """
        The model under `steering` of `generate` as well, ready for the first pass; and the report of these operations. Without
        any there is no steering to be told of passes, unless they are `replayed`: operations may be attached between them.
        """
        operations = operations_by_row(self, steering, len(canvases), copies)
        if not operations and not self.attached_operations and not replayed:
            if self._steering is not None:
                self._steering.warn_of_others()
            yield None, None
            return
        shared, call = self._shared_steering(), Call()
        handle = shared.attach(operations, call)
        try:
            with shared.call(call, canvases):
                yield shared, handle.report if operations else None
        finally:
            handle.remove()

    def _attach(self, operations: Any, owner: object) -> SteeringHandle:
        checked = [(operation, None) for operation in flatten_operations(self, operations)]
        return self._shared_steering().attach(checked, owner)

    def _shared_steering(self) -> Steering:
        """The model's one `Steering`."""
        with HOOKS_LOCK:
            if self._steering is None:
                self._steering = Steering(self)
            return self._steering

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # torch's, which mypy does not see from a mixin
        _drop_hooks_of_others(self)


def flatten_operations(model: Any, operations: Any) -> list[Operation]:
    """
    The operations in an operation, a recipe, a sequence of such or `None`, checked.

    Raises:
        ValueError: Something is no operation, or does not suit the model.
    """
    if operations is None:
        return []
    if isinstance(operations, (list, tuple)):
        return [single for part in operations for single in flatten_operations(model, part)]
    if hasattr(operations, "operations"):  # a recipe, which checks what it was made for
        operations.check(model)
        return flatten_operations(model, list(operations.operations))
    if isinstance(operations, type) or not hasattr(operations, "attach"):
        raise ValueError(f"`steering` has {operations!r}: give operations such as Amplify(12), or recipes.")
    operations.check(model.config)
    return [operations]


def operations_by_row(model: Any, steering: Any, rows: int, copies: int) -> list[tuple[Operation, set[int] | None]]:
    """
    `steering` of `generate`: each operation with the numbers of its rows, `None` for all.

    Args:
        model: The model.
        steering: An operation or a recipe, for all rows; or a list with an entry for each prompt, which may be `None`, an
            operation, a recipe or a tuple of those.
        rows: Rows of the output.
        copies: Rows of each prompt.

    Raises:
        ValueError: The list has another length, or something does not suit the model.
    """
    if not isinstance(steering, list):
        return [(operation, None) for operation in flatten_operations(model, steering)]
    if len(steering) * copies != rows:
        raise ValueError(
            f"`steering` has {len(steering)} entries for {rows // copies} prompts: give one each, or a tuple for all rows."
        )
    chosen: list[tuple[Operation, set[int]]] = []
    for number, entry in enumerate(steering):
        own = range(number * copies, (number + 1) * copies)
        place = 0
        for operation in flatten_operations(model, entry):
            # Rows share an operation where that keeps the order of each.
            while place < len(chosen) and chosen[place][0] != operation:
                place += 1
            if place == len(chosen):
                chosen.append((operation, set()))
            chosen[place][1].update(own)
            place += 1
    return list(chosen)


def _places(canvases: Sequence[Canvas], repeats: list[int], positions: torch.Tensor, masked: torch.Tensor) -> Places:
    """Places of positions (rows, W) or (n,), where each canvas has so many rows, or so many of the n."""
    facts = torch.tensor(
        [[canvas.index, canvas.prompt_length, canvas.committed, canvas.forwards] for canvas in canvases],
        device="cpu",
    )
    lines = facts.repeat_interleave(torch.tensor(repeats, device="cpu"), dim=0).T
    row, prompt, committed, step = (lines[..., None] if positions.dim() == 2 else lines).expand(-1, *positions.shape)
    return Places(
        row=row,
        position=positions,
        offset=positions - prompt,
        masked=masked,
        clean=torch.zeros_like(masked),
        committed=committed,
        step=step,
        blind=torch.zeros_like(masked),
    )


def _bound(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by their names."""
    kwargs = {"cache" if name == OLD_NAME else name: value for name, value in kwargs.items()}
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments


__all__ = ["SteerableMixin", "Steering", "SteeringHandle", "operations_by_row"]
