"""Logits that say nothing: an error that names what made them so, never token 0; and float16 that stays in its range."""

import math

import pytest
import torch
from generation_model import MASK, VOCABULARY, make_model, make_prompt
from transformers import AutoModelForCausalLM

from steerling_hf import Amplify, Suppress, checkpoint

RULES = ["confidence", "margin", "entropy", "threshold", "factor", "entropy_bound", lambda logits, count: [0]]


@pytest.fixture
def model():
    return make_model()


def spoil(model, value: float, from_call: int = 0) -> None:
    """Logits that are inf or NaN at one token, from some forward pass on."""
    calls = []

    def hook(_module, _inputs, logits):
        calls.append(None)
        logits = logits.clone()
        if len(calls) > from_call:
            logits[-1, 5] = value
        return logits

    model.transformer.lm_head.register_forward_hook(hook)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 0}], ids=["greedy", "sampling"])
def test_the_model(model, rule, value, sampling):
    spoil(model, value)
    with pytest.raises(ValueError, match="not finite at step 0, position 16 of row 1: computed in torch.float32;"):
        model.generate(make_prompt(9, rows=2), max_new_tokens=8, unmasking=rule, **sampling)


def test_the_step_the_type_and_what_steers_are_named(model):
    model.to(torch.float16)
    spoil(model, math.nan, from_call=3)
    match = r"at step 3, .*torch\.float16 with steering by Amplify, `guidance_scale` 1\.5; use bfloat16 or float32, or less"
    with pytest.raises(ValueError, match=match):
        model.generate(make_prompt(9), max_new_tokens=8, steering=Amplify(3), guidance_scale=1.5)


class Bad:
    def __init__(self, value: float, token=slice(None)):
        self.value, self.token = value, token

    def __call__(self, ids, scores):
        scores[:, self.token] = self.value
        return scores


@pytest.mark.parametrize("sees_canvas", [False, True])
@pytest.mark.parametrize(("value", "token"), [(math.nan, 3), (math.inf, 3), (-math.inf, slice(None))])
def test_a_processor(model, value, token, sees_canvas):
    processor = Bad(value, token)
    processor.sees_canvas = sees_canvas
    with pytest.raises(ValueError, match=r"`logits_processor` \(Bad\) .* at step 0, position 9 of row 0"):
        model.generate(make_prompt(9), max_new_tokens=8, logits_processor=[processor])


def test_what_rules_out_every_token_is_named(model):
    words = [token for token in range(VOCABULARY) if token != 3]
    end = {"eos_token_id": 3, "suppress_tokens": words}
    with pytest.raises(
        ValueError, match="`suppress_tokens` and `min_new_tokens` and .*leave no token to write at step 0"
    ):
        model.generate(make_prompt(9), max_new_tokens=8, min_new_tokens=2, **end)
    prompt = make_prompt(9)
    prompt[0, 4] = MASK
    with pytest.raises(ValueError, match="`suppress_tokens` and `eos_token_id` leave no token"):
        model.generate(prompt, max_new_tokens=0, **end)
    phrases = [[int(make_prompt(9)[0, -1]), token] for token in range(VOCABULARY)]
    with pytest.raises(ValueError, match="`bad_words_ids` leave no token to write"):
        model.generate(make_prompt(9), max_new_tokens=8, bad_words_ids=phrases)
    banned = {(token,): -math.inf for token in range(VOCABULARY)}
    with pytest.raises(ValueError, match="`sequence_bias` leave no token to write"):
        model.generate(make_prompt(9), max_new_tokens=8, sequence_bias=banned)


def test_one_token_that_is_left_is_written(model):
    words = [token for token in range(VOCABULARY) if token != 3]
    assert model.generate(make_prompt(9), max_new_tokens=4, suppress_tokens=words)[0, 9:].tolist() == [3] * 4


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("operation", [Amplify(3), Suppress(3)], ids=["amplify", "suppress"])
def test_float16_holds_what_the_presets_add(operation, factor):
    """Its hidden states are those of float32, in which the product of the MLP goes beyond 65,504."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    operation = type(operation)(3, strength=factor * operation.strength)
    ids = torch.cat([make_prompt(9), torch.full((1, 8), model.config.mask_token_id)], 1)
    with model.steer(operation), torch.no_grad():
        expected = model(ids).logits
        found = model.half()(ids).logits
    assert found.isfinite().all()
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_float16_without_steering_is_as_it_was():
    """The product of the MLP is scaled where it is large, and its norm takes that out."""
    model = make_model().half()
    mlp = model.transformer.blocks[0].mlp
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        up, gate = mlp.c_fc(states).chunk(2, dim=-1)
        torch.testing.assert_close(mlp(states), mlp.c_proj(torch.nn.functional.silu(gate) * up), rtol=0.01, atol=0.01)
        large = 300 * states
        assert (
            not torch.nn.functional.silu(mlp.c_fc(large).chunk(2, dim=-1)[1])
            .mul(mlp.c_fc(large).chunk(2, dim=-1)[0])
            .isfinite()
            .all()
        )
        norm, exact = model.transformer.blocks[0].ln_2, make_model()
        expected = exact.transformer.blocks[0].ln_2(exact.transformer.blocks[0].mlp(large.float()))
        assert (norm(mlp(large)).float() - expected).norm() < 0.01 * expected.norm()
