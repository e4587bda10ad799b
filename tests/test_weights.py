"""Weights are checked from their headers before anything is written: what is broken is told by name."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from steerling_hf.weights import check_shapes, find_weights, read_shapes


@pytest.fixture
def sharded(tmp_path, tiny_model) -> Path:
    """A folder with the weights of a tiny model in several shards."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_reads_names_and_shapes_of_a_whole_checkpoint(sharded, tiny_config):
    shapes = read_shapes(find_weights(sharded))
    assert shapes["transformer.tok_emb.weight"] == (8200, 32)
    check_shapes(shapes, tiny_config(), sharded)


def test_a_single_file_needs_no_index(tmp_path, tiny_model, tiny_config):
    tiny_model().save_pretrained(tmp_path)
    files = find_weights(tmp_path)
    assert [file.name for file in files] == ["model.safetensors"]
    check_shapes(read_shapes(files), tiny_config(), tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights; expected model.safetensors"):
        find_weights(tmp_path)


def test_missing_shard_is_named(sharded):
    shard = first_shard(sharded)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        find_weights(sharded)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_shard(sharded, kept):
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model-00001.*truncated"):
        read_shapes(find_weights(sharded))


def test_a_file_that_is_no_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((3).to_bytes(8, "little") + b"???")
    with pytest.raises(ValueError, match="header is not readable"):
        read_shapes(find_weights(tmp_path))


def test_index_and_shards_that_disagree(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.extra.weight"] = first_shard(sharded).name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'transformer.extra.weight' is in .*no shard holds it"):
        read_shapes(find_weights(sharded))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_cannot_be_read(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="not a safetensors index"):
        find_weights(sharded)


def test_a_tensor_in_two_shards(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match="which model-00001-of"):
        read_shapes(find_weights(sharded))


def test_weights_of_another_configuration(sharded, tiny_config):
    shapes = read_shapes(find_weights(sharded))
    with pytest.raises(ValueError, match=r"has shape \(32, 32\) in the weights, but config.json asks for \(48, 32\)"):
        check_shapes(shapes, tiny_config(n_concepts=40), sharded)
    with pytest.raises(ValueError, match=r"lack 'transformer.blocks.2"):
        check_shapes(shapes, tiny_config(n_layers=3), sharded)


@pytest.mark.compatibility
@pytest.mark.parametrize("kept", ["transformer.lm_head.weight", "transformer.tok_emb.weight"])
def test_either_of_the_tied_tensors_is_enough(tiny_model, tmp_path, kept):
    model = tiny_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {"transformer.lm_head.weight", "transformer.tok_emb.weight"}
    one = {name: shape for name, shape in shapes.items() if name not in tied - {kept}}
    check_shapes(one, model.config, tmp_path)
    none = {name: shape for name, shape in shapes.items() if name not in tied}
    with pytest.raises(ValueError, match="lack 'transformer.tok_emb.weight'"):
        check_shapes(none, model.config, tmp_path)


@pytest.mark.compatibility
def test_a_bare_backbone_may_lack_the_prefix(tiny_model, tmp_path):
    model = tiny_model(interpretable=False)
    bare = {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(bare, tmp_path / "model.safetensors")
    check_shapes(read_shapes(find_weights(tmp_path)), model.config, tmp_path)
