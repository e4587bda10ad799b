"""Weights that are quantised when a model is loaded, by each library that transformers hands them to."""

import pytest
import torch
from generation_model import make_model, make_prompt
from steering_cases import OPERATIONS
from steerling_hf.modeling.attribution_steerling import vocabulary_rows
from steerling_hf.modeling.packing_steerling import multiply
from steerling_hf.modeling.quantized_steerling import is_opaque, is_quantized
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from steerling_hf import attribute_inputs, checkpoint, embed, explain


def torchao(make, **settings):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(make(quantization), **settings)


def bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


def quanto(**settings):
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(**settings)


METHODS = {
    "bitsandbytes 8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4 bits": lambda: bitsandbytes(load_in_4bit=True),
    "torchao int8": lambda: torchao(lambda ao: ao.Int8WeightOnlyConfig()),
    "torchao int8 of states too": lambda: torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
    "torchao int4": lambda: torchao(
        lambda ao: ao.IntxWeightOnlyConfig(torch.int4, granularity=ao.granularity.PerGroup(32))
    ),
    "quanto int8": lambda: quanto(weights="int8"),
}
# Their products are those of a dense weight, within rounding.
WEIGHT_ONLY = ("torchao int8", "torchao int4", "quanto int8")
PROMPT = make_prompt(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "plain"
    make_model(n_embd=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def load(folder, method, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=METHODS[method]())


def linear_layers(model) -> dict[str, nn.Module]:
    """The layers that multiply with a matrix in the blocks of a backbone."""
    return {
        name: module
        for name, module in model.transformer.blocks.named_modules()
        if name.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")
    }


@torch.no_grad()
def dense_twin(model, folder):
    """A model without quantisation whose weights are what those of `model` stand for."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    own = linear_layers(twin)
    for name, layer in linear_layers(model).items():
        own[name].weight.copy_(layer(torch.eye(own[name].in_features, dtype=model.dtype)).T)
    return twin


def test_linear_layers_are_what_quantisers_convert(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {type(layer) for layer in (*linear_layers(model).values(), model.transformer.lm_head)} == {nn.Linear}
    assert not [part for head in model.concept_heads() for part in head.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_linear_layer_of_the_blocks_is_converted_and_nothing_else(folder, method, dtype):
    plain, model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), load(folder, method, dtype)
    layers = linear_layers(model)
    assert len(layers) == 2 * 4
    assert all(is_quantized(layer.weight) for layer in layers.values())
    exact = {name: weight for name, weight in plain.state_dict().items() if ".blocks." not in name}
    found = model.state_dict()
    for name, weight in exact.items():
        assert torch.equal(found[name], weight), name
    states = torch.randn(3, 64, dtype=dtype)
    for head, other in zip(model.concept_heads(), plain.concept_heads()):
        assert torch.equal(head(states).indices, other(states).indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_quantised_model_generates_decomposes_and_attributes(folder, method, dtype):
    model = load(folder, method, dtype)
    output = model.generate(
        PROMPT, max_new_tokens=24, output_attributions=True, return_dict_in_generate=True, do_sample=False
    )
    assert torch.equal(model.generate(PROMPT, max_new_tokens=24, do_sample=False), output.sequences)
    found = output.attributions
    parts = found.known_contributions.sum(-1) + found.unknown_contributions.sum(-1) + found.residual
    torch.testing.assert_close(parts, found.logits)
    assert model(PROMPT, output_concepts=True).concepts.composed.dtype == dtype
    static = model.generate(PROMPT, max_new_tokens=8, cache_implementation="static")
    assert static.shape == (1, 13)
    if method in WEIGHT_ONLY and dtype == torch.float32:
        assert torch.equal(
            dense_twin(model, folder).generate(PROMPT, max_new_tokens=24, do_sample=False), output.sequences
        )


def test_every_operation_steers_a_quantised_model(folder, method):
    model, twin = load(folder, method), None
    if method in WEIGHT_ONLY:
        twin = dense_twin(model, folder)
    for name, operation in OPERATIONS.items():
        output = model.generate(PROMPT, max_new_tokens=16, steering=operation, return_dict_in_generate=True)
        assert len(output.steering) or name not in ("amplify", "suppress"), name
        if twin is not None:
            assert torch.equal(twin.generate(PROMPT, max_new_tokens=16, steering=operation), output.sequences), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_a_product_are_those_of_its_weight(folder, method, dtype):
    layer = load(folder, method, dtype).transformer.blocks[0].mlp.c_fc
    weight = layer(torch.eye(64, dtype=dtype)).T.float().detach()  # bitsandbytes may pack its 4 bits here
    states, wanted = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True), torch.randn(2, 3, 256, dtype=dtype)
    found = torch.autograd.grad(multiply(layer, states), states, wanted)[0].float()
    assert (found - wanted.float() @ weight).norm() < 0.02 * found.norm()


def test_inputs_of_a_quantised_model_are_attributed_as_those_of_its_dense_twin(folder, method):
    pytest.importorskip("captum")
    model = load(folder, method)
    output = model.generate(PROMPT, max_new_tokens=8, return_dict_in_generate=True)
    scores = attribute_inputs(model, output.traces[0], n_steps=8).scores
    expected = attribute_inputs(dense_twin(model, folder), output.traces[0], n_steps=8).scores
    assert scores.abs().max() > 0
    assert (scores - expected).norm() < (1e-3 if method in WEIGHT_ONLY else 0.3) * expected.norm()


@pytest.mark.parametrize("method", ["bitsandbytes 4 bits", "torchao int8", "quanto int8"])
def test_a_quantised_model_is_explained(tokenizer, method):
    pytest.importorskip("captum")
    model = load(checkpoint(), method)
    assert explain(model, tokenizer, "The gardener", max_new_tokens=4, seed=0).chunks
    assert embed(model, tokenizer, ["a rose"]).isfinite().all()


def test_a_quantised_model_is_saved_and_loaded_or_says_why_not(folder, method, tmp_path):
    model = load(folder, method)
    if method.startswith("quanto"):
        with pytest.raises(ValueError, match="by quanto cannot be saved: save the model as it is before"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        return
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(is_quantized(layer.weight) for layer in linear_layers(again).values())
    wanted = model.generate(PROMPT, max_new_tokens=16, do_sample=False)
    assert torch.equal(again.generate(PROMPT, max_new_tokens=16, do_sample=False), wanted)


UNTIED = {
    "bitsandbytes 8 bits": lambda: bitsandbytes(load_in_8bit=True, llm_int8_skip_modules=["none"]),
    "bitsandbytes 4 bits": lambda: bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["none"]),
    "torchao int8 of states too": lambda: torchao(
        lambda ao: ao.Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=["none"]
    ),
    "quanto int8": lambda: quanto(weights="int8", modules_to_not_convert=["none"]),
}


@pytest.mark.parametrize("method", UNTIED)
def test_rows_of_a_vocabulary_that_the_user_has_quantised(method, tmp_path):
    make_model(n_embd=64, intermediate_size=128, weight_sharing=False).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=UNTIED[method]())
    lm_head, tokens = model.transformer.lm_head, torch.tensor([4, 90, 4])
    assert is_quantized(lm_head.weight)
    with torch.no_grad():
        weight = lm_head(torch.eye(64, dtype=torch.bfloat16)).T.float()
    torch.testing.assert_close(vocabulary_rows(lm_head, tokens), weight[tokens], atol=0.02, rtol=0.02)
    assert not any(part.isnan().any() for part in model.known_head.forward(torch.randn(2, 64).bfloat16()).values())
    output = model.generate(
        PROMPT,
        max_new_tokens=16,
        steering=OPERATIONS["amplify"],
        output_attributions=True,
        return_dict_in_generate=True,
    )
    assert output.attributions.logits.isfinite().all()


class Adapted(nn.Module):
    """As adapters do: a frozen layer and something beside it that is trained."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.beside = base, nn.Linear(64, 256)

    def forward(self, states):
        return self.base(states) + self.beside(states)


def test_training_beside_a_layer_that_loses_gradients_is_refused(folder):
    model = load(folder, "torchao int8 of states too")
    states = torch.randn(2, 64, requires_grad=True)
    layer = Adapted(model.transformer.blocks[0].mlp.c_fc)
    assert is_opaque(layer, states)
    with pytest.raises(ValueError, match=r"No gradients come through a quantised layer .*Adapted.* to train"):
        multiply(layer, states)
    layer = layer.requires_grad_(False)
    weight = layer(torch.eye(64)) - layer(torch.zeros(1, 64))
    found = torch.autograd.grad(multiply(layer, states).sum(), states)[0]
    torch.testing.assert_close(found[0], weight.sum(-1), atol=1e-3, rtol=1e-3)
    layer.base.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be used under hooks"):
        multiply(layer, states)


def test_four_bits_that_were_packed_can_be_trained_beside_after_the_remedy(folder):
    model = load(folder, "bitsandbytes 4 bits")
    model.generate(PROMPT, max_new_tokens=8)
    layer, states = model.transformer.blocks[0].mlp.c_fc, torch.randn(2, 64, requires_grad=True)
    packed = is_opaque(layer, states)
    model.train()
    model.state_dict()
    assert not is_opaque(layer, states)
    found = torch.autograd.grad(multiply(Adapted(layer), states).sum(), states)[0]
    if packed:
        assert found.abs().max() > 0
