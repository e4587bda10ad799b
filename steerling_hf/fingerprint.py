"""What a model's concepts are recognised by."""

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch

# The tables that say what a concept means; how it is detected may be retrained.
MEANINGS = ("concept_embedding", "embedding_coef", "embedding_basis")
# Rows that are hashed at a time.
PIECE = 4096

_known: "WeakKeyDictionary[Any, tuple[tuple, str]]" = WeakKeyDictionary()


def concept_fingerprint(model: Any) -> str:
    """
    SHA-256 of the concept embeddings of both heads, rounded to bfloat16 and then to float16, so that the precision
    in which a checkpoint in bfloat16 is loaded does not matter. Computed once for a state of the weights.

    Raises:
        ValueError: The model has no concept heads.
    """
    if not model.concept_heads():
        raise ValueError(
            "This checkpoint has no concept heads (interpretable=False), so its concepts have no fingerprint."
        )
    tables = [getattr(head, name) for head in model.concept_heads() for name in MEANINGS if hasattr(head, name)]
    state = tuple((id(table.weight), table.weight._version) for table in tables)
    if model not in _known or _known[model][0] != state:
        digest = hashlib.sha256()
        for table in tables:
            table(_feed, digest)
        _known[model] = state, digest.hexdigest()
    return _known[model][1]


def _feed(weight: torch.Tensor, digest: Any) -> None:
    digest.update(str(tuple(weight.shape)).encode())
    for piece in weight.detach().split(PIECE):
        halves = piece.to("cpu", torch.bfloat16).to(torch.float16)
        digest.update(halves.contiguous().view(torch.int16).numpy().tobytes())
