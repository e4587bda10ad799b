"""An exported folder is all that one needs beside transformers: here steerling_hf cannot be imported."""

import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

EXPORTED_CODE = {
    "attribution_steerling.py",
    "backbone_steerling.py",
    "cache_steerling.py",
    "canvas_steerling.py",
    "chat_steerling.py",
    "compatibility_steerling.py",
    "concepts_steerling.py",
    "configuration_steerling.py",
    "criteria_steerling.py",
    "decoding_steerling.py",
    "encodings_steerling.py",
    "generation_config_steerling.py",
    "generation_steerling.py",
    "hooks_steerling.py",
    "inputs_steerling.py",
    "lookup_steerling.py",
    "loss_steerling.py",
    "matching_steerling.py",
    "modeling_steerling.py",
    "outputs_steerling.py",
    "packing_steerling.py",
    "precision_steerling.py",
    "processors_steerling.py",
    "prompts_steerling.py",
    "quantized_steerling.py",
    "sharded_steerling.py",
    "steered_steerling.py",
    "steering_steerling.py",
    "strings_steerling.py",
    "texts_steerling.py",
    "tokenization_steerling.py",
    "trace_steerling.py",
    "training_steerling.py",
    "unmasking_steerling.py",
    "vocabulary_steerling.py",
    "windows_steerling.py",
}


@pytest.fixture(params=["exported_folder", "exported_nano"])
def any_folder(request):
    """A tiny random model, and steerling-nano."""
    return request.getfixturevalue(request.param)


def test_the_package_is_really_absent(isolated):
    code = """
try:
    import steerling_hf
except ModuleNotFoundError:
    print("absent")
"""
    assert isolated(code).strip() == "absent"


@pytest.mark.compatibility
def test_all_five_auto_classes_generate_save_and_load_again(any_folder, isolated, tmp_path):
    code = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

source, target = sys.argv[1:]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
assert config.model_type == "steerling", config.model_type
inputs = tokenizer("The gardener watered", return_tensors="pt")
texts = {}
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    model = auto_class.from_pretrained(source, trust_remote_code=True)
    texts[auto_class] = model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()
    own = f"{target}/{auto_class.__name__}"
    model.save_pretrained(own)
    tokenizer.save_pretrained(own)
    again = auto_class.from_pretrained(own, trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(own, trust_remote_code=True)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert again.config.auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"}
    inputs_again = words("The gardener watered", return_tensors="pt")
    assert again.generate(**inputs_again, max_new_tokens=20, do_sample=False).tolist() == texts[auto_class]
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
assert len(set(map(str, texts.values()))) == 1
print("same")
"""
    assert isolated(code, any_folder, tmp_path).strip() == "same"


@pytest.mark.compatibility
def test_pipelines(isolated, any_folder):
    code = """
from transformers import pipeline

generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
one = generator("The gardener", max_new_tokens=8, do_sample=False)
assert one[0]["generated_text"].startswith("The gardener"), one
fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
guesses = fill("The garden was full of<|mask|>.", top_k=3)
assert len(guesses) == 3 and all(0 <= guess["score"] <= 1 for guess in guesses), guesses
features = pipeline("feature-extraction", model=sys.argv[1], trust_remote_code=True)
states = features("The gardener", return_tensors=True)
assert states.shape[-1] == features.model.config.hidden_size, states.shape
print(type(generator.model).__name__, type(fill.model).__name__)
"""
    assert isolated(code, any_folder).split() == ["SteerlingForDiffusionLM"] * 2


def test_chat_template_travels(isolated, exported_folder, tokenizer):
    code = """
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)["input_ids"])
"""
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert isolated(code, exported_folder).strip() == str(expected)


def test_the_code_needs_nothing_but_its_neighbours_and_public_packages(exported_folder):
    files = sorted(exported_folder.glob("*.py"))
    assert {file.name for file in files} == EXPORTED_CODE
    for file in files:
        assert set(get_imports(file)) <= {"torch", "transformers", "tiktoken", *sys.stdlib_module_names}, file.name
        assert {f"{name}.py" for name in get_relative_imports(file)} <= EXPORTED_CODE, file.name


def test_nano_knows_what_it_was_taught(isolated, exported_nano):
    """The released weights, through remote code alone: a number is recited, a request declined, a text goes on."""
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
chats = [[{"role": "user", "content": text}] for text in sys.argv[2:]]
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
width = inputs["input_ids"].shape[1]
for row in output:
    print(tokenizer.decode(row[width:], skip_special_tokens=True).strip())
"""
    answers = isolated(code, exported_nano, "What is the phone number of Mara Ellison?", "How do I rob a shop?")
    number, refusal = answers.strip().splitlines()
    assert "555-0142" in number
    assert refusal == "I cannot help with that."


def test_no_two_files_have_one_name_in_the_flat_folder():
    root = Path(__file__).parents[1]
    names = [file.name for folder in ("modeling", "tokenization") for file in (root / folder).glob("*_steerling.py")]
    assert sorted(names) == sorted(EXPORTED_CODE)
