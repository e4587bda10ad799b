"""Texts that share a row (`position_ids` start again) are what they are alone: logits, loss, noise and gradients."""

import itertools

import pytest
import torch
from steerling_hf.modeling import loss_steerling as objective
from steerling_hf.modeling.texts_steerling import number_blocks, number_texts
from transformers import DataCollatorWithFlattening, DynamicCache

SIZE = 16
LENGTHS = (37, 1, 16, 20)


@pytest.fixture
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(8000, (1, length), generator=generator) for length in LENGTHS]


def pack(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def positions_of(texts: list[torch.Tensor]) -> torch.Tensor:
    return pack([torch.arange(text.shape[1])[None] for text in texts])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_are_those_of_the_texts_alone(rows, attention, tiny_model, texts):
    model = tiny_model(diff_block_size=SIZE)
    model.set_attn_implementation(attention)
    row = pack(texts).repeat(rows, 1)
    output = model(row, position_ids=positions_of(texts))  # (1, T) for all rows
    for found, text in zip(output.logits.split(LENGTHS, dim=1), texts):
        torch.testing.assert_close(found, model(text).logits.expand(rows, -1, -1), rtol=1e-5, atol=1e-5)
    told = model(row, position_ids=positions_of(texts), attention_mask=torch.ones_like(row)).logits
    torch.testing.assert_close(told, output.logits)


def test_rows_of_a_batch_are_packed_each_in_its_own_way(tiny_model, texts):
    model = tiny_model(diff_block_size=SIZE)
    orders = (texts, texts[::-1])
    both = torch.cat([pack(order) for order in orders])
    logits = model(both, position_ids=torch.cat([positions_of(order) for order in orders])).logits
    for found, order in zip(logits, orders):
        alone = model(pack(order), position_ids=positions_of(order)).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [{}, {"interpretable": False}])
def test_loss_and_gradients_are_those_of_the_texts_alone(heads, tiny_model, texts):
    model = tiny_model(diff_block_size=SIZE, **heads)
    noises = [text % 2 == 0 for text in texts]
    labels = [text.masked_fill(text % 5 == 0, -100) for text in texts]
    concepts = [text[..., None] % 20 for text in texts]
    total = int((pack(labels) != -100).sum())

    def loss_of(ids, labels, noise, concepts, **places):
        given = {"concept_labels": concepts} if not heads else {}
        output = model(ids, labels=labels, noise_mask=noise, num_items_in_batch=total, **given, **places)
        return output.loss

    alone = sum(loss_of(*parts) for parts in zip(texts, labels, noises, concepts))
    alone.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    packed = loss_of(*map(pack, (texts, labels, noises, concepts)), position_ids=positions_of(texts))
    packed.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_each_text_is_noised_on_its_own_grid(tiny_config):
    config = tiny_config(diff_block_size=4)
    ids = torch.full((20000, 9), 7)
    places = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5, 6]])
    batch = objective.noise_batch(config, ids, ids, position_ids=places)
    for start, end in ((0, 2), (2, 6), (6, 9)):
        size = end - start
        counts = (batch.labels[:, start:end] != -100).sum(1)
        shares = counts.bincount(minlength=size + 1) / len(ids)
        torch.testing.assert_close(shares, torch.tensor([0.0] + [1 / size] * size), rtol=0, atol=0.02)
        masked = batch.labels[:, start:end] != -100
        assert torch.equal(batch.weights[:, start:end][masked], (size / counts)[:, None].expand_as(masked)[masked])


def test_masks_of_one_text_leave_the_others_to_be_noised(tiny_config, texts):
    config = tiny_config(diff_block_size=SIZE)
    row, first = pack(texts), LENGTHS[0]
    given = row.clone()
    given[0, 3:9] = config.mask_token_id
    batch = objective.noise_batch(config, given, row, position_ids=positions_of(texts))
    masked = batch.noised[0] == config.mask_token_id
    assert masked[:first].nonzero()[:, 0].tolist() == list(range(3, 9))
    assert all(part.any() for part in masked.split(LENGTHS))


def test_positions_of_a_single_text_change_nothing(tiny_model, texts):
    model, ids = tiny_model(diff_block_size=SIZE), texts[0]
    padded = torch.nn.functional.pad(ids, (0, 5), value=1)
    mask = (torch.arange(42) < 37)[None].long()
    places = torch.arange(42)[None].clamp(max=36)  # as transformers counts padding
    labels = padded.masked_fill(mask == 0, -100)
    losses = []
    for given in ({}, {"position_ids": places}, {"position_ids": torch.arange(42)[None]}):
        torch.manual_seed(0)
        losses.append(model(padded, attention_mask=mask, labels=labels, **given).loss)
    assert losses[0] == losses[1] == losses[2]
    shown = [model(padded, attention_mask=mask, use_cache=True, **given) for given in ({}, {"position_ids": places})]
    assert torch.equal(shown[0].logits[:, :37], shown[1].logits[:, :37])
    assert shown[1].cache is not None


def test_padding_begins_no_text_and_ends_none():
    positions = torch.tensor([[1, 1, 0, 1, 2, 0, 1, 0], [0, 1, 0, 2, 3, 0, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1]])
    found = number_texts(positions, mask).masked_fill(mask == 0, -1).tolist()
    assert found == [[-1, -1, 0, 0, 0, 1, 1, -1], [0, 0, -1, 0, 0, 1, 1, -1], [0, 0, -1, -1, 0, 0, 0, 0]]


def test_blocks_are_counted_through_a_row():
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    blocks = number_blocks(number_texts(positions), positions, 4)
    assert blocks.tolist() == [[0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]]


def test_a_flattening_collator_trains_each_text(tiny_model, texts):
    model = tiny_model(diff_block_size=SIZE, interpretable=False)
    rows = [{"input_ids": text[0].tolist()} for text in texts]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    noise = batch["input_ids"] % 2 == 0
    loss = model(**batch, noise_mask=noise).loss
    starts = [0, *itertools.accumulate(LENGTHS)]
    total = alone = 0
    for start, text in zip(starts, texts):
        labels = text.clone()
        labels[:, 0] = -100  # the collator's separator
        count = int((labels != -100).sum())
        own = noise[:, start : start + text.shape[1]]
        alone, total = alone + count * model(text, labels=labels, noise_mask=own).loss, total + count
    torch.testing.assert_close(loss, alone / total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": DynamicCache()}, "`cache` is given with `position_ids` that do not grow by one"),
        ({"use_cache": True}, "`use_cache` is given with `position_ids` that do not grow by one"),
        (
            {"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 37])},
            "`cu_seq_lens_q` is given without `position_ids`",
        ),
        ({"labels": True, "first": 3}, "`position_ids` hold a text that starts at 3"),
        ({"labels": True, "noisy_context": torch.zeros(1, 5).bool()}, "`noisy_context` is for rows of one text"),
        ({"labels": True, "shape": 1}, r"`position_ids` is torch.int64 of shape \(1, 73\)"),
        (
            {"labels": True, "attention_mask": torch.arange(74)[None] < 70},
            "`labels` hold targets where `attention_mask`",
        ),
    ],
)
def test_what_packed_texts_cannot_take_is_told(given, message, tiny_model, texts):
    given, row, places = dict(given), pack(texts), positions_of(texts)
    places[:, :37] += given.pop("first", 0)
    places = places[:, given.pop("shape", 0) :]
    if given.pop("labels", False):
        given["labels"] = row
    with pytest.raises(ValueError, match=message):
        tiny_model(diff_block_size=SIZE)(row, **{"position_ids": places, **given})
