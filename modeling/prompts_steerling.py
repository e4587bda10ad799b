"""What `generate` asks of prompts, and of the model, before it computes anything."""

from typing import Any

import torch


def check_prompt(config: Any, prompt: Any, attention_mask: Any) -> None:
    """
    Refuse what `generate` cannot start from.

    Args:
        config: The model's configuration.
        prompt: What was given as `input_ids`.
        attention_mask: What was given as such, or `None`.

    Raises:
        ValueError: It is no tensor of (rows, length) token ids of the vocabulary with a text in each row, or too long.
    """
    vocabulary, context, pad = config.vocab_size, config.block_size, config.pad_token_id
    if not isinstance(prompt, torch.Tensor):
        problem = f"is a {type(prompt).__name__}: use generate(**tokenizer(text, return_tensors='pt'))"
    elif prompt.dim() != 2:
        problem = f"has shape {tuple(prompt.shape)}: pass (rows, length)"
    elif not prompt.numel():
        problem = f"is empty, of shape {tuple(prompt.shape)}: pass at least one token, such as bos_token_id"
    elif prompt.is_floating_point() or prompt.dtype == torch.bool:
        problem = f"has dtype {prompt.dtype}: pass token ids as torch.long"
    elif prompt.min() < 0 or prompt.max() >= vocabulary:
        problem = f"has ids from {int(prompt.min())} to {int(prompt.max())}: use ids from 0 to {vocabulary - 1}"
    elif attention_mask is None and pad is not None and (prompt == pad).any():
        problem = "holds the padding token: pass `attention_mask`, ones where it is meant as text"
    elif attention_mask is None and prompt.shape[1] > context:
        problem = f"has {prompt.shape[1]} tokens for a context of {context}: shorten the prompt"
    else:
        problem = ""
    if problem:
        raise ValueError(f"`input_ids` {problem}.")
    if attention_mask is not None:
        _check_attention_mask(config, prompt, attention_mask)


def _check_attention_mask(config: Any, prompt: torch.Tensor, attention_mask: Any) -> None:
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != prompt.shape:
        shape = f"not a tensor of the shape of `input_ids`, {tuple(prompt.shape)}"
        raise ValueError(f"`attention_mask` is {shape}: give one value per token.")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("`attention_mask` holds other numbers than 0, for padding, and 1, for text.")
    text = attention_mask.bool()
    # Text begins once where it is in one piece, be it in the first column or later.
    begins = text[:, 0].long() + (text[:, 1:] & ~text[:, :-1]).sum(dim=1)
    if not bool(text.any(dim=1).all()):
        row = int((~text.any(dim=1)).nonzero()[0])
        raise ValueError(f"`attention_mask` leaves row {row} without a token: give every row a prompt.")
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(f"`attention_mask` has zeros inside row {row}: padding may only be before or after a text.")
    longest = int(text.sum(dim=1).max())
    if longest > config.block_size:
        context = config.block_size
        raise ValueError(f"`input_ids` has {longest} tokens for a context of {context}: shorten the prompt.")


def refuse_adapter_names(model: Any) -> None:
    """
    Refuse PEFT's `adapter_names`, which it hands to layers by hooks, a name for each row of the call.

    Raises:
        ValueError: There are such hooks. Rows of `generate` change places and leave the batch, so that a layer's rows would get
            the adapters of others.
    """
    found = [
        (module, number)
        for module in model.modules()
        for number, hook in module._forward_pre_hooks.items()
        if "adapter_names" in getattr(hook, "keywords", ())
    ]
    if not found:
        return
    for module, number in found:  # which PEFT leaves behind where an error passes through it
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)
    raise ValueError(
        "`adapter_names` cannot be given to generate(), whose rows change places while they are written: call it once for each "
        "adapter, after model.set_adapter(name)."
    )


__all__ = ["check_prompt", "refuse_adapter_names"]
