"""The search for a strength: a table of effect and fluency, and the errors before it begins."""

import pytest
import torch

from steerling_hf import Amplify, Inject, SetConcepts, search_strength
from steerling_hf.fluency import text_fluency
from steerling_hf.strength_search import StrengthTable, StrengthTrial, _text_mask

SETTINGS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def common_token(model) -> int:
    """The token that concept 3 promotes most."""
    direction = model.known_head.embeddings(torch.tensor(3))
    return int((model.transformer.lm_head.weight @ direction).argmax())


def share_of(word: str):
    return lambda texts: sum(word in text for text in texts) / len(texts)


def test_a_grid_shows_effect_and_fluency(model, tokenizer, tmp_path):
    word = tokenizer.decode([common_token(model)])
    operation = Inject(3, 1.0, layers=1)
    table = search_strength(
        model, tokenizer, operation, ["The", "A longer beginning"], share_of(word), strengths=(300.0, 0.0), **SETTINGS
    )
    assert [trial.strength for trial in table] == [0.0, 300.0]
    assert [trial.effect for trial in table] == [0.0, 1.0]
    assert all(len(trial.texts) == 2 for trial in table)
    assert table.best(0.5) is table[1]
    with pytest.raises(ValueError, match="the largest effect of any strength is 1"):
        table.best(1.5)
    assert str(table).splitlines()[0].split() == ["strength", "effect", "fluency"]
    assert table.plot(tmp_path / "plot.svg").read_text().count("<circle") == 4
    assert [row["strength"] for row in table.to_dicts()] == [0.0, 300.0]


def test_bisection_closes_in_on_the_weakest_enough(model, tokenizer):
    tried = []

    def effect(texts):
        tried.append(texts)
        return float(len(tried) != 2)  # 50 is enough, 25 is not, 37.5 is

    table = search_strength(
        model, tokenizer, Amplify(3), ["The"], effect, between=(0.0, 100.0), least_effect=0.5, trials=4, **SETTINGS
    )
    assert [trial.strength for trial in table] == [25.0, 31.25, 37.5, 50.0]


def test_texts_end_at_stop_strings(model, tokenizer):
    asked = {"prompts": ["The"], "objective": lambda texts: 0.0, "strengths": (0.0,), **SETTINGS}
    (whole,) = search_strength(model, tokenizer, Amplify(3), **asked)
    (ended,) = search_strength(model, tokenizer, Amplify(3), stop_strings=[whole.texts[0][:4]], **asked)
    assert len(ended.texts[0]) < len(whole.texts[0])


def test_another_field_can_be_varied(model, tokenizer):
    table = search_strength(
        model, tokenizer, SetConcepts(3, 0.0), ["The"], len, strengths=(0.0, 40.0), field="value", **SETTINGS
    )
    assert table.field == "value"
    assert table[0].texts != table[1].texts


def test_fluency_is_the_mean_log_probability_of_masked_tokens(model):
    ids = torch.arange(6, 26)[None]
    written = torch.zeros_like(ids)
    written[0, 17] = 1  # one token: one pass
    masked = ids.clone()
    masked[0, 17] = model.config.mask_token_id
    with torch.no_grad():
        expected = model(masked).logits[0, 17].log_softmax(-1)[ids[0, 17]]
    assert text_fluency(model, ids, written) == pytest.approx(float(expected), abs=1e-5)
    padded = torch.nn.functional.pad(ids, (3, 0), value=8193)
    marks = torch.nn.functional.pad(written, (3, 0), value=-1)
    assert text_fluency(model, padded, marks) == pytest.approx(float(expected), abs=1e-4)


def test_fluency_masks_every_eighth_token_at_once(model):
    ids, found = torch.arange(10, 31)[None], []
    for place in range(21):
        masked = ids.clone()
        masked[0, place % 8 :: 8] = model.config.mask_token_id
        with torch.no_grad():
            found.append(float(model(masked).logits[0, place].log_softmax(-1)[ids[0, place]]))
    assert text_fluency(model, ids, torch.ones_like(ids)) == pytest.approx(sum(found) / 21, abs=1e-5)


def test_only_what_was_written_counts_for_fluency(model):
    pad = model.config.pad_token_id
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1]])
    output = torch.tensor([[pad, 5, 6, 7, 8], [1, 2, 3, 9, pad]])
    assert _text_mask(model, prompt, output).tolist() == [[-1, 0, 0, 1, 1], [0, 0, 0, 1, -1]]


def test_a_steered_model_is_no_judge_of_fluency(model, tokenizer):
    with model.steer(Amplify(4)), pytest.raises(ValueError, match="`model` is steered"):
        search_strength(model, tokenizer, Amplify(3), ["The"], len, strengths=(1.0,), **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "volume"}, "`field` is 'volume', which Amplify does not have"),
        ({"strengths": None}, "Give either `strengths`, or `between` and `least_effect`"),
        ({"between": (0, 1)}, "Give either `strengths`"),
        ({"strengths": None, "between": (0, 1)}, "Give either `strengths`"),
        ({"prompts": []}, "need one entry or more"),
        ({"strengths": ()}, "need one entry or more"),
        ({"strengths": (0.5, float("nan"))}, "`strengths` is nan: give a number"),
        ({"strengths": None, "between": (0, float("nan")), "least_effect": 1}, "`between` is nan"),
        ({"num_return_sequences": 2}, "`num_return_sequences` cannot be given"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate` cannot be given"),
        ({"steering": Amplify(3)}, "`steering` cannot be given"),
        ({"prompts": "The gardener"}, "`prompts` is the single text 'The gardener'"),
    ],
)
def test_bad_input_is_told_before_anything_is_generated(changes, message, model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    arguments = {"operation": Amplify(3), "prompts": ["The"], "objective": len, "strengths": (1.0,), **SETTINGS}
    with pytest.raises(ValueError, match=message):
        search_strength(model, tokenizer, **{**arguments, **changes})


def test_a_table_is_a_sequence():
    table = StrengthTable([StrengthTrial(2.0, 0.5, -1.0, ()), StrengthTrial(1.0, 0.6, -2.0, ())], "strength")
    assert len(table) == 2
    assert table.best(0.5).strength == 2.0
    assert table.best(0.55).strength == 1.0


def test_fluency_does_not_depend_on_padding(tiny_model):
    model = tiny_model()
    ids = torch.arange(10, 31)[None]
    written = (torch.arange(21) >= 6).long()[None]
    alone = text_fluency(model, ids, written)
    for columns in (1, 3, 8):
        padded = torch.nn.functional.pad(ids, (columns, 0))
        assert text_fluency(model, padded, torch.nn.functional.pad(written, (columns, 0), value=-1)) == pytest.approx(
            alone, abs=1e-5
        )
