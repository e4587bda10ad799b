"""Steering comes off without a trace, leaves users' own hooks alone, and stays with its model."""

import copy
import pickle
from functools import partial

import pytest
import torch
from generation_model import MASK, make_model, make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_cases import OPERATIONS, hooks_of
from steerling_hf.modeling.steering_steerling import Condition, Inject, Operation, SetConcepts, SuppressTokens
from transformers import DynamicCache

from steerling_hf import SteerlingForDiffusionLM

CANVAS = torch.cat([make_prompt(9), torch.full((1, 6), MASK)], dim=1)


class BrokenOperation(Operation):
    """Fails after it has registered a hook."""

    def attach(self, model, hooks):
        hooks.put(model.transformer.blocks[0], lambda *_: None)
        raise RuntimeError("cannot attach")


@pytest.fixture
def model():
    return make_model()


def outputs_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(CANVAS).logits
    return logits, model.generate(make_prompt(9), max_new_tokens=6, steps=2)


def fail(*_):
    raise RuntimeError("a hook of the user's")


def run_and_fail(model, place: str, run) -> None:
    handle = model.get_submodule(place).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        run()
    handle.remove()


def make_hooked_model():
    """With hooks of the user's, which do nothing."""
    model = make_model()
    model.known_head.register_forward_hook(lambda _m, _a, output: None)
    model.transformer.register_forward_pre_hook(lambda _m, _a, _k: None, with_kwargs=True)
    return model


operations = st.sampled_from(list(OPERATIONS.values()))
places = st.sampled_from(["transformer.blocks.1", "known_head", "transformer.lm_head", "unknown_head"])
steps = st.one_of(
    st.tuples(st.just("add"), st.lists(operations, min_size=1, max_size=2)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("steer"), operations),
    st.tuples(st.just("leave"), st.none()),
    st.tuples(st.just("generate"), operations),
    st.tuples(st.just("fail to attach"), operations),
    st.tuples(st.just("fail to generate"), places),
    st.tuples(st.just("fail in forward"), places),
)


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(steps, max_size=6), st.randoms(use_true_random=False))
def test_no_trace_stays_whatever_is_attached_removed_and_interrupted(program, random):
    model = make_hooked_model()
    before, outputs = hooks_of(model), outputs_of(model)
    handles, contexts = [], []
    for step, value in program:
        if step == "add":
            handles.append(model.add_steering(*value))
        elif step == "remove" and handles:
            handles[value % len(handles)].remove()
        elif step == "steer":
            contexts.append(model.steer(value))
            handles.append(contexts[-1].__enter__())
        elif step == "leave" and contexts:
            contexts.pop().__exit__(None, None, None)
        elif step == "generate":
            model.generate(make_prompt(9), max_new_tokens=2, steering=value)
        elif step == "fail to attach":
            with pytest.raises(RuntimeError, match="cannot attach"):
                model.add_steering(value, BrokenOperation())
            with pytest.raises(RuntimeError, match="cannot attach"):
                model.generate(make_prompt(9), max_new_tokens=2, steering=(value, BrokenOperation()))
        elif step == "fail to generate":
            call = {"max_new_tokens": 2, "steering": SetConcepts((3, 25), 1.0)}
            run_and_fail(model, value, partial(model.generate, make_prompt(9), **call))
        elif step == "fail in forward":
            run_and_fail(model, value, partial(model, CANVAS, output_concepts=True))
    while contexts:
        contexts.pop().__exit__(None, None, None)
    random.shuffle(handles)
    for handle in [*handles, *handles]:
        handle.remove()
    assert hooks_of(model) == before
    assert model.attached_operations == ()
    assert all(torch.equal(*pair) for pair in zip(outputs_of(model), outputs))


def test_a_handle_that_is_removed_twice_leaves_later_steering_alone(model):
    first = model.add_steering(Inject(3, 30.0))
    first.remove()
    second = model.add_steering(Inject(5, 30.0))
    expected = outputs_of(model)
    first.remove()
    assert model.attached_operations == (Inject(5, 30.0),)
    assert all(torch.equal(*pair) for pair in zip(outputs_of(model), expected))
    second.remove()
    assert not hooks_of(model)


def test_nested_steering_ends_where_its_block_ends(model):
    plain = outputs_of(model)[0]
    with model.steer(Inject(3, 30.0)):
        outer = outputs_of(model)[0]
        with model.steer(SuppressTokens(5)):
            assert not torch.equal(outputs_of(model)[0], outer)
        assert torch.equal(outputs_of(model)[0], outer)
        assert not torch.equal(outer, plain)
    assert torch.equal(outputs_of(model)[0], plain)


def test_steering_of_a_call_adds_to_that_of_the_model(model):
    prompt = make_prompt(9)
    both = model.generate(prompt, max_new_tokens=12, steering=(Inject(3, 30.0), SuppressTokens(5)))
    with model.steer(Inject(3, 30.0)):
        assert torch.equal(model.generate(prompt, max_new_tokens=12, steering=SuppressTokens(5)), both)


def test_hooks_that_act_in_forward_are_not_put_on_for_a_call_of_generate(model):
    """They would make compiled steps of their own."""
    seen = []
    model.transformer.blocks[0].register_forward_hook(lambda *_: seen.append(hooks_of(model)))
    model.generate(make_prompt(9), max_new_tokens=1, steering=SuppressTokens(3))
    assert all(name in ("transformer.blocks.0", "transformer.lm_head") for hooks in seen for name, _ in hooks)


def test_a_forward_pass_inside_generate_is_its_own(model):
    """As in a processor that asks the model about something else."""
    with model.steer(Inject(3, 30.0)):
        expected = model(CANVAS).logits
        seen = []

        def ask(_canvases, scores):
            seen.append(model(CANVAS).logits)
            return scores

        ask.sees_canvas = True  # called once a step
        steered = model.generate(make_prompt(9), max_new_tokens=6)
        assert torch.equal(model.generate(make_prompt(9), max_new_tokens=6, logits_processor=[ask]), steered)
    assert len(seen) == 6
    assert all(torch.allclose(logits, expected) for logits in seen)


def test_a_forward_pass_inside_generate_weighs_conditions_of_its_own(model):
    prompts = torch.cat([make_prompt(9), make_prompt(10)[:, :9]])
    concept, threshold = condition_that_parts(model, prompts)
    operation = Inject(3, 30.0, condition=Condition(concept, threshold))

    def ask(_rows, scores):
        model(prompts.flip(0))  # in which it holds for the other row
        return scores

    with model.steer(operation):
        expected = model.generate(prompts, max_new_tokens=6)
        assert torch.equal(model.generate(prompts, max_new_tokens=6, logits_processor=[ask]), expected)
    assert not torch.equal(expected, model.generate(prompts, max_new_tokens=6))


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}])
def test_what_is_attached_in_the_middle_acts_from_then_on(model, settings):
    """And a pass inside, which weighs its condition for another text, does not decide where it acts in this one."""
    prompts, handles = torch.cat([make_prompt(9), make_prompt(10)[:, :9]]), []

    def attach(_rows, scores):
        if not handles:
            handles.append(model.add_steering(Inject(3, 30.0, condition=Condition(3, 1e-6))))
        model(torch.full((1, 4), MASK))
        return scores

    with model.steer(Inject(2, 1.0)):
        model.generate(prompts, max_new_tokens=6, logits_processor=[attach], **settings)
        steps = {(touch.row, touch.step) for touch in handles[0].report if touch.position >= 9}
        handles[0].remove()
    assert {row for row, step in steps if step > 1} == {0, 1}


def test_a_text_of_masks_alone_meets_no_condition(model):
    with model.steer(Inject(3, 30.0, condition=Condition(3, 1e-6))) as handle, torch.no_grad():
        model(torch.full((2, 5), MASK))
        model.generate(torch.full((1, 5), MASK), max_new_tokens=3)
    assert len(handle.report) == 0


def test_passes_inside_may_go_on_from_a_cache(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(CANVAS[:, :8], cache=cache)

    def ask(_rows, scores):
        model(CANVAS[:, 8:], cache=copy.deepcopy(cache))
        return scores

    with model.steer(Inject(2, 1.0)):
        conditioned = Inject(3, 30.0, condition=Condition(3, 0.01))
        model.generate(make_prompt(9), max_new_tokens=2, steering=conditioned, logits_processor=[ask])


def test_a_condition_sees_a_prompt_with_gaps_as_it_stands(model):
    """Texts behind masks stay where they are; counted without them, they would move into another block."""
    gapped = torch.cat([make_prompt(5), torch.full((1, 9), MASK), make_prompt(6)], dim=1)
    text = gapped != MASK
    hidden = model.transformer(input_ids=gapped, attention_mask=text.long(), position_ids=torch.arange(20)[None])
    weights = model.known_head(hidden.last_hidden_state[text])
    dense = torch.zeros(int(text.sum()), 20).scatter(-1, weights.indices, weights.weights).amax(dim=0)
    concept = int(dense.argsort()[-3])
    for threshold, holds in ((float(dense[concept]) - 1e-4, True), (float(dense[concept]) + 1e-4, False)):
        operation = Inject(3, 30.0, condition=Condition(concept, threshold))
        with model.steer(operation) as handle:
            model(gapped)
            assert (len(handle.report) > 0) is holds
        output = model.generate(gapped, max_new_tokens=0, steering=operation, return_dict_in_generate=True)
        assert (len(output.steering) > 0) is holds


def condition_that_parts(model, prompts) -> tuple[int, float]:
    """A concept, and a threshold between its highest weights in two rows."""
    concepts = model(prompts, output_concepts=True).concepts
    dense = torch.zeros(*prompts.shape, 20).scatter(-1, concepts.known_indices, concepts.known_weights).amax(dim=1)
    concept = int((dense[0] - dense[1]).abs().argmax())
    return concept, float(dense[:, concept].mean())


def test_generate_inside_generate_is_its_own(model):
    inner, found = make_prompt(5), []

    def ask(_rows, scores):
        found.append(model.generate(inner, max_new_tokens=4))
        return scores

    prompts = torch.cat([make_prompt(9), make_prompt(10)[:, :9]])
    with model.steer(Inject(2, 8.0, cutoff=3)):
        alone = model.generate(inner, max_new_tokens=4)
        for settings in ({}, {"steering": [Inject(3, 30.0), None]}):
            found.clear()
            expected = model.generate(prompts, max_new_tokens=6, **settings)
            assert torch.equal(model.generate(prompts, max_new_tokens=6, logits_processor=[ask], **settings), expected)
            assert len(found) >= 6
            assert all(torch.equal(text, alone) for text in found)
    assert hooks_of(model) == {}


def test_recorded_hidden_states_are_those_that_the_next_block_reads(model):
    model(CANVAS, output_hidden_states=True)  # which hangs up hooks that stay
    read = []
    handle = model.transformer.blocks[1].register_forward_pre_hook(lambda _block, args: read.append(args[0]))
    with model.steer(Inject(3, 30.0, layers=(1,))):
        states = model(CANVAS, output_hidden_states=True).hidden_states
    handle.remove()
    assert any(torch.equal(state, read[0]) for state in states)


# Hooks of users


def shift_block(_module, _inputs, output):
    return output + 3 * torch.sin(torch.arange(32.0))


def double_features(_module, _inputs, output):
    output.features = 2 * output.features
    return output


def roll_logits(_module, _inputs, output):
    return output.roll(1, dims=-1)


def drop(_module, _inputs, output):
    return torch.zeros_like(output)


USER_HOOKS = {
    "transformer.blocks.0": shift_block,
    "known_head": double_features,
    "unknown_head": double_features,
    "transformer.lm_head": roll_logits,
    "residual": drop,
}


@pytest.mark.parametrize("place", USER_HOOKS)
@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_users_own_hook_takes_effect(model, place, way):
    prompt = make_prompt(9)
    plain = model.generate(prompt, max_new_tokens=12, **way)
    handle = model.get_submodule(place).register_forward_hook(USER_HOOKS[place])
    hooked = model.generate(prompt, max_new_tokens=12, **way)
    assert not torch.equal(hooked, plain)
    with torch.no_grad():
        by_parts = model(CANVAS, output_concepts=True).logits
        torch.testing.assert_close(model(CANVAS).logits, by_parts, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, steering=Inject(3, 0.0)), hooked)
    handle.remove()
    assert torch.equal(model.generate(prompt, max_new_tokens=12, **way), plain)


# Copies and files


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_steered_by_itself(model, duplicate):
    plain = outputs_of(model)
    handle = model.add_steering(Inject(3, 30.0), SetConcepts((2, 25), 1.0), SuppressTokens(4))
    steered = outputs_of(model)
    other, other_handle = duplicate((model, handle))
    handle.remove()
    touches = len(other_handle.report)
    assert all(torch.equal(*pair) for pair in zip(outputs_of(model), plain))
    assert all(torch.equal(*pair) for pair in zip(outputs_of(other), steered))
    assert len(other_handle.report) > touches
    assert len(handle.report) == touches
    other_handle.remove()
    assert not hooks_of(other)
    assert other.attached_operations == ()
    assert all(torch.equal(*pair) for pair in zip(outputs_of(other), plain))


def test_files_of_a_steered_model_are_those_of_the_model(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    plain = outputs_of(model)
    with model.steer(Inject(3, 30.0), SetConcepts((2, 25), 1.0), SuppressTokens(4)):
        model.save_pretrained(tmp_path / "steered")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "steered" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = SteerlingForDiffusionLM.from_pretrained(tmp_path / "steered").eval()
    assert all(torch.equal(*pair) for pair in zip(outputs_of(loaded), plain))
