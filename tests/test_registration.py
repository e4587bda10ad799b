"""After `import steerling_hf` the Auto classes know Steerling, with no trust_remote_code."""

import json
import subprocess
import sys

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

import steerling_hf
from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM, SteerlingTokenizer

MODEL_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM)


def test_every_public_name_is_there():
    for name in steerling_hf.__all__:
        assert getattr(steerling_hf, name) is not None
    assert set(steerling_hf.__all__) <= set(dir(steerling_hf))


@pytest.mark.parametrize("name", steerling_hf.checkpoint_names())
def test_configurations_and_tokenizers_of_ours_load(name):
    folder = steerling_hf.checkpoint(name)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(config) is SteerlingConfig
    assert type(tokenizer) is SteerlingTokenizer
    assert len(tokenizer) == config.vocab_size
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
        assert getattr(tokenizer, key) == getattr(config, key), key


def test_an_unknown_checkpoint_is_told():
    with pytest.raises(ValueError, match=r"`name` is 'steerling-9b'.* choose one of steerling-8b, "):
        steerling_hf.checkpoint("steerling-9b")


@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
@pytest.mark.parametrize("older", [False, True])
def test_models_load_in_both_forms(auto_class, older, tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    if older:
        path = tmp_path / "config.json"
        values = json.loads(path.read_text())
        concept = {key: values.pop(key) for key in ("n_concepts", "n_unknown_concepts", "factorize_rank")}
        path.write_text(json.dumps({**values, "model_type": "causal_diffusion", "concept": concept}))
    assert type(auto_class.from_pretrained(tmp_path)) is SteerlingForDiffusionLM
    assert type(auto_class.from_config(model.config)) is SteerlingForDiffusionLM


def test_the_package_wins_over_a_folders_code(exported_folder):
    config = AutoConfig.from_pretrained(exported_folder, trust_remote_code=True)
    assert type(config) is SteerlingConfig
    for auto_class in MODEL_CLASSES:
        model = auto_class.from_pretrained(exported_folder, trust_remote_code=True)
        assert type(model) is SteerlingForDiffusionLM
    assert type(AutoTokenizer.from_pretrained(exported_folder)) is SteerlingTokenizer


def test_what_is_saved_loads_where_the_package_is_not(tiny_model, tokenizer, isolated, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=4).shape[0])
"""
    assert isolated(code, tmp_path).strip() == "1"


def test_a_released_configuration_that_names_foreign_code_loads_with_ours(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    foreign = {"AutoConfig": "configuration_steerling.SteerlingConfig", "AutoModel": "modeling.SteerlingForCausalLM"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": foreign}))
    assert type(AutoModel.from_pretrained(tmp_path)) is SteerlingForDiffusionLM


def test_importing_is_enough_in_a_fresh_interpreter():
    code = (
        "import steerling_hf; from transformers import AutoConfig; "
        "print(AutoConfig.from_pretrained(steerling_hf.checkpoint('steerling-8b')).model_type)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "steerling"
