"""PEFT's own tests of its methods on a decoder (PeftCommonTester), with a small Steerling in place of the models they name."""

import functools
import types

import pytest
import torch
from peft import PeftConfig, PromptLearningConfig, ShadowConfig

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM, SteerlingTokenizer, checkpoint

# What run.py unpacked.
from tests import test_decoder_models as theirs

TARGETS, FEEDFORWARD = ["c_attn", "c_fc"], ["c_fc"]
SIZES = {
    "n_layers": 2,
    "n_head": 4,
    "n_kv_heads": 2,
    "n_embd": 32,
    "intermediate_size": 48,
    "block_size": 256,
    "inject_layer": 1,
}
CONCEPTS = {
    "n_concepts": 20,
    "topk_known": 4,
    "topk_known_features": 4,
    "n_unknown_concepts": 30,
    "unknown_topk": 6,
    "factorize_rank": 8,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A checkpoint of steerling-nano's tokenizer and random weights."""
    place = tmp_path_factory.mktemp("steerling")
    nano = SteerlingConfig.from_pretrained(checkpoint("steerling-nano")).to_dict()
    nano.pop("concept_dim")
    torch.manual_seed(0)
    config = SteerlingConfig(**{**nano, **SIZES, **CONCEPTS, "initializer_range": 0.2})
    SteerlingForDiffusionLM(config).save_pretrained(place)
    SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano")).save_pretrained(place)
    return str(place)


@pytest.fixture
def model_id(folder) -> str:
    return folder


def for_steerling(config_class: type[PeftConfig], options: dict) -> dict:
    """The options of a method with the layers that it adapts, which PEFT knows by itself only for its own list of models."""
    options = dict(options)
    if not issubclass(config_class, (PromptLearningConfig, ShadowConfig)):
        options["target_modules"] = TARGETS
    if "feedforward_modules" in options:
        options["feedforward_modules"] = FEEDFORWARD
    return options


def with_our_model(function):
    """A test of theirs whose model is ours: parametrised by methods, and no longer by the models that they download."""
    marks = [mark for mark in function.pytestmark if mark.name == "parametrize"]
    ours = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(ours, function, updated=())
    ours.pytestmark = [mark for mark in function.pytestmark if mark.name != "parametrize"]
    for mark in marks:
        names, values = mark.args
        if names == "model_id":
            continue
        if names == "config_cls,config_kwargs":
            values = [
                pytest.param(kind, for_steerling(kind, options), id=name_of(kind, options)) for kind, options in values
            ]
        ours = pytest.mark.parametrize(names, values)(ours)
    return ours


def name_of(kind: type[PeftConfig], options: dict) -> str:
    extra = [
        key
        for key in ("alora_invocation_tokens", "trainable_token_indices", "init_weights", "select_top")
        if key in options
    ]
    return "-".join([kind.__name__.removesuffix("Config"), *(f"{key}={options[key]}" for key in extra)])


def is_of_any_model(function) -> bool:
    marks = getattr(function, "pytestmark", [])
    return any(mark.name == "parametrize" and mark.args[0] == "model_id" for mark in marks)


def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
    """As theirs, but for padding, which theirs put inside a text."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    return {
        "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]).to(self.torch_device),
        "attention_mask": mask.to(self.torch_device),
    }


TestSteerling = type(
    "TestSteerling",
    (theirs.TestDecoderModels,),
    {
        name: with_our_model(function) if is_of_any_model(function) else None
        for name, function in vars(theirs.TestDecoderModels).items()
        if name.startswith("test_")
    }
    | {"prepare_inputs_for_testing": prepare_inputs_for_testing},
)
