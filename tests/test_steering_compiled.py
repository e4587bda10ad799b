"""Compiled steps see hooks that come and go, users' as well as those of steering."""

import pytest
import torch
from generation_model import make_model, make_prompt
from steerling_hf.modeling.steering_steerling import Inject, SetConcepts, SuppressTokens
from transformers import CompileConfig

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(autouse=True)
def graphs():
    """Counts compilations, from none."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled(model, backend="eager", **settings):
    config = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config, **settings}
    return model.generate(make_prompt(11), max_new_tokens=13, **settings)


def uncompiled(model, **settings):
    return model.generate(make_prompt(11), max_new_tokens=13, use_cache=False, **settings)


def shift(_module, _inputs, output):
    return output + 3 * torch.sin(torch.arange(32.0))


def shift_back(_module, _inputs, output):
    return output - 5 * torch.cos(torch.arange(32.0))


def double(_module, _inputs, output):
    output.features = 2 * output.features
    return output


PLACES = {
    "transformer.blocks.0": shift,
    "transformer.blocks.0.attn.c_proj": lambda _m, _a, output: -5 * output,
    "known_head": double,
    "transformer.lm_head": lambda _m, _a, output: output.roll(1, dims=-1),
    "residual": lambda _m, _a, output: torch.zeros_like(output),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["hooked first", "plain first"])
def test_a_users_hook_is_seen_before_and_after_the_step_was_compiled(model, order, place, backend):
    plain = uncompiled(model)
    if order == "plain first":
        assert torch.equal(compiled(model, backend), plain)
    handle = model.get_submodule(place).register_forward_hook(PLACES[place])
    hooked = uncompiled(model)
    assert not torch.equal(hooked, plain)
    assert torch.equal(compiled(model, backend), hooked)
    handle.remove()
    assert torch.equal(compiled(model, backend), plain)


def test_one_hook_in_the_place_of_another_is_seen(model):
    for hook in (shift, shift_back, shift):
        handle = model.transformer.blocks[0].register_forward_hook(hook)
        assert torch.equal(compiled(model), uncompiled(model))
        handle.remove()


@pytest.mark.parametrize("backend", BACKENDS)
def test_injections_of_a_kind_share_a_compiled_step(model, backend, graphs):
    """Concepts, strengths, windows and rows are data; where there are hooks is not."""
    seen = [uncompiled(model)]
    assert torch.equal(compiled(model, backend), seen[0])
    steerings = [Inject(3, 30.0, cutoff=5), Inject((4, 25), -6.0, normalized=False), [Inject(7, 30.0, window=(3, 9))]]
    for steering in steerings:
        seen.append(uncompiled(model, steering=steering))
        assert torch.equal(compiled(model, backend, steering=steering), seen[-1])
    assert len({str(tokens) for tokens in seen}) == 4
    assert graphs() == 2
    assert torch.equal(
        compiled(model, backend, steering=Inject(3, 30.0, layers=1)),
        uncompiled(model, steering=Inject(3, 30.0, layers=1)),
    )
    assert torch.equal(compiled(model, backend), seen[0])
    assert graphs() <= 3


def test_operations_outside_the_blocks_need_no_step_of_their_own(model, graphs):
    compiled(model)
    for steering in (SuppressTokens(3), SetConcepts((3, 25), 1.0, keep_epsilon=False)):
        assert torch.equal(compiled(model, steering=steering), uncompiled(model, steering=steering))
    assert graphs() == 1


def test_a_steered_model_compiles_too(model):
    plain = compiled(model)
    with model.steer(Inject(3, 30.0)) as handle:
        assert torch.equal(compiled(model), uncompiled(model))
        with model.steer(SuppressTokens(4)):
            assert torch.equal(compiled(model, steering=Inject(25, 9.0)), uncompiled(model, steering=Inject(25, 9.0)))
        assert len(handle.report) > 0
    assert torch.equal(compiled(model), plain)
    assert torch.equal(plain, uncompiled(model))
