"""examples/nano/evaluate_unmasking.py on what is known: a rule with foresight, prompts that judge their own answers."""

import re
import sys
from pathlib import Path

import pytest
import torch
from generation_model import MASK, make_model, make_prompt

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))

import evaluate_unmasking
from evaluate_unmasking import CURVE, Foresight, Prompt, make_prompts, plot, settings_of
from grammar import END_OF_CHUNK, REFUSAL
from parser import INVALID, Parsed
from steerling_hf.modeling.unmasking_steerling import UNMASKING_RULES


def best_tokens(*tokens: int) -> torch.Tensor:
    """Logits whose best tokens are given, the later the surer."""
    logits = torch.zeros(len(tokens), 10)
    logits[range(len(tokens)), list(tokens)] = torch.arange(1.0, len(tokens) + 1)
    return logits


def test_foresight_decides_what_is_right_already():
    known = Foresight(torch.tensor([1, 2, 3, 4, 5, 6]), mask_token=0)
    canvas = torch.tensor([[1, 2, 0, 4, 0, 0, 0, 0]])
    logits = best_tokens(3, 9, 6, 7)  # wanted: 3, 5, 6, and nothing behind the end of the text
    assert known(canvas.repeat(4, 1), logits) is logits
    assert known.rule(logits, 1).tolist() == [0, 2]
    assert known.rule(best_tokens(9, 9, 9, 7), 1).tolist() == [3]


def test_foresight_writes_the_text_in_fewer_passes():
    model, prompt = make_model(), make_prompt(9)
    single = model.generate(prompt, max_new_tokens=16)
    known = Foresight(single[0], MASK)
    output = model.generate(
        prompt, max_new_tokens=16, unmasking=known.rule, logits_processor=[known], return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, single)
    assert output.tokens_per_forward.item() > 1


class Writer:
    """A tokenizer of words."""

    def __init__(self):
        self.words: list[str] = []

    def __call__(self, text, add_special_tokens=True):
        found = re.findall(r"<\|\w+\|>|\S+|\s+", text)
        self.words += [word for word in found if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in found]}

    def decode(self, ids, **tidying):
        return "".join(self.words[i] for i in ids)


def test_prompts_judge_their_answers():
    writer = Writer()
    contact, *others = make_prompts(writer, "contact", 7)
    assert len(others) == 6
    assert contact.parse(REFUSAL + END_OF_CHUNK, True)[0].valid
    assert contact.parse("You can reach nobody." + END_OF_CHUNK, True) == [INVALID]
    assert len(make_prompts(writer, "refusal", 1000)) == 40
    plain = make_prompts(writer, "plain", 3)
    assert [prompt.ids for prompt in plain] == [prompt.ids for prompt in make_prompts(writer, "plain", 3)]
    assert not plain[0].parse(" no sentence of the grammar." + END_OF_CHUNK, True)[-1].valid


def test_tokens_and_passes_are_counted_over_all_answers(monkeypatch):
    batches = iter([([[Parsed(True)], [INVALID]], 30.0, 10.0), ([[Parsed(True), Parsed(True)]], 10.0, 10.0)])
    monkeypatch.setattr(evaluate_unmasking, "BATCH", 2)
    monkeypatch.setattr(evaluate_unmasking, "answer", lambda *given, **settings: (*next(batches), None))
    prompts = [Prompt([1], lambda text, ended: [])] * 3
    assert evaluate_unmasking.judge(None, None, prompts, "name") == (2.0, 0.75)


@pytest.mark.parametrize("rule", CURVE)
def test_the_curve_is_of_rules_and_keys_that_there_are(rule):
    key, values = CURVE[rule]
    assert rule in UNMASKING_RULES
    assert key == (UNMASKING_RULES[rule][1] or "steps")
    assert settings_of(rule, values[0]) == {"unmasking": rule, key: values[0]}


def test_plot(tmp_path):
    points = [{"tokens_per_forward": 1.0, "parse_rate": 0.9}, {"tokens_per_forward": 2.0, "parse_rate": 0.5}]
    plot({"entropy": points, "threshold": points}, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert "threshold" in drawn
    assert drawn.count("<circle") == 4
