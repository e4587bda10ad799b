"""Measures of belief: scores that name the cause beat random ones and wrong ones, and ablation falls as predicted."""

import math

import pytest
import torch
from generation_model import BLOCK, MASK, make_model, make_prompt

from steerling_hf.belief import Belief, ablate_concepts, measure_belief
from steerling_hf.input_attribution import InputAttributions


@pytest.fixture(scope="module")
def written():
    model = make_model()
    output = model.generate(
        make_prompt(11), max_new_tokens=8, return_dict_in_generate=True, output_attributions=True, do_sample=False
    )
    return model, output


@pytest.fixture(scope="module")
def decision(written):
    """A model, a trace of it, and a position whose decision is looked at."""
    model, output = written
    trace = output.traces[0]
    return model, trace, trace.decided.tolist()[3]


def seen_from(trace, position) -> torch.Tensor:
    """The tokens that were visible when the one at a position was decided, to the end of its attention block."""
    return trace.before(position).tokens[: (position // BLOCK + 1) * BLOCK]


def inputs_of(trace, position) -> list[int]:
    """Where these are not masked."""
    return (seen_from(trace, position) != MASK).nonzero()[:, 0].tolist()


def fall(model, trace, position, places) -> float:
    """How much masking the tokens at some places lowers the probability of the one at a position."""
    seen = seen_from(trace, position)
    rows = torch.stack([seen, seen.index_fill(0, torch.tensor(places), MASK)])
    before, after = model(rows).logits[:, position].softmax(-1)[:, trace.tokens[position]].tolist()
    return before - after


def by_effect(model, trace, positions) -> torch.Tensor:
    """(N, T) how much masking each token alone lowers the probability of each target."""
    scores = torch.zeros(len(positions), len(trace.tokens))
    for target, position in enumerate(positions):
        for place in inputs_of(trace, position):
            scores[target, place] = fall(model, trace, position, [place])
    return scores


def with_scores(trace, positions, scores) -> InputAttributions:
    zeros = torch.zeros(len(positions))
    return InputAttributions(torch.tensor(positions), scores, zeros, zeros, trace.prompt_length)


@torch.no_grad()
def test_true_scores_beat_random_and_reversed_ones(written):
    model, output = written
    trace = output.traces[0]
    positions = trace.decided.tolist()
    scores = by_effect(model, trace, positions)
    true = measure_belief(model, trace, with_scores(trace, positions, scores), fractions=(0.2,))
    wrong = measure_belief(model, trace, with_scores(trace, positions, -scores), fractions=(0.2,))
    assert true.comprehensiveness > true.random_comprehensiveness > wrong.comprehensiveness
    assert true.soft_comprehensiveness > wrong.soft_comprehensiveness
    assert true.random_comprehensiveness == pytest.approx(wrong.random_comprehensiveness, abs=0.1)


@torch.no_grad()
def test_numbers_by_hand(decision):
    model, trace, position = decision
    scores = torch.zeros(1, len(trace.tokens))
    scores[0, 4] = 1.0
    others = [place for place in inputs_of(trace, position) if place != 4]
    found = measure_belief(model, trace, with_scores(trace, [position], scores), fractions=(0.01,))
    assert found.comprehensiveness == pytest.approx(fall(model, trace, position, [4]), abs=1e-5)
    assert found.sufficiency == pytest.approx(fall(model, trace, position, others), abs=1e-5)
    # Certain to be dropped and certain to stay: the soft measures of such scores are the hard ones.
    assert found.soft_comprehensiveness == pytest.approx(found.comprehensiveness, abs=1e-5)
    assert found.soft_sufficiency == pytest.approx(found.sufficiency, abs=1e-5)


@pytest.mark.parametrize("fractions", [(0.2,), (0.5,), (0.2, 0.5)], ids=str)
@torch.no_grad()
def test_fractions_say_how_many_inputs_are_masked(decision, fractions):
    model, trace, position = decision
    inputs = inputs_of(trace, position)
    scores = torch.zeros(1, len(trace.tokens))
    scores[0, inputs] = torch.arange(float(len(inputs)), 0, -1)
    counts = [round(fraction * len(inputs)) for fraction in fractions]
    assert min(counts) > 1
    without = [fall(model, trace, position, inputs[:count]) for count in counts]
    only = [fall(model, trace, position, inputs[count:]) for count in counts]
    found = measure_belief(model, trace, with_scores(trace, [position], scores), fractions=fractions)
    assert found.comprehensiveness == pytest.approx(sum(without) / len(counts), abs=1e-5)
    assert found.sufficiency == pytest.approx(sum(only) / len(counts), abs=1e-5)


@torch.no_grad()
def test_to_mask_all_inputs_or_none_is_the_same_in_any_order(decision):
    model, trace, position = decision
    scores = torch.rand(1, len(trace.tokens), generator=torch.Generator().manual_seed(0))
    found = measure_belief(model, trace, with_scores(trace, [position], scores), fractions=(0.99,))
    everything = fall(model, trace, position, inputs_of(trace, position))
    assert [found.comprehensiveness, found.random_comprehensiveness] == pytest.approx([everything] * 2, abs=1e-5)
    assert [found.sufficiency, found.random_sufficiency] == pytest.approx([0, 0], abs=1e-5)


@torch.no_grad()
def test_soft_measures_go_by_the_share_of_the_largest_score_and_nothing_against_the_token(decision):
    model, trace, position = decision
    scores = torch.zeros(1, len(trace.tokens))
    scores[0, [4, 6]] = 2.0
    scores[0, 3] = -2.0
    others = [place for place in inputs_of(trace, position) if place not in (4, 6)]
    found = measure_belief(model, trace, with_scores(trace, [position], scores), draws=1)
    assert found.soft_comprehensiveness == pytest.approx(fall(model, trace, position, [4, 6]), abs=1e-5)
    assert found.soft_sufficiency == pytest.approx(fall(model, trace, position, others), abs=1e-5)


def test_the_same_seed_gives_the_same_numbers(written):
    model, output = written
    trace = output.traces[0]
    scores = torch.rand(2, len(trace.tokens), generator=torch.Generator().manual_seed(0))
    attributions = with_scores(trace, trace.decided.tolist()[:2], scores)
    first, again, other = (measure_belief(model, trace, attributions, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(math.isfinite(getattr(first, name)) for name in Belief.__dataclass_fields__)


def test_ablation_lowers_the_logit_by_the_contribution(written):
    model, output = written
    trace, attributions = output.traces[0], output.attributions
    positions = trace.decided.tolist()
    known = attributions.known_indices[0, positions, 0]
    unknown = attributions.unknown_indices[0, positions, 0] + model.config.n_concepts
    for concepts, name in ((known, "known"), (unknown, "unknown")):
        before, after = ablate_concepts(model, trace, positions, concepts.tolist())
        contributions = attributions[f"{name}_contributions"][0, positions, 0]
        assert contributions.abs().min() > 1e-4
        assert torch.allclose(before, attributions.logits[0, positions], atol=1e-4)
        assert torch.allclose(before - after, contributions, atol=1e-4)


def test_bad_arguments(written):
    model, output = written
    trace = output.traces[0]
    attributions = with_scores(trace, trace.decided.tolist()[:1], torch.zeros(1, len(trace.tokens)))
    with pytest.raises(ValueError, match=r"`fractions` is \[1.5\]"):
        measure_belief(model, trace, attributions, fractions=[1.5])
    with pytest.raises(ValueError, match=r"`attributions` has no target"):
        measure_belief(model, trace, with_scores(trace, [], torch.zeros(0, len(trace.tokens))))
    with pytest.raises(ValueError, match=r"`concepts` has 2 entries for 1"):
        ablate_concepts(model, trace, trace.decided.tolist()[:1], [1, 2])
