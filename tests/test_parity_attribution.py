"""Attribution says what the reference's says: its recorded concepts, chunks and input tokens of greedy generations."""

import json
from pathlib import Path

import pytest
import torch
from reference.cases import (
    ATTRIBUTED_CASES,
    ATTRIBUTED_CHUNKS,
    ATTRIBUTED_GENERATIONS,
    ATTRIBUTED_POINTS,
    fingerprint,
    make_prompt,
    make_weights,
)
from reference.compare import (
    TOLERANCE,
    generation_disagreement,
    our_output,
    relative_difference,
)
from reference.loaded import loaded_models
from safetensors.torch import load_file

from steerling_hf.chunks import aggregate
from steerling_hf.input_attribution import attribute_inputs

OUTPUTS = Path(__file__).parent / "reference" / "outputs" / "attributed"
RECORD = json.loads((OUTPUTS / "record.json").read_text())
WAYS = {"cached": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}
HEADS = ("known", "unknown")
CONCEPT_PARTS = [f"{head}_{part}" for head in HEADS for part in ("indices", "weights", "contributions")]
# The reference's input attributor goes past the heads, so it is wrong where the epsilon correction is off.
WITH_EPSILON = [
    generation
    for generation in ATTRIBUTED_GENERATIONS
    if ATTRIBUTED_CASES[generation.case].config["use_epsilon_correction"]
]


def recorded(generation) -> dict[str, torch.Tensor]:
    return load_file(OUTPUTS / f"{generation.name}.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loaded models by case, each loaded once."""
    yield from loaded_models(tmp_path_factory, ATTRIBUTED_CASES.__getitem__)


@pytest.fixture(scope="module")
def outputs(models):
    """Our generations with attributions, by generation and way, each made once."""
    made = {}

    def get(generation, way: str = "cached"):
        if (generation, way) not in made:
            settings = {**generation.settings, **WAYS[way], "output_attributions": True}
            made[generation, way] = our_output(models(generation.case), make_prompt(generation), **settings)
        return made[generation, way]

    return get


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", ATTRIBUTED_GENERATIONS, ids=lambda generation: generation.name)
def test_concepts_of_each_token_equal_the_recorded_reference(generation, way, outputs):
    output, start = outputs(generation, way), generation.prompt_length
    theirs = RECORD["generations"][generation.name]
    ours = output.sequences[0, start:].tolist(), output.step_map[0, start:].tolist()
    config = ATTRIBUTED_CASES[generation.case].config
    assert not generation_disagreement(ours, (theirs["tokens"], theirs["step_map"]), config)

    expected, found = recorded(generation), output.attributions
    largest = expected["logits"].abs().max()
    assert set(found) - {"logits", "residual"} == {name for name in CONCEPT_PARTS if name in expected}
    for name in found:
        own = found[name][0, start:]
        if name.endswith("_indices"):
            assert torch.equal(own, expected[name].long()), name
        else:  # where concepts explain everything the residual is 0, so all is measured by the logits
            difference = (own - expected[name]).abs().max() / (1 if name.endswith("_weights") else largest)
            assert difference < TOLERANCE, f"{name} differ by {difference:.1e}"


@pytest.mark.parametrize("generation", WITH_EPSILON, ids=lambda generation: generation.name)
def test_input_tokens_equal_the_recorded_reference(generation, models, outputs):
    trace, expected = outputs(generation).traces[0], recorded(generation)
    found = attribute_inputs(models(generation.case), trace, method="riemann_right", n_steps=ATTRIBUTED_POINTS)
    assert torch.equal(found.positions, torch.arange(generation.prompt_length, len(trace.tokens)))
    logits = outputs(generation).attributions.logits[0, found.positions]
    compared = [
        (found.scores, expected["inputs"]),
        (found.values, logits),
        (found.aggregate(), expected["inputs_of_prompt"]),
    ]
    for start, stop in ATTRIBUTED_CHUNKS:
        compared.append((found.aggregate(start, stop, scope="answer"), expected[f"inputs_of_answer_{start}_{stop}"]))
    for ours, theirs in compared:
        difference = relative_difference(ours, theirs)
        assert difference < TOLERANCE, f"scores differ by {difference:.1e} of the largest"


@pytest.mark.parametrize("chunk", ATTRIBUTED_CHUNKS, ids=str)
@pytest.mark.parametrize("generation", ATTRIBUTED_GENERATIONS, ids=lambda generation: generation.name)
def test_chunks_equal_the_recorded_reference(generation, chunk, outputs):
    start, stop = chunk
    expected = recorded(generation)
    theirs = [expected[name] for name in (f"chunk_{start}_{stop}_{head}" for head in HEADS) if name in expected]
    found = aggregate(outputs(generation).attributions, 0, start, stop, n_known=len(theirs[0]))
    ours = torch.zeros(sum(map(len, theirs))).index_put((found.ids,), found.contributions)
    # Shares, of which 1 is the whole of the logits.
    assert (ours - torch.cat(theirs)).abs().max() < TOLERANCE
    assert abs(found.residual - float(expected[f"chunk_{start}_{stop}_residual"])) < TOLERANCE


@pytest.mark.parametrize("generation", ATTRIBUTED_GENERATIONS, ids=lambda generation: generation.name)
def test_recordings_belong_to_these_weights_and_prompts(generation):
    case = ATTRIBUTED_CASES[generation.case]
    weights = make_weights(case.config, case.seed, case.weight_gain)
    made = fingerprint({**weights, "prompt": make_prompt(generation)})
    assert made == RECORD["fingerprints"][generation.name], "cases.py has changed: run record.py attributed again"


def test_every_recording_is_compared():
    names = {generation.name for generation in ATTRIBUTED_GENERATIONS}
    assert {path.stem for path in OUTPUTS.glob("*.safetensors")} == names
    assert set(RECORD["generations"]) == names
    chunks = {f"chunk_{start}_{stop}_{part}" for start, stop in ATTRIBUTED_CHUNKS for part in (*HEADS, "residual")}
    answers = {f"inputs_of_answer_{start}_{stop}" for start, stop in ATTRIBUTED_CHUNKS}
    for generation in ATTRIBUTED_GENERATIONS:
        compared = {"logits", "residual", *CONCEPT_PARTS, *chunks}
        compared |= {"inputs", "inputs_of_prompt", *answers} if generation in WITH_EPSILON else set()
        if not ATTRIBUTED_CASES[generation.case].config["use_unknown"]:
            compared = {name for name in compared if "unknown" not in name}
        assert set(recorded(generation)) == compared
