"""Steered generation: the same however it is computed and whoever shares the batch, where and as long as it is asked for."""

import pytest
import torch
from generation_model import PAD, make_model, make_prompt
from steering_cases import OPERATIONS
from steerling_hf.modeling import steered_steerling
from steerling_hf.modeling.cache_steerling import SteerlingCache
from steerling_hf.modeling.steering_steerling import (
    Amplify,
    Condition,
    Imitate,
    Inject,
    SetConcepts,
    Suppress,
    SuppressTokens,
)

WAYS = {"cached": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}
LENGTHS = (5, 21, 9)


@pytest.fixture
def model():
    return make_model(topk_known=4, topk_known_features=4, unknown_topk=6)


def generate(model, prompt, **settings):
    return model.generate(prompt, return_dict_in_generate=True, output_scores=True, **settings)


def ragged(lengths=LENGTHS):
    """(rows, longest) prompts padded on the left, their attention mask, and each without padding."""
    prompts = [make_prompt(length) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=PAD) for row in prompts])
    return ids, (ids != PAD).long(), prompts


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("aligned", [False, True])
def test_cached_uncached_and_static_runs_decide_the_same(model, name, guidance, aligned):
    settings = {"max_new_tokens": 19, "guidance_scale": guidance, "align_blocks": aligned}
    unsteered = generate(model, make_prompt(11), **settings)
    settings["steering"] = OPERATIONS[name]
    plain = generate(model, make_prompt(11), use_cache=False, **settings)
    assert not torch.equal(plain.log_probabilities, unsteered.log_probabilities)
    for way in ("cached", "static"):
        output = generate(model, make_prompt(11), **settings, **WAYS[way])
        assert torch.equal(output.sequences, plain.sequences), way
        assert torch.equal(output.step_map, plain.step_map), way


def test_steering_a_call_and_steering_the_model_are_the_same(model):
    for operation in OPERATIONS.values():
        called = model.generate(make_prompt(11), max_new_tokens=9, steering=operation)
        with model.steer(operation):
            assert torch.equal(model.generate(make_prompt(11), max_new_tokens=9), called)


def test_named_operations_are_what_they_are_made_of(model):
    settings = {"max_new_tokens": 12}
    amplified = model.generate(make_prompt(11), steering=Amplify(3, 8.0, cutoff=5), **settings)
    injected = model.generate(make_prompt(11), steering=Inject(3, 8.0, layers=1, cutoff=5), **settings)
    assert torch.equal(amplified, injected)
    suppressed = model.generate(make_prompt(11), steering=Suppress(3, (4, 3), strength=-5.0), **settings)
    parts = (Inject((3, 4), -5.0, normalized=False), SuppressTokens(3, 20.0))
    assert torch.equal(suppressed, model.generate(make_prompt(11), steering=parts, **settings))


def test_a_masked_part_of_the_prompt_is_steered_too(model):
    prompt = make_prompt(20)
    prompt[0, 5:9] = model.config.mask_token_id
    for way in WAYS.values():
        plain = model.generate(prompt, max_new_tokens=8, **way)
        steered = model.generate(prompt, max_new_tokens=8, steering=Inject(3, 30.0), **way)
        assert not torch.equal(steered[:, 5:9], plain[:, 5:9])
        behind = model.generate(prompt, max_new_tokens=8, steering=Inject(3, 30.0, window=(0, None)), **way)
        assert torch.equal(behind[:, 5:9], plain[:, 5:9])


# Where and how long


def test_a_window_and_a_cutoff_say_where_and_how_long(model):
    steering = (Inject(3, 30.0, cutoff=4), SuppressTokens(5, window=(2, 7)), SetConcepts(3, 1.0, window=(6, None)))
    report = generate(model, make_prompt(11), max_new_tokens=12, steering=steering, use_cache=False).steering
    places = {
        name: {t.position - 11 for t in report if t.operation == name} for name in ("SuppressTokens", "SetConcepts")
    }
    assert max(touch.step for touch in report if touch.operation == "Inject") == 3
    assert max(touch.step for touch in report) > 8
    assert places["SuppressTokens"] == {2, 3, 4, 5, 6}
    assert places["SetConcepts"] == {6, 7, 8, 9, 10, 11}


def test_an_imitation_ends_with_its_target(model):
    report = generate(model, make_prompt(11), max_new_tokens=12, steering=Imitate((5, 6, 7))).steering
    assert {touch.position - 11 for touch in report} == {0, 1, 2}


def test_a_cache_of_steered_rows_serves_unsteered_ones(model):
    """With guidance, the row without the prompt has masked positions, which steering has touched."""
    for guidance in (1.0, 1.7):
        settings = {"max_new_tokens": 12, "guidance_scale": guidance}
        cache = SteerlingCache(model.config)
        first = model.generate(make_prompt(29), cache=cache, steering=Inject(3, 30.0), **settings)
        again = model.generate(first, cache=cache, **settings)
        assert torch.equal(again, model.generate(first, use_cache=False, **settings))
        steered = model.generate(first, cache=cache, steering=Inject(3, 30.0), **settings)
        assert torch.equal(steered, model.generate(first, use_cache=False, steering=Inject(3, 30.0), **settings))


def test_half_precision(model):
    model.to(torch.bfloat16)
    for operation in OPERATIONS.values():
        for way in WAYS.values():
            assert model.generate(make_prompt(11), max_new_tokens=9, steering=operation, **way).shape == (1, 20)


# Rows of a batch


BY_ROW = [None, Inject(3, 30.0, cutoff=7), (SuppressTokens(3), SetConcepts((2, 25), 1.0, keep_epsilon=False))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_rows_with_steering_of_their_own_equal_their_single_runs(model, way, sampled, guidance):
    ids, mask, prompts = ragged()
    copies = 2 if sampled else 1
    settings = {"max_new_tokens": 13, "guidance_scale": guidance, **WAYS[way]}
    if sampled:
        settings |= {"do_sample": True, "num_return_sequences": copies}
    seeds = [3, 1, 4, 15, 9, 2]
    chosen = {"seed": seeds} if sampled else {}
    together = generate(model, ids, attention_mask=mask, steering=BY_ROW, **settings, **chosen)
    for number, (prompt, operations) in enumerate(zip(prompts, BY_ROW)):
        chosen = {"seed": seeds[2 * number : 2 * number + 2]} if sampled else {}
        alone = generate(model, prompt, steering=operations, **settings, **chosen)
        rows, length = slice(number * copies, (number + 1) * copies), alone.sequences.shape[1]
        assert torch.equal(together.sequences[rows, -length:], alone.sequences), number
        assert torch.equal(together.step_map[rows, -length:], alone.step_map), number


def test_a_row_that_has_ended_is_not_steered_any_more(model):
    prompts = make_prompt(9, rows=2)
    # From left to right, so that a row ends at the step that writes its end.
    settings = {"max_new_tokens": 24, "steering": Inject(3, 5.0), "unmasking": lambda _, count: torch.arange(count)}
    end = int(model.generate(prompts, **settings)[0, 12])
    output = generate(model, prompts, eos_token_id=end, cache_implementation="static", **settings)
    first, second = (int(trace.step_map.max()) for trace in output.traces)
    assert first < second
    assert max(touch.step for touch in output.steering if touch.row == 0) == first


def test_rows_keep_the_order_and_number_of_their_operations(model):
    """What rows have in common is attached once, but not at the cost of either."""
    scale, set_one = SetConcepts(3, 0.3, mode="scale"), SetConcepts(3, 1.0)
    steering = [(scale, set_one), (set_one, scale), (set_one, scale, scale), None, (scale, scale, set_one)]
    prompts = make_prompt(9).repeat(5, 1)
    together = generate(model, prompts, max_new_tokens=3, steering=steering)
    for row, operations in enumerate(steering):
        alone = generate(model, prompts[:1], max_new_tokens=3, steering=operations)
        torch.testing.assert_close(together.log_probabilities[row], alone.log_probabilities[0])
    settings = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2, "seed": 0}
    twice = generate(model, prompts[:3], steering=[None, None, (set_one, scale, scale)], **settings)
    expected = generate(model, prompts[:3], steering=(set_one, scale, scale), **settings)
    torch.testing.assert_close(twice.log_probabilities[4:], expected.log_probabilities[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_unsteered_rows_are_bit_identical(model, name, dtype):
    """Where shapes do not depend on the other rows' steps, as those of windows do."""
    ids, mask, _ = ragged()
    model.to(dtype)
    settings = {"attention_mask": mask, "max_new_tokens": 10, "use_cache": False}
    plain = generate(model, ids, **settings)
    steered = generate(model, ids, steering=[None, OPERATIONS[name], None], **settings)
    for key in ("sequences", "step_map", "log_probabilities"):
        assert torch.equal(steered[key][[0, 2]], plain[key][[0, 2]])
    assert not torch.equal(steered.log_probabilities[1], plain.log_probabilities[1])


def weights_in(model, prompt, concept):
    """(T,) weights of a concept in a prompt."""
    with torch.no_grad():
        concepts = model(prompt, output_concepts=True).concepts
    known = concept < model.config.n_concepts
    indices = concepts.known_indices if known else concepts.unknown_indices
    weights = concepts.known_weights if known else concepts.unknown_weights
    return (weights * (indices == (concept if known else concept - model.config.n_concepts))).sum(-1)[0]


@pytest.mark.parametrize("concept", [3, 25])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_conditions_hold_in_rows_whose_prompt_shows_the_concept(model, concept, pooling):
    ids, mask, prompts = ragged()
    pooled = [float(getattr(weights_in(model, prompt, concept), pooling)()) for prompt in prompts]
    low, middle, _ = sorted(pooled)
    threshold = (low + middle) / 2
    held = [value >= threshold for value in pooled]
    settings = {"attention_mask": mask, "max_new_tokens": 10, "use_cache": False}
    plain = generate(model, ids, **settings)
    for strength in (30.0, 0.0):
        operation = Inject(3, strength, condition=Condition(concept, threshold, pooling))
        steered = generate(model, ids, steering=operation, **settings)
        assert {touch.row for touch in steered.steering} == {row for row, holds in enumerate(held) if holds}
        same = [torch.equal(ours, first) for ours, first in zip(steered.log_probabilities, plain.log_probabilities)]
        assert same == [not holds or not strength for holds in held]
    with model.steer(Inject(9, 50.0)):  # what the unsteered model sees decides
        report = generate(model, ids, steering=operation, **settings).steering
        assert {touch.row for touch in report} == {row for row, holds in enumerate(held) if holds}


def test_conditions_are_weighed_in_every_row_however_many_at_a_time(model, monkeypatch):
    settings = {"max_new_tokens": 4, "steering": Inject(3, 30.0, condition=Condition(3, 1e-6))}
    whole = generate(model, make_prompt(9, rows=5), **settings).steering
    monkeypatch.setattr(steered_steerling, "POSITIONS", 20)  # two rows
    parts = generate(model, make_prompt(9, rows=5), **settings).steering
    rows = {touch.row for touch in whole}
    assert {touch.row for touch in parts} == rows
    assert len(rows) > 3  # of more than one pass over prompts


def test_a_condition_in_forward_looks_at_what_is_not_masked(model):
    prompts = [make_prompt(length) for length in (9, 10)]
    values = [float(weights_in(model, prompt, 3).max()) for prompt in prompts]
    condition = Condition(3, sum(values) / 2)
    for prompt, value in zip(prompts, values):
        canvas = torch.nn.functional.pad(prompt, (0, 4), value=model.config.mask_token_id)
        plain = model(canvas).logits
        with model.steer(Inject(3, 30.0, condition=condition)):
            assert torch.equal(model(canvas).logits, plain) == (value < condition.threshold)
