"""Embeddings and concept vectors: the reference's numbers, whoever shares the batch, and errors that say what to do."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.cases import case_named, make_input, make_weights, recorded_positions
from reference.compare import TOLERANCE, relative_difference
from reference.folders import write_folder
from safetensors.torch import load_file

from steerling_hf import SteerlingForDiffusionLM, embeddings
from steerling_hf.embeddings import KINDS, ConceptVectors, concept_vectors, embed

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))

import evaluate_embeddings
from grammar import is_reserved
from parser import split_sentences

OUTPUTS = Path(__file__).parent / "reference" / "outputs"
KNOWN, UNKNOWN = 20, 30
TEXTS = [
    "The gardener watered the new rose.",
    "Rain.",
    "Seven banks closed before noon, and the lawyer said that " + "nobody was to blame for it, " * 12,
    "A pilot<|endofchunk|> and a sailor.",
    "What a joy!",
]


class Numbers:
    """A tokenizer of texts that are written as ids: "3 5 7"."""

    def __call__(self, texts, add_special_tokens=True, **kwargs):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_states_of_a_text_keep_no_others_in_memory(tiny_model, tokenizer):
    for states in embed(tiny_model(), tokenizer, TEXTS, pooling="none"):
        assert states.untyped_storage().nbytes() == states.nbytes


@pytest.mark.parametrize(
    "name",
    ["released", "released_without_epsilon", "unknown_off", "all_unknown_factorised", "gpt_like", "bare_backbone"],
)
def test_equals_the_recorded_reference_beside_shorter_texts(name, tmp_path):
    case, theirs = case_named(name), load_file(OUTPUTS / f"{name}.safetensors")
    model = SteerlingForDiffusionLM.from_pretrained(
        write_folder(tmp_path, case.config, make_weights(case.config, case.seed, case.weight_gain))
    )
    rows = make_input(case).tolist()
    texts = [" ".join(map(str, row)) for row in [[1, 2, 3], *rows, [4]]]
    if name == "unknown_off":  # the reference then calls "unknown" what the known concepts leave
        theirs["unknown"] = theirs["hidden"] - theirs["known"]
    kinds = KINDS if case.config["interpretable"] else ("hidden",)
    for kind in kinds:
        ours = embed(model, Numbers(), texts, kind, pooling="none", batch_size=len(texts))[1:-1]
        assert relative_difference(torch.stack(ours)[:, recorded_positions(case)], theirs[kind]) < TOLERANCE, kind


def test_pooling(tiny_model, tokenizer):
    model = tiny_model()
    states = embed(model, tokenizer, TEXTS, pooling="none")
    for text, state in zip(TEXTS, states):
        hidden = model.transformer(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
        torch.testing.assert_close(state, hidden, rtol=0, atol=1e-5)
    for pooling, expected in {
        "mean": [state.sum(0) / len(state) for state in states],
        "first": [state[0] for state in states],
        "last": [state[-1] for state in states],
    }.items():
        pooled = embed(model, tokenizer, TEXTS, pooling=pooling)
        torch.testing.assert_close(pooled, torch.stack(expected), rtol=0, atol=1e-5)
        unit = embed(model, tokenizer, TEXTS, pooling=pooling, normalize=True)
        torch.testing.assert_close(unit, pooled / pooled.norm(dim=1, keepdim=True))
    for unit in embed(model, tokenizer, TEXTS, pooling="none", normalize=True):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(unit)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_text_does_not_depend_on_its_batch(kind, attention, tiny_model, tokenizer):
    model = tiny_model()
    model.set_attn_implementation(attention)
    alone = torch.stack([embed(model, tokenizer, text, kind) for text in TEXTS])
    assert alone.unique(dim=0).shape == (len(TEXTS), model.config.n_embd)
    for batch_size in (1, 2, 3, 32):
        together = embed(model, tokenizer, TEXTS, kind, batch_size=batch_size)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_one_text_no_texts_and_texts_cut_short(tiny_model, tokenizer):
    model = tiny_model()
    assert embed(model, tokenizer, TEXTS[0]).shape == (32,)
    assert embed(model, tokenizer, "Rain.", pooling="none").shape == (len(tokenizer("Rain.")["input_ids"]), 32)
    assert embed(model, tokenizer, []).shape == (0, 32)
    assert embed(model, tokenizer, [], pooling="none") == []
    assert concept_vectors(model, tokenizer, []).weights.shape == (0, KNOWN + UNKNOWN)
    long = "nobody was to blame for it, " * 100
    cut = embed(model, tokenizer, [long, "Rain."], pooling="none", max_length=9)
    assert [len(states) for states in cut] == [9, len(tokenizer("Rain.")["input_ids"])]
    beginning = tokenizer.decode(tokenizer(long, verbose=False)["input_ids"][:9])
    torch.testing.assert_close(cut[0].mean(0), embed(model, tokenizer, beginning), rtol=0, atol=1e-5)


def refuse(*args, **kwargs):
    raise AssertionError("this module was not needed")


def test_texts_come_in_any_collection(tiny_model, tokenizer):
    model, texts = tiny_model(), ["Rain.", "The gardener watered the new rose."]
    expected = embed(model, tokenizer, texts)
    for same in (np.array(texts), (text for text in texts), dict.fromkeys(texts)):
        assert torch.equal(embed(model, tokenizer, same), expected)


def test_only_the_heads_that_a_kind_needs_run(tiny_model, tokenizer, monkeypatch):
    model = tiny_model()
    expected = {kind: embed(model, tokenizer, TEXTS, kind) for kind in KINDS}
    parts = {"known": model.known_head, "unknown": model.unknown_head, "vocabulary": model.transformer.lm_head}
    for kind in KINDS:
        with monkeypatch.context() as patch:
            for name, module in parts.items():
                if name != kind:
                    patch.setattr(module, "forward", refuse)
            assert torch.equal(embed(model, tokenizer, TEXTS, kind), expected[kind])
    monkeypatch.setattr(model.unknown_head, "forward", refuse)
    assert concept_vectors(model, tokenizer, TEXTS, top_unknown=0).ids.max() < KNOWN


@pytest.mark.parametrize("epsilon", [True, False])
def test_composed_is_what_the_vocabulary_projection_reads(epsilon, tiny_model, tokenizer):
    model = tiny_model(use_epsilon_correction=epsilon)
    model.known_head.register_forward_hook(
        lambda module, args, output: type(output)(2 * output.features, output.indices, output.weights)
    )
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    expected = model(**inputs, output_concepts=True).concepts.composed[0].detach()
    torch.testing.assert_close(embed(model, tokenizer, TEXTS[0], pooling="none"), expected, rtol=0, atol=1e-5)


def test_leaves_the_model_as_it_was(tiny_model, tokenizer, monkeypatch):
    model = tiny_model().train()
    model.transformer.blocks[0].eval()
    model.activation_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    seen = []
    model.transformer.ln_f.register_forward_hook(lambda module, *_: seen.append(module.training))
    found = embed(model, tokenizer, TEXTS)
    concept_vectors(model, tokenizer, TEXTS)
    assert seen == [False, False]
    assert not found.requires_grad
    assert not found.is_inference()
    with monkeypatch.context() as patch:
        patch.setattr(model.transformer.ln_f, "forward", refuse)
        with pytest.raises(AssertionError, match="not needed"):
            embed(model, tokenizer, TEXTS)
    assert [module.training for module in model.modules()] == modes
    model(**tokenizer(TEXTS[0], return_tensors="pt"), output_concepts=True).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.transformer.parameters())


def test_half_precision_is_pooled_in_single(tiny_model, tokenizer):
    model = tiny_model()
    precise = embed(model, tokenizer, TEXTS)
    model.bfloat16()
    for kind in KINDS:
        found = embed(model, tokenizer, TEXTS, kind)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
    assert relative_difference(embed(model, tokenizer, TEXTS), precise) < 0.05
    assert concept_vectors(model, tokenizer, TEXTS).weights.dtype == torch.float32


def test_weights_are_pooled_in_single_precision_whatever_the_default_and_autocast(tiny_model, tokenizer):
    model, texts = tiny_model(), ["Rain.", "The gardener watered the new rose."]
    expected = concept_vectors(model, tokenizer, texts)
    torch.set_default_dtype(torch.float64)
    try:
        again = concept_vectors(model, tokenizer, texts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.weights.dtype == torch.float32
    torch.testing.assert_close(again.weights, expected.weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert concept_vectors(model, tokenizer, texts).weights.dtype == torch.float32


@pytest.mark.parametrize("on_disk", ["transformer", "known_head"])
def test_offloaded_weights(on_disk, tiny_model, tokenizer, tmp_path, library_warnings):
    whole = tiny_model()
    whole.save_pretrained(tmp_path / "model")
    parts = ("transformer", "known_head", "unknown_head", "residual")
    model = SteerlingForDiffusionLM.from_pretrained(
        tmp_path / "model",
        device_map={part: "disk" if part == on_disk else "cpu" for part in parts},
        offload_folder=tmp_path / "offload",
    )
    library_warnings.clear()
    assert any(parameter.device.type == "meta" for parameter in model.get_submodule(on_disk).parameters())
    for kind in KINDS:
        torch.testing.assert_close(embed(model, tokenizer, TEXTS, kind), embed(whole, tokenizer, TEXTS, kind))
    ours, theirs = concept_vectors(model, tokenizer, TEXTS), concept_vectors(whole, tokenizer, TEXTS)
    assert torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.weights, theirs.weights)


@torch.no_grad()
def mean_weights(model, tokenizer, text: str) -> torch.Tensor:
    """(concepts,) mean weights of one text, from the logits of all concepts."""
    hidden = model.transformer(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    columns = []
    for head in (model.known_head, model.unknown_head):
        if head is not None:
            weights = head.logits(hidden).sigmoid()
            if head.topk is not None:
                weights[weights < weights.topk(head.topk_features).values[:, -1:]] = 0
            columns.append(weights.mean(0))
    return torch.cat(columns)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"topk_known_features": 2},
        {"topk_known_features": 7},
        {"apply_topk_to_unknown": False},
        {"use_unknown": False},
        {"use_attention_unknown": True, "factorize_unknown": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("tops", [(32, 128), (3, 5)])
def test_concept_vectors_against_the_same_done_slowly(config, tops, tiny_model, tokenizer):
    model = tiny_model(**config)
    vectors = concept_vectors(model, tokenizer, TEXTS, *tops, batch_size=2)
    size = KNOWN if model.unknown_head is None else KNOWN + UNKNOWN
    assert vectors.size == size
    assert len(vectors) == len(TEXTS)
    for row, text in enumerate(TEXTS):
        wanted = mean_weights(model, tokenizer, text)
        for part, top in zip(wanted.split(KNOWN if size == KNOWN else [KNOWN, UNKNOWN]), tops):
            if top < len(part):
                part[part < part.topk(top).values[-1]] = 0
        wanted /= wanted.norm()
        torch.testing.assert_close(vectors.to_dense()[row], wanted, rtol=0, atol=1e-5)


def test_concept_vectors_are_in_order_and_filled_up(tiny_model, tokenizer):
    model = tiny_model()
    vectors = concept_vectors(model, tokenizer, TEXTS, top_known=10, top_unknown=12)
    for ids, weights in zip(vectors.ids.tolist(), vectors.weights):
        assert all(i < KNOWN for i in ids[:10])
        assert all(KNOWN <= i < KNOWN + UNKNOWN or i == -1 for i in ids[10:])
        assert [i for i, weight in zip(ids, weights.tolist()) if weight == 0] == [i for i in ids if i == -1]
        for part in (weights[:10], weights[10:]):
            assert torch.equal(part, part.sort(descending=True).values)
    one = concept_vectors(model, tokenizer, "Rain", top_known=10, top_unknown=12)
    tokens = len(tokenizer("Rain")["input_ids"])
    assert (one.ids >= 0).sum() <= (4 + 6) * tokens
    assert one.ids[0, -1] == -1


def test_similarity(tiny_model, tokenizer, monkeypatch):
    model = tiny_model()
    vectors, others = (concept_vectors(model, tokenizer, texts) for texts in (TEXTS, TEXTS[:2]))
    monkeypatch.setattr(embeddings, "SCORE_BUDGET", KNOWN + UNKNOWN)  # one of the others at a time
    found = vectors.similarity(others)
    torch.testing.assert_close(found, vectors.to_dense() @ others.to_dense().T)
    assert found.shape == (len(TEXTS), 2)
    assert (found >= 0).all()
    assert (found <= 1).all()
    torch.testing.assert_close(vectors.similarity(vectors).diagonal(), torch.ones(len(TEXTS)))
    apart = ConceptVectors(torch.tensor([[1, -1], [2, -1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 5)
    assert torch.equal(apart.similarity(apart), torch.eye(2))
    with pytest.raises(ValueError, match="`other` is over 5 concepts, these vectors over 50"):
        vectors.similarity(apart)


LONG = "nobody was to blame for it, " * 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "logits"}, "`kind` is 'logits': choose from 'hidden', 'composed', 'known', 'unknown'"),
        ({"pooling": "max"}, "`pooling` is 'max': choose from 'mean', 'first', 'last', 'none'"),
        ({"texts": ["Rain.", ""]}, r"`texts\[1\]` is '', which has no tokens"),
        ({"texts": ""}, r"`texts\[0\]` is '', which has no tokens"),
        ({"texts": ["Rain.", LONG]}, r"`texts\[1\]` has \d+ tokens .*context holds 256.*`max_length`"),
        ({"texts": ["Rain.", 5]}, "`texts` is .*: give a string or a list of strings"),
        ({"max_length": 257}, "`max_length` is 257: the model's context holds no more than 256"),
        ({"max_length": 0}, "`max_length` is 0: choose 1 or more"),
        ({"batch_size": 0}, "`batch_size` is 0: choose 1 or more"),
    ],
)
def test_errors_come_before_any_work(changes, message, tiny_model, tokenizer, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.transformer, "forward", refuse)
    with pytest.raises(ValueError, match=message):
        embed(model, tokenizer, **{"texts": TEXTS, **changes})
    if not {"kind", "pooling"} & changes.keys():
        with pytest.raises(ValueError, match=message):
            concept_vectors(model, tokenizer, **{"texts": TEXTS, **changes})


def test_models_without_the_heads_that_are_asked_for(tiny_model, tokenizer):
    bare = tiny_model(interpretable=False)
    assert torch.equal(embed(bare, tokenizer, TEXTS), embed(bare, tokenizer, TEXTS, "hidden"))
    for kind in ("known", "unknown"):
        with pytest.raises(ValueError, match=f"`kind` is '{kind}', but `model` has no concept heads"):
            embed(bare, tokenizer, TEXTS, kind)
    with pytest.raises(ValueError, match="`model` has no concept heads"):
        concept_vectors(bare, tokenizer, TEXTS)
    for tops in ((0, 5), (0, 0), (-1, 5)):
        with pytest.raises(ValueError, match=f"`top_known` is {tops[0]} and `top_unknown` is {tops[1]}: keep 1"):
            concept_vectors(tiny_model(use_unknown=False), tokenizer, TEXTS, *tops)


def test_a_bar_only_where_it_is_asked_for(tiny_model, tokenizer, capsys):
    model = tiny_model()
    embed(model, tokenizer, TEXTS)
    assert capsys.readouterr().err == ""
    embed(model, tokenizer, TEXTS, progress=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_neighbours_of_nano_are_held_out_and_counted():
    texts, topics = evaluate_embeddings.held_out_chunks(40)
    assert len(set(texts)) == len(topics) == 40
    assert all(is_reserved(sentence) for text in texts for sentence in split_sentences(text)[0])
    similarity = torch.tensor([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.1], [0.1, 0.3, 1.0, 0.2], [0.2, 0.1, 0.0, 1.0]])
    assert evaluate_embeddings.shared_by_neighbours(similarity, ["sea", "sea", "sea", "law"]) == 0.75
