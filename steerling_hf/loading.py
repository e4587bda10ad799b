"""What every command begins with: a model and its tokenizer, its names of concepts, a prompt, and text that goes on from it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .catalog import ConceptCatalog
from .chat import chat_inputs
from .checkpoints import checkpoint, checkpoint_names
from .torch_state import PlainTensors


def load(source: str) -> tuple[Any, Any]:
    """Model in evaluation mode, on the accelerator if there is one, and tokenizer, of a checkpoint by name or of a folder."""
    folder = checkpoint(source) if source in checkpoint_names() else source
    if source in checkpoint_names() and not any(Path(folder).glob("*.safetensors")):
        remedy = "train it with `make nano`" if source == "steerling-nano" else "give a folder that has them"
        raise FileNotFoundError(f"{source} has no weights in {folder}: {remedy}.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return AutoModelForCausalLM.from_pretrained(folder).eval().to(device), tokenizer


def encode(tokenizer: Any, text: str, chat: bool = False) -> Any:
    """Inputs of one row for `text` as it is, or as a user's message."""
    with PlainTensors():
        if not chat:
            return tokenizer(text, return_tensors="pt")
        return chat_inputs(tokenizer, [{"role": "user", "content": text}], return_tensors="pt")


def write_on(model: Any, tokenizer: Any, text: str, chat: bool = False, **kwargs: Any) -> torch.Tensor:
    """
    Continue `text`, or answer it as a user's message.

    Args:
        kwargs: For `model.generate`.

    Returns:
        (T,) token ids, prompt included.
    """
    inputs = encode(tokenizer, text, chat)
    return model.generate(**inputs.to(model.device), **kwargs)[0]


def catalog_of(model: Any) -> ConceptCatalog | None:
    """The names of a model's concepts, if it comes with any."""
    try:
        return ConceptCatalog.for_model(model)
    except FileNotFoundError:
        return None
