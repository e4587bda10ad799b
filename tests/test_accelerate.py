"""Loading under accelerate: device maps, offloading, and modules that stay in one piece."""

import pytest
import torch
from steerling_hf.modeling.steering_steerling import Condition, Imitate, Inject, SetConcepts, SuppressTokens

from steerling_hf import SteerlingForDiffusionLM


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Folder of a tiny model in which every variant of access to a table occurs, and its outputs."""
    model = tiny_model(n_layers=3, use_attention_known=True, use_epsilon_correction=False)
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    ids = torch.randint(8000, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return tmp_path / "model", ids, model(ids, output_concepts=True)


def assert_equal_outputs(model, ids, expected):
    with torch.no_grad():
        output = model(ids, output_concepts=True)
        plain = model(ids).logits
    torch.testing.assert_close(output.logits.cpu(), expected.logits)
    torch.testing.assert_close(plain.cpu(), expected.logits)
    assert torch.equal(output.concepts.unknown_indices.cpu(), expected.concepts.unknown_indices)
    assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 74)


def test_device_map_auto(saved):
    folder, ids, expected = saved
    assert_equal_outputs(SteerlingForDiffusionLM.from_pretrained(folder, device_map="auto"), ids, expected)


@pytest.mark.parametrize("on_disk", ["blocks", "heads"])
def test_a_split_between_cpu_and_disk(on_disk, saved, tmp_path, library_warnings):
    folder, ids, expected = saved
    blocks = {"transformer.blocks.0": "cpu", "transformer.blocks.1": "disk", "transformer.blocks.2": "disk"}
    device_map = {
        "transformer.tok_emb": "cpu",
        "transformer.lm_head": "cpu",
        "transformer.ln_f": "cpu",
        "transformer.blocks": "cpu",
        "known_head": "disk" if on_disk == "heads" else "cpu",
        "unknown_head": "disk" if on_disk == "heads" else "cpu",
    }
    if on_disk == "blocks":
        del device_map["transformer.blocks"]
        device_map |= blocks
    model = SteerlingForDiffusionLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    part = "transformer.blocks.1" if on_disk == "blocks" else "known_head"
    assert any(name.startswith(part) for name in offloaded)
    assert_equal_outputs(model, ids, expected)
    assert all("on the meta device because they were offloaded" in message for message in library_warnings)
    library_warnings.clear()


@pytest.mark.parametrize("on_disk", ["transformer", "heads"])
def test_steering_of_offloaded_weights(on_disk, saved, tmp_path, library_warnings):
    """The embedding table too is on no device then, and the model has none that inputs could go to."""
    folder, ids, _ = saved
    heads = (
        {"known_head": "disk", "unknown_head": "cpu"}
        if on_disk == "heads"
        else {"known_head": "cpu", "unknown_head": "disk"}
    )
    device_map = {"transformer": "disk" if on_disk == "transformer" else "cpu", "residual": "cpu", **heads}
    loaded = SteerlingForDiffusionLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    library_warnings.clear()
    whole = SteerlingForDiffusionLM.from_pretrained(folder)
    plain = whole.generate(ids, max_new_tokens=8)
    injection = Inject((3, 25), 30.0, condition=Condition(4, 1e-6))
    for operation in (injection, SuppressTokens(25), SetConcepts((3, 25), 2.0), Imitate((5, 6))):
        steered = whole.generate(ids, max_new_tokens=8, steering=operation)
        assert not torch.equal(steered, plain), operation
        assert torch.equal(loaded.generate(ids, max_new_tokens=8, steering=operation), steered), operation
        with loaded.steer(operation), whole.steer(operation), torch.no_grad():
            masked = torch.where(torch.arange(70) > 60, loaded.config.mask_token_id, ids)
            torch.testing.assert_close(loaded(masked).logits, whole(masked).logits)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8), plain)


def test_little_memory_at_loading(saved):
    folder, ids, expected = saved
    assert_equal_outputs(SteerlingForDiffusionLM.from_pretrained(folder, low_cpu_mem_usage=True), ids, expected)


def test_blocks_and_heads_are_never_split(tiny_model):
    from accelerate import infer_auto_device_map

    model = tiny_model(n_layers=4, n_unknown_concepts=5000, factorize_unknown=False)
    splits = set()
    for budget in range(1_060_000, 2_700_000, 20_000):
        device_map = infer_auto_device_map(
            model, max_memory={"cpu": budget, "disk": 10**9}, no_split_module_classes=model._no_split_modules
        )
        splits.add(tuple(device_map.values()))
        for name in device_map:
            assert not (name.startswith("transformer.blocks.") and name.count(".") > 2)
            assert "head." not in name
    assert len(splits) > 3
