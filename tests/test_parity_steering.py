"""Steering does what the reference's does: its recorded logits, and its recorded greedy generations."""

import json
from pathlib import Path

import pytest
from reference.cases import (
    OPERATIONS,
    STEERED_CASES,
    STEERED_FORWARDS,
    STEERED_GENERATIONS,
    fingerprint,
    make_input,
    make_prompt,
    make_weights,
    recorded_positions,
)
from reference.compare import (
    TOLERANCE,
    generation_disagreement,
    our_generation,
    our_steered_logits,
    relative_difference,
)
from reference.loaded import loaded_models
from safetensors.torch import load_file
from steerling_hf.modeling.steering_steerling import operation_from_dict

OUTPUTS = Path(__file__).parent / "reference" / "outputs" / "steered"
RECORD = json.loads((OUTPUTS / "record.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loaded models by case, each loaded once."""
    yield from loaded_models(tmp_path_factory, STEERED_CASES.__getitem__)


@pytest.mark.parametrize(
    ("case", "operation"), STEERED_FORWARDS, ids=[f"{case.name}-{name}" for case, name in STEERED_FORWARDS]
)
def test_logits_equal_the_recorded_reference(case, operation, models):
    ours = our_steered_logits(models(case.name), OPERATIONS[operation], make_input(case))
    theirs = load_file(OUTPUTS / "logits.safetensors")[f"{case.name}-{operation}"]
    difference = relative_difference(ours[:, recorded_positions(case)], theirs)
    assert difference < TOLERANCE, f"logits differ by {difference:.1e} of the largest"


WAYS = {"cached": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}


def assert_equals_recording(ours: tuple[list[int], list[int]], generation) -> None:
    theirs, config = RECORD["generations"][generation.name], STEERED_CASES[generation.case].config
    disagreement = generation_disagreement(ours, (theirs["tokens"], theirs["step_map"]), config)
    assert not disagreement, disagreement


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", STEERED_GENERATIONS, ids=lambda generation: generation.name)
def test_greedy_generation_equals_the_recorded_reference(generation, way, models):
    operation = operation_from_dict(OPERATIONS[generation.operation])
    settings = {**generation.settings, **WAYS[way], "steering": operation}
    assert_equals_recording(our_generation(models(generation.case), make_prompt(generation), **settings), generation)


@pytest.mark.parametrize(
    "generation",
    [generation for generation in STEERED_GENERATIONS if generation.case == "released"],
    ids=lambda generation: generation.name,
)
def test_so_it_does_where_the_operation_is_attached_before(generation, models):
    model = models(generation.case)
    with model.steer(operation_from_dict(OPERATIONS[generation.operation])):
        ours = our_generation(model, make_prompt(generation), **generation.settings)
    assert_equals_recording(ours, generation)


@pytest.mark.parametrize("case", STEERED_CASES.values(), ids=lambda case: case.name)
def test_recordings_belong_to_these_weights_and_inputs(case):
    weights = make_weights(case.config, case.seed, case.weight_gain)
    made = fingerprint({**weights, "input_ids": make_input(case)})
    assert made == RECORD["fingerprints"][case.name], "cases.py has changed: run tests/reference/record.py again"


def test_every_recording_is_compared():
    logits = {f"{case.name}-{operation}" for case, operation in STEERED_FORWARDS}
    assert set(load_file(OUTPUTS / "logits.safetensors")) == logits
    assert set(RECORD["generations"]) == {generation.name for generation in STEERED_GENERATIONS}
    assert set(RECORD["fingerprints"]) == set(STEERED_CASES)
