"""Recipes: what is saved comes back, belongs to its weights, and is never half-written."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from steerling_hf import (
    Amplify,
    Concept,
    ConceptCatalog,
    Condition,
    Imitate,
    Inject,
    SetConcepts,
    SteeringRecipe,
    Suppress,
    SuppressTokens,
)
from steerling_hf.fingerprint import concept_fingerprint

EVERYTHING = (
    Inject((3, 25), -2.5, normalized=False, layers=(1, 2), window=(0, None)),
    SuppressTokens(4, 3.0, window=(2, 9)),
    SetConcepts([1, 2], 0.5, "scale", keep_epsilon=False, clean_rows=True),
    Imitate((40, 4250, 13), context=(5, 6), strength=0.5, top_n=3, pooled=True, keep_epsilon=True),
    Amplify(7, cutoff=None),
    Suppress(8, (9, 10), condition=Condition(5, 0.25, "mean")),
)


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def catalog():
    return ConceptCatalog([Concept(i, "known", f"name {i}") for i in range(20)], n_unknown=30)


def test_a_saved_recipe_comes_back_and_steers_the_same(model, catalog, tmp_path):
    recipe = SteeringRecipe.of(model, *EVERYTHING, catalog=catalog, effect={"recited": 0.02}, description="quiet")
    loaded = SteeringRecipe.load(recipe.save(tmp_path / "recipe.json"))
    assert loaded.to_dict() == recipe.to_dict()
    assert loaded.concepts == {**{i: f"name {i}" for i in (1, 2, 3, 4, 5, 7, 8, 9, 10)}, 25: "discovered concept 25"}
    prompt = torch.arange(5)[None]
    texts = [model.generate(prompt, max_new_tokens=12, steering=made) for made in (EVERYTHING, recipe, loaded, None)]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[3])
    assert SteeringRecipe.load(SteeringRecipe(recipe.operations).save(tmp_path).parent).fingerprint is None


def test_a_recipe_refuses_other_concepts_unless_told(model, tiny_model):
    recipe = SteeringRecipe.of(model, Amplify(3))
    other = tiny_model()
    recipe.check(other)  # the same seed makes the same weights
    with torch.no_grad():
        other.unknown_head.embedding_basis.weight[0, 0] += 1
    with pytest.raises(ValueError, match="made for the concepts of .*for_any_weights"):
        other.generate(torch.arange(5)[None], max_new_tokens=4, steering=recipe)
    with pytest.raises(ValueError, match="for_any_weights"), other.steer(recipe):
        pass
    other.generate(torch.arange(5)[None], max_new_tokens=4, steering=recipe.for_any_weights())


def test_the_fingerprint_is_of_the_concepts_and_of_no_precision(model, tiny_model):
    half = tiny_model().to(torch.bfloat16)
    assert concept_fingerprint(model) == concept_fingerprint(half)
    with torch.no_grad():  # smaller than half precision has normal numbers for
        half.known_head.concept_embedding.weight[0, :8] = torch.logspace(-7, -4, 8)
    small = concept_fingerprint(half)
    # Copies: a fingerprint is kept for the weights that a model has, whatever their precision becomes.
    for dtype in (torch.float16, torch.float32):
        assert concept_fingerprint(copy.deepcopy(half).to(dtype)) == small
    before = concept_fingerprint(model)
    with torch.no_grad():
        model.transformer.lm_head.weight.add_(1)
    assert concept_fingerprint(model) == before
    with torch.no_grad():
        model.known_head.concept_embedding.weight[-1, -1] += 1
    assert concept_fingerprint(model) != before


def test_a_model_without_heads_has_no_fingerprint(tiny_model):
    with pytest.raises(ValueError, match="interpretable=False"):
        concept_fingerprint(tiny_model(interpretable=False))


def test_what_differs_is_listed(model, catalog):
    one = SteeringRecipe.of(model, Amplify(3), catalog=catalog)
    other = SteeringRecipe.of(model, Amplify(4, 2.0), SuppressTokens(4), catalog=catalog)
    assert one.diff(one) == []
    assert one.diff(other) == [
        "operations[0].concepts: 3 -> 4",
        'concepts.3: "name 3" -> -',
        "operations[0].strength: - -> 2.0",
        'operations[1].operation: - -> "SuppressTokens"',
        "operations[1].concepts: - -> 4",
        'concepts.4: - -> "name 4"',
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "`format` of the recipe is 2, and this version reads 1"),
        ({"operations": [{"operation": "Explode"}]}, "choose one of Inject, SuppressTokens"),
        ({"operations": [{"operation": "Amplify", "volume": 3}]}, "Amplify cannot have these fields"),
        ({"operations": 3}, "holds no steering recipe"),
    ],
)
def test_a_wrong_file_is_told(change, message, model, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**SteeringRecipe.of(model, Amplify(3)).to_dict(), **change}))
    with pytest.raises(ValueError, match=message):
        SteeringRecipe.load(path)


def test_no_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a recipe's file nor a folder or Hub repository"):
        SteeringRecipe.load(tmp_path / "none.json")


def test_operations_are_checked_when_a_recipe_is_made(model):
    with pytest.raises(ValueError, match="`concepts` has 50"):
        SteeringRecipe.of(model, Amplify(50))


def test_an_interrupted_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = SteeringRecipe.of(model, Amplify(3)).save(tmp_path / "recipe.json")
    before = path.read_text()

    def write_half(self, text, **_):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        SteeringRecipe.of(model, Amplify(4)).save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


def test_a_recipe_is_not_saved_in_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        SteeringRecipe.of(model, Inject(3, 1.0)).save(tmp_path / "nowhere" / "fix.json")


def test_a_recipe_takes_over_lists_and_recipes(model, tmp_path):
    quiet = SteeringRecipe.of(model, Suppress(4))
    recipe = SteeringRecipe.of(model, [Inject(3, 1.0)], quiet, effect={"recited": np.float32(0.5)})
    assert recipe.operations == (Inject(3, 1.0), Suppress(4))
    recipe.save(tmp_path / "both.json")
    assert SteeringRecipe.load(tmp_path / "both.json").effect == {"recited": 0.5}


def test_a_file_that_is_no_text_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_bytes('{"name": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="recipe.json' holds no steering recipe: it is not in UTF-8"):
        SteeringRecipe.load(path)


def test_a_repository_without_access_says_so(monkeypatch):
    import huggingface_hub

    def refused(*_, **__):
        raise GatedRepoError("ask for access", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(GatedRepoError, match="ask for access"):
        SteeringRecipe.load("someone/gated")


def test_push_to_hub_uploads_the_very_file(model, monkeypatch, tmp_path):
    import huggingface_hub

    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, exist_ok):
            sent["repo"] = (repo_id, exist_ok)

        def upload_file(self, **given):
            sent.update(given)
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    recipe = SteeringRecipe.of(model, *EVERYTHING)
    assert recipe.push_to_hub("owner/quiet", token="secret") == "https://hub/commit/1"
    assert sent["repo"] == ("owner/quiet", True)
    assert (sent["repo_id"], sent["path_in_repo"], sent["token"]) == ("owner/quiet", "steering_recipe.json", "secret")
    (tmp_path / "steering_recipe.json").write_bytes(sent["path_or_fileobj"])
    assert SteeringRecipe.load(tmp_path).to_dict() == recipe.to_dict()
