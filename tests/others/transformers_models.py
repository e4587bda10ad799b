"""transformers' tests that every model must pass (ModelTesterMixin, ConfigTester), for the shapes that a checkpoint can have."""

import unittest
from contextlib import nullcontext

import torch
from steerling_hf.modeling.backbone_steerling import SteerlingModel

# What run.py unpacked.
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM

BATCH, LENGTH, VOCABULARY, FIRST_WORD = 3, 14, 99, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "n_layers": 2,
    "n_head": 4,
    "n_kv_heads": 2,
    "n_embd": 32,
    "intermediate_size": 37,
    "block_size": 128,
    "diff_block_size": 8,
    "n_concepts": 20,
    "topk_known": 4,
    "topk_known_features": 4,
    "n_unknown_concepts": 30,
    "unknown_topk": 6,
    "factorize_rank": 8,
    "inject_layer": 1,
    # Below 4, to which one test shrinks the vocabulary.
    "bos_token_id": 0,
    "eos_token_id": 1,
    "mask_token_id": 2,
    "pad_token_id": 3,
    "endofchunk_token_id": None,
}


class Sizes:
    """What the mixin asks about the model under test."""

    batch_size, seq_length, encoder_seq_length = BATCH, LENGTH, LENGTH
    hidden_size = SIZES["n_embd"]
    num_hidden_layers = SIZES["n_layers"]
    num_attention_heads = SIZES["n_head"]
    vocab_size = VOCABULARY

    def __init__(self, overrides: dict, is_training: bool):
        self.overrides, self.is_training = overrides, is_training

    def get_config(self):
        return SteerlingConfig(**{**SIZES, **self.overrides})

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([BATCH, LENGTH], VOCABULARY - FIRST_WORD) + FIRST_WORD,
            "attention_mask": random_attention_mask([BATCH, LENGTH]),
        }
        return self.get_config(), inputs


class Common(ModelTesterMixin):
    overrides: dict = {}
    is_training = True

    def setUp(self):
        self.model_tester = Sizes(self.overrides, self.is_training)
        self.config_tester = ConfigTester(
            self, config_class=SteerlingConfig, common_properties=None, **{**SIZES, **self.overrides}
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if return_labels:
            inputs["labels"] = inputs["input_ids"].clone()
            # Training refuses masks with padding in front of a text or inside it.
            inputs["attention_mask"] = inputs["attention_mask"].sort(dim=-1, descending=True).values
            # Two calls are compared, so that both have to mask the same tokens.
            inputs["noise_mask"] = torch.arange(LENGTH) % 2 == torch.arange(BATCH)[:, None] % 2
            inputs["noisy_context"] = torch.zeros(BATCH, -(-LENGTH // SIZES["diff_block_size"]), dtype=torch.bool)
        return inputs

    def subTest(self, *_, **__):  # noqa: N802
        # A part that fails is to fail the test, which not_applicable.toml can name.
        return nullcontext()

    def test_config(self):
        self.config_tester.run_common_tests()


class Whole(Common, GenerationTesterMixin):
    all_model_classes = (SteerlingForDiffusionLM,)


class ReleasedTest(Whole, unittest.TestCase):
    """The released checkpoints' shape: tied, a known head and a factorised discovered one, epsilon."""


class UntiedTest(Whole, unittest.TestCase):
    overrides = {"weight_sharing": False}


class DenseUnknownTest(Whole, unittest.TestCase):
    overrides = {"factorize_unknown": False, "use_epsilon_correction": False}


class AttentionScoredTest(Whole, unittest.TestCase):
    overrides = {"use_attention_known": True, "use_attention_unknown": True}


class KnownOnlyTest(Whole, unittest.TestCase):
    overrides = {"use_unknown": False, "topk_known": None, "topk_known_features": None}


class PlainTest(Whole, unittest.TestCase):
    """Every other choice of the backbone: LayerNorm first, biases, a standard MLP, no rotation, no grouped queries."""

    overrides = {
        "use_rms_norm": False,
        "norm_order": "pre",
        "use_bias": True,
        "mlp_type": "standard",
        "use_rope": False,
        "use_qk_norm": False,
        "n_kv_heads": None,
        "clip_qkv": None,
    }


class BackboneTest(Whole, unittest.TestCase):
    """A checkpoint without concept heads, whose names in the file lack the prefix."""

    overrides = {"interpretable": False}


class UntiedBackboneTest(Whole, unittest.TestCase):
    overrides = {"interpretable": False, "weight_sharing": False}


class InnerModelTest(Common, unittest.TestCase):
    """The backbone's class itself, which gives hidden states and has no loss."""

    is_training = False
    all_model_classes = (SteerlingModel,)
    overrides = {"interpretable": False}
