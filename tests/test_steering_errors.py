"""Bad operations: a clear error that names the field, before anything is attached; and operations as plain data."""

import json

import pytest
import torch
from generation_model import make_model, make_prompt
from steering_cases import OPERATIONS, hooks_of
from steerling_hf.modeling.steering_steerling import (
    Amplify,
    Condition,
    Imitate,
    Inject,
    SetConcepts,
    Suppress,
    SuppressTokens,
    operation_from_dict,
)


@pytest.fixture(scope="module")
def model():
    return make_model()


BAD = [
    (Inject(-1, 1.0), "`concepts` has -1"),
    (Inject(50, 1.0), "`concepts` has 50: known .* 0 to 19, discovered ones 20 to 49"),
    (Inject((), 1.0), "`concepts` is empty"),
    (Inject((3, True), 1.0), "`concepts` has True"),
    (Inject(2.0, 1.0), "`concepts` has 2.0"),
    (Inject("ghost", 1.0), "`concepts` has 'ghost'"),
    (Inject((3, 4, 3), 1.0), "`concepts` has 3 more than once"),
    (Inject(3, float("nan")), "`strength` is nan"),
    (Inject(3, "strong"), "`strength` is 'strong'"),
    (Inject(3, None), "`strength` is None"),
    (Inject(3, 1.0, normalized=1), "`normalized` is 1: give True or False"),
    (Inject(3, 1.0, layers=3), "`layers` has 3.*1 to 2"),
    (Inject(3, 1.0, layers=-1), "`layers` has -1"),
    (Inject(3, 1.0, layers=(0, 1)), "`layers` has 0"),
    (Inject(3, 1.0, layers=()), "`layers` is empty"),
    (Inject(3, 1.0, layers=1.5), "`layers` has 1.5"),
    (Inject(3, 1.0, layers=True), "`layers` has True"),
    (Inject(3, 1.0, cutoff=0), "`cutoff` is 0"),
    (Inject(3, 1.0, cutoff=2.5), "`cutoff` is 2.5"),
    (Inject(3, 1.0, cutoff=True), "`cutoff` is True"),
    (Inject(3, 1.0, window=5), "`window` is 5"),
    (Inject(3, 1.0, window=(4, 4)), r"`window` is \(4, 4\)"),
    (Inject(3, 1.0, window=(-1, 4)), r"`window` is \(-1, 4\)"),
    (Inject(3, 1.0, window=(0, 1, 2)), r"`window` is \(0, 1, 2\)"),
    (Inject(3, 1.0, window=(0, "end")), "`window` is .*end"),
    (Inject(3, 1.0, clean_rows="yes"), "`clean_rows` is 'yes'"),
    (Inject(3, 1.0, condition=0.5), "`condition` is 0.5: give a Condition"),
    (Inject(3, 1.0, condition=Condition(99, 0.5)), "`condition.concept` has 99"),
    (Inject(3, 1.0, condition=Condition(3, 0.0)), "`condition.threshold` is 0.0"),
    (Inject(3, 1.0, condition=Condition(3, 1.5)), "`condition.threshold` is 1.5"),
    (Inject(3, 1.0, condition=Condition(3, "low")), "`condition.threshold` is 'low'"),
    (
        Inject(3, 1.0, condition=Condition(3, 0.5, "median")),
        "`condition.pooling` is 'median': choose one of max, mean",
    ),
    (SuppressTokens(3, -1.0), "`strength` is -1.0.*0 or more"),
    (SuppressTokens(50), "`concepts` has 50"),
    (SuppressTokens(3, window=(2, 1)), "`window`"),
    (SetConcepts(3, float("inf")), "`value` is inf"),
    (SetConcepts(3, 1.0, mode="multiply"), "`mode` is 'multiply': choose one of set, scale, add"),
    (SetConcepts(3, 1.0, keep_epsilon=0), "`keep_epsilon` is 0"),
    (Imitate(()), "`target`.*at least one"),
    (Imitate((5, 96)), "`target`.*0 to 95"),
    (Imitate((5,), (-1,)), "`context`.*0 to 95"),
    (Imitate(5), "`target` is 5: give a list"),
    (Imitate("a text"), "`target` is 'a text': give a list"),
    (Imitate((5,) * 40, (6,) * 25), "65 tokens, but the model's context is 64"),
    (Imitate((5,), strength=0.0), "`strength` is 0.0"),
    (Imitate((5,), strength=1.1), "`strength` is 1.1"),
    (Imitate((5,), strength="much"), "`strength` is 'much'"),
    (Imitate((5,), top_n=0), "`top_n` is 0"),
    (Imitate((5,), top_n=1.5), "`top_n` is 1.5"),
    (Imitate((5,), pooled=None), "`pooled` is None"),
    (Amplify(50), "`concepts` has 50"),
    (Amplify(3, layers=7), "`layers` has 7"),
    (Amplify(3, cutoff=-1), "`cutoff` is -1"),
    (Suppress(50), "`concept` has 50"),
    (Suppress((3, 4)), r"`concept` has \(3, 4\)"),
    (Suppress(3, (50,)), "`group` has 50"),
    (Suppress(3, (4, 4)), "`group` has 4 more than once"),
    (Suppress(3, strength=float("nan")), "`strength` is nan"),
    (Suppress(3, strength=7.0), "`strength` is 7.0, which pushes towards the concept: give 0 or less"),
    (Suppress(3, token_strength=-2.0), "`token_strength` is -2.0"),
    (Suppress(3, layers=9), "`layers` has 9"),
    (Inject, "`steering` has .*Inject.*give operations"),
    ("amplify", "`steering` has 'amplify'"),
    ({"operation": "Inject"}, "`steering` has {"),
    (3, "`steering` has 3"),
]


@pytest.mark.parametrize(("operation", "message"), BAD, ids=[f"{number}" for number in range(len(BAD))])
def test_a_bad_operation_is_refused_by_name_and_nothing_is_attached(model, operation, message):
    good = SuppressTokens(3)
    with pytest.raises(ValueError, match=message):
        model.add_steering(good, operation)
    with pytest.raises(ValueError, match=message):
        model.generate(make_prompt(5, rows=2), max_new_tokens=2, steering=[good, operation])
    with pytest.raises(ValueError, match=message), model.steer((good, [operation])):
        raise AssertionError("the block was entered")
    assert not hooks_of(model)
    assert model.attached_operations == ()


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_a_list_has_an_entry_for_each_prompt(model, entries):
    settings = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 2}
    with pytest.raises(ValueError, match=f"`steering` has {entries} entries for 2 prompts"):
        model.generate(make_prompt(5, rows=2), steering=[None] * entries, **settings)
    assert model.generate(make_prompt(5, rows=2), steering=[None] * 2, **settings).shape == (4, 7)


def test_what_a_model_lacks_is_said(tiny_model):
    with pytest.raises(ValueError, match="interpretable=False"):
        tiny_model(interpretable=False).add_steering(Inject(3, 1.0))
    with pytest.raises(ValueError, match="interpretable=False"):
        tiny_model(interpretable=False).add_steering(Suppress(3))
    with pytest.raises(ValueError, match="`concepts` has 20: .* 0 to 19, and no others"):
        tiny_model(use_unknown=False).add_steering(Inject(20, 1.0))


def test_decoding_methods_of_others_take_no_steering(model):
    def decode(model, input_ids, *_, **__):
        return input_ids

    with pytest.raises(ValueError, match="`steering`.*custom_generate"):
        model.generate(make_prompt(5), max_new_tokens=2, custom_generate=decode, steering=Inject(3, 1.0))


# Operations as data


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_come_back_from_json(name):
    operation = OPERATIONS[name]
    values = json.loads(json.dumps(operation.to_dict()))
    assert values["operation"] == type(operation).__name__
    assert operation_from_dict(values) == operation
    assert hash(operation_from_dict(values)) == hash(operation)


def test_only_what_differs_from_the_defaults_is_written():
    assert Inject(3, 2.0).to_dict() == {"operation": "Inject", "concepts": 3, "strength": 2.0}
    condition = Condition(25, 0.5, "mean")
    values = Suppress(3, (4, 5), condition=condition, clean_rows=True).to_dict()
    written = {"concept": 25, "threshold": 0.5, "pooling": "mean"}
    assert values == {"operation": "Suppress", "concept": 3, "group": [4, 5], "condition": written, "clean_rows": True}
    values["condition"]["threshold"] = 0.9  # is a copy
    assert condition.threshold == 0.5


def test_lists_ranges_and_tensors_of_ids_are_tuples():
    assert Inject([1, 2], 1.0) == Inject((1, 2), 1.0) == Inject(torch.tensor([1, 2]), 1.0) == Inject(range(1, 3), 1.0)
    assert Imitate(torch.tensor([5, 6])).target == (5, 6)
    assert operation_from_dict(SetConcepts([1, 2], 1.0, window=[0, None]).to_dict()) == SetConcepts(
        (1, 2), 1.0, window=(0, None)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "`operation` is None: choose one of Inject, SuppressTokens"),
        ({"operation": "Boost"}, "`operation` is 'Boost'"),
        ({"operation": "Inject", "concepts": 3}, "Inject cannot have these fields.*strength"),
        ({"operation": "Inject", "concepts": 3, "strength": 1.0, "power": 2}, "cannot have these fields.*power"),
        (
            {"operation": "Amplify", "concepts": 3, "condition": {"concept": 3}},
            "cannot have these fields.*threshold",
        ),
        ({"operation": "Amplify", "concepts": 3, "condition": 0.5}, "cannot have these fields"),
    ],
)
def test_data_of_no_operation_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        operation_from_dict(values)
