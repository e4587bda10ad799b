"""The explanation of a generated text as one HTML page that needs neither a network nor other files."""

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

from .checking import checked

__all__ = ["render_report"]


def render_report(explanation: dict[str, Any]) -> str:
    """
    The page on an explanation: text, concepts and attributions behind each of its chunks, and the order of decisions.

    The page holds the explanation as JSON, and its script shows all of it as text: nothing in a prompt, an answer or a
    concept's name can become markup. Its Content-Security-Policy allows its own script and style and no request at all.

    Args:
        explanation: The dictionary of an explanation's `to_dict`. Parts of a token are in logits and sum to its logit;
            those of chunks and concepts are signed shares of 1. Keys that the page does not know are ignored.

    Returns:
        HTML, to be written as UTF-8.

    Raises:
        ValueError: A key is missing, a value is of the wrong kind or not finite, or a chunk lies outside the answer.
    """
    data = json.dumps(checked(explanation), separators=(",", ":"), allow_nan=False)
    style, script = _asset("style.css"), _asset("script.js")
    parts = {
        "policy": "; ".join(
            [
                "default-src 'none'",
                f"script-src '{_digest(script)}'",
                f"style-src '{_digest(style)}'",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        "style": style,
        "script": script,
        # Without this character, nothing in the data can end the element that holds it.
        "data": data.replace("<", "\\u003c"),
    }
    # In one pass, so that a placeholder's name in the data stays as it is.
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
