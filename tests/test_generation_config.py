"""SteerlingGenerationConfig: where its values come from and how it is stored; and the library's tools around it."""

import json
import re
import threading

import pytest
import torch
from generation_model import BOS, EOS, MASK, PAD, TURN, VOCABULARY, make_model, make_prompt
from steerling_hf.modeling.generation_config_steerling import SteerlingGenerationConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from steerling_hf import SteerlingTokenizer, checkpoint

OWN = {
    "steps": 6,
    "unmasking": "threshold",
    "threshold": 0.7,
    "align_blocks": True,
    "entropy_temperature": True,
    "seed": 5,
}


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokenizer():
    """Words w0 to w89, one token each."""
    names = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", MASK: "<mask>", TURN: "<turn>"}
    words = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, padding_side="left", **special)


def forwards(model, **settings) -> int:
    """Forward passes that a generation of 12 tokens takes."""
    output = model.generate(make_prompt(9), max_new_tokens=12, return_dict_in_generate=True, **settings)
    return round(12 / output.tokens_per_forward.item())


def test_without_a_file_rows_end_with_a_turn_or_not_at_all(tmp_path):
    for turn in (None, TURN):
        make_model(eot_id=turn).save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        config = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
        assert type(config) is SteerlingGenerationConfig
        assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (turn, PAD, BOS)


def test_own_keys_survive_saving_and_loading(model, tmp_path):
    model.generation_config = SteerlingGenerationConfig(**OWN, do_sample=True, top_p=0.8, max_new_tokens=12)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: stored[key] for key in OWN} == OWN
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is SteerlingGenerationConfig
    assert loaded.generation_config == model.generation_config
    assert torch.equal(loaded.generate(make_prompt(9)), model.generate(make_prompt(9)))


def test_own_keys_survive_the_mark_of_a_derived_configuration(model, tmp_path):
    """The library drops what it does not know from a file that says `_from_model_config`."""
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({**OWN, "_from_model_config": True}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert {key: getattr(loaded, key) for key in OWN} == OWN


def test_what_is_unset_is_not_stored(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored.keys() == {"pad_token_id", "bos_token_id", "transformers_version"}


def test_a_configuration_given_to_from_pretrained_is_used(model, tmp_path):
    model.save_pretrained(tmp_path)
    for given in (SteerlingGenerationConfig(max_new_tokens=3, seed=1), GenerationConfig(max_new_tokens=3)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, generation_config=given)
        assert type(loaded.generation_config) is SteerlingGenerationConfig
        assert loaded.generation_config.seed == getattr(given, "seed", None)
        assert loaded.generate(make_prompt(9)).shape == (1, 12)


def test_arguments_come_before_the_given_configuration_and_that_before_the_models(model, library_warnings):
    assert forwards(model) == 12
    model.generation_config.steps = 6
    assert forwards(model) == 6
    for given in (GenerationConfig(), SteerlingGenerationConfig()):
        assert forwards(model, generation_config=given) == 6
    assert forwards(model, generation_config=SteerlingGenerationConfig(steps=4)) == 4
    assert forwards(model, steps=3) == 3
    assert forwards(model, steps=None) == 12
    assert model.generation_config.steps == 6
    library_warnings.clear()  # arguments beside a configuration are deprecated


def test_a_plain_configuration_on_the_model_is_enough(model):
    model.generation_config = GenerationConfig(do_sample=True)
    assert forwards(model, steps=3, seed=0, entropy_temperature=True) == 3


def test_inherited_sampling_settings_do_not_disturb_greedy_decoding(model):
    """Neither a change nor a warning (which would fail the test, see conftest)."""
    greedy = model.generate(make_prompt(9), max_new_tokens=12)
    sampling = {"do_sample": True, "entropy_temperature": True, "temperature": 0.7, "top_p": 0.8, "top_k": 9}
    model.generation_config = SteerlingGenerationConfig(**sampling, max_new_tokens=12)
    assert torch.equal(model.generate(make_prompt(9), do_sample=False), greedy)
    assert not torch.equal(model.generate(make_prompt(9), seed=2), greedy)


def test_the_default_length_is_transformers_own(model):
    with pytest.warns(UserWarning, match="max_new_tokens"):
        assert model.generate(make_prompt(9)).shape == (1, 29)


def test_whole_numbers_serve_as_floats(model):
    settings = {"max_new_tokens": 12, "do_sample": True, "seed": 0}
    floats = model.generate(make_prompt(9), repetition_penalty=2.0, temperature=3.0, **settings)
    assert torch.equal(model.generate(make_prompt(9), repetition_penalty=2, temperature=3, **settings), floats)


def test_a_decoding_method_of_the_users_own(model):
    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return input_ids, generation_config.steps, model_kwargs.get("cache")

    prompt, steps, cache = model.generate(make_prompt(9), custom_generate=decode, steps=7, max_new_tokens=12)
    assert torch.equal(prompt, make_prompt(9))
    assert steps == 7
    assert cache.get_seq_length() == 0


# The library's tools


def test_pipeline(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = model.generate(**tokenizer("w3 w14 w15", return_tensors="pt"), max_new_tokens=12)
    (record,) = pipe("w3 w14 w15", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert record["generated_text"].split() == tokenizer.convert_ids_to_tokens(expected[0, 3:])
    # Here the pipeline samples at 0.7 by its own default.
    (record,) = pipe("w3 w14 w15", max_new_tokens=12, steps=4, seed=0, return_tensors=True)
    settings = {"max_new_tokens": 12, "steps": 4, "seed": 0, "do_sample": True, "temperature": 0.7}
    expected = model.generate(**tokenizer("w3 w14 w15", return_tensors="pt"), **settings)
    assert record["generated_token_ids"] == expected[0].tolist()


def test_pipeline_with_all_outputs(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False}
    found = pipe("The gardener", return_dict_in_generate=True, output_scores=True, **settings)[0]
    assert found["generated_text"] == pipe("The gardener", **settings)[0]["generated_text"]
    assert {"step_map", "log_probabilities", "tokens_per_forward"} < set(found)


def test_pipeline_without_a_prompt_starts_from_bos(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = model.generate(torch.tensor([[BOS]]), max_new_tokens=12)
    (record,) = pipe("", max_new_tokens=12, do_sample=False, return_tensors=True)
    assert record["generated_token_ids"] == expected[0].tolist()


def test_pipeline_on_a_padded_batch(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w3 w14 w15", "w9"]
    together = pipe(prompts, batch_size=2, max_new_tokens=12, do_sample=False)
    assert together == [pipe(prompt, max_new_tokens=12, do_sample=False) for prompt in prompts]


def test_text_streamers(model, tokenizer, capsys):
    inputs = tokenizer("w3 w14 w15", return_tensors="pt")
    words = tokenizer.convert_ids_to_tokens(model.generate(**inputs, max_new_tokens=12)[0])
    model.generate(**inputs, max_new_tokens=12, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == words
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 12, "streamer": stream})
    thread.start()
    assert "".join(stream).split() == words[3:]
    thread.join()


def test_drafts_are_printed_and_replaced(model, tokenizer, capsys):
    inputs = tokenizer("w3 w14 w15", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=12, streamer=TextDiffusionStreamer(tokenizer))
    out = capsys.readouterr().out
    assert out.count("<mask>") > 12
    # What is left when every draft has been wiped off the screen.
    final = re.sub(r"\0337.*?\0338\033\[J", "", out, flags=re.DOTALL)
    assert final.split() == tokenizer.convert_ids_to_tokens(model.generate(**inputs, max_new_tokens=12)[0])


def test_stop_strings():
    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
    names = ("pad", "bos", "eos", "mask")
    model = make_model(
        vocab_size=len(tokenizer), **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    )
    inputs = tokenizer(["The sailor", "A gardener in the rain"], return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 12, "repetition_penalty": 1.5}
    free = model.generate(**inputs, **settings)[:, width:].tolist()
    stop = tokenizer.decode(free[0][4:6])[1:]
    stopped = model.generate(**inputs, **settings, stop_strings=[stop], tokenizer=tokenizer)[:, width:].tolist()
    lengths = []
    for row, text in zip(stopped, free):
        lengths.append(next((end for end in range(1, 13) if stop in tokenizer.decode(text[:end])), 12))
        assert row == (text[: lengths[-1]] + [tokenizer.pad_token_id] * 12)[: max(map(len, stopped))]
    assert lengths[0] <= 6
    assert len(stopped[0]) == max(lengths)


def test_fill_mask_agrees_with_filling_in(model, tokenizer):
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    inputs = tokenizer("w3 w14 <mask> w15 w9", return_tensors="pt")
    filled = model.generate(**inputs, max_new_tokens=0)[0]
    best = next(answer["token"] for answer in fill("w3 w14 <mask> w15 w9", top_k=9) if answer["token"] < PAD)
    assert filled.tolist() == [3, 14, best, 15, 9]


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="generate"):
        model.generate_batch([[1, 2, 3]])


def test_features_are_the_last_hidden_states(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    expected = model.transformer(**tokenizer("w3 w14 w15", return_tensors="pt")).last_hidden_state
    for given in (str(tmp_path), AutoModel.from_pretrained(tmp_path), model.base_model):
        pipe = pipeline("feature-extraction", model=given, tokenizer=tokenizer)
        torch.testing.assert_close(pipe("w3 w14 w15", return_tensors=True), expected)
    batch = pipe(["w3 w14 w15", "w9"], batch_size=2, return_tensors=True)
    torch.testing.assert_close(batch[0], expected)
    for task in ("fill-mask", "text-generation"):
        other = pipeline(task, model=str(tmp_path), tokenizer=tokenizer).model
        assert torch.equal(other(make_prompt(3))[0], model(make_prompt(3)).logits)
    output = AutoModel.from_pretrained(tmp_path)(make_prompt(3), output_concepts=True)
    assert torch.equal(output[0], output.concepts.hidden)
    torch.testing.assert_close(output.logits, model(make_prompt(3)).logits)
