"""A generation repeated: canvases as they were, and passes over them."""

import json

import pytest
import torch
from generation_model import MASK, PAD, make_model, make_prompt
from steering_cases import OPERATIONS
from steerling_hf.modeling.steering_steerling import Condition, Inject, SetConcepts, SuppressTokens
from steerling_hf.modeling.trace_steerling import SteerlingTrace
from trace_cases import GUIDED_AND_STEERED, SPARSE, trace_of, write

from steerling_hf.input_attribution import attribute_inputs
from steerling_hf.replay import alike, replay


@pytest.fixture
def model():
    return make_model(**SPARSE)


# Canvases as they were


def masked_prompt() -> torch.Tensor:
    prompt = make_prompt(19)
    prompt[:, [2, 9, 10]] = MASK
    return prompt


SEEN = {
    "plain": {},
    "few steps": {"steps": 5},
    "guided": {"guidance_scale": 1.7},
    "aligned": {"align_blocks": True, "steps": 7},
    "masks in the prompt": {"prompt": masked_prompt()},
    "masks in the prompt, aligned, guided": {"prompt": masked_prompt(), "align_blocks": True, "guidance_scale": 1.7},
    "an end": {"end": 5},
    "an end, few steps": {"end": 2, "steps": 5},
}


@pytest.mark.parametrize("name", SEEN)
def test_the_canvas_before_a_position_is_what_the_model_saw(model, name):
    settings = dict(SEEN[name])
    prompt, end = settings.pop("prompt", make_prompt(11)), settings.pop("end", None)
    if end is not None:
        free = write(model, prompt, **settings)
        settings["eos_token_id"] = int(free.sequences[0, free.step_map[0] == end][0])
    seen = []
    watch = model.transformer.tok_emb.register_forward_hook(lambda _m, args, _o: seen.append(args[0].clone()))
    trace = write(model, prompt, use_cache=False, **settings).traces[0]
    watch.remove()
    assert (trace.length < len(trace.tokens)) == (end is not None)
    assert len(seen) == trace.step_map.max() + 1
    for position in trace.decided.tolist():
        canvas, step = trace.before(position), int(trace.step_map[position])
        masked = seen[step][0] == MASK
        assert torch.equal(canvas.tokens[: canvas.visible], seen[step][0])
        assert position in canvas.masked()
        assert masked[canvas.masked()].all()
        assert canvas.forwards == step
        assert canvas.committed == ((trace.step_map >= 0) & (trace.step_map < step)).sum()
        if trace.guidance_scale is not None:
            blind = canvas.tokens.masked_fill(canvas.given, MASK)[: canvas.visible]
            assert torch.equal(blind, seen[step][1])


def test_only_decided_positions_have_a_canvas_before_them(model):
    trace = trace_of(model)
    for position in (3, -1, 23):
        with pytest.raises(ValueError, match=rf"`position` is {position}"):
            trace.before(position)


def test_a_trace_holds_how_its_row_was_written(model):
    prompts = make_prompt(11, rows=2)
    prompts[1, :3] = PAD
    own = [None, SetConcepts((2, 25), 1.0)]
    settings = {"attention_mask": (prompts != PAD).long(), "do_sample": True, "guidance_scale": 1.7}
    with model.steer(SuppressTokens(3)):
        output = write(model, prompts, steering=own, seed=5, num_return_sequences=2, **settings)
        alone = write(model, prompts[1:, 3:], steering=own[1], do_sample=True, guidance_scale=1.7, seed=8)
    assert [trace.steering for trace in output.traces] == [(), (), (own[1],), (own[1],)]
    assert [trace.prompt_length for trace in output.traces] == [11, 11, 8, 8]
    assert {trace.guidance_scale for trace in output.traces} == {1.7}
    assert {trace.attached for trace in output.traces} == {(SuppressTokens(3),)}
    assert [trace.seed for trace in output.traces] == [5, 6, 7, 8]
    assert equal_values(alone.traces[0], output.traces[3])
    assert torch.equal(alone.traces[0].tokens, alone.sequences[0])
    assert torch.equal(alone.traces[0].step_map, alone.step_map[0])


def equal_values(one: SteerlingTrace, other: SteerlingTrace) -> bool:
    names = vars(one).keys() - {"tokens", "step_map"}
    same = torch.equal(one.tokens, other.tokens) and torch.equal(one.step_map, other.step_map)
    return same and all(getattr(one, name) == getattr(other, name) for name in names)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_trace_can_be_written_to_a_file(model, name):
    with model.steer(SetConcepts(4, 1.0)):
        trace = trace_of(model, steering=OPERATIONS[name], guidance_scale=1.7, do_sample=True, seed=3)
        read = SteerlingTrace.from_dict(json.loads(json.dumps(trace.to_dict())))
        assert equal_values(read, trace)
        found = [attribute_inputs(model, each, [15], n_steps=2) for each in (trace, read)]
    assert torch.equal(found[0].scores, found[1].scores)


# Passes repeated


def replayed(model, trace) -> torch.Tensor:
    """(n,) logits of decided tokens, from left to right, by passes over what was seen."""
    with replay(model, trace, trace.decided.tolist()) as replaying, torch.no_grad():
        found = torch.zeros(len(trace.decided))
        for batch in alike(replaying):
            logits = replaying.logits(batch, replaying.embed(replaying.tokens(batch)))
            found[batch] = logits[torch.arange(len(batch)), trace.tokens[trace.decided[batch]]]
    return found


def assert_replayed(model, output) -> None:
    width = output.sequences.shape[1]
    longest = max(trace.length - trace.prompt_length for trace in output.traces)
    for row, trace in enumerate(output.traces):
        columns = trace.decided + width - longest - trace.prompt_length
        recorded = output.attributions.logits[row, columns]
        torch.testing.assert_close(replayed(model, trace), recorded, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_steered_generation_is_repeated(model, name, guidance):
    settings = {"guidance_scale": guidance, "max_new_tokens": 19, "steps": 12}
    output = write(model, make_prompt(11), steering=OPERATIONS[name], **settings)
    assert output.steering
    assert_replayed(model, output)
    with model.steer(OPERATIONS[name]):
        attached = write(model, make_prompt(11), **settings)
        assert torch.equal(attached.sequences, output.sequences)
        assert_replayed(model, attached)


@pytest.mark.parametrize(
    "way", [{"align_blocks": True}, {"cache_implementation": "static"}, {"unmasking": "threshold"}]
)
def test_rows_are_repeated(model, way):
    prompts = make_prompt(11, rows=3)
    prompts[1, :3] = PAD
    settings = {"attention_mask": (prompts != PAD).long(), "guidance_scale": 1.7, "do_sample": True, "seed": 1, **way}
    assert_replayed(model, write(model, prompts, steering=[None, *GUIDED_AND_STEERED["steering"]], **settings))
    assert_replayed(model, write(model, prompts, **settings, num_return_sequences=2))


@pytest.mark.parametrize("attach", [False, True])
def test_conditions_are_weighed_on_the_prompt_as_it_was_given(model, attach):
    """Not on what has been filled in since."""
    prompt, length = masked_prompt(), 19
    filled = write(model, prompt).sequences[:, :length]
    with torch.no_grad():
        before = weights_of(model, prompt)[prompt[0] != MASK].amax(0)
        after = weights_of(model, filled).amax(0)
    concept = int((after - before).argmax())
    threshold = float((before + after)[concept] / 2)
    assert before[concept] < threshold < after[concept]
    operation = Inject(3, 30.0, condition=Condition(concept, threshold))
    if attach:
        with model.steer(operation):
            assert_replayed(model, write(model, prompt))
    else:
        assert_replayed(model, write(model, prompt, steering=operation))


def weights_of(model, ids) -> torch.Tensor:
    """(T, concepts) weights of known concepts in the top k."""
    concepts = model(ids, output_concepts=True).concepts
    indices, weights = concepts.known_indices[0], concepts.known_weights[0]
    return weights.new_zeros(len(indices), 20).scatter(-1, indices, weights)


def test_operations_that_were_attached_must_be_attached(model):
    operation = SetConcepts((2, 25), 1.0)
    with model.steer(operation):
        trace = trace_of(model)
        attribute_inputs(model, trace, [15], n_steps=2)
    with pytest.raises(ValueError, match=r"SetConcepts.*attached.*add_steering"):
        attribute_inputs(model, trace, [15], n_steps=2)
    with model.steer(SetConcepts((2, 25), 2.0)), pytest.raises(ValueError, match=r"attached"):
        attribute_inputs(model, trace, [15], n_steps=2)
    plain = trace_of(model)
    with model.steer(operation), pytest.raises(ValueError, match=r"SetConcepts.*attach"):
        attribute_inputs(model, plain, [15], n_steps=2)
