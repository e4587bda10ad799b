"""Messages as the prompt of an answer."""

from collections.abc import Mapping, Sequence
from typing import Any


def chat_inputs(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    """
    `input_ids` and `attention_mask` of a chat up to where the assistant answers; control tokens in messages are only text.

    Args:
        options: Further arguments of `apply_chat_template`, such as `return_tensors`.
    """
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, sanitize_control_tokens=True, **options
    )
