"""A model under steering: attaching operations, and telling their hooks about each forward pass."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch

from .canvas_steerling import Canvas
from .compatibility_steerling import OLD_NAME
from .hooks_steerling import ForwardContext, Places, SteeringReport
from .lookup_steerling import device_of
from .steering_steerling import HookBuilder, Operation

# Positions of texts in which conditions are weighed at a time.
POSITIONS = 4096


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


class Steering:
    """
    The operations on one model, in the order in which they were attached, and its present forward pass.

    In `generate`, the loop announces every pass (`window`, `choose`). Any other call of the backbone is seen by hooks of its
    own (`watch`), and there the prompt of a row ends with its first masked position.

    Args:
        model: The model.
    """

    def __init__(self, model: Any):
        self.model = model
        self.context = ForwardContext()
        self.builders: list[HookBuilder] = []
        self.announced = False  # whether the present pass of the backbone is known without a look at its arguments
        self.whole = False  # whether forward decomposes all positions, whatever it keeps
        self.keep: int | torch.Tensor = 0  # `logits_to_keep` of forward
        # Of the present call of generate: what `changed` saw last of each canvas, and the rows of each operation.
        self.states: dict[int, tuple[bool, ...]] = {}
        self.rows: dict[HookBuilder, set[int] | None] = {}
        self.of_calls: list[HookBuilder] = []  # all that came with calls of generate
        self.watches: list[Any] = []

    def attach(
        self, operations: Sequence[Operation], rows: set[int] | None, report: SteeringReport
    ) -> list[HookBuilder]:
        """Register hooks for operations that have been checked; all or none."""
        builders: list[HookBuilder] = []
        try:
            for operation in operations:
                builder = HookBuilder(operation, rows, self.context, report)
                builders.append(builder)
                with self.announce(None):
                    operation.attach(self.model, builder)
        except BaseException:
            for builder in builders:
                builder.remove()
            raise
        self.builders.extend(builders)
        return builders

    def detach(self, builders: list[HookBuilder]) -> None:
        """Take operations off, and with the last of them everything else."""
        for builder in builders:
            builder.remove()
        self.builders = [builder for builder in self.builders if builder not in builders]
        if not self.builders:
            for watch in self.watches:
                watch.remove()
            self.watches = []
            if self.model._steering is self:
                self.model._steering = None

    @contextmanager
    def announce(self, places: Places | None, device: torch.device | None = None) -> Iterator[None]:
        """Passes of the backbone in this context compute these places, and steer nothing if there are none."""
        before, self.announced = self.announced, True
        self._prepare(places, device)
        try:
            yield
        finally:
            self.announced = before
            self._prepare(None)

    def _prepare(self, places: Places | None, device: torch.device | None = None) -> None:
        for builder in self.builders:
            for injection in builder.injections:
                injection.prepare(places, device)

    # In generate

    @contextmanager
    def call(self, canvases: Sequence[Canvas], own: list[HookBuilder]) -> Iterator[None]:
        """A call of generate, perhaps inside another one, with operations of its own."""
        before = self.states, self.rows
        self.of_calls += own
        try:
            self._start(canvases, own)
            yield
        finally:
            self.states, self.rows = before
            self.of_calls = [builder for builder in self.of_calls if builder not in own]
            self.context.forget()

    def _start(self, canvases: Sequence[Canvas], own: list[HookBuilder]) -> None:
        """Before the first pass: which rows meet the conditions of which operations."""
        same: dict[tuple[int, ...], list[int]] = {}
        for canvas in canvases:
            same.setdefault(tuple(canvas.tokens[: canvas.prompt_length].tolist()), []).append(canvas.index)
        prompts = [torch.tensor(prompt, device="cpu") for prompt in same]
        mask = self.model.config.mask_token_id
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=mask)
        positions = torch.arange(ids.shape[1], device="cpu").expand(ids.shape)
        self.rows = self._weigh_conditions(ids, ids != mask, positions, list(same.values()), own)
        self.states = {canvas.index: self._state(canvas) for canvas in canvases}

    def changed(self, canvas: Canvas) -> bool:
        """Whether operations have begun or ended in a row since this was last asked."""
        before, self.states[canvas.index] = self.states[canvas.index], self._state(canvas)
        return self.states[canvas.index] != before

    def _state(self, canvas: Canvas) -> tuple[bool, ...]:
        scopes = ((builder.scope, self.rows.get(builder, builder.rows)) for builder in self.builders)
        return tuple(
            scope.cutoff is None or canvas.committed < scope.cutoff
            for scope, rows in scopes
            if rows is None or canvas.index in rows
        )

    def _act_in(self, rows: dict[HookBuilder, set[int] | None]) -> None:
        """Have operations act in these rows; what was attached since they were weighed, wherever it was attached for."""
        for builder in self.builders:
            builder.scope.rows = rows.get(builder, builder.rows)

    def window(
        self,
        canvases: Sequence[Canvas],
        lanes: int,
        positions: torch.Tensor,
        masked: torch.Tensor,
        device: torch.device,
    ) -> AbstractContextManager[None]:
        """
        Announce a pass over windows of canvases, each of which has `lanes` rows: (rows, W) positions, and bool where they
        are masked and seen.
        """
        self._act_in(self.rows)
        if not any(builder.injections for builder in self.builders):
            return self.announce(None)
        places = _places(canvases, [lanes] * len(canvases), positions, masked)
        if lanes == 2:
            places.blind[1::2] = True
        return self.announce(places, device)

    def choose(self, canvases: Sequence[Canvas], lanes: int, masked: Sequence[torch.Tensor]) -> None:
        """Announce the heads and logits of masked positions (n_i,) of canvases, lane by lane."""
        self._act_in(self.rows)
        positions = torch.cat(list(masked))
        places = _places(
            canvases, [len(own) for own in masked], positions, torch.ones_like(positions, dtype=torch.bool)
        )
        if lanes == 2:
            places = places[torch.arange(len(positions), device="cpu").repeat(2)]
            places.blind[len(positions) :] = True
        self.context.states = self.context.logits = places

    # In forward

    def watch(self) -> None:
        """See calls of the model and of its backbone that nobody announces."""
        if self.builders and not self.watches:
            self.watches = [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.model.register_forward_hook(self._after_model, always_call=True),
                self.model.transformer.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            ]

    def _before_model(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _bound(module, args, kwargs)
        if given.get("labels") is not None:
            raise ValueError("`labels` cannot be given while the model is steered: compute the loss from the logits.")
        self.keep, self.whole = given.get("logits_to_keep", 0), given.get("output_concepts", False)

    def _after_model(self, *_: Any) -> None:
        self.keep, self.whole = 0, False
        self.context.forget()
        self._prepare(None)

    def _before_backbone(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.announced:
            return
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
            and any(one.operation.condition for one in self.builders if one not in self.of_calls)
        ):
            raise ValueError(
                "`cache` (`past_key_values`) cannot be given to a model that is steered under a condition, which needs the whole text: "
                "pass all of it, or use generate()."
            )
        text, positions = self._text_and_positions(ids, given)
        masked = (ids == self.model.config.mask_token_id) & text
        with torch.no_grad():
            rows = [[row] for row in range(len(ids))]
            self._act_in(self._weigh_conditions(ids, text & ~masked, positions, rows))
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
        kept = places[:, slice(-self.keep, None) if isinstance(self.keep, int) else self.keep.cpu()]
        self.context.states, self.context.logits = places if self.whole else kept, kept
        self._prepare(places, device)

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
        ids: torch.Tensor,
        text: torch.Tensor,
        positions: torch.Tensor,
        rows: list[list[int]],
        acting: Sequence[HookBuilder] = (),
    ) -> dict[HookBuilder, set[int] | None]:
        """
        The rows in which each operation may act, by texts (B, T) that each stand in some rows. Operations of a call of generate
        are idle in what is called inside it.
        """
        device, at_once = device_of(self.model), max(1, POSITIONS // ids.shape[1])
        found: dict[HookBuilder, set[int] | None] = {}
        for builder in self.builders:
            condition = builder.operation.condition
            found[builder] = builder.rows
            if builder in self.of_calls and builder not in acting:
                found[builder] = set()
            elif condition is not None:
                pieces = zip(*(whole.split(at_once) for whole in (ids, text, positions.clamp(min=0))))
                with self.announce(None):
                    holds = [
                        condition.holds(self.model, *(part.to(device) for part in piece)).tolist() for piece in pieces
                    ]
                allowed = {row for own, held in zip(rows, chain(*holds)) if held for row in own}
                found[builder] = allowed if builder.rows is None else allowed & builder.rows
        return found


class SteerableMixin:
    """`steer` and `add_steering` for a model that has `transformer`, heads and a Steerling configuration."""

    config: Any
    _steering: Steering | None = None

    def add_steering(self, *operations: Any) -> SteeringHandle:
        """
        Attach operations (or recipes) to the model until the handle removes them. They act in `generate` and in
        `forward`, at masked positions, after those that were attached before.

        Raises:
            ValueError: An operation does not suit the model; nothing is attached then.
        """
        handle = self._attach([(operation, None) for operation in flatten_operations(self, operations)])
        if self._steering is not None:
            self._steering.watch()
        return handle

    @contextmanager
    def steer(self, *operations: Any) -> Iterator[SteeringHandle]:
        """`add_steering` for the length of a `with` block, which gives the handle."""
        handle = self.add_steering(*operations)
        try:
            yield handle
        finally:
            handle.remove()

    @contextmanager
    def _steered(
        self, steering: Any, canvases: Sequence[Canvas], copies: int
    ) -> Iterator[tuple[Steering | None, SteeringReport | None]]:
        """The model under `steering` of `generate` as well, ready for the first pass; and the report of these operations."""
        operations = operations_by_row(self, steering, len(canvases), copies)
        handle = self._attach(operations) if operations else None
        if self._steering is None:
            yield None, None
            return
        try:
            with self._steering.call(canvases, handle._builders if handle else []):
                yield self._steering, handle.report if handle else None
        finally:
            if handle is not None:
                handle.remove()

    def _attach(self, operations: Sequence[tuple[Operation, set[int] | None]]) -> SteeringHandle:
        """Attach operations, each for the rows of these numbers or for all."""
        steering = self._steering or Steering(self)
        report, builders = SteeringReport(), []
        try:
            for operation, rows in operations:
                builders += steering.attach([operation], rows, report)
                self._steering = steering
        except BaseException:
            steering.detach(builders)
            raise
        return SteeringHandle(steering, builders, report)


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
