"""Which concepts made each token: the logit of a decided token as a sum over concepts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .canvas_steerling import Canvas, Rows
from .outputs_steerling import SteerlingConcepts
from .packing_steerling import multiply
from .precision_steerling import in_full_precision
from .quantized_steerling import is_opaque, is_quantized, weight_rows

# Decided tokens whose hidden states wait to be decomposed together: the concept tables are read once for all of them.
TOGETHER = 256


@dataclass
class SteerlingAttributions(ModelOutput):
    """
    Logits of tokens as sums: `logits = known_contributions.sum(-1) + unknown_contributions.sum(-1) + residual`.

    Concept c contributes `w_c (E_c . u_y)`: its weight times the product of its embedding with row u_y of the vocabulary
    projection, y being the token. The residual is what is left of the logit: epsilon, concepts outside the top k, and what
    hooks on `lm_head` subtract. A guided logit `blind + g (full - blind)` has the concepts of both passes, those of the
    full one first, with weights times g and times 1 - g; a concept of both is there twice.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, T)`): Of each token in the forward pass that decided it, after guidance
            and forward hooks and before logits processors; 0 where nothing was decided.
        known_indices, unknown_indices (`torch.LongTensor` of shape `(rows, T, k)`): Concepts, numbered in each head.
        known_weights, unknown_weights (`torch.FloatTensor` of shape `(rows, T, k)`): Their weights w_c.
        known_contributions, unknown_contributions (`torch.FloatTensor` of shape `(rows, T, k)`): What they add to the
            logits. `unknown_*` are `None` without a discovered head.
        residual (`torch.FloatTensor` of shape `(rows, T)`): What is left of the logits.
    """

    logits: torch.Tensor | None = None
    known_indices: torch.Tensor | None = None
    known_weights: torch.Tensor | None = None
    known_contributions: torch.Tensor | None = None
    unknown_indices: torch.Tensor | None = None
    unknown_weights: torch.Tensor | None = None
    unknown_contributions: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def attribute_logits(
    model: Any, concepts: SteerlingConcepts, tokens: torch.Tensor, logits: torch.Tensor
) -> SteerlingAttributions:
    """
    Contributions of concepts to the logits of tokens.

    Args:
        model: A `SteerlingForDiffusionLM` with concept heads.
        concepts: The decomposition of n last hidden states: indices and weights of shape (n, k).
        tokens: (n,) token ids.
        logits: (n,) their logits.

    Returns:
        Attributions of shapes (n,) and (n, k), float32.
    """
    directions = vocabulary_rows(model.transformer.lm_head, tokens)
    logits = logits.float()
    found: dict[str, torch.Tensor] = {"logits": logits, "residual": logits}
    for name, head in (("known", model.known_head), ("unknown", model.unknown_head)):
        if head is None:
            continue
        indices = concepts[f"{name}_indices"].to(logits.device)
        weights = concepts[f"{name}_weights"].to(logits.device, torch.float32)
        contributions = weights * head.alignments(indices, directions).to(logits.device)
        found |= {f"{name}_indices": indices, f"{name}_weights": weights, f"{name}_contributions": contributions}
        found["residual"] = found["residual"] - contributions.sum(dim=-1)
    return SteerlingAttributions(**found)


def vocabulary_rows(lm_head: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(n, D) rows of the vocabulary projection, float32, for (n,) tokens; its hooks are left out."""
    weight = lm_head.weight
    if type(lm_head) is torch.nn.Linear and not weight.is_meta and not is_quantized(weight):
        return weight[tokens.to(weight.device)].float()
    with torch.inference_mode(False):
        states = torch.ones(
            len(tokens), lm_head.in_features, dtype=torch.float32, device=tokens.device, requires_grad=True
        )
    if is_opaque(lm_head, states):
        return weight_rows(lm_head, tokens)
    # Adapters add to the weight, quantised ones hold other numbers, offloaded ones come when the module is called. In each case
    # the rows are the gradients of their logits.
    with torch.inference_mode(False), torch.enable_grad():
        logits = in_full_precision(lm_head.forward, states)
        # A copy: what was made in inference mode cannot be kept for gradients.
        chosen = logits.gather(-1, tokens[:, None].to(logits.device, copy=True)).sum()
        return torch.autograd.grad(chosen, states)[0].detach()


class ConceptRecorder:
    """
    Attributes each token to concepts as it is decided. Where no hook can change what the heads say of a hidden state, the
    hidden states of decided tokens are kept and decomposed together.

    Args:
        model: A `SteerlingForDiffusionLM`.
        guidance_scale: As in `masked_logits`.

    Raises:
        ValueError: The model has no concept heads.
    """

    def __init__(self, model: Any, guidance_scale: float | None):
        if model.known_head is None:
            raise ValueError(
                "`output_attributions` is True, but this checkpoint has no concept heads (interpretable=False): leave it out."
            )
        self.model = model
        self.shares = (1.0,) if guidance_scale is None else (guidance_scale, 1 - guidance_scale)
        self._hidden: torch.Tensor | None = None  # of the present pass, lane after lane
        self._concepts: SteerlingConcepts | None = None
        self._waiting: list[tuple[Canvas, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._found: list[tuple[Canvas, torch.Tensor, SteerlingAttributions]] = []

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the model's own, of (n, D) hidden states; remembers them, and what hooked heads say of them."""
        self._hidden, self._concepts = hidden_states, None
        if not self.model.hooked_heads():
            return self.model.compute_logits(hidden_states)
        self._concepts = self.model.decompose(hidden_states)
        return multiply(self.model.transformer.lm_head, self._concepts["composed"])

    def note(
        self,
        canvas: Canvas,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """
        After a step has decided (c,) tokens at (c,) positions of a canvas.

        Args:
            canvas: The row.
            positions, tokens: What was decided.
            places: (c,), where these positions are among all that the pass has computed.
            logits: (c,) guided logits of the tokens.
        """
        assert self._hidden is not None
        count = len(self._hidden) // len(self.shares)
        lanes = torch.cat([places + lane * count for lane in range(len(self.shares))]).to(self._hidden.device)
        if self._concepts is not None:
            chosen = {
                key: value[lanes] for key, value in self._concepts.items() if key.endswith(("indices", "weights"))
            }
            self._attribute([(canvas, positions)], SteerlingConcepts(**chosen), tokens, logits)
            return
        self._waiting.append(
            (canvas, positions, tokens, self._hidden[lanes].view(len(self.shares), len(places), -1), logits)
        )
        if sum(len(waiting[1]) for waiting in self._waiting) >= TOGETHER:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        canvases, positions, tokens, hidden, logits = zip(*self._waiting)
        self._waiting = []
        concepts = self.model.decompose(torch.cat(hidden, dim=1).flatten(0, 1))
        self._attribute(list(zip(canvases, positions)), concepts, torch.cat(tokens), torch.cat(logits))

    def _attribute(
        self,
        decided: Sequence[tuple[Canvas, torch.Tensor]],
        concepts: SteerlingConcepts,
        tokens: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Attribute (c,) tokens, given the concepts (lanes * c, ...) of their hidden states, lane after lane."""
        lanes = len(self.shares)
        # What the lanes leave of the logit is only known once they are added up.
        found = attribute_logits(self.model, concepts, tokens.repeat(lanes), logits.repeat(lanes))
        joined = {"logits": logits.float(), "residual": logits.float()}
        for name in ("known", "unknown"):
            if f"{name}_indices" not in found:
                continue
            for part, shared in (("indices", False), ("weights", True), ("contributions", True)):
                values = found[f"{name}_{part}"].chunk(lanes)
                values = [value * share for value, share in zip(values, self.shares)] if shared else values
                joined[f"{name}_{part}"] = torch.cat(list(values), dim=-1)
            joined["residual"] = joined["residual"] - joined[f"{name}_contributions"].sum(dim=-1)
        values = {key: value.cpu() for key, value in joined.items()}
        counts = [len(positions) for _, positions in decided]
        pieces = zip(*(value.split(counts) for value in values.values()))
        for (canvas, positions), piece in zip(decided, pieces):
            self._found.append((canvas, positions.cpu(), SteerlingAttributions(**dict(zip(values, piece)))))

    def collect(self, rows: Rows) -> SteerlingAttributions:
        """Attributions of all that was decided, in the shape of the rows: (rows, T) and (rows, T, k)."""
        self._flush()
        result = {}
        for key in self._found[0][2] if self._found else ():
            shapes = [found[key].shape[1:] for _, _, found in self._found]
            width = max(shape[0] for shape in shapes) if shapes[0] else None
            values = [
                self._found[0][2][key].new_zeros((len(canvas.tokens), *([] if width is None else [width])))
                for canvas in rows.canvases
            ]
            owners = {id(canvas): value for canvas, value in zip(rows.canvases, values)}
            for canvas, positions, found in self._found:
                piece = found[key]
                if width is not None:  # hooks may show more concepts in one step than in another
                    piece = torch.nn.functional.pad(piece, (0, width - piece.shape[-1]))
                owners[id(canvas)][positions] = piece
            result[key] = rows.gather(values, 0)
        return SteerlingAttributions(**result)


__all__ = ["ConceptRecorder", "SteerlingAttributions", "attribute_logits", "vocabulary_rows"]
