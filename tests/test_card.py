"""The model card: its metadata is what the Hub reads, and every program that it shows runs."""

import json
import re

import pytest
import yaml

from steerling_hf import SteerlingConfig, checkpoint, checkpoint_names
from steerling_hf.card import render_card, snippets


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("name", checkpoint_names())
def test_card_of_each_checkpoint(name):
    config = SteerlingConfig.from_pretrained(checkpoint(name))
    card = render_card(config, f"owner/{name}", name, has_chat_template=True)
    assert card.startswith("---\n")
    found = metadata(card)
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "custom_code" in found["tags"]
    assert f"# {name}\n" in card
    assert f"{config.n_concepts:,}" in card
    assert "REPO_ID" not in card
    assert "{{" not in card
    assert "{%" not in card
    assert "\n\n\n" not in card


def test_card_shows_every_snippet_word_for_word():
    card = render_card(SteerlingConfig(), "owner/name", "steerling-8b", has_chat_template=True)
    shown = re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL)
    assert sorted(shown) == sorted(snippets("owner/name").values())


def test_card_without_chat_template_or_concepts_shows_neither():
    card = render_card(SteerlingConfig(interpretable=False), "owner/name")
    assert "apply_chat_template" not in card
    assert "output_concepts" not in card
    assert "say here what it was trained on" in card


def test_card_shows_measured_results(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"parse_greedy": 0.987}))
    card = render_card(SteerlingConfig(), "owner/name", folder=tmp_path)
    assert "| parse_greedy | 0.987 |" in card


@pytest.mark.parametrize("name", sorted(snippets("x")))
def test_snippet_runs_where_the_package_is_not(name, isolated, exported_folder):
    printed = isolated(snippets(str(exported_folder))[name])
    assert printed.strip()
