"""The export: whole or not at all, from each kind of source, and everything that is wrong is told before it writes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import steerling_hf.exporting
from steerling_hf import SteerlingConfig, SteerlingTokenizer, checkpoint, export
from steerling_hf.exporting import AUTO_MAP
from steerling_hf.isolation import run_isolated

VOCABULARY = "cl100k_base.tiktoken"


@pytest.fixture
def released(tmp_path, tiny_model) -> Path:
    """A folder as the released checkpoints have it: config.json and shards, no vocabulary, no code."""
    folder = tmp_path / "released"
    model = tiny_model()
    model.save_pretrained(folder, max_shard_size="60KB")
    values = model.config.to_dict()
    values.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(values))
    for extra in [*folder.glob("*.py"), folder / "generation_config.json"]:
        extra.unlink()
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "steerling-tiny"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_nothing_written(out: Path) -> None:
    assert not any(out.parent.iterdir())


# What it writes


def test_writes_a_flat_hub_folder(tiny_model, out):
    model = tiny_model()
    assert export(model, out) == out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
        VOCABULARY,
        *(
            path.name
            for folder in ("modeling", "tokenization")
            for path in (Path(steerling_hf.__file__).parents[1] / folder).glob("*_steerling.py")
        ),
    }
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["SteerlingForDiffusionLM"]
    assert config["dtype"] == "float32"
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_steerling.SteerlingTokenizer", None]}
    assert not [name for name in names if (out / name).stat().st_mode & 0o600 != 0o600]


@pytest.mark.compatibility
def test_a_model_in_memory_comes_back_equal(tiny_model, out):
    model = tiny_model().bfloat16()
    export(model, out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_released_folder(released, out, tokenizer):
    export(released, out)
    assert [path.name for path in shards(out)] == [path.name for path in shards(released)]
    assert (out / "model.safetensors.index.json").is_file()
    text = "The gardener watered the roses."
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == tokenizer(text).input_ids
    a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in (released, out))
    ids = torch.arange(10)[None]
    assert torch.equal(a(ids).logits, b(ids).logits)


def test_the_older_nested_form_becomes_flat(released, out):
    path = released / "config.json"
    values = json.loads(path.read_text())
    nested = {"block_size": values.pop("concept_block_size")}
    nested |= {key: values.pop(key) for key in ("n_concepts", "topk_known", "n_unknown_concepts", "factorize_rank")}
    path.write_text(json.dumps({**values, "model_type": "causal_diffusion", "concept": nested}))
    export(released, out)
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "steerling"
    assert "concept" not in written
    config = SteerlingConfig.from_pretrained(out)
    assert (config.n_concepts, config.topk_known, config.n_unknown_concepts, config.factorize_rank) == (20, 4, 30, 8)


@pytest.mark.parametrize("name", ["steerling-8b", "steerling-8b-instruct"])
def test_a_configuration_of_ours_without_weights(name, out):
    export(name, out)
    assert not shards(out)
    assert SteerlingConfig.from_pretrained(out).to_dict().items() >= {"n_layers": 32, "n_concepts": 33732}.items()
    assert (out / "chat_template.jinja").is_file() == name.endswith("instruct")
    assert f"guidelabs/{name}" in (out / "README.md").read_text()
    config = SteerlingConfig.from_pretrained(out)
    tokenizer = SteerlingTokenizer.from_pretrained(out)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.mask_token_id == config.mask_token_id


def test_weights_from_another_folder(released, out):
    bare = released.parent / "bare"
    bare.mkdir()
    shutil.copy(released / "config.json", bare)
    export(bare, out, weights=released)
    assert len(shards(out)) == len(shards(released))


def test_an_export_can_be_exported(tiny_model, tmp_path):
    first = export(tiny_model(), tmp_path / "first")
    second = export(first, tmp_path / "second", repo_id="owner/second")
    for path in first.iterdir():
        if path.name != "README.md":
            assert (second / path.name).read_bytes() == path.read_bytes(), path.name
    assert "owner/second" in (second / "README.md").read_text()


def test_links_by_default_copies_when_asked_or_when_it_must(released, tmp_path, monkeypatch):
    linked = export(released, tmp_path / "linked")
    copied = export(released, tmp_path / "copied", copy=True)

    def refuse(*args):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    fallen_back = export(released, tmp_path / "fallen_back")
    for a, b, c, d in zip(*map(shards, (released, linked, copied, fallen_back)), strict=True):
        assert a.samefile(b)
        assert not a.samefile(c)
        assert not a.samefile(d)
        assert a.read_bytes() == c.read_bytes() == d.read_bytes()


@pytest.fixture
def cached(tiny_model, tmp_path) -> Path:
    """A snapshot as the Hub's cache has it: links to `../../blobs`."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f2e", tmp_path / "models--a--b" / "blobs"
    export(tiny_model(), tmp_path / "plain")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "plain" / "concept_labels.json").write_text("[]")
    for number, file in enumerate((tmp_path / "plain").iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_links_reach_through_the_hub_caches_symbolic_links(cached, out):
    export(cached, out)
    weights = out / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.samefile(cached / "model.safetensors")
    assert (out / "concept_labels.json").read_text() == "[]"


SECRET = "a secret"


@pytest.mark.parametrize(
    "name",
    [
        "concept_labels.json",
        "evaluation.json",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer_config.json",
        "cl100k_base.tiktoken",
        "model.safetensors",
        "config.json",
        "special_tokens_map.json",
    ],
)
@pytest.mark.parametrize("leads", ["to a file", "up", "through a folder", "nowhere", "in a circle", "from a snapshot"])
def test_no_link_out_of_the_folder_is_followed(tiny_model, cached, tmp_path, out, name, leads):
    source = tmp_path / "stranger"
    export(tiny_model(), source)
    secret = tmp_path / "elsewhere" / name
    secret.parent.mkdir()
    secret.write_text(SECRET)
    if name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, secret)  # what is read first must not look wrong for another reason
    target: Path = {
        "to a file": secret,
        "up": Path("..", "elsewhere", name),
        "through a folder": source / "inner" / name,
        "nowhere": tmp_path / "missing",
        "in a circle": source / name,
        "from a snapshot": secret,
    }[leads]
    (source / "inner").symlink_to(secret.parent)
    if leads == "from a snapshot":  # a cache that only looks like one: its blobs are elsewhere
        source = cached
        blobs = source.parents[1] / "blobs"
        (blobs / "99").symlink_to(secret)
        target = blobs / "99"
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(target)
    with pytest.raises(
        (ValueError, FileNotFoundError),
        match=f"{name.split('.')[0]}.* link that leads nowhere|{name}.* link that leaves|no config.json",
    ):
        export(source, out)
    assert_nothing_written(out)


def test_a_folder_that_is_a_link_is_no_way_out(tiny_model, tmp_path, out):
    source, secret = export(tiny_model(), tmp_path / "stranger"), tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "tool.jinja").write_text(SECRET)
    (source / "additional_chat_templates").symlink_to(secret)
    with pytest.raises(ValueError, match="additional_chat_templates is a link that leaves its folder"):
        export(source, out)
    (source / "additional_chat_templates").unlink()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").symlink_to(secret / "tool.jinja")
    with pytest.raises(ValueError, match=r"tool\.jinja is a link that leaves its folder"):
        export(source, out)
    assert_nothing_written(out)


def test_blobs_that_are_a_link_are_no_way_out(cached, tmp_path, out):
    blobs = cached.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link that leaves its folder"):
        export(cached, out)


def test_links_within_a_folder_and_to_a_folder_are_followed(released, tmp_path, out):
    labels = "[]"
    (released / "labels").write_text(labels)
    (released / "concept_labels.json").symlink_to("labels")
    (tmp_path / "alias").symlink_to(released)
    export(tmp_path / "alias", out)
    assert (out / "concept_labels.json").read_text() == labels
    assert not (out / "concept_labels.json").is_symlink()


def test_labels_of_a_model_in_memory_follow_no_link_either(tiny_model, released, tmp_path, out):
    (tmp_path / "secret").write_text(SECRET)
    (released / "concept_labels.json").symlink_to(tmp_path / "secret")
    model = AutoModelForCausalLM.from_pretrained(released)
    with pytest.raises(ValueError, match="concept_labels.json is a link that leaves"):
        export(model, out)
    assert_nothing_written(out)


@pytest.mark.parametrize(
    "repo_id",
    [
        "",
        "a/b/c",
        "/a",
        "a/",
        "../a",
        "a b",
        'a"); import os',
        "a\nb",
        "-a",
        "a..b",
        "x" * 97,
        "a.git",
        5,
        "é/b",
        "a/b\0",
    ],
)
def test_a_repository_needs_a_name(tiny_model, out, monkeypatch, repo_id):
    monkeypatch.setattr(steerling_hf.exporting, "_from_model", None)  # before any work
    with pytest.raises(ValueError, match="`repo_id` is "):
        export(tiny_model(), out, repo_id=repo_id)
    assert_nothing_written(out)


def test_a_folder_whose_name_is_no_repositorys(tiny_model, out):
    card = (export(tiny_model(), out.with_name('odd "name"; (2)')) / "README.md").read_text()
    assert 'from_pretrained("odd-name-2"' in card


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ('{"loss": "<script>"}', "'loss' is '<script>'"),
        ('{"a|b](http://x)": 1.0}', "is no name of a measure"),
        ('{"loss": NaN}', "NaN"),
        ("[1]", "holds no object of measures"),
        ("{", "holds no object of measures"),
    ],
)
def test_measures_are_numbers(released, out, evaluation, words):
    (released / "evaluation.json").write_text(evaluation)
    with pytest.raises(ValueError, match=f"evaluation.json.*{re.escape(words)}"):
        export(released, out)
    assert_nothing_written(out)


def test_passwords_stay_out_of_a_check(tiny_model, out, monkeypatch):
    """What a failed check prints becomes an error, so the interpreter that checks has no passwords."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    monkeypatch.setenv("HARMLESS", "here")
    with pytest.raises(RuntimeError) as caught:
        run_isolated("import os; raise ValueError(dict(os.environ))")
    assert SECRET not in str(caught.value)
    assert "here" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": 5}, "`source` is 5"),
        ({"source": ""}, "`source` is ''"),
        ({"folder": None}, "`folder` is None"),
        ({"folder": "a\0b"}, "`folder` is"),
        ({"weights": 5}, "`weights` is 5"),
        ({"copy": "no"}, "`copy` is 'no'"),
        ({"check": 1}, "`check` is 1"),
    ],
)
def test_wrong_arguments_are_named(out, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        export(**{"source": "steerling-nano", "folder": out, **change})
    assert_nothing_written(out)


def test_saving_into_an_export_leaves_the_linked_source_alone(released, out):
    before = [path.read_bytes() for path in shards(released)]
    export(released, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.transformer.tok_emb.weight.zero_()
    model.save_pretrained(out, max_shard_size="60KB")
    assert [path.read_bytes() for path in shards(released)] == before


def test_labels_and_results_travel(released, out):
    (released / "concept_labels.json").write_text("[]")
    (released / "evaluation.json").write_text('{"parse_greedy": 0.5}')
    export(released, out)
    assert (out / "concept_labels.json").read_text() == "[]"
    assert "| parse_greedy | 0.5 |" in (out / "README.md").read_text()


def test_labels_of_a_model_in_memory_come_from_where_it_was_loaded(tiny_model, released, out, tmp_path, monkeypatch):
    (released / "concept_labels.json").write_text("[]")
    (released / "evaluation.json").write_text("{}")
    monkeypatch.chdir(released)  # which is nowhere for a model that was made
    export(tiny_model(), out)
    assert not (out / "concept_labels.json").exists()
    export(AutoModelForCausalLM.from_pretrained(released), tmp_path / "again")
    assert (tmp_path / "again" / "concept_labels.json").read_text() == "[]"
    assert not (tmp_path / "again" / "evaluation.json").exists()


def test_check_loads_the_result_elsewhere(tiny_model, out):
    export(tiny_model(), out, check=True)
    assert out.is_dir()


def test_check_of_an_export_without_weights(out):
    export("steerling-8b", out, check=True)
    assert out.is_dir()


# What it refuses, leaving nothing behind


def test_a_failed_check_leaves_nothing(tiny_model, out, monkeypatch):
    monkeypatch.setattr(steerling_hf.exporting, "AUTO_MAP", {**AUTO_MAP, "AutoModel": "modeling_steerling.Missing"})
    with pytest.raises(RuntimeError, match=r"(?s)does not load on its own.*Missing"):
        export(tiny_model(), out, check=True)
    assert_nothing_written(out)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_or_an_interrupt_midway_leaves_nothing(tiny_model, out, monkeypatch, error):
    def fail(*args, **kwargs):
        assert any(out.parent.iterdir())
        raise error

    monkeypatch.setattr(steerling_hf.exporting, "render_card", fail)
    with pytest.raises(type(error)):
        export(tiny_model(), out)
    assert_nothing_written(out)


def test_a_terminated_command_leaves_nothing(released, out):
    code = """
import sys, time
import steerling_hf.exporting
def stall(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(60)
steerling_hf.exporting.render_card = stall
from steerling_hf.cli import main
sys.exit(main(["export", *sys.argv[1:]]))
"""
    arguments = [sys.executable, "-c", code, str(released), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert any(out.parent.iterdir())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert_nothing_written(out)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_target(tiny_model, out, kind):
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[kind]()
    with pytest.raises(FileExistsError, match=r"`folder` is .*steerling-tiny', which exists; choose another name"):
        export(tiny_model(), out)


def test_a_target_without_parent(tiny_model, out):
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        export(tiny_model(), out / "below" / "deep")
    assert_nothing_written(out)


def test_a_parent_that_cannot_be_written_to(tiny_model, out, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # root may write everywhere, so chmod would show nothing
    with pytest.raises(PermissionError, match="cannot be written to"):
        export(tiny_model(), out)
    assert_nothing_written(out)


def test_a_source_that_is_nowhere(out):
    with pytest.raises(FileNotFoundError, match=r"'steerling-9b', which is no folder; .*one of .*steerling-8b"):
        export("steerling-9b", out)
    assert_nothing_written(out)


def test_a_source_without_config(released, out):
    (released / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        export(released, out)
    assert_nothing_written(out)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_cannot_be_read(released, out, text):
    (released / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: not a JSON object"):
        export(released, out)
    assert_nothing_written(out)


def test_a_config_of_another_model(released, out):
    (released / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"`model_type` is 'bert'; only Steerling"):
        export(released, out)
    assert_nothing_written(out)


def test_a_config_with_an_impossible_value(released, out):
    values = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps({**values, "n_layers": 0}))
    with pytest.raises(ValueError, match="`n_layers` is 0"):
        export(released, out)
    assert_nothing_written(out)


def test_another_model_in_memory(out):
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="`source` is a BertModel; only Steerling"):
        export(model, out)
    assert_nothing_written(out)


def test_weights_beside_a_model_in_memory(tiny_model, out):
    with pytest.raises(ValueError, match=r"`weights` is .* brings its own; leave it out"):
        export(tiny_model(), out, weights="somewhere")
    assert_nothing_written(out)


def test_a_truncated_shard(released, out):
    shard = shards(released)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name}.*truncated"):
        export(released, out)
    assert_nothing_written(out)


def test_a_missing_shard(released, out):
    shard = shards(released)[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        export(released, out)
    assert_nothing_written(out)


def test_a_folder_without_weights(released, out):
    for path in released.glob("model*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        export(released, out)
    assert_nothing_written(out)


def test_weights_of_another_size(released, out):
    with pytest.raises(ValueError, match=r"lack|has shape"):
        export("steerling-8b", out, weights=released)
    assert_nothing_written(out)


def test_a_wrong_vocabulary(tiny_model, tmp_path, out):
    source = export(tiny_model(), tmp_path / "source")
    with (source / VOCABULARY).open("ab") as file:
        file.write(b"eA== 100256\n")
    with pytest.raises(ValueError, match="sha256"):
        export(source, out)
    assert_nothing_written(out)


def test_a_model_with_several_ends_of_text(tiny_model, out):
    """Of which the tokenizer has one."""
    nano = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
    export(tiny_model(eos_token_id=[nano.eos_token_id, 8199]), out, tokenizer=nano)
    assert SteerlingConfig.from_pretrained(out).eos_token_id == [nano.eos_token_id, 8199]


def test_a_tokenizer_with_other_ids(released, tiny_model, out):
    base = SteerlingTokenizer.from_pretrained(checkpoint("steerling-8b"))
    with pytest.raises(ValueError, match="`tokenizer` has 100,281 ids, but `vocab_size` is 8,200"):
        export(released, out, tokenizer=base)
    other_ids = tiny_model(mask_token_id=8199, eot_id=8196)
    with pytest.raises(ValueError, match="`tokenizer` is None"):
        export(other_ids, out)
    nano = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
    with pytest.raises(ValueError, match="`tokenizer` has mask_token_id 8196, but the configuration says 8199"):
        export(other_ids, out, tokenizer=nano)
    assert_nothing_written(out)
