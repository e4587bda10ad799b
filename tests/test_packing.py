"""Weights packed for the time of a generation."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_model import make_model, make_prompt
from steerling_hf.modeling import concepts_steerling, packing_steerling
from steerling_hf.modeling.packing_steerling import PRODUCTS_UNPACKED, multiply, packed_copy, packed_weights
from steerling_hf.modeling.precision_steerling import in_full_precision
from torch import nn

from steerling_hf import SetConcepts


@pytest.fixture
def model():
    return make_model()


def is_packed(module) -> bool:
    """Whether the present call has packed a module's weight."""
    return id(module.weight) in packing_steerling._PRESENT.get().packed


def packed_layers(model) -> int:
    """Packed linear layers of a model, whichever calls have packed them."""
    held = {id(packed.weight) for packed in packing_steerling._SHARED.values()}
    return sum(id(layer.weight) in held for layer in model.modules() if isinstance(layer, nn.Linear))


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
        lambda head, *_: seen.append((is_packed(head.scored_table), is_packed(model.unknown_head.scored_table)))
    )
    steering = SetConcepts([3], 0.9)
    packed = model.generate(make_prompt(5), max_new_tokens=16, steering=steering)
    assert seen == [(number >= PRODUCTS_UNPACKED, False) for number in range(16)]
    assert not packing_steerling._SHARED
    watching.remove()
    monkeypatch.setattr("steerling_hf.modeling.packing_steerling.FEWEST_PASSES", 1000)
    assert torch.equal(packed, model.generate(make_prompt(5), max_new_tokens=16, steering=steering))
    assert not torch.equal(packed, model.generate(make_prompt(5), max_new_tokens=16))


def test_a_table_that_is_never_scored_as_a_whole_is_not_packed(monkeypatch):
    monkeypatch.setattr(concepts_steerling, "SCREENS", (12,))
    model, seen = make_model(n_concepts=1000), []
    table = model.known_head.scored_table
    table.weight.data[3] = 0  # half of the others are stronger, clearly
    model.transformer.lm_head.register_forward_hook(lambda *_: seen.append(is_packed(table)))
    model.generate(make_prompt(5), max_new_tokens=16, steering=SetConcepts([3], 0.9))
    assert seen == [False] * 16


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_the_same(rows, bias):
    torch.manual_seed(0)
    layer, states = nn.Linear(48, 80, bias=bias), torch.randn(2, rows, 48)
    with torch.no_grad():
        plain = layer(states)
        with packed_weights(layer, [], passes=100):
            assert torch.allclose(multiply(layer, states), plain, atol=1e-6)
            assert is_packed(layer)
            # Views, as the model hands them on.
            assert torch.allclose(multiply(layer, states.transpose(0, 1)), plain.transpose(0, 1), atol=1e-6)


def test_full_precision_of_half_precision_weights_keeps_the_bias():
    layer, states = nn.Linear(6, 5, bias=True).bfloat16(), torch.randn(3, 6)
    wanted = states @ layer.weight.float().T + layer.bias.float()
    assert torch.allclose(in_full_precision(layer, states), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_full_precision(layer, states), in_full_precision(layer, states.double()))


def test_gradients_flow_past_packed_weights():
    layer = nn.Linear(4, 3)
    with packed_weights(layer, [], passes=100):
        multiply(layer, torch.ones(1, 4)).sum().backward()
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


@torch.no_grad()
def test_what_is_packed_is_counted_together(monkeypatch):
    first, second, states = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), torch.ones(1, 8)
    for largest, packed in ((2 * first.weight.nbytes - 1, False), (2 * first.weight.nbytes, True)):
        monkeypatch.setattr(packing_steerling, "LARGEST", largest)
        with packed_weights(first, [second], passes=100):
            multiply(first, states)
            for _ in range(PRODUCTS_UNPACKED + 1):
                multiply(second, states)
            assert (is_packed(first), is_packed(second)) == (True, packed)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
def test_weights_that_are_not_plain_tensors_are_never_packed():
    half, parametrised, states = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8), torch.ones(1, 8)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", Doubled())
    for layer in (half, parametrised, nn.Linear(8, 8, device="meta")):
        with packed_weights(layer, [], passes=100):
            multiply(layer, states.to(layer.weight))
            assert not packing_steerling._PRESENT.get().packed
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8).as_subclass(Marked))
    with packed_weights(layer, [], passes=100):
        assert torch.allclose(multiply(layer, states), 8 + layer.bias)
        assert not packing_steerling._PRESENT.get().packed


class Marked(torch.Tensor):
    """As torchao and quanto keep quantised weights: with products of its own."""


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


@pytest.mark.parametrize("attach", ["hook", "pre_hook", "forward"])
@torch.no_grad()
def test_what_is_attached_to_a_layer_runs_and_its_product_is_packed(attach):
    layer, states, seen = nn.Linear(8, 8), torch.randn(2, 8), []
    if attach == "hook":
        layer.register_forward_hook(lambda *_: seen.append(attach))
    elif attach == "pre_hook":
        layer.register_forward_pre_hook(lambda *_: seen.append(attach))
    else:  # as accelerate does
        own = layer.forward
        layer.forward = lambda states: [seen.append(attach), own(states)][1]
    with packed_weights(layer, [], passes=100):
        product = multiply(layer, states)
        assert is_packed(layer)
    assert seen == [attach]
    torch.testing.assert_close(product, states @ layer.weight.T + layer.bias)


@torch.no_grad()
def test_a_weight_that_is_put_in_place_of_a_packed_one_is_used():
    layer, states = nn.Linear(8, 8, bias=False), torch.ones(1, 8)
    with packed_weights(layer, [], passes=100):
        multiply(layer, states)
        layer.weight = nn.Parameter(torch.ones(8, 8))
        assert multiply(layer, states).eq(8).all()


@torch.no_grad()
def test_calls_that_overlap_share_their_copies_until_the_weight_changes():
    layer, states = nn.Linear(8, 8, bias=False), torch.ones(1, 8)
    with packed_weights(layer, [], passes=100):
        before = multiply(layer, states)
        with packed_weights(layer, [], passes=100):
            multiply(layer, states)
            assert packed_layers(layer) == len(packing_steerling._SHARED) == 1
        layer.weight.neg_()
        with packed_weights(layer, [], passes=100):
            assert torch.allclose(multiply(layer, states), -before)
    assert not packing_steerling._SHARED


@torch.no_grad()
def test_a_call_inside_another_one_packs_what_it_would_alone():
    layer, states = nn.Linear(8, 8), torch.ones(1, 8)
    with packed_weights(layer, [], passes=100):
        assert packed_copy(layer.weight, states) is not None
        with packed_weights(layer, [], passes=1):
            assert packed_copy(layer.weight, states) is None
        assert packed_copy(layer.weight, states) is not None


def test_copies_that_are_made_meanwhile_have_nothing_packed(model):
    copies = []

    def copy_all(_rows, scores):
        copies.append((copy.deepcopy(model), pickle.loads(pickle.dumps(model.known_head))))
        return scores

    before = model.generate(make_prompt(5), max_new_tokens=16, logits_processor=[copy_all])
    whole, head = copies[-1]
    assert packed_layers(whole) == 0
    assert not {"packed", "waiting"} & vars(head.scored_table).keys()
    assert torch.equal(whole.generate(make_prompt(5), max_new_tokens=16), before)


def test_calls_in_threads_do_not_disturb_each_other():
    """Which products are packed follows from the call itself, so that all bits are what they are alone."""
    model = make_model(use_epsilon_correction=False)  # whose concept tables are scored in every pass

    def write(number):
        output = model.generate(
            make_prompt(5 + number % 3),
            max_new_tokens=8 * (1 + number % 3),  # too few passes to pack anything, and enough
            output_scores=True,
            return_dict_in_generate=True,
        )
        return output.sequences, output.log_probabilities

    alone = [write(number) for number in range(6)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(write, [*range(6)] * 3))
    for found, expected in zip(together, alone * 3):
        assert all(map(torch.equal, found, expected))
    assert not packing_steerling._SHARED
