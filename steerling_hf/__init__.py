"""
Steerling in Hugging Face transformers: `import steerling_hf` makes the Auto classes know it.

    import steerling_hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = steerling_hf.checkpoint("steerling-nano")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import checkpoint, checkpoint_names
    from .exporting import export
    from .modeling.configuration_steerling import SteerlingConfig
    from .modeling.generation_steerling import SteerlingGenerationConfig
    from .modeling.modeling_steerling import SteerlingForDiffusionLM
    from .tokenization.tokenization_steerling import SteerlingTokenizer

__version__ = "0.1.0"

__all__ = [
    "SteerlingConfig",
    "SteerlingForDiffusionLM",
    "SteerlingGenerationConfig",
    "SteerlingTokenizer",
    "checkpoint",
    "checkpoint_names",
    "export",
]

_HOME_OF = {
    "SteerlingConfig": "modeling.configuration_steerling",
    "SteerlingForDiffusionLM": "modeling.modeling_steerling",
    "SteerlingGenerationConfig": "modeling.generation_steerling",
    "SteerlingTokenizer": "tokenization.tokenization_steerling",
    "checkpoint": "checkpoints",
    "checkpoint_names": "checkpoints",
    "export": "exporting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Registering imports torch and transformers, which takes seconds. The command line registers once a command needs it, so
# that `steerling-hf --help` and a mistyped option answer at once.
if Path(sys.argv[0] if sys.argv else "").stem != "steerling-hf":
    from .registration import register

    register()
