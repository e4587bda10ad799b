"""What the report asks of an explanation, and of an audit in it."""

import math
from typing import Any

from ..shapes import LARGEST_WHOLE, SCORE, check_shape, shown

FORMAT = 1

HEAD = frozenset({"known", "unknown"})

PARTS = {"known": float, "unknown": float, "residual": float}
TOKEN = {"text": str, "id": int}
AUDIT: dict[str, Any] = {
    # Of the whole answer, the strongest first.
    "concepts": [
        {
            "id": int,
            "head": HEAD,
            "name": str,
            "group": str,
            "flags": [str],
            "contribution": float,
            # Nats a token that the answer would lose without it.
            "support": float,
            "in_prompt": SCORE,
            "in_answer": SCORE,
        }
    ],
    # The distribution over sources, the largest share first.
    "sources": [{"source": str, "share": SCORE, "score": SCORE, "hits": int}],
    # For each chunk those that it resembles, best first; no list at all without an index.
    "hits": [
        [
            {
                "text": str,
                "source": str,
                "metadata": dict,
                "score": SCORE,
                "dense_score": SCORE,
                "sparse_score": SCORE,
                "concepts": [{"id": int, "name": (str, None), "part": float}],
            }
        ]
    ],
    "meaning": str,
    "remedies": [
        {
            "kind": str,
            "description": str,
            "works": bool,
            "before": str,
            "after": str,
            "evidence": {...: (float, None)},
            "operations": [{"operation": str}],
            "concepts": {...: str},
        }
    ],
}
SHAPE: dict[str, Any] = {
    "format": int,
    "model": {"name": str, "fingerprint": (str, None)},
    "generation": {"seed": (int, None), "settings": dict},
    "steering": [{"operation": str}],
    "prompt": [TOKEN],
    "answer": [{**TOKEN, **PARTS, "position": int, "step": (int, None), "logit": float, "probability": (float, None)}],
    "chunks": [
        {
            **PARTS,
            "start": int,
            "end": int,
            "text": str,
            "concepts": [{"id": int, "head": HEAD, "name": str, "contribution": float}],
            "inputs": ([float], None),
            "context": ([float], None),
        }
    ],
    "metrics": {...: (float, None)},
    "audit?": (AUDIT, None),
}


def checked(explanation: dict[str, Any]) -> Any:
    """
    A copy of an explanation that JSON and JavaScript hold without loss of what the report shows.

    Raises:
        ValueError: It is not what `SHAPE` says, or its parts do not fit each other; the message names the place.
    """
    check_shape(explanation, SHAPE, "explanation")
    if explanation["format"] != FORMAT:
        raise ValueError(
            f"`explanation['format']` is {explanation['format']!r}, and this version shows format {FORMAT}: render it "
            "with the version of steerling-hf that made it."
        )
    check_chunks(explanation)
    hits = (explanation.get("audit") or {}).get("hits")
    if hits and len(hits) != len(explanation["chunks"]):
        raise ValueError(
            f"`explanation['audit']['hits']` has {len(hits)} lists, and there are {len(explanation['chunks'])} chunks: give "
            "one for each chunk, or none."
        )
    return _plain(explanation, "explanation")


def check_chunks(explanation: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: Chunks do not lie in the answer one after another, or have not as many scores as there are tokens.
    """
    tokens, last = len(explanation["answer"]), 0
    for number, chunk in enumerate(explanation["chunks"]):
        place, start, end = f"explanation['chunks'][{number}]", chunk["start"], chunk["end"]
        if not 0 <= start < end <= tokens:
            raise ValueError(
                f"`{place}` spans tokens {start} to {end}, but the answer has {tokens}: `start` must be less than `end`, "
                "and both must lie within it."
            )
        if start < last:
            raise ValueError(
                f"`{place}` starts at token {start}, and the chunk before ends at {last}: sort them by start."
            )
        last = end
        for key, among in (("inputs", "prompt"), ("context", "answer")):
            if chunk[key] is not None and len(chunk[key]) != len(explanation[among]):
                raise ValueError(
                    f"`{place}[{key!r}]` has {len(chunk[key])} values, and there are {len(explanation[among])} tokens in "
                    f"`explanation[{among!r}]`: give one each, or None."
                )


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part, f"{place}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{place}[{number}]") for number, part in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"`{place}` is {value}: the report shows finite numbers only.")
        # The page shows fewer digits, and attributions of long texts would fill megabytes.
        return float(f"{value:.7g}")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"`{place}` is {shown(value)}, which JSON cannot hold: give a number, text, list or dictionary.")
