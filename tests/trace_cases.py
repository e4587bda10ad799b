"""Generations with a trace, for tests of what is done with one."""

from generation_model import make_prompt
from steerling_hf.modeling.steering_steerling import Inject, SuppressTokens
from steerling_hf.modeling.trace_steerling import SteerlingTrace

SPARSE = {"topk_known": 5, "topk_known_features": 5, "unknown_topk": 7}
# The second row of a guided pass, and a cutoff in the middle of the generation.
GUIDED_AND_STEERED = {"guidance_scale": 1.7, "steering": (Inject(3, 30.0, cutoff=7), SuppressTokens(3, 2.0))}


def write(model, prompt, **settings):
    settings = {"max_new_tokens": 12, "output_attributions": True, "return_dict_in_generate": True, **settings}
    return model.generate(prompt, **settings)


def trace_of(model, **settings) -> SteerlingTrace:
    return write(model, make_prompt(11), **settings).traces[0]
