"""
Transformers 5.24 calls `cache` what 5.23 calls `past_key_values`. Our code says `cache`; here is what makes 5.23 and its users
understand that, and the old name understood in both. With support for 5.23, `CacheOutput` becomes `ModelOutput` and `CACHE_NAME` "cache".
"""

from typing import Any

from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

_RENAMED = hasattr(ModelOutput, "past_key_values")
OLD_NAME = "past_key_values"
CACHE_NAME = "cache" if _RENAMED else OLD_NAME
"""The cache's name among the arguments that the library hands on."""

# Of a version behind it, the library makes no words when it hands on the old name as the new one.
accept_past_key_values = deprecate_kwarg(OLD_NAME, "5.40.0" if _RENAMED else "5.23.0", new_name="cache")
"""Decorator of a function with the argument `cache`, which may be called `past_key_values`."""


class CacheOutput(ModelOutput):
    """Base of outputs with a field `cache`, which 5.23 looks for as `past_key_values`; from 5.24 on the library does that."""

    if not _RENAMED:

        @property
        def past_key_values(self) -> Any:
            """`cache`."""
            return getattr(self, "cache", None)

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__("cache" if key == OLD_NAME else key)

        def __contains__(self, key: Any) -> bool:
            return super().__contains__("cache" if key == OLD_NAME else key)

        def get(self, key: Any, default: Any = None) -> Any:
            """As in a dictionary."""
            return super().get("cache" if key == OLD_NAME else key, default)


__all__ = ["CACHE_NAME", "CacheOutput", "accept_past_key_values"]
