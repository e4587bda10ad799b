"""Greedy generation decides the same tokens in the same order as the reference's recorded runs."""

import json
from pathlib import Path

import pytest
from reference.cases import GENERATIONS, case_named, make_prompt
from reference.compare import generation_disagreement, our_generation
from reference.loaded import loaded_models

RECORD = json.loads((Path(__file__).parent / "reference" / "outputs" / "record.json").read_text())["generations"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loaded models by case, each loaded once."""
    yield from loaded_models(tmp_path_factory, case_named)


WAYS = {"cached": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
def test_greedy_generation_equals_the_recorded_reference(generation, way, models):
    ours = our_generation(models(generation.case), make_prompt(generation), **generation.settings, **WAYS[way])
    theirs = RECORD[generation.name]
    config = case_named(generation.case).config
    disagreement = generation_disagreement(ours, (theirs["tokens"], theirs["step_map"]), config)
    assert not disagreement, disagreement


def test_an_instruct_checkpoint_ends_at_the_end_of_its_turn(models):
    """The reference leaves masks before <|eot_id|> in its output; ours are all text."""
    config = case_named("instruct").config
    for generation in (generation for generation in GENERATIONS if generation.case == "instruct"):
        assert config["mask_token_id"] in RECORD[generation.name]["tokens"]
        tokens, _ = our_generation(models("instruct"), make_prompt(generation), **generation.settings)
        assert tokens[-1] == config["eot_id"]
        assert config["mask_token_id"] not in tokens


def test_every_recorded_generation_is_compared():
    assert set(RECORD) == {generation.name for generation in GENERATIONS}
