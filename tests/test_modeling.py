"""The model's forward pass: masks, attention implementations, outputs, and heads that run only when they matter."""

import pytest
import torch
from safetensors import safe_open
from steerling_hf.modeling import concepts_steerling
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(8000, (3, 150), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, ids, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


def test_a_position_sees_its_block_and_earlier_ones(tiny_model, ids):
    model = tiny_model(diff_block_size=16)
    before = logits_of(model, ids)
    changed = ids.clone()
    changed[:, 40] = 8100  # in block 2, positions 32 to 47
    difference = (logits_of(model, changed) - before).abs().amax(dim=(0, 2))
    assert difference[:32].max() == 0
    assert difference[32:].min() > 0


@pytest.mark.compatibility
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementations_agree(attention, tiny_model, ids):
    model = tiny_model(diff_block_size=16)
    expected = logits_of(model, ids)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(logits_of(model, ids), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("side", "attention"),
    [("left", "sdpa"), ("right", "sdpa"), ("left", "eager"), ("right", "eager"), ("left", "flex_attention")],
)
def test_padding_changes_nothing(side, attention, tiny_model, ids):
    model = tiny_model(diff_block_size=16)
    rows = [ids[0], ids[1, :33], ids[2, :1]]
    expected = [logits_of(model, row[None])[0] for row in rows]
    model.set_attn_implementation(attention)
    width = max(map(len, rows))
    padded = torch.full((3, width), model.config.pad_token_id)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        padded[i, place], mask[i, place] = row, 1
    logits = logits_of(model, padded, attention_mask=mask)
    assert logits.isfinite().all()
    for i in range(len(rows)):
        torch.testing.assert_close(logits[i, mask[i].bool()], expected[i], **TOLERANCE)


def test_position_ids_place_a_row_on_the_grid(tiny_model, ids):
    model = tiny_model(diff_block_size=16)
    shifted = logits_of(model, ids[:1, :40], position_ids=torch.arange(8, 48)[None])
    expected = logits_of(model, torch.cat((ids[:1, :8], ids[:1, :40]), dim=1))
    mask = torch.cat((torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 40, dtype=torch.long)), dim=1)
    masked = logits_of(
        model, torch.cat((ids[:1, :8], ids[:1, :40]), dim=1), attention_mask=mask, position_ids=torch.arange(48)[None]
    )
    torch.testing.assert_close(masked[:, 8:], shifted, **TOLERANCE)
    assert (expected[:, 8:] - shifted).abs().max() > 0.01


@pytest.mark.compatibility
def test_a_cache_of_whole_blocks_is_exact(tiny_model, ids):
    model = tiny_model(diff_block_size=16)
    expected = logits_of(model, ids)
    with torch.no_grad():
        first = model(ids[:, :48], use_cache=True)
        rest = model(ids[:, 48:], cache=first.cache)
    torch.testing.assert_close(rest.logits, expected[:, 48:], **TOLERANCE)


@pytest.mark.compatibility
def test_gradient_checkpointing_gives_equal_gradients(tiny_model, ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, noise_mask=ids % 2 == 0).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert model.transformer.blocks[0].gradient_checkpointing is checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.compatibility
def test_hidden_states_and_attentions(tiny_model, ids):
    model = tiny_model(diff_block_size=16)
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True, output_concepts=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 150, 32)] * 3
    torch.testing.assert_close(output.hidden_states[-1], output.concepts.hidden)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 150, 150)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, 150))
    assert output.attentions[0][:, :, 0, 16:].max() == 0
    assert output.attentions[0][:, :, 0, :16].min() > 0


@pytest.mark.parametrize("keep", [1, 7, torch.tensor([0, 3, 149])], ids=["last", "some", "chosen"])
def test_logits_to_keep(keep, tiny_model, ids):
    model = tiny_model()
    columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    for concepts in (False, True):
        kept = logits_of(model, ids, logits_to_keep=keep, output_concepts=concepts)
        torch.testing.assert_close(kept, logits_of(model, ids)[:, columns], **TOLERANCE)


@pytest.mark.compatibility
def test_tuples_on_request(tiny_model, ids):
    model = tiny_model()
    torch.testing.assert_close(model(ids, return_dict=False)[0], model(ids).logits)


@pytest.mark.compatibility
def test_embeddings_in_place_of_ids(tiny_model, ids):
    model = tiny_model()
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(logits_of(model, None, inputs_embeds=embeddings), logits_of(model, ids))
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=embeddings)


@pytest.mark.parametrize("epsilon", [True, False])
@pytest.mark.parametrize("unknown", [True, False])
def test_the_parts_sum_to_what_the_vocabulary_reads(epsilon, unknown, tiny_model, ids):
    model = tiny_model(use_epsilon_correction=epsilon, use_unknown=unknown)
    with torch.no_grad():
        output = model(ids, output_concepts=True)
        concepts = output.concepts
        parts = concepts.known_features + concepts.unknown_features + concepts.epsilon
        torch.testing.assert_close(concepts.composed, parts, **TOLERANCE)
        torch.testing.assert_close(output.logits, model.get_output_embeddings()(parts), **TOLERANCE)
        if epsilon or not unknown:
            torch.testing.assert_close(concepts.composed, concepts.hidden, **TOLERANCE)
        else:
            assert concepts.epsilon.abs().max() == 0
        assert (concepts.unknown_indices is None) is not unknown


def test_features_are_the_weighted_sum_of_the_reported_concepts(tiny_model, ids):
    model = tiny_model()
    with torch.no_grad():
        concepts = model(ids, output_concepts=True).concepts
        for name, head in (("known", model.known_head), ("unknown", model.unknown_head)):
            weights, indices = concepts[f"{name}_weights"], concepts[f"{name}_indices"]
            logits = head.logits(concepts.hidden)
            assert logits.shape[-1] == head.n_concepts
            torch.testing.assert_close(weights, logits.gather(-1, indices).sigmoid(), **TOLERANCE)
            assert (weights.diff() <= 0).all()
            expected = (weights[..., None] * head.embeddings(indices)).sum(-2)
            torch.testing.assert_close(concepts[f"{name}_features"], expected, **TOLERANCE)


def test_heads_run_only_when_something_depends_on_them(tiny_model, ids):
    calls = []

    def spy(model):
        for head in (model.known_head, model.unknown_head):
            head._query = lambda x, f=head._query: calls.append(x.shape) or f(x)
        return model

    logits_of(spy(tiny_model()), ids)
    assert not calls
    logits_of(spy(tiny_model()), ids, output_concepts=True)
    assert len(calls) == 2
    calls.clear()
    logits_of(spy(tiny_model(use_epsilon_correction=False)), ids, logits_to_keep=2)
    assert calls == [(6, 32), (6, 32)]


@pytest.mark.parametrize("head", ["known_head", "unknown_head"])
def test_a_users_hook_on_a_head_reaches_the_logits(head, tiny_model, ids):
    model = tiny_model()
    expected = logits_of(model, ids)
    direction = torch.randn(32)

    def push(module, inputs, output):
        output.features = output.features + direction
        return output

    handle = getattr(model, head).register_forward_hook(push)
    pushed = logits_of(model, ids)
    shift = model.get_output_embeddings()(direction)
    torch.testing.assert_close(pushed, expected + shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, ids, output_concepts=True), pushed, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(logits_of(model, ids), expected)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        output = function(*arguments, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("topk", [8, None])
def test_scores_of_a_large_head_never_exist_as_a_whole(topk, factorized, tiny_model, ids, monkeypatch):
    concepts, chunk = 100_000, 1000
    monkeypatch.setattr(concepts_steerling, "GATHER_BUDGET", 400 * chunk)
    model = tiny_model(
        n_unknown_concepts=concepts, unknown_topk=topk, concept_block_size=chunk, factorize_unknown=factorized
    )
    state = torch.randn(1, 400, 32)
    with LargestTensor() as largest, torch.no_grad():
        model.unknown_head(state)
    table = concepts * (8 if factorized else 32)
    assert largest.elements <= max(400 * chunk, table)
    assert largest.elements < 400 * concepts / 10


@pytest.mark.parametrize("topk_on_logits", [True, False])
def test_the_strongest_are_the_same_however_the_table_is_cut(topk_on_logits, tiny_model, monkeypatch):
    model = tiny_model(
        n_unknown_concepts=5000,
        unknown_topk=40,
        concept_block_size=512,
        factorize_unknown=False,
        topk_on_logits=topk_on_logits,
    )
    state = torch.randn(3, 7, 32)
    with torch.no_grad():
        whole = model.unknown_head(state)
        monkeypatch.setattr(concepts_steerling, "GATHER_BUDGET", 1)
        pieces = model.unknown_head(state)
        best = model.unknown_head.logits(state).sigmoid().topk(40)
    for found in (whole, pieces):
        torch.testing.assert_close(found.weights, best.values)
        assert torch.equal(found.indices, best.indices)
        torch.testing.assert_close(found.features, whole.features)


def test_padded_rows_of_a_table_never_take_part(tiny_model, ids):
    model = tiny_model(pad_multiple=32, topk_known=20, topk_known_features=20)
    expected = model(ids, output_concepts=True).concepts
    with torch.no_grad():
        for table in (model.known_head.concept_predictor, model.known_head.concept_embedding):
            assert table.weight.shape[0] == 32
            table.weight[20:] = 100.0
    concepts = model(ids, output_concepts=True).concepts
    assert concepts.known_indices.max() < 20
    torch.testing.assert_close(concepts.known_features, expected.known_features)


def test_adapters_of_a_bare_backbone_are_left_to_the_library(tiny_model, tmp_path, monkeypatch):
    """Which picks their weights from the model's own names, and finds none among renamed ones."""
    given = []
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda self, folder, main=True, weights=None: given.append(weights)
    )
    model = tiny_model(interpretable=False)
    model.save_pretrained(tmp_path)
    model._hf_peft_config_loaded = True  # as add_adapter() leaves it
    model.save_pretrained(tmp_path)
    renamed, own = given
    assert "tok_emb.weight" in renamed
    assert own is None


@pytest.mark.compatibility
@pytest.mark.parametrize("tied", [True, False])
def test_the_bare_backbone_has_no_heads_and_no_prefix(tied, tiny_model, ids, tmp_path):
    model = tiny_model(interpretable=False, weight_sharing=tied)
    with pytest.raises(ValueError, match="no concept heads"):
        model(ids, output_concepts=True)
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"tok_emb.weight", "blocks.1.attn.c_attn.weight", "ln_f.weight"} <= names
    assert ("lm_head.weight" in names) is not tied
    assert not any(name.startswith("transformer.") for name in names)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path), ids), expected)


@pytest.mark.compatibility
def test_fresh_weights_follow_the_configuration(tiny_model):
    model = tiny_model(n_layers=8, initializer_range=0.5)
    block = model.transformer.blocks[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.5 / 4, rel=0.1)
    assert model.known_head.concept_embedding.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tiny_model(weight_sharing=False).transformer.lm_head.weight is not tiny_model().transformer.tok_emb.weight


def test_concept_labels_need_labels(tiny_model, ids):
    with pytest.raises(ValueError, match="`concept_labels` without `labels`"):
        tiny_model()(ids, concept_labels=ids[..., None])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cache", "computed as a whole"),
        ("inputs_embeds", "in place of prompt tuning.*use LoRA"),
        ("output_concepts", "losses alone"),
        ("output_attentions", "more keys than tokens"),
    ],
)
def test_what_a_loss_cannot_take_is_refused(tiny_model, ids, name, reason):
    given = {
        "cache": DynamicCache(),
        "inputs_embeds": torch.zeros(*ids.shape, 32),
        "output_concepts": True,
        "output_attentions": True,
    }
    with pytest.raises(ValueError, match=f"`{name}` cannot be given with `labels`: .*{reason}"):
        tiny_model()(None if name == "inputs_embeds" else ids, labels=ids, **{name: given[name]})


def test_half_precision_does_not_round_positions(tiny_model):
    """Whichever way a model comes to it: with rounded frequencies, late positions are turned by other angles."""
    model = tiny_model()
    positions = torch.tensor([[0, 100, 4000]])
    expected = model.transformer.rotary_emb(positions)
    torch.testing.assert_close(model.to(torch.bfloat16).transformer.rotary_emb(positions), expected)


@pytest.mark.compatibility
def test_resizing_the_vocabulary(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(8210, mean_resizing=False)
    assert model(torch.tensor([[8205]])).logits.shape == (1, 1, 8210)
