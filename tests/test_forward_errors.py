"""Bad input to forward(): a clear error that names the argument, before anything is computed; and nothing where it is traced."""

import pytest
import torch
from generation_model import CONTEXT, MASK, VOCABULARY, make_model, make_prompt
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

IDS = make_prompt(3, rows=2)
LABELS = {"labels": IDS}


@pytest.fixture
def model():
    """Fails as soon as anything is computed."""
    model = make_model()

    def refuse(*_):
        raise AssertionError("a forward pass came before the error")

    model.transformer.register_forward_pre_hook(refuse)
    return model


def filled(length: int) -> DynamicCache:
    with torch.no_grad():
        return make_model()(make_prompt(length), use_cache=True).cache


CASES = [
    ("input_ids", [[1, 2, 3]]),
    ("input_ids", torch.tensor([1, 2])),
    ("input_ids", torch.zeros(2, 0, dtype=torch.long)),
    ("input_ids", torch.zeros(2, 3)),
    ("input_ids", torch.ones(2, 3, dtype=torch.bool)),
    ("input_ids", torch.tensor([[VOCABULARY]])),
    ("input_ids", torch.tensor([[-1]])),
    ("input_ids", make_prompt(CONTEXT + 1)),
    ("inputs_embeds", torch.zeros(2, 3, 32)),  # beside input_ids
    ("attention_mask", [1]),
    ("attention_mask", torch.ones(2, 4)),
    ("attention_mask", torch.ones(3)),
    ("attention_mask", torch.full((2, 3), 2)),
    ("attention_mask", torch.full((2, 3), float("nan"))),
    ("attention_mask", torch.ones(2, 1, 2, 3)),
    ("position_ids", torch.arange(3)),
    ("position_ids", [[0, 1, 2]]),
    ("position_ids", torch.full((2, 3), float("nan"))),
    ("position_ids", torch.tensor([[0, 1, CONTEXT]])),
    ("position_ids", torch.tensor([[-1, 0, 1]])),
    ("position_ids", torch.zeros(3, 3, dtype=torch.long)),
    ("cache", ((torch.zeros(1), torch.zeros(1)),)),
    ("use_cache", "yes"),
    ("output_concepts", 1),
    ("logits_to_keep", -1),
    ("logits_to_keep", True),
    ("logits_to_keep", 1.0),
    ("logits_to_keep", torch.tensor([3])),
    ("logits_to_keep", torch.tensor(1)),
    ("logits_to_keep", torch.tensor([True, False, True])),
    ("labels", [[1, 2, 3]]),
    ("labels", IDS.float()),
    ("labels", IDS[:1]),
    ("labels", IDS + VOCABULARY),
]

WITH_LABELS = [
    ("noise_mask", "x"),
    ("noise_mask", torch.full((2, 3), 0.5)),
    ("noise_mask", torch.full((2, 3), 2)),
    ("noise_mask", torch.ones(2, 2, dtype=torch.bool)),
    ("noisy_context", [True]),
    ("concept_labels", [[[1]]]),
    ("concept_labels", torch.zeros(2, 3, 1)),
    ("concept_labels", torch.zeros(2, 3, dtype=torch.long)),
    ("concept_labels", torch.full((2, 3, 1), 20)),
    ("attention_mask", "x"),
    ("input_ids", torch.tensor([[VOCABULARY] * 3] * 2)),
    ("input_ids", None),
]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_arguments(model, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(**{"input_ids": IDS, name: value})


@pytest.mark.parametrize(("name", "value"), WITH_LABELS)
def test_arguments_beside_labels(model, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(**{"input_ids": IDS, **LABELS, name: value})


@pytest.mark.parametrize(
    "embeddings", [[[[0.0]]], torch.zeros(2, 3), torch.zeros(2, 3, 31), torch.zeros(2, 3, 32).long()], ids=str
)
def test_embeddings(model, embeddings):
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model(inputs_embeds=embeddings)


def test_the_message_has_the_value_and_the_remedy(model):
    with pytest.raises(ValueError, match=r"`input_ids` holds ids from 0 to 96: use ids from 0 to 95\."):
        model(torch.tensor([[0, 96]]))


def test_a_cache_counts_in_the_context():
    model, cache = make_model(), filled(CONTEXT - 2)
    model(make_prompt(2), cache=cache)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens in a row, {CONTEXT} of them cached"):
        model(make_prompt(1), cache=cache)


def test_padding_does_not():
    mask = torch.ones(1, CONTEXT + 3, dtype=torch.long)
    mask[:, :3] = 0
    assert make_model()(make_prompt(CONTEXT + 3), attention_mask=mask).logits.shape[1] == CONTEXT + 3
    mask[:, 2] = 1
    with pytest.raises(ValueError, match=f"`input_ids` .*{CONTEXT + 1} tokens"):
        make_model()(make_prompt(CONTEXT + 3), attention_mask=mask)


def test_what_is_right_passes():
    model, ids = make_model(), IDS
    expected = model(ids).logits
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    places = torch.arange(3)[None]
    for given in (
        {"attention_mask": torch.ones(2, 3)},
        {"attention_mask": torch.ones(2, 3, dtype=torch.bool)},
        {"attention_mask": mask, "position_ids": places.expand(2, -1)},
        {"position_ids": places},
        {"position_ids": places.int(), "logits_to_keep": torch.tensor([0, -2, 2])},
        {"logits_to_keep": 9},
        {"input_ids": ids.int()},
    ):
        torch.testing.assert_close(model(**{"input_ids": ids, **given}).logits, expected)


def test_a_configuration_that_asks_for_tuples():
    expected, model = make_model(), make_model(return_dict=False)
    assert torch.equal(model(IDS)[0], expected(IDS).logits)
    assert torch.equal(model.transformer(IDS)[0], expected.transformer(IDS).last_hidden_state)
    assert torch.equal(model.generate(IDS, max_new_tokens=9), expected.generate(IDS, max_new_tokens=9))
    noise = {"labels": IDS, "noise_mask": torch.ones_like(IDS).bool()}
    assert torch.equal(model(IDS, **noise)[0], expected(IDS, **noise).loss)


def test_nothing_is_looked_at_while_a_call_is_traced():
    model = make_model()
    ids = torch.full((1, 8), MASK)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, model(ids).logits)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(ids)).logits.shape == (1, 8, VOCABULARY)
