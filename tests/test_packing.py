"""Weights packed for the time of a generation."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_model import make_model, make_prompt
from steerling_hf.modeling import concepts_steerling, packing_steerling
from steerling_hf.modeling.packing_steerling import PRODUCTS_UNPACKED, SteerlingLinear, packed_weights

from steerling_hf import SetConcepts


@pytest.fixture
def model():
    return make_model()


def packed_layers(model) -> int:
    return sum(layer.packed is not None for layer in model.modules() if isinstance(layer, SteerlingLinear))


def packed_during_generate(model, **settings) -> int:
    seen = []
    handle = model.transformer.lm_head.register_forward_hook(lambda *_: seen.append(packed_layers(model)))
    model.generate(make_prompt(5), **{"max_new_tokens": 16, **settings})
    handle.remove()
    assert len(set(seen)) == 1
    return seen[0]


def test_all_linear_layers_of_the_backbone_are_packed_while_it_generates(model):
    assert packed_during_generate(model) == 4 * 2 + 1
    assert packed_layers(model) == 0


def test_the_table_of_a_head_that_scores_all_of_it_is_packed_after_some_products(model, monkeypatch):
    seen = []
    watching = model.known_head.register_forward_hook(
        lambda head, *_: seen.append((head.scored_table.packed, model.unknown_head.scored_table.packed))
    )
    steering = SetConcepts([3], 0.9)
    packed = model.generate(make_prompt(5), max_new_tokens=16, steering=steering)
    assert [own is not None for own, _ in seen] == [number >= PRODUCTS_UNPACKED for number in range(16)]
    assert all(other is None for _, other in seen)
    assert model.known_head.scored_table.packed is None
    assert model.known_head.scored_table.products_unpacked is None
    watching.remove()
    monkeypatch.setattr("steerling_hf.modeling.packing_steerling.FEWEST_PASSES", 1000)
    assert torch.equal(packed, model.generate(make_prompt(5), max_new_tokens=16, steering=steering))
    assert not torch.equal(packed, model.generate(make_prompt(5), max_new_tokens=16))


def test_a_table_that_is_never_scored_as_a_whole_is_not_packed(monkeypatch):
    monkeypatch.setattr(concepts_steerling, "SCREENS", (12,))
    model, seen = make_model(n_concepts=1000), []
    table = model.known_head.scored_table
    table.weight.data[3] = 0  # half of the others are stronger, clearly
    model.transformer.lm_head.register_forward_hook(lambda *_: seen.append(table.packed))
    model.generate(make_prompt(5), max_new_tokens=16, steering=SetConcepts([3], 0.9))
    assert seen == [None] * 16


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_the_same(rows, bias):
    torch.manual_seed(0)
    layer, states = SteerlingLinear(48, 80, bias=bias), torch.randn(2, rows, 48)
    with torch.no_grad():
        plain = layer(states)
        with packed_weights(layer, [], passes=100):
            assert torch.allclose(layer(states), plain, atol=1e-6)
            assert layer.packed is not None
            # Views, as the model hands them on.
            assert torch.allclose(layer(states.transpose(0, 1)), plain.transpose(0, 1), atol=1e-6)


def test_full_precision_of_half_precision_weights_keeps_the_bias():
    layer, states = SteerlingLinear(6, 5, bias=True).bfloat16(), torch.randn(3, 6)
    wanted = states @ layer.weight.float().T + layer.bias.float()
    assert torch.allclose(layer(states), wanted)


def test_gradients_flow_past_packed_weights():
    layer = SteerlingLinear(4, 3)
    with packed_weights(layer, [], passes=100):
        layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(3, 4))


def test_weights_that_change_between_calls_are_seen(model):
    prompt = make_prompt(5)
    before = model.generate(prompt, max_new_tokens=16)
    saved = model.transformer.lm_head.weight.detach().clone()
    model.transformer.lm_head.weight.data.neg_()  # behind the back of any version counter
    assert not torch.equal(model.generate(prompt, max_new_tokens=16), before)
    model.transformer.lm_head.weight.data.copy_(saved)
    assert torch.equal(model.generate(prompt, max_new_tokens=16), before)


def test_nothing_stays_packed_after_an_error(model):
    def fail(*_):
        raise RuntimeError("stop")

    model.transformer.ln_f.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(make_prompt(5), max_new_tokens=16)
    assert packed_layers(model) == 0


def test_few_passes_half_precision_autocast_and_large_models_do_without(model, monkeypatch):
    assert packed_during_generate(model, steps=8) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_during_generate(model) == 0
    assert packed_during_generate(make_model().to(torch.bfloat16)) == 0
    monkeypatch.setattr(packing_steerling, "LARGEST", 1000)
    assert packed_during_generate(model) == 0


def test_what_is_packed_is_counted_together(monkeypatch):
    first, second = SteerlingLinear(8, 8, bias=False), SteerlingLinear(8, 8, bias=False)
    monkeypatch.setattr(packing_steerling, "LARGEST", 2 * first.weight.nbytes - 1)
    with packed_weights(first, [second], passes=100):
        assert first.products_unpacked == 0
        assert second.products_unpacked is None


def test_half_precision_is_never_packed():
    layer = SteerlingLinear(8, 8).bfloat16()
    with packed_weights(layer, [], passes=100):
        assert layer.products_unpacked is None


def test_scores_of_a_packed_table_have_the_shape_of_the_others(model):
    model.known_head.register_forward_hook(lambda _head, _args, output: output)  # scores all, without looking
    states, found = torch.randn(2, 3, 32), []
    model.transformer.lm_head.register_forward_hook(lambda *_: found.append(model.known_head.logits(states)))
    model.generate(make_prompt(5), max_new_tokens=16)
    assert model.config.pad_multiple > 1
    for scores in found:
        torch.testing.assert_close(scores, found[0])


def test_a_call_inside_another_one_leaves_what_that_has_packed(model):
    seen = []

    def ask(_rows, scores):
        model.generate(make_prompt(3), max_new_tokens=16)
        seen.append(packed_layers(model))
        return scores

    model.generate(make_prompt(5), max_new_tokens=16, logits_processor=[ask])
    assert set(seen) == {4 * 2 + 1}
    assert packed_layers(model) == 0


def test_copies_of_a_compiled_layer_are_not_compiled():
    layer = SteerlingLinear(4, 3)
    layer.compile(backend="eager")
    assert layer._compiled_call_impl is not None
    assert copy.deepcopy(layer)._compiled_call_impl is None


def test_copies_that_are_made_meanwhile_have_nothing_packed(model):
    copies = []

    def copy_all(_rows, scores):
        copies.append((copy.deepcopy(model), pickle.loads(pickle.dumps(model.known_head))))
        return scores

    before = model.generate(make_prompt(5), max_new_tokens=16, logits_processor=[copy_all])
    whole, head = copies[-1]
    assert packed_layers(whole) == 0
    assert head.scored_table.products_unpacked is None
    assert torch.equal(whole.generate(make_prompt(5), max_new_tokens=16), before)


def test_calls_in_two_threads_do_not_disturb_each_other(model):
    lengths = (5, 7, 9, 11)
    expected = [model.generate(make_prompt(length), max_new_tokens=24) for length in lengths]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda length: model.generate(make_prompt(length), max_new_tokens=24), lengths))
    for one, two in zip(found, expected):
        assert torch.equal(one, two)
    assert packed_layers(model) == 0
    assert all(layer.products_unpacked is None for layer in model.modules() if isinstance(layer, SteerlingLinear))
