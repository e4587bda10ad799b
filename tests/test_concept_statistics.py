"""What a model says of its concepts, against the same said slowly; and steerling-nano, whose concepts are known."""

import dataclasses
import math
import random
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerling_hf import Concept, ConceptCatalog, checkpoint, concept_statistics

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))

import evaluate_contrast
from concepts import CONCEPTS, tone_concept
from grammar import is_reserved
from parser import split_sentences

KNOWN, UNKNOWN = 20, 30
TEXTS = [
    "The gardener watered the new rose.",
    "Rain.",
    "Seven banks closed before noon, and the lawyer said that " + "nobody was to blame for it, " * 12,
    "A pilot<|endofchunk|> and a sailor.",
]
OTHERS = ["What a joy!", "Sadly, the train was late again because of the fog.", "As a rule, tea is served at five."]


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def catalog() -> ConceptCatalog:
    return ConceptCatalog([Concept(i, "known", f"known {i}") for i in range(KNOWN)], n_unknown=UNKNOWN)


@pytest.fixture(scope="module")
def nano():
    folder = checkpoint("steerling-nano")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return ConceptCatalog.for_model(model), model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def token_weights(model, tokenizer, text: str) -> torch.Tensor:
    """(T, concepts) weights of one text read alone, 0 outside the top k."""
    concepts = model(**tokenizer(text, return_tensors="pt"), output_concepts=True).concepts
    table = torch.zeros(concepts.known_indices.shape[1], KNOWN + UNKNOWN)
    table.scatter_(1, concepts.known_indices[0], concepts.known_weights[0])
    if concepts.unknown_indices is not None:
        table.scatter_(1, concepts.unknown_indices[0] + KNOWN, concepts.unknown_weights[0])
    return table


@pytest.mark.parametrize("factorize_unknown", [True, False])
def test_top_tokens_are_those_of_the_embedding(factorize_unknown, tiny_model, catalog, tokenizer):
    model = tiny_model(factorize_unknown=factorize_unknown)
    embeddings = torch.cat(
        [model.known_head.embeddings(torch.arange(KNOWN)), model.unknown_head.embeddings(torch.arange(UNKNOWN))]
    )
    expected = embeddings @ model.get_output_embeddings().weight.T
    for concept in (0, KNOWN - 1, KNOWN, KNOWN + UNKNOWN - 1):
        found = catalog.top_tokens(model, tokenizer, concept, k=5)
        scores, ids = expected[concept].topk(5)
        assert [row.token_id for row in found] == ids.tolist()
        assert [row.score for row in found] == pytest.approx(scores.tolist(), rel=1e-4)
        assert [row.token for row in found] == [tokenizer.decode([i]) for i in ids.tolist()]


def test_top_tokens_are_tokens(tiny_model, catalog, tokenizer):
    """Rows behind the tokenizer's vocabulary are padding, and win if they may take part."""
    model = tiny_model(vocab_size=8300)
    assert len(tokenizer) == 8200
    with torch.no_grad():
        model.get_output_embeddings().weight[8200:] = 100 * model.known_head.embeddings(torch.tensor(3))
        model.get_output_embeddings().weight[:8200] *= 0.01
    assert all(row.token_id < 8200 for row in catalog.top_tokens(model, tokenizer, 3, k=20))
    assert len(catalog.top_tokens(model, tokenizer, 3, k=9000)) == 8200


def test_active_concepts_are_those_of_each_text_read_alone(model, catalog, tokenizer):
    for text, found in zip(TEXTS, catalog.active_in(model, tokenizer, TEXTS, k=50)):
        weights = token_weights(model, tokenizer, text)
        highest, mean = weights.amax(0), weights.mean(0)
        assert {row.concept.id for row in found} == set(highest.nonzero().flatten().tolist())
        for row in found:
            assert row.concept == catalog[row.concept.id]
            assert row.weight == pytest.approx(highest[row.concept.id].item(), abs=1e-5)
            assert row.mean == pytest.approx(mean[row.concept.id].item(), abs=1e-5)
        assert [row.weight for row in found] == sorted((row.weight for row in found), reverse=True)
        assert catalog.active_in(model, tokenizer, [text], k=3)[0] == [
            dataclasses.replace(
                row, weight=pytest.approx(row.weight, abs=1e-5), mean=pytest.approx(row.mean, abs=1e-5)
            )
            for row in found[:3]
        ]


@pytest.mark.parametrize(("batch", "head"), [(1, 3), (40, 7), (4096, 1024)])
def test_batches_and_padding_change_nothing(batch, head, model, tokenizer, monkeypatch):
    ids = concept_statistics.token_ids(model, tokenizer, TEXTS + OTHERS)
    alone = [concept_statistics.read_concepts(model, [row]) for row in ids]
    monkeypatch.setattr(concept_statistics, "BATCH_POSITIONS", batch)
    monkeypatch.setattr(concept_statistics, "HEAD_POSITIONS", head)
    together = concept_statistics.read_concepts(model, ids)
    assert together.texts.tolist() == [i for i, part in enumerate(alone) for _ in part.texts]
    for column in ("concepts", "highest", "mean"):
        torch.testing.assert_close(
            getattr(together, column), torch.cat([getattr(part, column) for part in alone]), atol=1e-5, rtol=0
        )


def test_a_model_in_training_is_read_as_it_will_be_used(model, catalog, tokenizer):
    model.train()
    seen = []
    model.transformer.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    catalog.contrast(model, tokenizer, TEXTS, OTHERS)
    assert set(seen) == {(False, False)}
    assert model.training


def test_heads_read_pieces_without_padding(model, tokenizer, monkeypatch):
    """No tensor of positions and concepts is ever wider than a piece, and no head sees padding."""
    monkeypatch.setattr(concept_statistics, "HEAD_POSITIONS", 16)
    seen = []
    model.known_head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].shape[0]))
    ids = concept_statistics.token_ids(model, tokenizer, TEXTS)
    read = concept_statistics.read_concepts(model, ids)
    assert max(seen) == 16
    assert sum(seen) == sum(map(len, ids))
    assert len(read.concepts) < len(TEXTS) * (KNOWN + UNKNOWN)


def test_head_picks_one_head(model, catalog, tokenizer):
    for head, ids in (("known", range(KNOWN)), ("unknown", range(KNOWN, KNOWN + UNKNOWN))):
        for found in (
            catalog.active_in(model, tokenizer, TEXTS, k=50, head=head)[0],
            catalog.contrast(model, tokenizer, TEXTS, OTHERS, k=50, head=head),
        ):
            assert found
            assert {row.concept.id for row in found} <= set(ids)
            assert {row.concept.head for row in found} == {head}


def test_contrast_is_the_formula_of_its_docstring(model, catalog, tokenizer):
    found = catalog.contrast(model, tokenizer, TEXTS, OTHERS, k=50)
    positive, negative = (
        torch.stack([token_weights(model, tokenizer, text).amax(0) for text in texts]).double()
        for texts in (TEXTS, OTHERS)
    )
    assert {row.concept.id for row in found} == set(
        torch.cat((positive, negative)).amax(0).nonzero().flatten().tolist()
    )
    for row in found:
        these, those = positive[:, row.concept.id].tolist(), negative[:, row.concept.id].tolist()
        within = statistics.variance(these) * (len(these) - 1) + statistics.variance(those) * (len(those) - 1)
        spread = math.sqrt(within / (len(these) + len(those) - 2))
        difference = statistics.fmean(these) - statistics.fmean(those)
        assert row.effect_size == pytest.approx(difference / (spread + 0.1), abs=1e-4)
        assert row.positive == pytest.approx(statistics.fmean(these), abs=1e-5)
        assert row.negative == pytest.approx(statistics.fmean(those), abs=1e-5)
        pairs = [(a > b) + (a == b) / 2 for a in these for b in those]
        assert row.superiority == pytest.approx(statistics.fmean(pairs))
    assert any(row.effect_size < 0 for row in found)
    sizes = [abs(row.effect_size) for row in found]
    assert sizes == sorted(sizes, reverse=True)
    assert catalog.contrast(model, tokenizer, TEXTS, OTHERS, k=4) == found[:4]


def test_contrast_has_two_sides(model, catalog, tokenizer):
    forth = catalog.contrast(model, tokenizer, TEXTS, OTHERS, k=50)
    back = {row.concept.id: row for row in catalog.contrast(model, tokenizer, OTHERS, TEXTS, k=50)}
    for row in forth:
        other = back[row.concept.id]
        assert other.effect_size == pytest.approx(-row.effect_size, abs=1e-5)
        assert other.superiority == pytest.approx(1 - row.superiority)
        assert (other.positive, other.negative) == pytest.approx((row.negative, row.positive))


def test_a_small_steady_effect_does_not_come_before_a_large_one(catalog, model, tokenizer, monkeypatch):
    weights = {0: [0.9, 0.8, 0.9, 0.1, 0.0, 0.2], 1: [0.011, 0.011, 0.011, 0.010, 0.010, 0.010]}
    read = concept_statistics.TextConcepts(
        6,
        torch.arange(6).repeat_interleave(2),
        torch.tensor([0, 1] * 6),
        torch.tensor(list(zip(*weights.values()))).flatten(),
        torch.zeros(12),
    )
    monkeypatch.setattr(concept_statistics, "read_concepts", lambda *arguments: read)
    first, second = catalog.contrast(model, tokenizer, ["a"] * 3, ["b"] * 3)
    assert (first.concept.id, second.concept.id) == (0, 1)
    assert (first.superiority, second.superiority) == (1, 1)
    assert second.effect_size == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "`texts` is empty"),
        ("one text", "`texts` is 'one text': give a list"),
        (["fine", None], "give a string or a list of strings"),
        (["fine", ""], r"`(texts|negative)\[1\]` is '', which has no tokens: leave empty texts out"),
        (["word " * 300], "has 30[01] tokens .*context holds 256: split the text"),
    ],
)
def test_texts_that_cannot_be_read(texts, message, model, catalog, tokenizer, monkeypatch):
    monkeypatch.setattr(model.transformer, "forward", None)  # nothing is computed before the error
    with pytest.raises(ValueError, match=message):
        catalog.active_in(model, tokenizer, texts)
    with pytest.raises(ValueError, match=message.replace("texts`", "negative`")):
        catalog.contrast(model, tokenizer, TEXTS, texts)


def test_numbers_that_make_no_sense(model, catalog, tokenizer):
    with pytest.raises(ValueError, match="`positive` has 1 text: give 2 or more"):
        catalog.contrast(model, tokenizer, TEXTS[:1], OTHERS)
    for call in (
        lambda: catalog.contrast(model, tokenizer, TEXTS, OTHERS, k=0),
        lambda: catalog.active_in(model, tokenizer, TEXTS, k=0),
        lambda: catalog.top_tokens(model, tokenizer, 0, k=0),
    ):
        with pytest.raises(ValueError, match="`k` is 0: choose 1 or more"):
            call()
    with pytest.raises(ValueError, match="`limit` is 0: choose 1 or more"):
        catalog.propose_labels(model, tokenizer, TEXTS, limit=0)


def test_heads_that_are_not_there(tiny_model, catalog, tokenizer):
    known_only = tiny_model(use_unknown=False)
    with pytest.raises(ValueError, match=f"{KNOWN} known and {UNKNOWN} discovered concepts, the model {KNOWN} and 0"):
        catalog.active_in(known_only, tokenizer, TEXTS)
    names = ConceptCatalog(catalog.filter("known"), n_known=KNOWN)
    assert len(names.fit(known_only.config)) == KNOWN
    assert names.active_in(known_only, tokenizer, TEXTS)[0]
    assert names.contrast(known_only, tokenizer, TEXTS, OTHERS)
    for call in (
        lambda: names.active_in(known_only, tokenizer, TEXTS, head="unknown"),
        lambda: names.propose_labels(known_only, tokenizer, TEXTS),
        lambda: concept_statistics.top_tokens(known_only, tokenizer, catalog[KNOWN]),
    ):
        with pytest.raises(ValueError, match="`head` is 'unknown', which `model` does not have; choose one of known"):
            call()
    with pytest.raises(ValueError, match="`model` has no concept heads"):
        names.active_in(tiny_model(interpretable=False), tokenizer, TEXTS)


def test_labels_of_another_model_are_refused(tiny_model, catalog, tokenizer):
    with pytest.raises(
        ValueError, match=r"20 known and 30 discovered concepts, the model 21 and 30: .*for_model\(model\)"
    ):
        catalog.contrast(tiny_model(n_concepts=21), tokenizer, TEXTS, OTHERS)


def test_a_catalog_for_a_model(nano, tiny_model):
    catalog, model, _ = nano
    assert (catalog.n_known, catalog.n_unknown, len(catalog)) == (60, 512, 572)
    assert catalog[571] == Concept(571, "unknown")
    with pytest.raises(ValueError, match="`model` was not loaded from anywhere: say in `source`"):
        ConceptCatalog.for_model(tiny_model())
    assert list(ConceptCatalog.for_model(model, "steerling-nano")) == list(catalog)


def test_half_precision(tiny_model, catalog, tokenizer):
    model = tiny_model().to(torch.bfloat16)
    assert len(catalog.top_tokens(model, tokenizer, KNOWN)) == 10
    assert all(row.weight > 0 for row in catalog.active_in(model, tokenizer, TEXTS)[2])
    assert len(catalog.contrast(model, tokenizer, TEXTS, OTHERS)) == 10


def test_nano_knows_what_a_text_is_about(nano):
    catalog, model, tokenizer = nano
    (found,) = catalog.active_in(
        model, tokenizer, ["Sadly, the gardener watered the rose in the garden."], head="known"
    )
    assert {"gardening", "home and household", "gloomy tone", "place"} == {row.concept.name for row in found[:4]}
    assert {" bed", "ener"} & {row.token for row in catalog.top_tokens(model, tokenizer, "gardening", k=20)}


def test_contrast_finds_nano_s_topics_and_tones(nano, monkeypatch, capsys):
    catalog, model, tokenizer = nano
    chosen = [1, 9, 16, 22, tone_concept("gloomy"), tone_concept("plain")]
    assert set(chosen) < set(evaluate_contrast.topics_and_tones())
    monkeypatch.setattr(evaluate_contrast, "topics_and_tones", lambda: chosen)
    ranks = evaluate_contrast.contrast_ranks(model, tokenizer, catalog, seed=7)
    assert list(ranks) == [CONCEPTS[i].concept_name for i in chosen]
    assert evaluate_contrast.top_share(ranks) == 1
    assert capsys.readouterr().out == ""  # stdout is for the JSON alone


def test_the_share_counts_the_first_three():
    ranks = {"a": 1, "b": 3, "c": 4, "d": None}
    assert evaluate_contrast.top_share(ranks) == 0.5
    assert len(evaluate_contrast.topics_and_tones()) == 28


def test_contrast_is_judged_on_text_that_training_never_saw():
    positive, negative = evaluate_contrast.held_out_texts(tone_concept("formal"), 20, seed=3)
    assert len(positive) == len(negative) == 20
    assert (positive, negative) != evaluate_contrast.held_out_texts(tone_concept("formal"), 20, seed=4)
    for text in positive + negative:
        assert all(is_reserved(sentence) for sentence in split_sentences(text)[0])


def test_names_are_proposed_for_what_concepts_are_about(nano):
    """Some discovered concept of steerling-nano counts and another one compares; the names say so."""
    catalog, model, tokenizer = nano
    rng = random.Random(5)
    texts = [
        chunk.text for _ in range(100) for chunk in evaluate_contrast.document(rng, "plain", held_out=True).chunks[:1]
    ]
    found = catalog.propose_labels(model, tokenizer, texts, limit=100)
    assert len(found) == 100
    weights = [proposal.weight for proposal in found]
    assert weights == sorted(weights, reverse=True)
    names = [set(proposal.words[:5]) for proposal in found]
    assert any(len(words & {"two", "three", "four", "five", "six", "seven", "ten", "twenty"}) >= 3 for words in names)
    assert any({"better", "than"} <= words for words in names)
    for proposal in found:
        assert not proposal.concept.name
        assert proposal.concept.head == "unknown"
        assert proposal.name == ", ".join(proposal.words[:3])
        assert proposal.tokens == tuple(row.token for row in catalog.top_tokens(model, tokenizer, proposal.concept))
        (strongest,) = catalog.active_in(model, tokenizer, proposal.texts[:1], k=572)
        assert {row.concept.id: row.weight for row in strongest}[proposal.concept.id] == pytest.approx(
            proposal.weight, abs=1e-4
        )


def test_proposals_are_for_the_unnamed(nano):
    catalog, model, tokenizer = nano
    texts = ["There were seven ships and two boats in the bay.", "The bad signals were better than the ticket office."]
    first, second = catalog.propose_labels(model, tokenizer, texts, limit=2)
    named = catalog.with_labels([dataclasses.replace(first.concept, name=first.name)])
    assert named[first.name].id == first.concept.id
    again = named.propose_labels(model, tokenizer, texts, limit=1)
    assert [proposal.concept for proposal in again] == [second.concept]
    assert named.propose_labels(model, tokenizer, texts, concepts=[first.name])[0].words == first.words
    with pytest.raises(ValueError, match="`concepts` has 'gardening', a known concept"):
        catalog.propose_labels(model, tokenizer, texts, concepts=["gardening"])


def test_a_proposal_weighs_words_as_its_docstring_says(model, catalog, tokenizer):
    (proposal,) = catalog.propose_labels(model, tokenizer, TEXTS, concepts=[KNOWN + 4])
    counted: dict[str, torch.Tensor] = {}
    pieces: dict[str, set[int]] = {}
    for text in TEXTS:
        words = {at: m.group().lower() for m in re.finditer("[A-Za-z]+", text) for at in range(*m.span())}
        end = 0
        for i, row in zip(tokenizer(text)["input_ids"], token_weights(model, tokenizer, text)[:, KNOWN:].double()):
            piece = tokenizer.decode([i])
            end += len(piece)
            if word := words.get(end - len(piece.lstrip())):
                counted[word] = counted.get(word, 0) + row
                pieces.setdefault(word, set()).add(i)
    table = torch.stack(list(counted.values()))  # words, concepts
    active = sum(token_weights(model, tokenizer, text)[:, KNOWN:].amax(0) for text in TEXTS) > 0
    mean_total = table.sum() / active.sum()
    frequency = table[:, 4] * torch.log(1 + mean_total / table.sum(1))
    scores = concept_statistics.vocabulary_scores(model, catalog[KNOWN + 4])
    mine = {w: (f.item(), scores[list(pieces[w])].max().item()) for w, f in zip(counted, frequency) if f > 0}
    ranks = [sorted(mine, key=lambda w: (-mine[w][i], w)) for i in (0, 1)]
    fused = {w: sum(1 / (61 + ranking.index(w)) for ranking in ranks) for w in mine}
    assert list(proposal.words) == sorted(fused, key=lambda w: (-fused[w], w))[:10]
