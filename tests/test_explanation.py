"""Explanations: whole, saved and loaded, of batches, and their parts in agreement with each other."""

import json
import re
import sys

import pytest
import torch

from steerling_hf import Amplify, Concept, ConceptCatalog, Explanation, attribute_concepts, explain, explain_output
from steerling_hf.chat import chat_inputs
from steerling_hf.cli import main
from steerling_hf.explaining import token_texts
from steerling_hf.input_attribution import attribute_inputs

PROMPT = "The gardener watered the"


@pytest.fixture(scope="module")
def made():
    from conftest import make_model

    from steerling_hf import SteerlingTokenizer, checkpoint

    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
    model = make_model()
    catalog = ConceptCatalog([Concept(i, "known", f"roses {i}") for i in range(20)], n_known=20, n_unknown=30)
    explanation = explain(
        model,
        tokenizer,
        PROMPT,
        by=[(7, 10), (10, 15)],
        catalog=catalog,
        max_new_tokens=9,
        seed=5,
        do_sample=True,
        steering=Amplify(3),
        attribution={"n_steps": 4},
    )
    return model, tokenizer, explanation


def test_parts_agree_with_each_other(made):
    _, tokenizer, explanation = made
    assert "".join(token.text for token in explanation.prompt) == PROMPT
    assert explanation.text == tokenizer.decode([token.id for token in explanation.answer])
    start = len(explanation.prompt)
    assert [token.position for token in explanation.answer] == list(range(start, start + 9))
    assert sorted(token.step for token in explanation.answer) == list(range(9))
    for token in explanation.answer:
        assert token.known + token.unknown + token.residual == pytest.approx(token.logit, abs=1e-4)
        assert 0 < token.probability <= 1
    for chunk, (first, stop) in zip(explanation.chunks, [(7, 10), (10, 15)], strict=True):
        assert (chunk.start, chunk.end) == (first - start, stop - start)
        assert chunk.text == "".join(token.text for token in explanation.answer[chunk.start : chunk.end])
        assert sum(c.contribution for c in chunk.concepts if c.head == "known") == pytest.approx(chunk.known, abs=1e-5)
        assert all(c.name == (f"roses {c.id}" if c.id < 20 else f"discovered concept {c.id}") for c in chunk.concepts)
        scores = [abs(score) for score in (*chunk.inputs, *chunk.context)]
        assert (len(chunk.inputs), len(chunk.context)) == (len(explanation.prompt), 9)
        assert sum(scores) <= 1 + 1e-5  # each target has one vote
    assert explanation.generation["seed"] == 5
    assert explanation.steering[0]["operation"] == "Amplify"
    assert explanation.metrics["median completeness error"] >= 0


def test_inputs_and_context_of_a_chunk_are_shares_of_all_that_its_tokens_saw(made):
    model, _, explanation = made
    found = attribute_inputs(model, explanation.trace, n_steps=4)
    start = len(explanation.prompt)
    for chunk in explanation.chunks:
        wanted = found.aggregate(start + chunk.start, start + chunk.end, "all")
        assert [*chunk.inputs, *chunk.context] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert any(chunk.context)


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_saved_and_loaded(made, ending, tmp_path):
    _, _, explanation = made
    path = explanation.save(tmp_path / f"why.{ending}")
    loaded = Explanation.load(path)
    assert loaded.to_dict() == explanation.to_dict()
    assert torch.equal(loaded.trace.tokens, explanation.trace.tokens)
    assert loaded.trace.steering == (Amplify(3),)
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_without_its_library(made, tmp_path, monkeypatch, capsys):
    _, _, explanation = made
    path = explanation.save(tmp_path / "why.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("steerling_hf.loading.load", None)
    missing = "in parquet needs pyarrow: pip install 'steerling-hf[concepts]'"
    for call in (lambda: explanation.save(tmp_path / "again.parquet"), lambda: Explanation.load(path)):
        with pytest.raises(ImportError, match=re.escape(missing)):
            call()
    assert main(["explain", "The", "--save", str(tmp_path / "again.parquet")]) == 2
    assert missing in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_what_was_there(made, tmp_path, monkeypatch):
    _, _, explanation = made
    path = tmp_path / "why.html"
    path.write_text("before")
    monkeypatch.setattr("steerling_hf.explanation.render_report", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explanation.save(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_and_the_notebook_show_it(made, tmp_path):
    _, _, explanation = made
    page = explanation.save(tmp_path / "why.html").read_text()
    assert f"roses {next(c.id for c in explanation.chunks[0].concepts if c.id < 20)}" in page
    shown = explanation._repr_html_()
    # Scripts of its own, and nothing else: no origin of the notebook's, no forms, pop-ups, downloads or navigation.
    assert shown.startswith('<iframe sandbox="allow-scripts" referrerpolicy="no-referrer" srcdoc="')
    assert re.findall("sandbox|allow-[a-z-]+", shown[: shown.index("srcdoc")]) == ["sandbox", "allow-scripts"]
    assert "Content-Security-Policy" in shown
    assert '"' not in shown.split('srcdoc="')[1].split('" style=')[0]  # nothing of the page ends the attribute
    assert "<script" not in shown  # escaped, all of it


def test_rows_are_a_table(made):
    _, _, explanation = made
    rows = explanation.rows()
    assert [row["rank"] for row in rows if row["chunk"] == 1] == list(range(len(explanation.chunks[1].concepts)))
    pandas = pytest.importorskip("pandas")
    assert isinstance(explanation.to_dataframe(), pandas.DataFrame)


def test_bad_files_and_names(made, tmp_path):
    _, _, explanation = made
    with pytest.raises(ValueError, match=r"`path` is .*why.pickle.*\.html"):
        explanation.save(tmp_path / "why.pickle")
    with pytest.raises(FileNotFoundError, match=r"no folder"):
        explanation.save(tmp_path / "missing" / "why.json")
    with pytest.raises(FileNotFoundError, match=r"`path` is"):
        Explanation.load(tmp_path / "missing.json")
    for number, content in enumerate(("{", "[]", '{"format": 1}', b"\xff")):
        file = tmp_path / f"{number}.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=r"holds no explanation"):
            Explanation.load(file)
    (tmp_path / "new.json").write_text(json.dumps({**explanation.to_dict(), "format": 2}))
    with pytest.raises(ValueError, match=r"`format` of the explanation is 2"):
        Explanation.load(tmp_path / "new.json")


def test_rows_of_a_padded_batch_are_those_of_single_runs(made):
    model, tokenizer, _ = made
    texts = [PROMPT, "Sadly, the captain raised the old sail and went out to sea"]
    asked = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_attributions": True, "output_scores": True}
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    batch = model.generate(**inputs, **asked)
    for row, text in enumerate(texts):
        together = explain_output(model, tokenizer, batch, row, inputs=False)
        alone = explain(model, tokenizer, text, inputs=False, max_new_tokens=6)
        assert [t.id for t in together.answer] == [t.id for t in alone.answer]
        assert [t.logit for t in together.answer] == pytest.approx([t.logit for t in alone.answer], abs=1e-4)
        assert [t.known for t in together.answer] == pytest.approx([t.known for t in alone.answer], abs=1e-4)
        assert together.chunks[0].inputs is None


def test_prompts_of_every_kind(made):
    model, tokenizer, _ = made
    messages = [{"role": "user", "content": PROMPT}]
    chat = chat_inputs(tokenizer, messages)
    for same in (
        (
            PROMPT,
            tokenizer(PROMPT)["input_ids"],
            tokenizer(PROMPT),
            tokenizer(PROMPT, return_tensors="pt")["input_ids"],
        ),
        (messages, chat, [chat["input_ids"]]),
        *(
            (PROMPT, tokenizer(PROMPT, padding="max_length", max_length=9, padding_side=side, return_tensors="pt"))
            for side in ("left", "right")
        ),
    ):
        first, *others = (explain(model, tokenizer, prompt, inputs=False, max_new_tokens=3) for prompt in same)
        assert all(other.prompt == first.prompt and other.answer == first.answer for other in others)


def test_the_tokenizer_goes_with_stop_strings(made):
    model, tokenizer, _ = made
    whole = explain(model, tokenizer, PROMPT, inputs=False, max_new_tokens=6, do_sample=False)
    ended = explain(
        model,
        tokenizer,
        PROMPT,
        inputs=False,
        max_new_tokens=6,
        do_sample=False,
        stop_strings=[whole.answer[2].text],
    )
    assert len(ended.answer) < len(whole.answer)


def test_what_explain_refuses(made):
    model, tokenizer, _ = made
    for prompt, message in (
        (torch.ones(2, 3, dtype=torch.long), r"`prompt` has the shape \(2, 3\)"),
        ("The<|mask|> watered", "`prompt` has gaps"),
        ([], "`prompt` is empty"),
        ([["The"]], "`prompt` is .*: give one text, token ids"),
        ([1.5, 2.5], r"`prompt` is \[1.5, 2.5\]: give one text, token ids"),
        ([{"role": "user", "content": "Hi"}, "The"], "`prompt` is .*: give one text, token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, tokenizer, prompt, max_new_tokens=2)
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_attributions": True}
    filled = model.generate(tokenizer("The<|mask|> watered", return_tensors="pt")["input_ids"], **asked)
    with pytest.raises(ValueError, match="The prompt of `output` has gaps"):
        explain_output(model, tokenizer, filled)
    output = model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"`output` has no attributions"):
        explain_output(model, tokenizer, output)


def test_tokens_that_share_a_character(made):
    _, tokenizer, _ = made
    text = "a\u00e9 \U0001f600 \u4e2d!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text
    assert "" in texts
    assert token_texts(tokenizer, ids[:3]) != []


def test_attribution_of_given_texts_sums_up_and_does_not_depend_on_the_batch(made):
    model, tokenizer, _ = made
    texts = [PROMPT, "Rain", "the captain raised the sail"]
    found = attribute_concepts(model, tokenizer, texts, batch_size=2)
    sums = found.known_contributions.sum(-1) + found.unknown_contributions.sum(-1) + found.residual
    assert torch.allclose(sums, found.logits, atol=1e-4)
    for row, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        outputs = model(ids, output_concepts=True)
        wanted = outputs.logits[0].gather(-1, ids[0][:, None])[:, 0]
        assert torch.allclose(found.logits[row, : len(wanted)], wanted, atol=1e-4)
        assert not found.logits[row, len(wanted) :].any()
        directions = model.transformer.lm_head.weight[ids[0]]
        epsilon = (outputs.concepts.epsilon[0] * directions).sum(-1)
        assert torch.allclose(found.residual[row, : len(wanted)], epsilon, atol=1e-4)


def test_given_texts_are_checked(made, tiny_model):
    model, tokenizer, _ = made
    for texts, message in (
        (["a", ""], "`texts` has 0 tokens in text 1"),
        ([1, 2], r"`texts` is \[1, 2\]: give a text, or a list of texts or of lists of token ids"),
        ([[1, 99_999]], "`texts` has token ids from 1 to 99999 in text 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute_concepts(model, tokenizer, texts)
    with pytest.raises(ValueError, match="`batch_size` is 0: choose 1 or more"):
        attribute_concepts(model, tokenizer, "a", batch_size=0)
    with pytest.raises(ValueError, match=r"no concept heads"):
        attribute_concepts(tiny_model(interpretable=False), tokenizer, "a")


def test_what_cannot_be_explained_is_refused_before_anything_is_generated(made, monkeypatch):
    model, tokenizer, _ = made
    monkeypatch.setattr(type(model), "generate", None)
    for wrong, message in (
        ({"attribution": {"n_steps": 5}}, "`n_steps` is 5"),
        ({"attribution": {"method": "x"}}, "`method` is 'x'"),
        ({"attribution": {"steps": 4}}, "`attribution` has 'steps'.*'n_steps'"),
        ({"inputs": False, "belief": True}, "`inputs` is False.*`belief`"),
        ({"inputs": False, "attribution": {"n_steps": 4}}, "`inputs` is False.*`attribution`"),
        ({"catalog": ConceptCatalog([], 3, 0)}, "3 known"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, tokenizer, PROMPT, max_new_tokens=9, **wrong)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"steerling-hf\[explain\].*inputs=False"):
        explain(model, tokenizer, PROMPT, max_new_tokens=9)


def test_a_catalog_that_knows_of_no_discovered_concepts(made):
    model, tokenizer, _ = made
    labels = ConceptCatalog([Concept(i, "known", f"roses {i}") for i in range(20)], n_known=20, n_unknown=0)
    explanation = explain(model, tokenizer, PROMPT, catalog=labels, inputs=False, max_new_tokens=5)
    names = {concept.name for chunk in explanation.chunks for concept in chunk.concepts}
    assert any(name.startswith("roses") for name in names)
    assert any(name.startswith("discovered concept") for name in names)


def test_spans_of_the_prompt_are_refused_before_anything_is_generated(made, monkeypatch):
    model, tokenizer, _ = made
    monkeypatch.setattr(type(model), "generate", None)
    with pytest.raises(ValueError, match=r"`by` has the span \(0, 5\)"):
        explain(model, tokenizer, PROMPT, by=[(0, 5)], max_new_tokens=5)
