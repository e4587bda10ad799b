"""What examples/nano/evaluate_attribution.py counts as a hit."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))

import evaluate_attribution
from evaluate_attribution import _names_the_person, _places_of

HEADER = ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]
QUESTION = ["How", " can", " I", " reach", " Mar", "a", " E", "ll", "ison", " by", " phone", "?"]
CLOSING = ["<|endofchunk|>", "<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]


def named(**scores: float) -> bool:
    words = {text.strip(): scores.get(text.strip(), 0.0) for text in QUESTION}
    values = [9.0] * len(HEADER) + [words[text.strip()] for text in QUESTION] + [9.0] * len(CLOSING)
    return _names_the_person(values, HEADER + QUESTION + CLOSING)


def test_the_name_has_to_be_among_three_words():
    assert named(reach=3.0, can=2.0, a=1.0)
    assert named(reach=3.0, can=2.0, ll=1.0)
    assert not named(reach=3.0, can=2.0, by=1.5, a=1.0)


def test_a_word_has_the_scores_of_all_its_tokens():
    assert named(reach=3.0, can=2.0, by=1.5, E=0.6, ll=0.6, ison=0.6)
    assert not named(reach=3.0, can=2.0, by=1.5, E=0.6, ll=-0.6, ison=0.6)


def test_the_last_two_digits_of_a_number():
    texts = ["Call", " Mar", "a", " at", " ", "555", "-", "014", "2", "."]
    assert _places_of("555-0142", texts, 1) == [7, 8]
    assert _places_of("555-0143", texts, 1) == []
    assert _places_of("555-0142", texts, 6) == []


def test_the_evaluation_runs_as_documented(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_attribution.py", "--json"])
    monkeypatch.setattr(evaluate_attribution, "load", lambda model: (model,))
    monkeypatch.setattr(evaluate_attribution, "evaluate", lambda *given: {"chunks": given[1], "exact": given[4]})
    evaluate_attribution.main()
    assert json.loads(capsys.readouterr().out) == {"chunks": evaluate_attribution.CHUNKS, "exact": 0}
