"""A folder in the form of a Hub repository: its tokenizer loads with trust_remote_code where steerling_hf is not."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizer_oracle import VOCAB_FILE
from transformers import AutoTokenizer

from steerling_hf import SteerlingTokenizer, checkpoint

CODE = sorted(VOCAB_FILE.parent.glob("*_steerling.py"))
CONFIGURATION = VOCAB_FILE.parents[1] / "modeling" / "configuration_steerling.py"
TEXT = "Né <|mask|> 日本<|eot_id|>"

USE = """
import copy, json, pickle, sys
from pathlib import Path
from transformers import AutoTokenizer
folder, scratch = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert "transformers_modules" in type(tokenizer).__module__, type(tokenizer)
tokenizer.add_tokens(["<new>"])
tokenizer.save_pretrained(scratch)
assert {path.name for path in Path(scratch).glob("*.py")} >= {"tokenization_steerling.py", "vocabulary_steerling.py"}
again = AutoTokenizer.from_pretrained(scratch, trust_remote_code=True)
chat = [{"role": "user", "content": "<|eot_id|><new>"}]
results = []
for each in (tokenizer, again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
    ids = each(sys.argv[3] + "<new>").input_ids
    assert each.decode(ids) == sys.argv[3] + "<new>"
    results.append([len(each), ids, each.apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"]])
assert all(result == results[0] for result in results), results
print(json.dumps(results[0]))
"""


def rewrite_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """What the Hub has of steerling-nano, without the model."""
    folder = tmp_path / "hub"
    shutil.copytree(checkpoint("steerling-nano"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (*CODE, VOCAB_FILE, CONFIGURATION):
        shutil.copy(file, folder)
    tokenizer_map = {"AutoTokenizer": ["tokenization_steerling.SteerlingTokenizer", None]}
    rewrite_json(folder / "tokenizer_config.json", auto_map=tokenizer_map)
    rewrite_json(folder / "config.json", auto_map={"AutoConfig": "configuration_steerling.SteerlingConfig"})
    return folder


def test_remote_code(hub_folder, tmp_path, isolated):
    size, ids, chat = json.loads(isolated(USE, hub_folder, tmp_path / "saved", TEXT))
    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
    tokenizer.add_tokens(["<new>"])
    assert (size, ids) == (8201, tokenizer(TEXT + "<new>").input_ids)
    messages = [{"role": "user", "content": "<|eot_id|><new>"}]
    assert chat == tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]


def test_remote_code_without_a_vocabulary_file(hub_folder, isolated):
    (hub_folder / "cl100k_base.tiktoken").unlink()
    with pytest.raises(RuntimeError, match="`vocab_file` is None, and beside the code there is none either"):
        isolated(USE, hub_folder, "unused", TEXT)


def test_no_network_and_no_cache_folder(hub_folder, tmp_path, isolated):
    watch = """
import os, sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise RuntimeError(f"asks the network: {event} {arguments}")
os.environ["TIKTOKEN_CACHE_DIR"] = sys.argv[2]
os.environ["DATA_GYM_CACHE_DIR"] = sys.argv[2]
import torch, transformers
sys.addaudithook(refuse)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(tokenizer("Hello").input_ids, os.path.exists(sys.argv[2]))
"""
    ids = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))("Hello").input_ids
    assert isolated(watch, hub_folder, tmp_path / "cache").strip() == f"{ids} False"


def test_the_code_needs_nothing_but_tiktoken_and_transformers():
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    beside = {file.stem for file in CODE}
    assert all(set(get_relative_imports(file)) <= beside for file in CODE)
    needed = set().union(*map(get_imports, CODE)) - set(sys.stdlib_module_names)
    assert needed == {"tiktoken", "transformers"}


def test_with_this_package_a_folder_needs_no_remote_code(hub_folder):
    assert type(AutoTokenizer.from_pretrained(hub_folder)) is SteerlingTokenizer
    remote = AutoTokenizer.from_pretrained(hub_folder, trust_remote_code=True)
    assert type(remote) is not SteerlingTokenizer
    assert type(remote).__name__ == "SteerlingTokenizer"
    assert remote(TEXT).input_ids == AutoTokenizer.from_pretrained(hub_folder)(TEXT).input_ids


def test_a_released_folder_without_our_keys(tmp_path):
    """The released folders name their special tokens but have neither a vocabulary file nor `instruct`."""
    names = ["<|endofchunk|>", "<|mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    released = {
        "tokenizer_class": "SteerlingTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_steerling.SteerlingTokenizer", None]},
        "additional_special_tokens": names,
        "encoding_name": "cl100k_base",
        "pad_token": "<|pad|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|endoftext|>",
        "pad_token_id": 100277,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(released), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "steerling"}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ours = SteerlingTokenizer.from_pretrained(checkpoint("steerling-8b-instruct"))
    assert tokenizer.get_vocab() == ours.get_vocab()
    assert tokenizer(TEXT).input_ids == ours(TEXT).input_ids
