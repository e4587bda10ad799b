"""PEFT, as it is: adapters are trained, merged, saved and loaded, tied weights stay tied or are stored apart."""

import pytest
import torch

from steerling_hf import SteerlingForDiffusionLM

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(8000, (2, 40), generator=torch.Generator().manual_seed(3))


def adapted(model, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["c_attn"], "r": 4, **options}))


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, noise_mask=IDS % 2 == 0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_again(model, folder) -> SteerlingForDiffusionLM:
    model.save_pretrained(folder)
    return SteerlingForDiffusionLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("interpretable", [True, False])
def test_adapters_are_trained_merged_saved_and_loaded(interpretable, tiny_model, tmp_path):
    model = tiny_model(interpretable=interpretable)
    before = model(IDS).logits
    trained = adapted(model)
    train(trained)
    expected = trained.eval()(input_ids=IDS).logits
    assert (expected - before).abs().max() > 0.1
    trained.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(interpretable=interpretable), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(saved_again(merged, tmp_path / "merged")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["tok_emb"], "ensure_weight_tying": True},
        {"trainable_token_indices": [int(token) for token in IDS.unique()[:9]]},
    ],
)
def test_a_tied_head_follows_what_is_trained_of_the_embedding(options, tiny_model, tmp_path):
    trained = adapted(tiny_model(), **options)
    train(trained)
    expected = trained.eval()(input_ids=IDS).logits
    merged = trained.merge_and_unload()
    assert merged.config.weight_sharing
    assert torch.equal(merged.transformer.lm_head.weight, merged.transformer.tok_emb.weight)
    torch.testing.assert_close(saved_again(merged, tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpretable", [True, False])
def test_a_head_that_was_trained_apart_is_not_lost(interpretable, tiny_model, tmp_path):
    trained = adapted(tiny_model(interpretable=interpretable), modules_to_save=["tok_emb", "lm_head"])
    train(trained)
    merged = trained.eval().merge_and_unload()
    expected = merged(IDS).logits
    again = saved_again(merged, tmp_path)
    assert not again.config.weight_sharing
    assert not torch.equal(again.transformer.lm_head.weight, again.transformer.tok_emb.weight)
    torch.testing.assert_close(again(IDS).logits, expected)


@pytest.mark.parametrize("part", ["model", "backbone"])
def test_a_head_that_was_untied_by_hand_is_stored_with_a_warning(part, tiny_model, tmp_path):
    model = tiny_model()
    model.transformer.lm_head.weight = torch.nn.Parameter(model.transformer.lm_head.weight * 2)
    whole = model if part == "model" else model.transformer
    with pytest.warns(UserWarning, match="it now says tie_word_embeddings=False"):
        whole.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, model.transformer.lm_head.weight)
    assert not again.config.weight_sharing


def test_adapters_of_single_rows_are_refused_in_generate(tiny_model):
    model = adapted(tiny_model()).eval()
    model.add_adapter("other", peft.LoraConfig(target_modules=["c_attn"], r=2))
    with pytest.raises(ValueError, match="`adapter_names` cannot be given to generate"):
        model.generate(input_ids=IDS, max_new_tokens=2, adapter_names=["default", "other"])
    assert model(input_ids=IDS, adapter_names=["default", "other"]).logits.shape == (2, 40, 8200)
    assert model.generate(input_ids=IDS, max_new_tokens=2).shape == (2, 42)
