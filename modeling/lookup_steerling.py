"""What steering and explanations look up in a model: heads, embeddings and directions of concepts, where it takes inputs."""

from collections.abc import Sequence
from typing import Any

import torch

from .concepts_steerling import SteerlingConceptOutput
from .precision_steerling import in_full_precision

# Rows of a target text that are computed at a time.
ROWS = 32


def split_concepts(model: Any, concepts: Sequence[int]) -> list[tuple[Any, list[int]]]:
    """The heads that have these concepts, each with its own indices of them."""
    n_known = model.config.n_concepts
    known = [concept for concept in concepts if concept < n_known]
    discovered = [concept - n_known for concept in concepts if concept >= n_known]
    return [pair for pair in ((model.known_head, known), (model.unknown_head, discovered)) if pair[1]]


def head_name(model: Any, head: Any) -> str:
    """Name of one of the model's heads."""
    return "known_head" if head is model.known_head else "unknown_head"


def device_of(model: Any) -> torch.device:
    """Where a model takes its inputs; weights that accelerate has offloaded are on no device, and inputs are moved."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def embed_concepts(model: Any, concepts: Sequence[int]) -> torch.Tensor:
    """(m, D) embeddings E_c, float32, those of known concepts first."""
    parts = [
        head.embeddings(torch.tensor(ids, device=device_of(model))).float()
        for head, ids in split_concepts(model, concepts)
    ]
    return torch.cat([part.to(parts[0].device) for part in parts]).detach()


def project(model: Any, vectors: torch.Tensor) -> torch.Tensor:
    """(n, V) logits, float32, of vectors (n, D), whatever hooks there are."""
    return in_full_precision(model.transformer.lm_head.forward, vectors).detach()


def concept_direction(model: Any, concepts: Sequence[int]) -> tuple[torch.Tensor, float]:
    """Unit direction (D,) of concepts, float32, and the largest logit that it adds to a token, at least 1e-6."""
    total = embed_concepts(model, concepts).sum(dim=0)
    direction = total / total.norm().clamp(min=1e-12)
    return direction, max(float(project(model, direction[None]).max()), 1e-6)


@torch.no_grad()
def target_profile(model: Any, operation: Any) -> list[tuple[Any, SteerlingConceptOutput]]:
    """
    For each head, what `ImitateFeatures` draws its features to under an `Imitate`: one line for each of the target's tokens, or
    one in all.
    """
    ids = torch.tensor([*operation.context, *operation.target], device=device_of(model))
    first, count = len(operation.context), len(operation.target)
    states = []
    for places in torch.arange(first, first + count, device=ids.device).split(ROWS):
        rows = ids.repeat(len(places), 1)
        each = torch.arange(len(places), device=ids.device)
        rows[each, places] = model.config.mask_token_id
        hidden_states = model.transformer(input_ids=rows, return_dict=True).last_hidden_state
        states.append(hidden_states[each.to(hidden_states.device), places.to(hidden_states.device)])
    profile = []
    for head in model.concept_heads():
        output = head.forward(torch.cat(states))
        weights, indices = output.weights.float(), output.indices
        if operation.pooled:
            mean = weights.new_zeros(head.n_concepts).index_add_(0, indices.flatten(), weights.flatten()) / count
            weights, indices = mean.topk(min(weights.shape[1], head.n_concepts))
            weights, indices = weights[None], indices[None]
        weights, indices = weights[:, : operation.top_n], indices[:, : operation.top_n]
        features = torch.stack([w @ head.embeddings(i).float() for w, i in zip(weights, indices)])
        profile.append((head, SteerlingConceptOutput(features=features, indices=indices, weights=weights)))
    return profile


__all__ = [
    "concept_direction",
    "device_of",
    "embed_concepts",
    "head_name",
    "project",
    "split_concepts",
    "target_profile",
]
