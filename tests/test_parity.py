"""The model computes what the reference computes: recorded outputs of every variant (tests/reference/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from reference.cases import (
    CASES,
    Case,
    case_named,
    fingerprint,
    make_input,
    make_weights,
    parameter_shapes,
    recorded_positions,
)
from reference.compare import TOLERANCE, differences, our_outputs
from reference.folders import write_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import steerling_hf  # noqa: F401  (registers the Auto classes)

OUTPUTS = Path(__file__).parent / "reference" / "outputs"
RECORD = json.loads((OUTPUTS / "record.json").read_text())

# How each form is stored here; test_stored_either_way has the other combinations.
STORAGE = {"flat": {"shards": 1, "tied": "both"}, "nested": {"shards": 3, "tied": "lm_head"}}


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(case: Case, folder: Path, **storage) -> torch.nn.Module:
    write_folder(folder, case.config, make_weights(case.config, case.seed, case.weight_gain), **storage)
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_equals_recording(model: torch.nn.Module, case: Case) -> None:
    ours, theirs = our_outputs(model, make_input(case)), load_file(OUTPUTS / f"{case.name}.safetensors")
    for name in ("known_indices", "unknown_indices"):
        if name in theirs:
            assert torch.equal(ours.pop(name), theirs.pop(name).long()), f"{name}: other concepts, or another order"
    found = differences({name: tensor[:, recorded_positions(case)] for name, tensor in ours.items()}, theirs)
    too_far = {name: difference for name, difference in found.items() if not difference < TOLERANCE}
    assert not too_far, f"relative differences above {TOLERANCE}: {too_far}"


@pytest.mark.parametrize("form", ["flat", "nested"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_equal_the_recorded_reference(case, form, tmp_path):
    assert_equals_recording(load(case, tmp_path, form=form, **STORAGE[form]), case)


@pytest.mark.parametrize("form", ["flat", "nested"])
@pytest.mark.parametrize("name", ["chunks_dense", "instruct", "gpt_like"])
def test_no_key_of_either_form_is_lost(name, form, tmp_path):
    config = load(case_named(name), tmp_path, form=form).config
    wanted = case_named(name).config
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("tied", ["tok_emb", "lm_head", "both"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", ["released_without_epsilon", "bare_backbone"])
def test_stored_either_way(name, shards, tied, tmp_path):
    case = case_named(name)
    model = load(case, tmp_path, shards=shards, tied=tied)
    assert model.transformer.lm_head.weight is model.transformer.tok_emb.weight
    assert_equals_recording(model, case)


@pytest.mark.parametrize(
    "name", ["released_without_epsilon", "attention_both_topk_on_logits", "gpt_like", "bare_backbone"]
)
def test_saves_under_the_released_names_and_loads_again(name, tmp_path):
    case = case_named(name)
    load(case, tmp_path / "nested", form="nested", shards=2).save_pretrained(tmp_path / "saved")
    names = set(parameter_shapes(case.config))
    tied = {name for name in names if name.endswith("lm_head.weight") and case.config["weight_sharing"]}
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == names - tied
    assert_equals_recording(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), case)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation(attention, tmp_path):
    case = case_named("released_without_epsilon")
    model = load(case, tmp_path)
    model.set_attn_implementation(attention)
    assert_equals_recording(model, case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recordings_belong_to_these_weights_and_inputs(case):
    weights = make_weights(case.config, case.seed, case.weight_gain)
    made = fingerprint({**weights, "input_ids": make_input(case)})
    assert made == RECORD["fingerprints"][case.name], "cases.py has changed: run tests/reference/record.py again"


def test_every_recording_has_its_case():
    recorded = {path.stem for path in OUTPUTS.glob("*.safetensors")}
    assert recorded == {case.name for case in CASES} == set(RECORD["fingerprints"])
