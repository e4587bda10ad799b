"""Makes transformers' Auto classes know Steerling."""

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from .modeling.configuration_steerling import SteerlingConfig
from .modeling.modeling_steerling import SteerlingAutoModel, SteerlingForDiffusionLM
from .tokenization.tokenization_steerling import SteerlingTokenizer

OLDER_MODEL_TYPE = "causal_diffusion"  # what conversions said that nest the concept keys

MODEL_CLASSES = {
    AutoModel: SteerlingAutoModel,
    AutoModelForCausalLM: SteerlingForDiffusionLM,
    AutoModelForMaskedLM: SteerlingForDiffusionLM,
}


def register() -> None:
    """
    Register configuration, model and tokenizer with the Auto classes. `import steerling_hf` calls this.

    From then on a folder or Hub repository whose `model_type` is "steerling" (or the older "causal_diffusion") loads
    without `trust_remote_code`, and what is saved takes its code along, so that it loads where this package is not.
    """
    AutoConfig.register(SteerlingConfig.model_type, SteerlingConfig, exist_ok=True)
    # AutoConfig.register insists that the class bears the name; loading turns the older form into the flat one.
    CONFIG_MAPPING.register(OLDER_MODEL_TYPE, SteerlingConfig, exist_ok=True)
    for auto_class, model_class in MODEL_CLASSES.items():
        auto_class.register(SteerlingConfig, model_class, exist_ok=True)
    AutoTokenizer.register(SteerlingConfig, slow_tokenizer_class=SteerlingTokenizer, exist_ok=True)

    # Without these, saving a model that came from a Hub folder keeps its auto_map but not the code that it names.
    SteerlingConfig.register_for_auto_class()
    SteerlingForDiffusionLM.register_for_auto_class("AutoModelForCausalLM")
    SteerlingTokenizer.register_for_auto_class()
