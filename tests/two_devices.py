"""A device map over two accelerators: whatever is asked of the model, it answers as on one device."""

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from generation_model import make_model, make_prompt
from steering_cases import OPERATIONS
from steerling_hf.modeling.steering_steerling import Condition, SetConcepts
from trace_cases import SPARSE, write
from virtual_devices import VirtualDevices

from steerling_hf import Concept, attribute_concepts, attribute_inputs, concept_vectors, embed, measure_belief
from steerling_hf.belief import ablate_concepts
from steerling_hf.concept_statistics import active_in, contrast, top_tokens

FIRST, SECOND = "virtual:0", "virtual:1"
# What accelerate makes of devices that are filled one after the other ends somewhere in this order.
MAPS = {
    "heads apart": {
        "transformer.tok_emb": FIRST,
        "transformer.blocks": FIRST,
        "transformer.ln_f": FIRST,
        "transformer.lm_head": SECOND,
        "known_head": SECOND,
        "unknown_head": SECOND,
    },
    "blocks apart": {
        "transformer.tok_emb": FIRST,
        "transformer.blocks.0": FIRST,
        "transformer.blocks.1": SECOND,
        "transformer.ln_f": SECOND,
        "transformer.lm_head": FIRST,
        "known_head": FIRST,
        "unknown_head": SECOND,
        "residual": FIRST,
    },
}
STEERED = ("inject on a condition", "set concepts", "add without epsilon in a window", "imitate a mean", "suppress")
# Of virtual devices, autograd knows the first.
FOR_GRADIENTS = {"transformer": FIRST, "residual": FIRST, "known_head": FIRST, "unknown_head": "cpu"}


@pytest.fixture
def virtual_devices():
    with VirtualDevices():
        yield


@pytest.fixture(params=MAPS)
def models(request, virtual_devices):
    """The same model in one piece and in two."""
    return make(), spread(make(), MAPS[request.param])


@pytest.fixture
def models_with_gradients(virtual_devices):
    return make(), spread(make(), FOR_GRADIENTS)


def make(**overrides):
    # Moving weights would untie them.
    return make_model(**{**SPARSE, "weight_sharing": False, **overrides})


def spread(model, device_map):
    """As `dispatch_model` does, which does not compute on the CPU if there are other devices."""
    attach_align_device_hook_on_blocks(model, {"": FIRST, **device_map}, dict.fromkeys(device_map, False))
    for name, device in device_map.items():
        assert {str(weight.device) for weight in model.get_submodule(name).parameters()} <= {device}
    return model


def assert_same(found, expected) -> None:
    """Nested values are equal, wherever their tensors are."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    elif isinstance(expected, dict):
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    elif expected is not None:
        assert found == pytest.approx(expected, abs=1e-4)


def test_two_devices_cannot_be_mixed(virtual_devices):
    one, other = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
    with pytest.raises(RuntimeError, match="add.*virtual:0.*virtual:1"):
        one + other
    assert (one + other.to(FIRST)).tolist() == [2, 2]


def test_forward(models):
    alone, together = models
    ids = make_prompt(13, rows=2)
    with torch.no_grad():
        some, concepts = torch.tensor([1, 7]), ids[..., None] % 20
        for settings in (
            {},
            {"output_concepts": True},
            {"output_concepts": True, "logits_to_keep": some},
            {"labels": ids, "concept_labels": concepts, "noise_mask": ids % 2 == 0},
        ):
            expected, found = alone(ids, **settings), together(ids, **settings)
            assert_same(found, expected)


def test_training(models_with_gradients):
    gradients = []
    for model in models_with_gradients:
        torch.manual_seed(0)
        ids = make_prompt(16, rows=2)
        loss = model.train()(ids, labels=ids, concept_labels=ids[..., None] % 20).loss
        loss.backward()
        gradients.append([loss, *(weight.grad for weight in model.parameters())])
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.7},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"unmasking": "entropy", "align_blocks": True},
    ],
    ids=str,
)
def test_generate(models, settings):
    prompts = make_prompt(13, rows=2)
    texts = [model.generate(prompts, max_new_tokens=6, **settings) for model in models]
    assert torch.equal(texts[1].cpu(), texts[0])


@pytest.mark.parametrize("name", STEERED)
def test_steering(models, name):
    settings = {"max_new_tokens": 5, "steering": OPERATIONS[name], "return_dict_in_generate": True}
    alone, together = (model.generate(make_prompt(13), **settings) for model in models)
    assert torch.equal(together.sequences.cpu(), alone.sequences)
    assert_same([touch.size for touch in together.steering], [touch.size for touch in alone.steering])


@pytest.mark.parametrize("top", [{"topk_known": 3, "topk_known_features": 9}, {"topk_known": None}], ids=str)
def test_weights_of_concepts_that_are_not_reported(virtual_devices, top):
    operation = SetConcepts(3, 2.0, mode="scale", keep_epsilon=False, condition=Condition(3, 1e-4))
    settings = {"max_new_tokens": 4, "steering": operation, "return_dict_in_generate": True}
    alone, together = (
        model.generate(make_prompt(9), **settings) for model in (make(**top), spread(make(**top), MAPS["heads apart"]))
    )
    assert len(alone.steering)
    assert_same([touch.size for touch in together.steering], [touch.size for touch in alone.steering])


def test_attributions(models, tokenizer):
    found = []
    for model in models:
        output = write(model, make_prompt(13), max_new_tokens=4)
        trace = output.traces[0]
        places = trace.decided.tolist()
        texts = attribute_concepts(model, tokenizer, [list(range(9)), list(range(4))])
        found.append((vars(output.attributions), ablate_concepts(model, trace, places[:3], [3, 4, 25]), vars(texts)))
    assert_same(found[1], found[0])


def test_input_attributions(models_with_gradients):
    found = []
    for model in models_with_gradients:
        trace = write(model, make_prompt(13), max_new_tokens=4).traces[0]
        inputs = attribute_inputs(model, trace, n_steps=2)
        places = trace.decided.tolist()[:3]
        concept = attribute_inputs(model, trace, places, concept=25, n_steps=2)
        found.append((vars(inputs), vars(concept), vars(measure_belief(model, trace, inputs))))
    assert_same(found[1], found[0])


def test_without_a_discovered_head(tokenizer, tiny_model, virtual_devices):
    device_map = {name: device for name, device in MAPS["heads apart"].items() if name != "unknown_head"}
    models = (tiny_model(use_unknown=False), spread(tiny_model(use_unknown=False), device_map))
    assert_same(*(embed(model, tokenizer, ["The diver found a reef."], kind="unknown") for model in models[::-1]))


def test_texts_as_concepts(tokenizer, tiny_model, virtual_devices):
    texts = ["The diver found a reef.", "Two trains were late again, and nobody cared."]
    found = []
    for model in (tiny_model(), spread(tiny_model(), MAPS["heads apart"])):
        vectors = concept_vectors(model, tokenizer, texts)
        found.append(
            (
                [embed(model, tokenizer, texts, kind=kind) for kind in ("composed", "known", "unknown")],
                [vectors.ids, vectors.weights],
                [
                    (active.concept, active.mean)
                    for text in active_in(model, tokenizer, int, texts, 5)
                    for active in text
                ],
                [(told.concept, told.effect_size) for told in contrast(model, tokenizer, int, texts, texts[:1] * 2)],
                [score.score for score in top_tokens(model, tokenizer, Concept(3, "known"))],
            )
        )
    assert_same(found[1], found[0])
