"""What `forward` asks of its arguments before it computes anything."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import Cache

IDS = (torch.long, torch.int)


def check_inputs(
    config: Any,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    cache: Any,
    inputs_embeds: Any,
    use_cache: Any,
    output_concepts: Any,
    logits_to_keep: Any,
) -> None:
    """
    Refuse arguments of `SteerlingForDiffusionLM.forward` that it cannot use; it says what each of them is.

    Shapes and types are checked everywhere, values only where they lie in the CPU's memory: elsewhere, reading them would make the
    CPU wait for the accelerator, and the embedding fails there by itself.

    Raises:
        ValueError: The message names the argument, what is wrong with it and the remedy.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        _check_ids(config, input_ids)
        rows, time = input_ids.shape
    else:
        _check_embeddings(config, inputs_embeds)
        rows, time = inputs_embeds.shape[:2]
    if cache is not None and not isinstance(cache, Cache):
        _fail("cache", f"is a {type(cache).__name__}", "pass a cache of transformers, such as a DynamicCache, or none")
    past = 0 if cache is None else int(cache.get_seq_length())
    _check_attention_mask(attention_mask, rows, time, past)
    _check_positions(config, position_ids, attention_mask, rows, time, past)
    for name, value in {"use_cache": use_cache, "output_concepts": output_concepts}.items():
        if value is not None and not isinstance(value, bool):
            _fail(name, f"is {value!r}", "choose True or False")
    _check_kept(logits_to_keep, time)


def check_labels(labels: Any, noise_mask: Any, noisy_context: Any, concept_labels: Any) -> None:
    """Refuse what is no tensor of labels, or of truth values; the loss checks shapes and values."""
    for name, value in {"labels": labels, "concept_labels": concept_labels}.items():
        if value is not None and _dtype(value) != torch.long:
            _fail(name, _kind(value), "pass ids as a tensor of torch.long, -100 where there are none")
    for name, value in {"noise_mask": noise_mask, "noisy_context": noisy_context}.items():
        if value is not None and not _are_switches(value):
            _fail(name, _kind(value), "pass a tensor of torch.bool")


def _are_switches(value: Any) -> bool:
    whole = _dtype(value) in IDS and _all(value, lambda values: (values == 0) | (values == 1))
    return _dtype(value) == torch.bool or whole


def _check_ids(config: Any, input_ids: Any) -> None:
    if _dtype(input_ids) not in IDS:
        _fail("input_ids", _kind(input_ids), "pass token ids as a tensor of torch.long")
    if input_ids.dim() != 2 or not input_ids.numel():
        _fail("input_ids", f"has shape {tuple(input_ids.shape)}", "pass (rows, tokens), at least one of each")
    if not _all(input_ids, lambda ids: (ids >= 0) & (ids < config.vocab_size)):
        ids = f"holds ids from {int(input_ids.min())} to {int(input_ids.max())}"
        _fail("input_ids", ids, f"use ids from 0 to {config.vocab_size - 1}")


def _check_embeddings(config: Any, inputs_embeds: Any) -> None:
    floats = isinstance(inputs_embeds, torch.Tensor) and inputs_embeds.is_floating_point()
    if not floats or inputs_embeds.dim() != 3 or not inputs_embeds.numel() or inputs_embeds.shape[2] != config.n_embd:
        wanted = f"pass (rows, tokens, {config.n_embd}) of floating point numbers"
        _fail("inputs_embeds", _kind(inputs_embeds), wanted)


def _check_attention_mask(attention_mask: Any, rows: int, time: int, past: int) -> None:
    # Attention implementations have masks of their own, which the backbone hands on.
    if attention_mask is None or isinstance(attention_mask, dict) or type(attention_mask).__name__ == "BlockMask":
        return
    if isinstance(attention_mask, torch.Tensor):
        shape = tuple(attention_mask.shape)
        if len(shape) == 4 and shape[0] in (1, rows) and shape[2] == time:
            return
        if shape == (rows, past + time):
            if not _all(attention_mask, lambda mask: (mask == 0) | (mask == 1)):
                _fail("attention_mask", "holds other numbers", "use 1 for tokens and 0 for padding")
            return
    _fail(
        "attention_mask",
        _kind(attention_mask),
        f"pass ({rows}, {past + time}), one number for each token, cached ones too",
    )


def _check_positions(config: Any, position_ids: Any, attention_mask: Any, rows: int, time: int, past: int) -> None:
    context = config.block_size
    if position_ids is not None:
        if _dtype(position_ids) not in IDS or tuple(position_ids.shape) not in ((rows, time), (1, time)):
            _fail("position_ids", _kind(position_ids), f"pass ({rows}, {time}) whole numbers")
        if not _all(position_ids, lambda places: (places >= 0) & (places < context)):
            places = f"holds positions from {int(position_ids.min())} to {int(position_ids.max())}"
            _fail("position_ids", places, f"the context has positions from 0 to {context - 1}")
        return
    tokens = past + time
    if tokens > context and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        tokens = int(attention_mask.sum(dim=-1).max())  # padding has no position
    if tokens > context:
        cached = f", {past} of them cached" if past else ""
        raise ValueError(
            f"`input_ids` or `inputs_embeds` has {tokens} tokens in a row{cached}, for a context of {context}: shorten it."
        )


def _check_kept(logits_to_keep: Any, time: int) -> None:
    if isinstance(logits_to_keep, torch.Tensor):
        if _dtype(logits_to_keep) not in IDS or logits_to_keep.dim() != 1:
            _fail("logits_to_keep", _kind(logits_to_keep), "pass (k,) positions")
        if not _all(logits_to_keep, lambda places: (places >= -time) & (places < time)):
            _fail("logits_to_keep", f"is {logits_to_keep.tolist()}", f"the positions are 0 to {time - 1}")
    elif not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool) or logits_to_keep < 0:
        _fail("logits_to_keep", f"is {logits_to_keep!r}", "choose a whole number, 0 for all, or a tensor of positions")


def _all(values: torch.Tensor, fit: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether all values fit, as far as it can be told."""
    # Subclasses such as fake tensors have no values.
    return type(values) is not torch.Tensor or values.device.type != "cpu" or bool(fit(values).all())


def _dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, torch.Tensor) else None


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}"
    first = f", the first is {value.flatten()[0].item()}" if type(value) is torch.Tensor and value.numel() else ""
    return f"is {value.dtype} of shape {tuple(value.shape)}{first}"


def _fail(name: str, problem: str, remedy: str) -> NoReturn:
    raise ValueError(f"`{name}` {problem}: {remedy}.")


__all__ = ["check_inputs", "check_labels"]
