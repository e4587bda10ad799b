"""
Steerling in Hugging Face transformers: `import steerling_hf` makes the Auto classes know it.

    import steerling_hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = steerling_hf.checkpoint("steerling-nano")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
"""

from .attack_prompts import AttackPrompt, read_prompts
from .attack_report import AttackError, AttackReport
from .attacks import evaluate_attacks
from .auditing import Audit, audit
from .belief import measure_belief
from .catalog import ConceptCatalog, ConceptNotFoundError
from .checkpoints import checkpoint, checkpoint_names
from .concept_attribution import attribute_concepts
from .concept_labels import Concept
from .embeddings import ConceptVectors, concept_vectors, embed
from .explaining import explain, explain_output, explain_text
from .explanation import Explanation
from .exporting import export
from .input_attribution import attribute_inputs
from .judges import ClassifierJudge, InstructJudge, PatternJudge, Verdict
from .modeling.cache_steerling import SteerlingCache
from .modeling.configuration_steerling import SteerlingConfig
from .modeling.generation_config_steerling import SteerlingGenerationConfig
from .modeling.modeling_steerling import SteerlingForDiffusionLM
from .modeling.steering_steerling import Amplify, Condition, Imitate, Inject, SetConcepts, Suppress, SuppressTokens
from .recipe import SteeringRecipe
from .registration import register
from .remedies import Remedy
from .strength_search import search_strength
from .tokenization.tokenization_steerling import SteerlingTokenizer
from .trace_index import TraceIndex
from .trace_results import Trace, TraceHit
from .training import DiffusionCollator

__version__ = "0.1.0"

__all__ = [
    "Amplify",
    "AttackError",
    "AttackPrompt",
    "AttackReport",
    "Audit",
    "ClassifierJudge",
    "Concept",
    "ConceptCatalog",
    "ConceptNotFoundError",
    "ConceptVectors",
    "Condition",
    "DiffusionCollator",
    "Explanation",
    "Imitate",
    "Inject",
    "InstructJudge",
    "PatternJudge",
    "Remedy",
    "SetConcepts",
    "SteeringRecipe",
    "SteerlingCache",
    "SteerlingConfig",
    "SteerlingForDiffusionLM",
    "SteerlingGenerationConfig",
    "SteerlingTokenizer",
    "Suppress",
    "SuppressTokens",
    "Trace",
    "TraceHit",
    "TraceIndex",
    "Verdict",
    "attribute_concepts",
    "attribute_inputs",
    "audit",
    "checkpoint",
    "checkpoint_names",
    "concept_vectors",
    "embed",
    "evaluate_attacks",
    "explain",
    "explain_output",
    "explain_text",
    "export",
    "measure_belief",
    "read_prompts",
    "search_strength",
]

register()
