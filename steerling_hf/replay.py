"""Forward passes as they were when tokens were decided, over embeddings that may be others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from .modeling.attribution_steerling import vocabulary_rows
from .modeling.canvas_steerling import Canvas
from .modeling.lookup_steerling import device_of
from .modeling.quantized_steerling import parts_of
from .modeling.trace_steerling import SteerlingTrace
from .modes import evaluating, frozen
from .shared_prefix import beginnings, read_prefix


class Replay:
    """
    Repeats the passes that decided positions of a generation, without a cache and no further than the decided block sees,
    under the steering and guidance of the generation. Made by `replay`.

    Args:
        model: The model.
        trace: How the row was written.
        positions: (n,) decided positions.
    """

    def __init__(self, model: Any, trace: SteerlingTrace, positions: Sequence[int]):
        self.model, self.guidance_scale, self.mask = model, trace.guidance_scale, trace.mask_token
        self.steering: Any = None  # told of every pass
        self.positions = torch.tensor(positions, device="cpu")
        self.canvases = [trace.before(position, index) for index, position in enumerate(positions)]

    @property
    def device(self) -> torch.device:
        """Where ids and embeddings go."""
        return device_of(self.model)

    def visible(self, target: int) -> int:
        """Number of first positions that a target sees: up to the end of its attention block."""
        canvas, position = self.canvases[target], int(self.positions[target])
        return min((position // canvas.grid + 1) * canvas.grid, canvas.visible)

    def settled(self, target: int) -> int:
        """
        Number of first positions, whole attention blocks, of which what is computed there does not depend on the step: rows
        that agree in them can share it.
        """
        steered = bool(self.steering.in_call())
        # An operation may act on the masked prompt of a blind row, and that may depend on the step.
        return 0 if steered and self.guidance_scale is not None else self.canvases[target].final

    def tokens(self, targets: Sequence[int]) -> torch.Tensor:
        """(n, W) tokens that the passes of targets saw; they must see equally many."""
        widths = {self.visible(target) for target in targets}
        assert len(widths) == 1, widths
        return torch.stack([self.canvases[target].tokens[: min(widths)] for target in targets]).to(self.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., D) embeddings of tokens."""
        return self.model.get_input_embeddings()(tokens)

    def states(self, targets: Sequence[int], embeddings: torch.Tensor) -> torch.Tensor:
        """
        (lanes, n, D) last hidden states at the positions of n targets, from (n, W, D) embeddings of what they see. Guided
        rows have two lanes, the second one with a masked prompt.
        """
        # As the tokens were decided; and linear layers would keep a copy of their weights for float32 states.
        embeddings = embeddings.to(self.model.dtype)
        canvases = [self.canvases[target] for target in targets]
        positions, width = self.positions[list(targets)], embeddings.shape[1]
        tokens = torch.stack([canvas.tokens[:width] for canvas in canvases])
        masked = tokens == self.mask
        lanes = 1 if self.guidance_scale is None else 2
        if lanes == 2:
            given = torch.stack([canvas.given[:width] for canvas in canvases])
            blind = torch.where(given.to(embeddings.device)[..., None], self._mask_embedding(embeddings), embeddings)
            embeddings = torch.stack([embeddings, blind], dim=1).flatten(0, 1)
            masked = torch.stack([masked, masked | given], dim=1).flatten(0, 1)
        cache = self._read_once(targets, lanes, embeddings, masked)
        start = 0 if cache is None else cache.get_seq_length()
        hidden_states = self._run(canvases, lanes, embeddings[:, start:], masked[:, start:], cache)
        self.steering.choose(canvases, lanes, self.positions[list(targets)][:, None].unbind())
        rows = torch.arange(len(targets), device=hidden_states.device)
        columns = (positions - start).to(hidden_states.device)
        return hidden_states.unflatten(0, (-1, lanes)).transpose(0, 1)[:, rows, columns]

    def _read_once(
        self, targets: Sequence[int], lanes: int, embeddings: torch.Tensor, masked: torch.Tensor
    ) -> DynamicCache | None:
        """Keys and values of the settled positions, if rows share some."""
        settled = min(map(self.settled, targets))
        first, kinds = beginnings(embeddings[:, :settled])
        if not settled or len(first) == len(kinds):
            return None

        def read(begin: torch.Tensor) -> DynamicCache:
            cache = DynamicCache(config=self.model.config)
            self._run(
                [self.canvases[targets[row // lanes]] for row in first.tolist()],
                1,
                begin,
                masked[first, :settled],
                cache,
            )
            return cache

        return read_prefix(read, embeddings[:, :settled], first, kinds, self.model.config)

    def _run(
        self,
        canvases: list[Canvas],
        lanes: int,
        embeddings: torch.Tensor,
        masked: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """(rows, W, D) last hidden states of a pass that continues what is cached, and is cached."""
        start = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(start, start + embeddings.shape[1], device="cpu").expand(len(embeddings), -1)
        steering, device = self.steering, embeddings.device
        with steering.window(canvases, lanes, places, masked, device) as injections:
            return self.model.transformer(
                inputs_embeds=embeddings,
                position_ids=places.to(device),
                cache=cache,
                use_cache=cache is not None,
                injections=injections,
                return_dict=True,
            ).last_hidden_state

    def logits(self, targets: Sequence[int], embeddings: torch.Tensor) -> torch.Tensor:
        """(n, V) guided logits, float32, at the positions of n targets, from (n, W, D) embeddings."""
        states = self.states(targets, embeddings)
        return self._guided(self.model.compute_logits(states.flatten(0, 1)).float())

    def token_logits(self, targets: Sequence[int], embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) of `logits` for (n,) tokens; the rest of the vocabulary is left out where no hook can look at it."""
        lm_head = self.model.transformer.lm_head
        if lm_head._forward_hooks or lm_head._forward_pre_hooks:
            logits = self.logits(targets, embeddings)
            return logits.gather(-1, tokens.to(logits.device)[:, None])[:, 0]
        states = self.model.compose(self.states(targets, embeddings).flatten(0, 1)).float()
        rows = vocabulary_rows(lm_head, tokens).to(states.device).repeat(len(states) // len(tokens), 1)
        return self._guided((states * rows).sum(dim=-1))

    def _guided(self, logits: torch.Tensor) -> torch.Tensor:
        if self.guidance_scale is None:
            return logits
        full, blind = logits.chunk(2)
        return blind + self.guidance_scale * (full - blind)

    def _mask_embedding(self, like: torch.Tensor) -> torch.Tensor:
        return self.embed(torch.tensor(self.mask, device=self.device)).to(like).detach()


@contextmanager
def replay(model: Any, trace: SteerlingTrace, positions: Sequence[int]) -> Iterator[Replay]:
    """
    A `Replay` for the length of a `with` block, in which the model is in evaluation mode, its weights want no gradients, and
    the trace's operations are attached.

    Args:
        model: What wrote the trace.
        trace: How.
        positions: Decided positions.

    Raises:
        ValueError: A position was not decided, or the model was steered and is not any more, or the other way round.
    """
    attached = model.attached_operations
    if attached != tuple(trace.attached):
        raise ValueError(
            f"The trace was written with {list(trace.attached)} attached to the model, which has {list(attached)}: attach "
            "the same operations with model.add_steering(), or give them to generate() as `steering`."
        )
    replaying = Replay(model, trace, positions)
    # Conditions are weighed on the prompt as it was given, before any of its masks was filled in.
    first = int((trace.step_map == 0).nonzero()[0])
    unwritten = [trace.before(first, index) for index in range(len(positions))]
    own = [tuple(trace.steering)] * len(positions) if trace.steering else None
    steered = model._steered(own, unwritten, 1, replayed=True)
    with frozen(model), evaluating(model), steered as (replaying.steering, _):
        yield replaying


def alike(replaying: Replay) -> list[list[int]]:
    """Numbers of targets whose passes see equally many positions, and equally many settled ones."""
    groups: dict[tuple[int, int], list[int]] = {}
    for target in range(len(replaying.positions)):
        groups.setdefault((replaying.settled(target), replaying.visible(target)), []).append(target)
    return list(groups.values())


def saved_bytes(model: Any, function: Callable, *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps of a call of `function`, each storage counted once and the model's own weights not at all."""
    storages: dict[int, int] = {}
    own = {storage.data_ptr() for weight in (*model.parameters(), *model.buffers()) for storage in _storages(weight)}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = function(*inputs)
    del kept
    return sum(storages.values())


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    return [part.untyped_storage() for part in parts_of(tensor) if not part.is_sparse]
