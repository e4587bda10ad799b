"""
Steerling in Hugging Face transformers: `import steerling_hf` makes the Auto classes know it.

    import steerling_hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = steerling_hf.checkpoint("steerling-nano")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
"""

from .catalog import ConceptCatalog, ConceptNotFoundError
from .checkpoints import checkpoint, checkpoint_names
from .concept_labels import Concept
from .exporting import export
from .modeling.cache_steerling import SteerlingCache
from .modeling.configuration_steerling import SteerlingConfig
from .modeling.generation_config_steerling import SteerlingGenerationConfig
from .modeling.modeling_steerling import SteerlingForDiffusionLM
from .registration import register
from .tokenization.tokenization_steerling import SteerlingTokenizer
from .training import DiffusionCollator

__version__ = "0.1.0"

__all__ = [
    "Concept",
    "ConceptCatalog",
    "ConceptNotFoundError",
    "DiffusionCollator",
    "SteerlingCache",
    "SteerlingConfig",
    "SteerlingForDiffusionLM",
    "SteerlingGenerationConfig",
    "SteerlingTokenizer",
    "checkpoint",
    "checkpoint_names",
    "export",
]

register()
