"""The training objective, against brute force and against plain forward passes."""

import itertools
import math
from collections import Counter

import pytest
import torch
from steerling_hf.modeling import loss_steerling as objective

SIZE = 16


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(8000, (3, 50), generator=torch.Generator().manual_seed(1))


def test_noise_is_a_uniform_subset_of_uniform_size():
    targets = torch.tensor([True, False, True, True]).repeat(60000, 1)
    noise = objective.draw_noise(targets, 4, torch.Generator().manual_seed(0))
    counts = Counter(map(tuple, noise[:, [0, 2, 3]].long().tolist()))
    assert not noise[:, 1].any()
    for subset in itertools.product((0, 1), repeat=3):
        size = sum(subset)
        expected = 0 if size == 0 else 60000 / 3 / math.comb(3, size)
        assert counts[subset] == pytest.approx(expected, rel=0.05)


def test_each_block_has_noise_of_its_own():
    targets = torch.ones(200, 10, dtype=torch.bool)
    targets[:, 4:8] = False
    noise = objective.draw_noise(targets, 4)
    assert noise[:, :4].any(-1).all()
    assert noise[:, 8:].any(-1).all()
    assert not noise[:, 4:8].any()


def test_the_loss_is_the_mean_over_all_decoding_orders(tiny_model):
    """The expectation over the noise equals the mean autoregressive loss over all orders, which bounds the likelihood."""
    model = tiny_model(interpretable=False, diff_block_size=4)
    clean = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])  # a whole block, then three positions
    labels = clean.clone()
    labels[:, :4] = objective.IGNORE_INDEX
    with torch.no_grad():
        expected = []
        for order in itertools.permutations(range(4, 7)):
            state = clean.clone()
            state[:, 4:] = model.config.mask_token_id
            for position in order:
                logits = model(state).logits[0, position]
                expected.append(-logits.log_softmax(-1)[clean[0, position]])
                state[0, position] = clean[0, position]
        losses = []
        for size in (1, 2, 3):
            subsets = list(itertools.combinations(range(4, 7), size))
            of_size = []
            for subset in subsets:
                noise = torch.zeros_like(clean, dtype=torch.bool)
                noise[0, list(subset)] = True
                of_size.append(model(clean, labels=labels, noise_mask=noise).loss)
            losses.append(torch.stack(of_size).mean())
    # each order has three terms; the loss is per target token
    torch.testing.assert_close(torch.stack(losses).mean(), torch.stack(expected).mean())


@pytest.mark.parametrize("straddles", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_pass_equals_a_pass_for_each_block(straddles, attention, tiny_model, ids):
    model = tiny_model(diff_block_size=SIZE)
    model.set_attn_implementation(attention)
    noisy_context = torch.tensor([[0, 1, 0, 1]] * 3).bool() if straddles else torch.zeros(3, 4, dtype=torch.bool)
    torch.manual_seed(0)
    batch = objective.noise_batch(model.config, ids, ids, noisy_context=noisy_context)
    with torch.no_grad():
        states = objective.encode(model.transformer, model.config, batch).last_hidden_state
        for block in range(4):
            start, end = block * SIZE, min(50, (block + 1) * SIZE)
            noised_from = start - SIZE if straddles and block % 2 else start
            row = torch.cat((ids[:, :noised_from], batch.noised[:, noised_from:end]), dim=1)
            alone = model.transformer(row).last_hidden_state[:, start:]
            torch.testing.assert_close(states[:, start:end], alone, rtol=1e-4, atol=1e-5)


def test_rows_without_masks_are_noised_beside_rows_with_some(tiny_model, ids):
    config = tiny_model(diff_block_size=SIZE).config
    given = ids.clone()
    given[0, 3:9] = config.mask_token_id
    batch = objective.noise_batch(config, given, ids)
    assert (batch.noised[0] == config.mask_token_id).nonzero()[:, 0].tolist() == list(range(3, 9))
    assert (batch.noised[1:] == config.mask_token_id).any(dim=1).all()
    torch.manual_seed(0)
    drawn = objective.noise_batch(config, ids, ids)
    torch.manual_seed(0)
    assert torch.equal(objective.noise_batch(config, given, ids).noised[1:], drawn.noised[1:])


def test_masks_in_the_input_are_the_noise(tiny_model, ids):
    model = tiny_model(diff_block_size=SIZE)
    noise = ids % 3 == 0
    explicit = model(ids, labels=ids, noise_mask=noise).loss
    assert torch.equal(model(ids.masked_fill(noise, model.config.mask_token_id), labels=ids).loss, explicit)
    torch.manual_seed(0)
    drawn = model(ids, labels=ids).loss
    torch.manual_seed(0)
    assert torch.equal(model(ids, labels=ids).loss, drawn)
    assert not torch.equal(drawn, explicit)


def test_masks_without_labels_stay_masks_for_later_blocks(tiny_model, ids):
    model = tiny_model(diff_block_size=SIZE, interpretable=False)
    labels = ids.clone()
    labels[:, :SIZE] = objective.IGNORE_INDEX
    noise = torch.zeros_like(ids, dtype=torch.bool)
    noise[:, 20] = True
    hidden = ids.clone()
    hidden[:, 3] = model.config.mask_token_id
    loss = model(hidden, labels=labels, noise_mask=noise).loss
    other = hidden.clone()
    other[:, 3] = 17
    assert not torch.equal(model(other, labels=labels, noise_mask=noise).loss, loss)


def test_right_padding_changes_nothing(tiny_model, ids):
    model = tiny_model(diff_block_size=SIZE)
    noise = ids % 2 == 0
    concepts = torch.randint(20, (3, 50, 1))
    expected = model(ids[:1, :40], labels=ids[:1, :40], noise_mask=noise[:1, :40], concept_labels=concepts[:1, :40])
    mask = torch.ones_like(ids[:1])
    mask[:, 40:] = 0
    labels = ids[:1].masked_fill(mask == 0, objective.IGNORE_INDEX)
    padded = model(
        ids[:1], labels=labels, attention_mask=mask, noise_mask=noise[:1] & mask.bool(), concept_labels=concepts[:1]
    )
    torch.testing.assert_close(padded.loss, expected.loss)
    torch.testing.assert_close(padded.diffusion_loss, expected.diffusion_loss)


def test_the_annotation_loss_is_binary_cross_entropy(tiny_model, monkeypatch):
    head = tiny_model().known_head
    states = torch.randn(9, 32)
    concepts = torch.tensor([[1, 5, -100], [0, -100, -100], [19, 3, 7]] * 3)
    truth = torch.zeros(9, 20)
    for row, true in enumerate(concepts.tolist()):
        truth[row, [c for c in true if c >= 0]] = 1.0
    weights = torch.rand(9)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(head.logits(states), truth, reduction="none")
    expected = (entropy.sum(-1) * weights).sum()
    torch.testing.assert_close(objective.annotation_loss(head, states, concepts, weights), expected)
    monkeypatch.setattr(objective, "SCORE_BUDGET", 40)  # pieces of two rows
    table = head.concept_predictor.weight
    (whole,) = torch.autograd.grad(expected, table)
    (pieces,) = torch.autograd.grad(objective.annotation_loss(head, states, concepts, weights), table)
    torch.testing.assert_close(pieces, whole)


def test_concept_losses_by_hand(tiny_model):
    model = tiny_model(known_reconstruction_loss_coef=0.7, reconstruction_loss_coef=0.2, known_loss_coef=0.3)
    states, weights = torch.randn(2, 5, 32, requires_grad=True), torch.rand(2, 5) + 0.1
    concepts = torch.full((2, 5, 1), objective.IGNORE_INDEX)
    concepts[0, 1] = 3

    def missing(target, features):
        return (target - features).square().sum(-1) / target.square().sum(-1)

    known = model.known_head(states).features
    both = known + model.unknown_head(states).features
    # What the known head cannot explain of a state must not shape the state.
    expected = (weights * (0.7 * missing(states.detach(), known) + 0.2 * missing(states, both))).sum()
    annotated = states[0, 1:2], concepts[0, 1:2], weights[0, 1:2]
    expected = expected + 0.3 * objective.annotation_loss(model.known_head, *annotated)
    found = objective.concept_loss(model.config, model.known_head, model.unknown_head, states, weights, concepts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, states), torch.autograd.grad(expected, states))


def test_positions_without_annotation_have_no_concept_loss(tiny_model, ids):
    model = tiny_model(known_reconstruction_loss_coef=0.0, reconstruction_loss_coef=0.0, known_loss_coef=1.0)
    noise = ids % 2 == 0
    concepts = torch.full((3, 50, 2), objective.IGNORE_INDEX)
    plain = model(ids, labels=ids, noise_mask=noise)
    none = model(ids, labels=ids, noise_mask=noise, concept_labels=concepts)
    assert none.loss == plain.loss == plain.diffusion_loss
    concepts[0, 0, 0] = 4
    assert model(ids, labels=ids, noise_mask=noise, concept_labels=concepts).loss > plain.loss


def test_prompts_are_annotated_and_a_row_weighs_what_its_targets_do(tiny_model, ids):
    model = tiny_model(known_reconstruction_loss_coef=0.0, reconstruction_loss_coef=0.0, known_loss_coef=1.0)
    labels = ids.clone()
    labels[:, :40] = objective.IGNORE_INDEX
    batch = objective.noise_batch(model.config, ids, labels, noise_mask=labels > 0)
    torch.testing.assert_close(batch.concept_weights(), torch.full((3, 50), 10 / 50))
    concepts = torch.full((3, 50, 2), objective.IGNORE_INDEX)
    concepts[:, :40, 0] = 4
    output = model(ids, labels=labels, noise_mask=labels > 0, concept_labels=concepts)
    assert output.loss > output.diffusion_loss


def test_concept_losses_reach_both_heads_and_the_backbone(tiny_model, ids):
    model = tiny_model()
    model(ids, labels=ids, concept_labels=(ids % 20)[..., None]).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_short_training_run_learns(tiny_model):
    model = tiny_model(diff_block_size=SIZE).train()
    ids = torch.arange(40).repeat(4, 1) + 100
    concepts = (ids // SIZE % 20)[..., None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = model(ids, labels=ids, concept_labels=concepts)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


BAD = {
    "mask token in labels": (lambda a: a["labels"].__setitem__((0, 3), 8196), "`labels` hold the mask token 8196"),
    "label too large": (lambda a: a["labels"].__setitem__((0, 3), 8200), "`labels` hold ids outside"),
    "label negative": (lambda a: a["labels"].__setitem__((0, 3), -5), "`labels` hold ids outside"),
    "label for the next token": (
        lambda a: a.update(shift_labels=a["labels"]),
        "`shift_labels` are labels for the next",
    ),
    "labels of other shape": (lambda a: a.update(labels=a["labels"][:, :9]), "`labels` has shape"),
    "noise of other shape": (lambda a: a.update(noise_mask=a["labels"][:1] > 0), "`noise_mask` has shape"),
    "context of other shape": (lambda a: a.update(noisy_context=a["labels"] > 0), "`noisy_context` has shape"),
    "left padding": (lambda a: a["attention_mask"].__setitem__((0, 0), 0), "`attention_mask` shows left padding"),
    "no ids": (lambda a: a.update(input_ids=None), "`input_ids` is None"),
    "unknown concept": (lambda a: a["concept_labels"].__setitem__((0, 0, 0), 20), "`concept_labels` hold 20"),
    "concept twice": (
        lambda a: a.update(concept_labels=torch.tensor([7, -100, 7]).expand(*a["labels"].shape, 3)),
        "`concept_labels` name 7 twice",
    ),
    "flat concepts": (lambda a: a.update(concept_labels=a["concept_labels"][..., 0]), "`concept_labels` have shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_are_told(case, tiny_model, ids):
    arguments = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    arguments["concept_labels"] = ids[..., None] % 20
    spoil, message = BAD[case]
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", torch.zeros(3, 50), "`labels` is torch.float32"),
        ("labels", [[1] * 50] * 3, "`labels` is a list"),
        ("noise_mask", "x", "`noise_mask` is a str"),
        ("noisy_context", True, "`noisy_context` is a bool"),
        ("attention_mask", [1], "`attention_mask` is a list"),
        ("position_ids", torch.zeros(1, 50), "`position_ids` is torch.float32"),
    ],
)
def test_arguments_of_the_wrong_type_are_told(name, value, message, tiny_model, ids):
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids, **{"labels": ids, name: value})


@pytest.mark.parametrize("options", [{}, {"use_epsilon_correction": False}, {"interpretable": False}])
def test_a_batch_without_targets_has_the_loss_zero_and_no_gradient(options, tiny_model, ids):
    model = tiny_model(**options)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_row_without_targets_adds_nothing(tiny_model, ids):
    model, noise = tiny_model(), ids % 2 == 0
    labels = ids.masked_fill(torch.tensor([[False], [True], [False]]), -100)
    both = model(ids, labels=labels, noise_mask=noise).loss
    torch.testing.assert_close(model(ids[::2], labels=ids[::2], noise_mask=noise[::2]).loss, both)


def test_hidden_states_of_a_loss_are_those_of_the_row(tiny_model, ids):
    model = tiny_model(diff_block_size=SIZE)
    noise = torch.zeros_like(ids, dtype=torch.bool)
    noise[:, 48:] = True  # the last block, which sees clean blocks only
    states = model(ids, labels=ids, noise_mask=noise, output_hidden_states=True).hidden_states
    expected = model(ids.masked_fill(noise, model.config.mask_token_id), output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for found, alone in zip(states, expected):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_a_bare_backbone_has_no_concepts_to_learn(tiny_model, ids):
    with pytest.raises(ValueError, match="interpretable=False"):
        tiny_model(interpretable=False)(ids, labels=ids, concept_labels=ids[..., None] % 20)
