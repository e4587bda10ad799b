"""Steered forward passes, outside generate: which positions are reached, gradients, and what reports say."""

import pytest
import torch
from generation_model import MASK, PAD, make_model, make_prompt
from steering_cases import OPERATIONS
from steerling_hf.modeling.lookup_steerling import project
from steerling_hf.modeling.steering_steerling import Condition, Imitate, Inject, SetConcepts, SuppressTokens
from transformers import DynamicCache

# A row with masks inside and at the end, and one without any.
ROWS = torch.cat([make_prompt(16), make_prompt(17)[:, :16]])
ROWS[0, [3, 11, 12, 13, 14, 15]] = MASK
MASKED = ROWS == MASK
CLEAN = {"clean_rows": True}


@pytest.fixture
def model():
    return make_model(topk_known=4, topk_known_features=4, unknown_topk=6)


def logits_of(model, *operations, ids=ROWS, **inputs):
    with torch.no_grad(), model.steer(*operations):
        return model(ids, **inputs).logits


def differs(ours, other) -> torch.Tensor:
    """(B, T), where logits are not the very same."""
    return (ours != other).any(dim=-1)


def seen_from(places: torch.Tensor) -> torch.Tensor:
    """(B, T) bool of positions that see one of (B, T) places, which share their attention block or lie in an earlier one."""
    blocks = places.unflatten(1, (-1, 8)).any(-1)
    return (blocks.cumsum(1) > 0).repeat_interleave(8, dim=1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_masked_positions_of_noised_rows_are_reached(model, name):
    changed = differs(logits_of(model, OPERATIONS[name]), logits_of(model))
    assert changed[0].any()
    assert not changed[1].any()
    # Injections reach what attention shows them to; all else stays where it is.
    in_the_stream = "inject" in name or name in ("amplify", "suppress")
    assert not (changed & ~(seen_from(MASKED) if in_the_stream else MASKED)).any()


@pytest.mark.parametrize(
    "operation",
    [
        Inject(3, 30.0, **CLEAN),
        SuppressTokens(3, **CLEAN),
        SetConcepts((2, 25), 1.0, **CLEAN),
        Imitate((5, 6), pooled=True, **CLEAN),
    ],
    ids=lambda operation: operation.name,
)
def test_clean_rows_are_reached_on_request(model, operation):
    changed = differs(logits_of(model, operation), logits_of(model))
    assert changed[1].all()
    assert changed[0, MASKED[0]].all()
    if not isinstance(operation, Inject):
        assert not changed[0, ~MASKED[0]].any()


def test_windows_count_from_the_first_mask_and_in_clean_rows_from_the_start(model):
    window = SuppressTokens(3, window=(8, 10), clean_rows=True)
    changed = differs(logits_of(model, window), logits_of(model))
    assert changed[0].nonzero()[:, 0].tolist() == [11, 12]
    assert changed[1].nonzero()[:, 0].tolist() == [8, 9]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_padding_changes_nothing(model, name, side):
    padding = (5, 0) if side == "left" else (0, 5)
    ids = torch.nn.functional.pad(ROWS, padding, value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(ROWS), padding)
    padded = logits_of(model, OPERATIONS[name], ids=ids, attention_mask=mask)[mask.bool()].view(2, 16, -1)
    torch.testing.assert_close(padded, logits_of(model, OPERATIONS[name]), rtol=1e-4, atol=1e-4)


def test_masks_that_are_padding_are_not_reached(model):
    ids = torch.nn.functional.pad(ROWS, (0, 4), value=MASK)
    mask = torch.nn.functional.pad(torch.ones_like(ROWS), (0, 4))
    with torch.no_grad(), model.steer(Inject(3, 30.0), SuppressTokens(3)) as handle:
        model(ids, attention_mask=mask)
    assert max(touch.position for touch in handle.report) == 15
    assert {touch.row for touch in handle.report} == {0}


def test_padding_of_clean_rows_is_not_reached(model):
    ids = torch.nn.functional.pad(ROWS[1:], (0, 4), value=PAD)
    with torch.no_grad(), model.steer(SuppressTokens(3, **CLEAN)) as handle:
        model(ids, attention_mask=(ids != PAD).long())
    assert [touch.position for touch in handle.report] == list(range(16))


KEPT = [3, 16, torch.tensor([14, 3, 0]), torch.tensor([-1]), torch.arange(15, -1, -1)]


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("output_concepts", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kept_logits_are_those_of_their_positions(model, name, kept, output_concepts):
    whole = logits_of(model, OPERATIONS[name])
    some = logits_of(model, OPERATIONS[name], logits_to_keep=kept, output_concepts=output_concepts)
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_decomposition_shows_what_the_logits_are_made_of(model, name):
    with torch.no_grad(), model.steer(OPERATIONS[name]):
        output = model(ROWS, output_concepts=True)
        plain = model(ROWS).logits
        by_hand = model.compute_logits(model.transformer(ROWS).last_hidden_state)
    torch.testing.assert_close(output.logits, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_hand, plain)
    concepts = output.concepts
    torch.testing.assert_close(
        concepts.composed, concepts.known_features + concepts.unknown_features + concepts.epsilon
    )


def test_states_of_unknown_places_are_left_alone(model):
    """What a user takes out of the hidden states has no positions that steering could know of."""
    with torch.no_grad():
        states = model.transformer(ROWS).last_hidden_state[MASKED]
        plain = model.compute_logits(states)
        with model.steer(SuppressTokens(3), SetConcepts((3, 25), 1.0, keep_epsilon=False)):
            model(ROWS)
            assert torch.equal(model.compute_logits(states), plain)
            model.transformer(ROWS)
            assert torch.equal(model.compute_logits(states), plain)


def test_positions_go_on_behind_a_cache(model):
    window = SuppressTokens(3, window=(2, 5))
    whole = logits_of(model, window, ids=ROWS[:1])
    with torch.no_grad(), model.steer(Inject(3, 0.0, window=(0, 4)), SuppressTokens(3, window=(0, 4))) as handle:
        cache = DynamicCache(config=model.config)
        model(make_prompt(16)[:, :8], cache=cache, use_cache=True)
        model(ROWS[:1, 8:], cache=cache, use_cache=True)
    assert {touch.position for touch in handle.report} == {11, 12, 13, 14}
    with torch.no_grad(), model.steer(window):
        positions = torch.arange(16)[None]
        assert torch.equal(model(ROWS[:1], position_ids=positions).logits, whole)


def test_windows_of_clean_rows_count_on_behind_a_cache(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), model.steer(Inject(3, 30.0, window=(10, 12), **CLEAN)) as handle:
        model(ROWS[1:, :8], cache=cache, use_cache=True)
        model(ROWS[1:, 8:], cache=cache, use_cache=True)
    assert {touch.position for touch in handle.report} == {10, 11}


def test_conditions_need_the_whole_text(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), model.steer(Inject(3, 1.0, condition=Condition(4, 0.1))):
        model(ROWS[:1, :8], cache=cache, use_cache=True)
        with pytest.raises(ValueError, match="`cache` .* under a condition, .* pass all of it, or use generate"):
            model(ROWS[:1, 8:], cache=cache, use_cache=True)


def test_training_and_embedded_inputs_are_refused(model):
    with model.steer(SuppressTokens(3)):
        with pytest.raises(ValueError, match="`labels`"):
            model(ROWS, labels=ROWS)
        with pytest.raises(ValueError, match="`labels`"):
            model(ROWS, None, None, None, None, ROWS)
        with pytest.raises(ValueError, match="`input_ids`.*`inputs_embeds`"):
            model(inputs_embeds=model.transformer.tok_emb(ROWS))
        positional = model(ROWS, torch.ones_like(ROWS), None, None, None, None, None, None, None, None, False, 3)
        assert torch.equal(positional.logits, model(ROWS, logits_to_keep=3).logits)
    labels = make_prompt(16).repeat(2, 1)
    assert torch.isfinite(model(ROWS, labels=labels).loss)
    assert model(inputs_embeds=model.transformer.tok_emb(ROWS)).logits.shape == (2, 16, 96)


# Gradients

BY_GRADIENT = (Inject(3, 4.0), SetConcepts((2, 25), 1.5, mode="add"), Imitate((5, 6), strength=0.5), SuppressTokens(4))
MODULES = ("transformer.blocks.0.mlp.c_fc", "transformer.tok_emb", "known_head.concept_embedding")


def loss_of(model):
    return model(ROWS).logits[MASKED].log_softmax(-1)[:, 7].sum()


def test_gradients_flow_through_the_hooks(model):
    """A step along the gradient changes the loss by what the gradient says."""
    model.double()
    with model.steer(*BY_GRADIENT):
        loss_of(model).backward()
        for name in MODULES:
            weight = model.get_submodule(name).weight
            direction, saved = weight.grad, weight.detach().clone()
            assert direction.abs().sum() > 0
            length = 1e-4 / direction.norm()  # norms and weights are float32 inside
            with torch.no_grad():
                values = []
                for sign in (1, -1):
                    weight.copy_(saved + sign * length * direction)
                    values.append(loss_of(model))
                weight.copy_(saved)
            slope = (values[0] - values[1]) / (2 * length)
            torch.testing.assert_close(slope, direction.square().sum(), rtol=0.01, atol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # as in any pass without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_the_same(model, reentrant):
    """Blocks are computed again in the backward pass, when the forward passes are over and the handles are gone."""
    gradients = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with model.steer(*BY_GRADIENT):
            loss, other = loss_of(model), model(ROWS[:, :8]).logits[0, 3].sum()
        (loss + other).backward()
        gradients.append([model.get_submodule(name).weight.grad.clone() for name in MODULES])
    for ours, expected in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(ours, expected)


# Reports


def touches_of(model, steering, **settings):
    output = model.generate(
        make_prompt(5), max_new_tokens=6, steering=steering, return_dict_in_generate=True, **settings
    )
    return output, [tuple(touch) for touch in output.steering]


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"cache_implementation": "static"}, {"use_cache": False, "guidance_scale": 1.7}]
)
def test_a_report_has_every_undecided_position_of_every_step(model, settings):
    injection, suppression = Inject(3, -4.0, normalized=False, layers=(1, 2)), SuppressTokens(3, 2.0)
    output, touches = touches_of(model, (injection, suppression, SetConcepts(25, 1.5)), **settings)
    steps = output.step_map[0].tolist()
    undecided = [(step, position) for step in range(6) for position in range(5, 11) if steps[position] >= step]
    row = {"Inject": ["layer 1", "layer 2"], "SuppressTokens": ["lm_head"], "SetConcepts": ["unknown_head"]}
    for operation, layers in row.items():
        for layer in layers:
            own = [touch for touch in touches if touch[:2] == (operation, layer)]
            assert sorted(touch[3:5] for touch in own) == undecided
            assert {touch[2] for touch in own} == {0}
    with torch.no_grad():
        promoted = project(model, model.known_head.embeddings(torch.tensor([3]))).max()
    sizes = {name: {touch[5] for touch in touches if touch[0] == name} for name in row}
    assert sizes["Inject"] == {4.0}
    assert list(sizes["SuppressTokens"]) == pytest.approx([2 * float(promoted)])
    assert min(sizes["SetConcepts"]) > 0
    assert len(output.steering) == len(touches)


def test_a_report_has_the_size_of_each_change(model):
    operation = SetConcepts(25, 1.5, keep_epsilon=False)
    with torch.no_grad():
        plain = model(ROWS, output_concepts=True).concepts
        with model.steer(operation) as handle:
            steered = model(ROWS, output_concepts=True).concepts
    for touch in handle.report:
        before, after = (
            (part.unknown_features if touch.layer == "unknown_head" else part.epsilon) for part in (plain, steered)
        )
        change = (after - before)[touch.row, touch.position].norm()
        assert touch.size == pytest.approx(float(change), rel=1e-4)
    places = [(row, position) for row, position in MASKED.nonzero().tolist()]
    for layer in ("unknown_head", "residual"):
        assert [(t.row, t.position) for t in handle.report if t.layer == layer] == places
    assert {touch.step for touch in handle.report} == {0}


def test_reports_tell_rows_and_calls_apart(model):
    prompts = make_prompt(5, rows=3)
    plain = model.generate(prompts, max_new_tokens=4, return_dict_in_generate=True)
    assert plain.steering is None
    with model.steer(SuppressTokens(3)) as handle:
        settings = {"max_new_tokens": 4, "return_dict_in_generate": True}
        output = model.generate(prompts, steering=[None, SetConcepts(3, 1.0), None], **settings)
        assert {touch.operation for touch in output.steering} == {"SetConcepts"}
        assert {touch.row for touch in output.steering} == {1}
        assert {touch.row for touch in handle.report} == {0, 1, 2}
        assert len(handle.report) == len(list(handle.report)) == 3 * (4 + 3 + 2 + 1)
        assert "30 touches by SuppressTokens" in repr(handle.report)
        assert model.generate(prompts, **settings).steering is None
        assert len(handle.report) == 60
        handle.report.clear()
        assert len(handle.report) == 0
        assert "nothing" in repr(handle.report)
