"""What a tokenizer is called with."""

from typing import Any


def check_text(name: str, value: Any, ids: int) -> None:
    """Refuse what is neither text nor ids below `ids`, nor lists of such."""
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"`{name}` is of the type {type(value).__name__}; give a string, or a list of strings or of ids."
        )
    kinds = {type(item) for item in value}
    alike = [kind for kind in (str, int, (list, tuple)) if all(issubclass(each, kind) for each in kinds)]
    if bool in kinds or not alike:
        raise ValueError(
            f"`{name}` has items of the types {', '.join(sorted(kind.__name__ for kind in kinds))}; give strings only, or "
            "ids only, or lists of these."
        )
    if int in alike and value and not 0 <= min(value) <= max(value) < ids:
        raise ValueError(f"`{name}` has ids from {min(value)} to {max(value)}; the vocabulary has 0 to {ids - 1}.")
    if str not in alike and int not in alike:
        for item in value:
            check_text(name, item, ids)
