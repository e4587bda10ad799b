"""The checkpoints whose configuration, and for steerling-nano whose weights, come with this package."""

from pathlib import Path

from . import configs

_CONFIGS = Path(configs.__file__).parent


def checkpoint_names() -> list[str]:
    """Names of the checkpoints that come with this package, sorted."""
    return sorted(path.parent.name for path in _CONFIGS.glob("*/config.json"))


def checkpoint(name: str = "steerling-nano") -> str:
    """
    Folder of a checkpoint that comes with this package, for the Auto classes' `from_pretrained`.

    "steerling-nano" is whole. "steerling-8b" and "steerling-8b-instruct" have a configuration and a tokenizer; their
    weights are on the Hub under `guidelabs/`.

    Args:
        name: One of `checkpoint_names()`.

    Returns:
        An absolute path.

    Raises:
        ValueError: There is no checkpoint of that name.
    """
    if name not in checkpoint_names():
        known = ", ".join(checkpoint_names())
        raise ValueError(f"`name` is {name!r}: no such checkpoint comes with steerling_hf; choose one of {known}.")
    return str(_CONFIGS / name)
