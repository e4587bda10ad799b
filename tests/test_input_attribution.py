"""Input attribution: integrated gradients by the canvases of a trace."""

import re

import pytest
import torch
from generation_model import BLOCK, MASK, make_model, make_prompt
from steering_cases import hooks_of
from steerling_hf.modeling.steering_steerling import Condition, Inject, SetConcepts
from trace_cases import GUIDED_AND_STEERED, SPARSE, trace_of, write

from steerling_hf import SteerlingForDiffusionLM
from steerling_hf.input_attribution import METHODS, InputAttributions, attribute_inputs
from steerling_hf.replay import Replay, replay, saved_bytes


@pytest.fixture
def model():
    return make_model(seed=0, **SPARSE)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Integrated gradients


def plain_loop(model, trace, position, n_steps, concept=None, first=1) -> torch.Tensor:
    """(T,) scores by a Riemann sum, a right one if its first point is 1, over the whole canvas."""
    canvas, token, table = trace.before(position), trace.tokens[position], model.transformer.tok_emb.weight.detach()
    mask, scale = table[MASK], 1.0 if trace.guidance_scale is None else trace.guidance_scale
    line, gradients = table[canvas.tokens] - mask, 0.0
    for point in range(first, first + n_steps):
        embeddings = (mask + line * point / n_steps).requires_grad_()
        if concept is None:
            blind = torch.where(canvas.given[:, None], mask, embeddings)
            full, masked = (model(inputs_embeds=own[None]).logits[0, position, token] for own in (embeddings, blind))
            target = masked + scale * (full - masked)
        else:
            state = model.transformer(inputs_embeds=embeddings[None]).last_hidden_state[0, position]
            n_known = model.config.n_concepts
            head = model.known_head if concept < n_known else model.unknown_head
            target = head.logits(state)[concept % n_known if concept < n_known else concept - n_known]
        gradients = gradients + torch.autograd.grad(target, embeddings)[0]
    return (line * gradients / n_steps).sum(-1)


def smooth_model():
    """The same without its sharp attention, so that sums come near their integrals."""
    model = make_model(seed=0, **SPARSE)
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.q_norm.weight.div_(6)
    return model


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.7}, {"align_blocks": True}], ids=str)
@pytest.mark.parametrize("n_steps", [1, 5])
@pytest.mark.parametrize(("method", "first"), [("riemann_right", 1), ("riemann_left", 0)])
def test_riemann_sums_equal_a_plain_loop(model, settings, n_steps, method, first):
    trace = trace_of(model, **settings)
    found = attribute_inputs(model, trace, method=method, n_steps=n_steps)
    assert torch.equal(found.positions, trace.decided)
    for position, scores in zip(trace.decided.tolist(), found.scores):
        assert relative(scores, plain_loop(model, trace, position, n_steps, first=first)) < 1e-4


def test_without_epsilon_it_goes_through_the_heads():
    model = make_model(seed=0, use_epsilon_correction=False, **SPARSE)
    trace = trace_of(model)
    found = attribute_inputs(model, trace, [13, 22], method="riemann_right", n_steps=3)
    for position, scores in zip((13, 22), found.scores):
        assert relative(scores, plain_loop(model, trace, position, 3)) < 1e-4


@pytest.mark.parametrize("concept", [3, 19, 20, 45])
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_a_concept_as_the_target(model, concept, guidance):
    trace = trace_of(model, guidance_scale=guidance)
    found = attribute_inputs(model, trace, [13, 22], concept=concept, method="riemann_right", n_steps=3)
    for position, scores, value in zip((13, 22), found.scores, found.values):
        assert relative(scores, plain_loop(model, trace, position, 3, concept)) < 1e-4
        with torch.no_grad():
            state = model.transformer(input_ids=trace.before(position).tokens[None]).last_hidden_state[0, position]
            heads = torch.cat([model.known_head.logits(state), model.unknown_head.logits(state)])
        torch.testing.assert_close(value, heads[concept], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, GUIDED_AND_STEERED], ids=["plain", "guided and steered"])
def test_scores_of_many_points_are_complete(method, settings):
    model = smooth_model()
    output = write(model, make_prompt(11), **settings)
    trace = output.traces[0]
    found = attribute_inputs(model, trace, [11, 22], method=method, n_steps=64)
    recorded = output.attributions.logits[0, found.positions]
    torch.testing.assert_close(found.values, recorded, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.errors, found.scores.sum(-1) - (found.values - found.baselines))
    change = (found.values - found.baselines).abs()
    assert change.min() > 0.5
    worst = {"riemann_right": 0.1, "riemann_left": 0.1}.get(method, 0.01)
    assert (found.errors.abs() / change).max() < worst


@pytest.mark.parametrize("concept", [5, 45])
def test_scores_for_a_concept_are_complete(concept):
    model = smooth_model()
    found = attribute_inputs(model, trace_of(model), concept=concept, n_steps=64)
    assert found.errors.abs().max() < 0.01 * (found.values - found.baselines).abs().max()


def test_the_path_begins_without_any_text(model):
    trace = trace_of(model)
    found = attribute_inputs(model, trace, n_steps=2)
    with torch.no_grad():
        logits = model(torch.full_like(trace.tokens, MASK)[None]).logits[0]
    expected = logits[found.positions, trace.tokens[found.positions]]
    torch.testing.assert_close(found.baselines, expected, atol=1e-4, rtol=1e-5)


def test_only_what_was_there_to_be_seen_has_a_score(model):
    trace = trace_of(model, max_new_tokens=19, steps=12)
    found = attribute_inputs(model, trace, n_steps=4)
    assert found.scores.shape == (19, 30)
    for position, scores in zip(found.positions.tolist(), found.scores):
        canvas = trace.before(position)
        there = (canvas.tokens != MASK) & (torch.arange(30) // BLOCK <= position // BLOCK)
        assert (scores[there] != 0).all()
        assert not scores[~there].any()


def test_adaptive_points_see_a_step_that_even_ones_miss(model, monkeypatch):
    """The target rises by 10, almost all of it on a 25th of the path."""
    trace, mask = trace_of(model), model.transformer.tok_emb.weight[MASK].detach()

    def token_logits(self, targets, embeddings, tokens):
        line = self.embed(self.tokens(targets)) - mask
        share = ((embeddings - mask) * line).sum((1, 2)) / line.square().sum((1, 2))
        return 10 * torch.sigmoid(100 * (share - 0.37))

    monkeypatch.setattr(Replay, "token_logits", token_logits)
    errors = {
        method: float(attribute_inputs(model, trace, [15], method=method, n_steps=12).errors.abs())
        for method in METHODS
    }
    assert errors.pop("adaptive") < 0.5
    assert min(errors.values()) > 2, errors


@pytest.mark.parametrize("positions", [[14], [22, 11], torch.tensor([12, 13])], ids=str)
def test_chosen_positions(model, positions):
    trace = trace_of(model)
    everything, found = attribute_inputs(model, trace, n_steps=4), attribute_inputs(model, trace, positions, n_steps=4)
    assert found.positions.tolist() == list(map(int, positions))
    for number, position in enumerate(found.positions):
        assert relative(found.scores[number], everything.scores[position - 11]) < 1e-4
        torch.testing.assert_close(found.values[number], everything.values[position - 11])


def test_no_positions(model):
    with model.steer(SetConcepts(2, 1.0)):
        found = attribute_inputs(model, trace_of(model), [])
    assert found.positions.shape == found.values.shape == (0,)
    assert found.positions.dtype == torch.long
    assert found.scores.shape == (0, 23)
    assert not found.aggregate().any()


# Shared positions


LONG = {"max_new_tokens": 30, "steps": 30}


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 1.7}, {"align_blocks": True}, {"steering": Inject(3, 30.0)}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_what_targets_have_in_common_is_computed_once(model, settings, method, monkeypatch):
    """And changes nothing."""
    trace = trace_of(model, **LONG, **settings)
    lengths = []
    watch = model.transformer.register_forward_pre_hook(
        lambda _m, _a, given: lengths.append(given["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    together = attribute_inputs(model, trace, n_steps=4, method=method)
    spent = sum(lengths)
    monkeypatch.setattr(Replay, "settled", lambda *_: 0)
    lengths.clear()
    alone = attribute_inputs(model, trace, n_steps=4, method=method)
    watch.remove()
    assert relative(together.scores, alone.scores) < 1e-4
    torch.testing.assert_close(together.values, alone.values, atol=1e-4, rtol=1e-5)
    assert spent < (0.85 if method == "adaptive" else 0.65) * sum(lengths)


def test_backward_passes_one_after_the_other_give_the_same(model, monkeypatch):
    """As on accelerators."""
    trace = trace_of(model, **LONG)
    batched = attribute_inputs(model, trace, n_steps=4)
    monkeypatch.setattr("steerling_hf.shared_prefix.BATCHED_ON", ())
    assert relative(attribute_inputs(model, trace, n_steps=4).scores, batched.scores) < 1e-5


def test_nothing_is_shared_that_depends_on_the_step(model):
    """The second row of a guided pass is steered at its masked prompt, until the cutoff."""
    trace = trace_of(model, **LONG, **GUIDED_AND_STEERED)
    with replay(model, trace, trace.decided.tolist()) as replaying:
        assert [replaying.settled(target) for target in range(30)] == [0] * 30


def test_a_condition_is_weighed_once_for_all_targets(model, monkeypatch):
    trace = trace_of(model, **LONG, steering=Inject(3, 30.0, condition=Condition(4, 0.01)))
    holds, rows = Condition.holds, []

    def watched(self, model, ids, text, positions):
        rows.append(len(ids))
        return holds(self, model, ids, text, positions)

    monkeypatch.setattr(Condition, "holds", watched)
    attribute_inputs(model, trace, n_steps=2)
    assert rows == [1]


def test_a_target_sees_up_to_the_end_of_its_attention_block(model):
    trace = trace_of(model, **LONG)
    with replay(model, trace, [11, 15, 16, 40]) as replaying:
        assert [replaying.visible(target) for target in range(4)] == [16, 16, 24, 41]


# Memory


def test_saved_bytes_counts_each_storage_once():
    values = torch.randn(100, requires_grad=True)
    none = torch.nn.Identity()
    assert saved_bytes(none, lambda x: x.exp(), values) == 400
    assert saved_bytes(none, lambda x: x.exp().exp(), values) == 800
    assert saved_bytes(none, lambda x: (x[:50] * x[50:]).sum(), values) == 400
    assert saved_bytes(none, lambda x: x + 1, values) == 0
    layer = torch.nn.Linear(100, 7).requires_grad_(False)
    assert saved_bytes(none, layer, values) == 7 * 400
    assert saved_bytes(layer, layer, values) == 0


def needed_bytes(model, trace, **arguments) -> int:
    """What a row needs, as the refusal of a tiny budget says."""
    with pytest.raises(ValueError, match=r"`memory_budget` is 1,000 bytes") as error:
        attribute_inputs(model, trace, memory_budget=1000, **arguments)
    return int(re.search(r"needs about ([\d,]+)", str(error.value)).group(1).replace(",", ""))


@pytest.mark.parametrize("method", ["adaptive", "riemann_right"])
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_passes_keep_to_the_budget(model, method, guidance):
    trace = trace_of(model, guidance_scale=guidance)
    expected = attribute_inputs(model, trace, method=method, n_steps=6)
    needed = needed_bytes(model, trace)
    positions = []
    watch = model.transformer.register_forward_pre_hook(
        lambda _m, _a, given: positions.append(given["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    for budget in (1, 3, 7, 14):
        positions.clear()
        found = attribute_inputs(model, trace, method=method, n_steps=6, memory_budget=budget * needed)
        most = budget * len(trace.tokens) * (1 if guidance == 1 else 2)
        assert most / 3 < max(positions) <= most
        assert relative(found.scores, expected.scores) < 1e-4
    watch.remove()


def test_a_wider_canvas_needs_more(model):
    short, long = trace_of(model, max_new_tokens=4), trace_of(model, max_new_tokens=40)
    assert 2 * needed_bytes(model, short) < needed_bytes(model, long)
    assert needed_bytes(model, long, positions=[11]) < needed_bytes(model, long)


# What is left behind


def state(model):
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    return modes, wanted, hooks_of(model), model.attached_operations


@pytest.mark.parametrize("fails", ["not at all", "by its budget", "in a pass", "by a position"])
def test_the_model_is_left_as_it_was(model, fails):
    trace = trace_of(model, steering=SetConcepts((2, 25), 1.0))
    model.train()
    model.known_head.eval()
    model.transformer.tok_emb.weight.requires_grad_(False)
    before = state(model)
    if fails == "not at all":
        attribute_inputs(model, trace, [15], n_steps=2)
    elif fails == "by its budget":
        needed_bytes(model, trace)
    elif fails == "by a position":
        with pytest.raises(ValueError, match="`position` is 3"):
            attribute_inputs(model, trace, [3])
    else:
        watch = model.transformer.ln_f.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            attribute_inputs(model, trace, [15], n_steps=2)
        watch.remove()
    assert state(model) == before
    assert all(weight.grad is None for weight in model.parameters())


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_model_is_in_evaluation_mode_meanwhile(model):
    trace = trace_of(model)
    model.train()
    modes = set()
    model.transformer.ln_f.register_forward_hook(lambda module, _a, _o: modes.add(module.training))
    attribute_inputs(model, trace, [15], n_steps=2)
    assert modes == {False}


# Other places and precisions of weights


def test_half_precision(model):
    whole = needed_bytes(model, trace_of(model))
    model.to(torch.bfloat16)
    # Nothing is kept in float32, least of all the weights.
    assert needed_bytes(model, trace_of(model)) < 0.7 * whole
    for settings in ({}, GUIDED_AND_STEERED):
        output = write(model, make_prompt(11), **settings)
        found = attribute_inputs(model, output.traces[0], n_steps=4)
        assert found.scores.dtype == torch.float32
        assert found.scores.isfinite().all()
        assert found.scores.abs().max() > 0.1
        assert relative(found.values, output.attributions.logits[0, found.positions]) < 0.01


def test_offloaded_weights(tmp_path, library_warnings):
    whole = make_model(seed=0, **SPARSE)
    whole.save_pretrained(tmp_path / "model")
    device_map = {"transformer": "disk", "known_head": "cpu", "unknown_head": "disk", "residual": "cpu"}
    loaded = SteerlingForDiffusionLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    library_warnings.clear()
    for settings in ({}, GUIDED_AND_STEERED):
        for concept in (None, 25):
            expected, found = (
                attribute_inputs(model, trace_of(model, **settings), [15, 20], concept=concept, n_steps=2)
                for model in (whole, loaded)
            )
            assert relative(found.scores, expected.scores) < 1e-4


# Scores of several targets together


def test_aggregates():
    scores = torch.tensor([[1.0, -3.0, 0.0, 0.0], [2.0, 0.0, 6.0, 0.0], [0.0, 1.0, 1.0, -2.0]])
    found = InputAttributions(torch.tensor([1, 2, 3]), scores, torch.zeros(3), torch.zeros(3), prompt_length=2)
    shares = {
        "prompt": [[0.25, -0.75, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]],
        "answer": [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1 / 3, -2 / 3]],
        "all": [[0.25, -0.75, 0, 0], [0.25, 0, 0.75, 0], [0, 0.25, 0.25, -0.5]],
    }
    for scope, rows in shares.items():
        expected = torch.tensor(rows)
        torch.testing.assert_close(found.aggregate(scope=scope), expected.mean(0))
        torch.testing.assert_close(found.aggregate(2, scope=scope), expected[1:].mean(0))
        torch.testing.assert_close(found.aggregate(1, 3, scope), expected[:2].mean(0))
    torch.testing.assert_close(found.aggregate(), torch.tensor(shares["prompt"]).mean(0))
    assert not found.aggregate(0, 1).any()
    with pytest.raises(ValueError, match="`scope` is 'question'"):
        found.aggregate(scope="question")


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": 0}, "`n_steps` is 0"),
        ({"n_steps": 2.5}, "`n_steps` is 2.5"),
        ({"n_steps": 5}, "`n_steps` is 5.*even"),
        ({"method": "simpson"}, "`method` is 'simpson'.*riemann_right"),
        ({"positions": [3]}, "`position` is 3"),
        ({"positions": [15, 99]}, "`position` is 99"),
        ({"concept": 50}, "50.*ids 0 to 19"),
        ({"concept": -1}, "-1.*ids 0 to 19"),
        ({"concept": "topic"}, "`concept` is 'topic'"),
    ],
    ids=str,
)
def test_bad_arguments(model, arguments, message):
    trace = trace_of(model)

    def refuse(*_):
        raise AssertionError("a forward pass came before the error")

    model.transformer.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        attribute_inputs(model, trace, **arguments)


def test_a_concept_of_a_model_without_any():
    model = make_model(seed=0, interpretable=False)
    trace = trace_of(model, output_attributions=False)
    with pytest.raises(ValueError, match="no concept heads"):
        attribute_inputs(model, trace, concept=3)
    found = attribute_inputs(model, trace, [15], method="riemann_right", n_steps=3)
    assert relative(found.scores[0], plain_loop(model, trace, 15, 3)) < 1e-4
