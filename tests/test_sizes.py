"""Parameter names, shapes and counts are those of the released checkpoints (REFERENCE.md), without any weights."""

import pytest
import torch
from reference.cases import CASES, parameter_shapes
from reference.folders import flat_config

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM

PARAMETERS_8B = 8_391_778_304
PARAMETERS_8B_INSTRUCT = PARAMETERS_8B + 3 * 4096  # three more tokens

BLOCK_8B = {
    "ln_1.weight": (4096,),
    "ln_2.weight": (4096,),
    "attn.c_attn.weight": (5120, 4096),
    "attn.c_proj.weight": (4096, 4096),
    "attn.q_norm.weight": (128,),
    "attn.k_norm.weight": (128,),
    "mlp.c_fc.weight": (32768, 4096),
    "mlp.c_proj.weight": (4096, 16384),
}
SHAPES_8B = {
    "transformer.tok_emb.weight": (100281, 4096),
    **{f"transformer.blocks.{layer}.{name}": shape for layer in range(32) for name, shape in BLOCK_8B.items()},
    "transformer.ln_f.weight": (4096,),
    "transformer.lm_head.weight": (100281, 4096),
    "known_head.concept_embedding.weight": (33744, 4096),
    "known_head.concept_predictor.weight": (33744, 4096),
    "unknown_head.embedding_coef.weight": (101200, 256),
    "unknown_head.embedding_basis.weight": (4096, 256),
    "unknown_head.predictor_down.weight": (256, 4096),
    "unknown_head.predictor_up.weight": (101200, 256),
}


def on_meta(config: SteerlingConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return SteerlingForDiffusionLM(config)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_default_configuration_is_the_released_8b():
    model = on_meta(SteerlingConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS_8B
    assert shapes(model) == SHAPES_8B
    assert model.transformer.lm_head.weight is model.transformer.tok_emb.weight


def test_the_instruct_checkpoint_has_three_more_tokens():
    model = on_meta(SteerlingConfig(vocab_size=100284))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS_8B_INSTRUCT


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names_and_shapes_of_every_variant(case):
    prefix = "" if case.config["interpretable"] else "transformer."  # which a bare checkpoint leaves out
    expected = {prefix + name: shape for name, shape in parameter_shapes(case.config).items()}
    assert shapes(on_meta(SteerlingConfig(**flat_config(case.config)))) == expected
