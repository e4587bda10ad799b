"""Texts that a model reads: as rows of tokens, in evaluation mode, without gradients, in padded batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .chat import chat_inputs
from .modeling.lookup_steerling import device_of
from .modes import evaluating

# Positions that pass through a concept head at once.
HEAD_POSITIONS = 1024


@contextmanager
def reading(model: torch.nn.Module) -> Iterator[None]:
    """`evaluating`, without gradients."""
    # Not inference mode: what a module may keep must not break later gradients.
    with evaluating(model), torch.no_grad():
        yield


def encode_texts(
    model: Any,
    tokenizer: Any,
    texts: Any,
    max_length: int | None = None,
    name: str = "texts",
    remedy: str = "split the text",
) -> list[list[int]]:
    """
    The tokens of each text, of a length that the model can read.

    Args:
        texts: Text as the tokenizer takes it; special tokens may be written out.
        max_length: Tokens that are kept of a longer text, up to the model's context.
        name: What error messages call the texts.
        remedy: What they say to do about one that is too long.

    Raises:
        ValueError: Something is no text, has no tokens, or has more than the context holds while no `max_length` is given.
    """
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise ValueError(f"`{name}` is {texts!r:.80}: give a string or a list of strings.")
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` is {texts!r:.80}: give a string or a list of strings.")
    if not texts:
        return []
    longest = model.config.block_size
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for i, (text, row) in enumerate(zip(texts, rows)):
        if not row:
            raise ValueError(f"`{name}[{i}]` is {text!r:.80}, which has no tokens: leave empty texts out.")
        if max_length is None and len(row) > longest:
            raise ValueError(
                f"`{name}[{i}]` has {len(row)} tokens ({text!r:.80}), and the model's context holds {longest}: {remedy}."
            )
    return [row[:max_length] for row in rows]


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """
    Token ids of one prompt.

    Args:
        prompt: A text; (T,) or (1, T) token ids as a tensor or lists; what a tokenizer returns; or messages with "role" and
            "content", which the assistant is to answer.

    Raises:
        ValueError: It is none of these, or empty.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt, Mapping):
        ids = prompt.get("input_ids")
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(part, Mapping) for part in prompt):
        try:
            ids = chat_inputs(tokenizer, prompt)["input_ids"]
        except ValueError as error:
            raise ValueError(f"`prompt` is no chat that can be answered: {error}") from error
    else:
        ids = prompt
    refusal = f"`prompt` is {prompt!r:.80}: give one text, token ids, what a tokenizer returns, or messages."
    try:
        given = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(refusal) from error
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise ValueError(refusal)
    if given.dim() == 0 or given.dim() > 2 or (given.dim() == 2 and len(given) > 1):
        raise ValueError(f"`prompt` has the shape {tuple(given.shape)}: give (T,) or (1, T) token ids.")
    given = given.flatten()
    if isinstance(prompt, Mapping) and prompt.get("attention_mask") is not None:
        given = given[torch.as_tensor(prompt["attention_mask"], device="cpu").flatten().bool()]
    if not len(given):
        raise ValueError("`prompt` is empty: give a text, token ids or messages.")
    return given.tolist()


def hidden_states_of(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Last hidden states (N, D) of all tokens of the rows, which are one batch, one row after another."""
    width, device = max(map(len, rows)), device_of(model)
    # Padding is masked and its states are dropped, so it may hold any token.
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    real = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    outputs = model.transformer(input_ids=padded, attention_mask=real.long(), use_cache=False, return_dict=True)
    states = outputs.last_hidden_state
    return states[real.to(states.device)]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) of rows of token ids, padded on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device="cpu"), "attention_mask": torch.tensor(mask, device="cpu")}
