"""Any number of threads may use one model, each under steering of its own: each gets what it gets alone."""

import asyncio
import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from generation_model import MASK, make_model, make_prompt
from steering_cases import hooks_of
from steerling_hf.modeling import steered_steerling

from steerling_hf import Amplify, Imitate, Inject, SetConcepts, Suppress, SuppressTokens, attribute_inputs

STEERINGS = [
    None,
    Inject(3, 30.0),
    Inject(4, -9.0, normalized=False, layers=1, cutoff=4),
    SetConcepts((2, 25), 1.0),
    SetConcepts(25, 2.0, keep_epsilon=False),
    (Suppress(5), SuppressTokens(3)),
    Imitate((5, 6), strength=0.5),
    Amplify((7, 30)),
]
ROWS = torch.cat([make_prompt(9), torch.full((1, 7), MASK)], dim=1)


@pytest.fixture(scope="module")
def model():
    return make_model()


def together(jobs):
    """Results of functions that run at once, four at a time and switching often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            return [future.result() for future in [pool.submit(job) for job in jobs]]
    finally:
        sys.setswitchinterval(interval)


def generate(model, number: int, attached: bool = False, **settings):
    """A call of its own length, seed and steering; the steering is the call's, or attached for it."""
    steering = STEERINGS[number % len(STEERINGS)]
    settings = {"max_new_tokens": 9 + number % 3, "do_sample": bool(number % 2), "seed": number, **settings}
    prompt = make_prompt(5 + number % 4)
    if not attached or steering is None:
        return model.generate(prompt, steering=steering, **settings)
    with model.steer(*(steering if isinstance(steering, tuple) else (steering,))):
        return model.generate(prompt, **settings)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.5}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("attached", [False, True])
def test_calls_in_threads_are_what_they_are_alone(model, attached, settings):
    numbers = range(2 * len(STEERINGS))
    alone = [generate(model, number, attached, **settings) for number in numbers]
    jobs = [lambda number=number: generate(model, number, attached, **settings) for number in numbers]
    for ours, expected in zip(together(jobs), alone):
        assert torch.equal(ours, expected)
    assert hooks_of(model) == {}


def test_attributions_and_reports_of_threads_are_their_own(model):
    def run(number):
        output = generate(model, number, return_dict_in_generate=True, output_attributions=True)
        return output.attributions.known_contributions, list(output.steering or [])

    alone = [run(number) for number in range(len(STEERINGS))]
    for (ours, report), (expected, other) in zip(
        together([lambda number=number: run(number) for number in range(len(STEERINGS))]), alone
    ):
        assert torch.equal(ours, expected)
        assert report == other


def test_forward_passes_in_threads_are_what_they_are_alone(model):
    def run(steering):
        operations = steering if isinstance(steering, tuple) else (steering,)
        with torch.no_grad(), nullcontext() if steering is None else model.steer(*operations):
            return model(ROWS, output_concepts=True).logits

    alone = [run(steering) for steering in STEERINGS]
    for ours, expected in zip(together([lambda one=one: run(one) for one in STEERINGS * 2]), alone * 2):
        assert torch.equal(ours, expected)
    assert hooks_of(model) == {}


def test_input_attributions_of_threads_are_their_own(model):
    """A model that trains is in evaluation mode, and its weights want no gradients, until the last of them is done."""
    pytest.importorskip("captum")

    def run(number):
        output = generate(model, number, return_dict_in_generate=True)
        return attribute_inputs(model, output.traces[0], [output.sequences.shape[1] - 2], n_steps=4).scores

    model.train()
    alone = [run(number) for number in range(6)]
    for ours, expected in zip(together([lambda number=number: run(number) for number in range(6)]), alone):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    model.eval()


def test_what_one_thread_attaches_acts_in_no_other_which_is_told(model, monkeypatch):
    told = []
    monkeypatch.setattr(steered_steerling.logger, "warning_once", told.append)
    plain, handle = generate(model, 0), model.add_steering(Inject(3, 30.0))
    (other,) = together([lambda: generate(model, 0)])
    assert torch.equal(other, plain)
    assert "in another thread or context" in told[0]
    assert "generate(steering=...)" in told[0]
    assert not torch.equal(generate(model, 0), plain)
    assert together([lambda: model.attached_operations]) == [()]
    handle.remove()
    assert hooks_of(model) == {}


def test_a_handle_may_be_removed_from_another_thread(model):
    plain, handle = generate(model, 0), model.add_steering(Inject(3, 30.0))
    together([handle.remove])
    assert torch.equal(generate(model, 0), plain)
    assert hooks_of(model) == {}


def test_tasks_are_steered_by_their_own_blocks(model):
    """Blocks of two tasks overlap; what runs in a copy of a task's context belongs to it, in whatever thread."""
    alone = [generate(model, number, attached=True, seed=0) for number in (1, 3)]

    async def run(number):
        with model.steer(STEERINGS[number]):
            await asyncio.sleep(0.01)
            prompt = make_prompt(5 + number % 4)
            settings = {"max_new_tokens": 9 + number % 3, "do_sample": bool(number % 2), "seed": 0}
            elsewhere = await asyncio.to_thread(model.generate, prompt, **settings)
            await asyncio.sleep(0.01)
            return elsewhere, model.generate(prompt, **settings)

    async def both():
        return await asyncio.gather(run(1), run(3))

    for results, expected in zip(asyncio.run(both()), alone):
        for text in results:
            assert torch.equal(text, expected)
    assert hooks_of(model) == {}


def test_a_copy_made_while_others_steer_has_none_of_their_hooks(model):
    started, done, copies = threading.Event(), threading.Event(), []

    def hold(_rows, scores):
        started.set()
        done.wait(20)
        return scores

    call = {"max_new_tokens": 1, "steering": tuple(STEERINGS[1:4]), "logits_processor": [hold]}
    thread = threading.Thread(target=model.generate, args=[make_prompt(5)], kwargs=call)
    thread.start()
    try:
        assert started.wait(20)
        copies.append(copy.deepcopy(model))
        assert hooks_of(model) != {}
    finally:
        done.set()
        thread.join()
    assert hooks_of(copies[0]) == {}
    assert torch.equal(generate(copies[0], 3), generate(model, 3))
