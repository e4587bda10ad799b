"""Positions and tokens that tie but for rounding: decided by place, the same alone and in any batch."""

import pytest
import torch
from generation_model import BLOCK, MASK, PAD, VOCABULARY, make_model, make_prompt
from steerling_hf.modeling.unmasking_steerling import (
    ConfidenceRule,
    EntropyBoundRule,
    EntropyRule,
    FactorRule,
    MarginRule,
    ThresholdRule,
    most_probable,
)

from steerling_hf import Imitate

RULES = [
    ConfidenceRule(),
    MarginRule(),
    EntropyRule(),
    ThresholdRule(0.3),
    FactorRule(1.0),
    EntropyBoundRule(2.0),
]


def rounded(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Logits as another order of summation might give them."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return logits + 4 * torch.finfo(torch.float32).eps * logits.abs() * noise


def three_kinds() -> torch.Tensor:
    """(12, V) logits of positions of three kinds, in turn."""
    kinds = 5 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return kinds.repeat(4, 1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_rounding_decides_nothing(rule, count):
    logits = three_kinds()
    expected = rule(logits, count).tolist()
    for seed in range(50):
        assert rule(rounded(logits, seed), count).tolist() == expected


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: type(rule).__name__)
def test_equals_come_from_left_to_right_behind_what_is_better(rule):
    order = rule(three_kinds(), 12).tolist()
    groups = [order[:4], order[4:8], order[8:]]
    assert groups == [sorted(group) for group in groups]
    assert [len({place % 3 for place in group}) for group in groups] == [1, 1, 1]


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("top", [3.0, 8.0])
def test_small_real_differences_count(rule, top):
    """Also among confidences near 1: what a logit more by 0.01 would change is no rounding."""
    logits = torch.zeros(4, VOCABULARY)
    logits[:, 3] = torch.tensor([0.0, 2e-2, 3e-2, 1e-2]) + top
    assert rule(logits, 4).tolist() == [2, 1, 3, 0]


def test_tokens_that_tie():
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[:, [7, 40, 80]] = 20.0
    logits[:, 60] = 20.0 - 1e-3
    for seed in range(50):
        assert most_probable(rounded(logits, seed)).tolist() == [7] * 5
    logits[:, 60] = 20.001
    assert most_probable(logits).tolist() == [60] * 5


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy", "threshold"])
@pytest.mark.parametrize("steps", [None, 4])
def test_rows_of_masks_alone_equal_their_single_runs(unmasking, steps):
    model = make_model()
    prompts = torch.full((5, 2 * BLOCK), MASK)
    settings = {"max_new_tokens": BLOCK, "unmasking": unmasking, "steps": steps, "return_dict_in_generate": True}
    alone = model.generate(prompts[:1], **settings)
    together = model.generate(prompts, **settings)
    # A row among others that need other windows, so that products of other shapes are computed.
    mixed = torch.cat([prompts[:1], make_prompt(2 * BLOCK, rows=4)])
    for output in (together, model.generate(mixed, **settings)):
        assert torch.equal(output.sequences[0], alone.sequences[0])
        assert torch.equal(output.step_map[0], alone.step_map[0])


def test_rows_in_which_steering_makes_all_positions_alike():
    model = make_model(
        use_unknown=False,
        n_unknown_concepts=None,
        block_size=96,
        diff_block_size=32,
        topk_known=None,
        topk_known_features=None,
    )
    operation = Imitate((31, 14, 73, 31, 29, 18), pooled=True, top_n=1)
    for seed in range(5):
        prompts = torch.randint(0, PAD, (4, 7), generator=torch.Generator().manual_seed(seed))
        together = model.generate(prompts, max_new_tokens=6, steering=operation)
        for row in range(4):
            alone = model.generate(prompts[row : row + 1], max_new_tokens=6, steering=operation)
            assert torch.equal(alone[0], together[row])
