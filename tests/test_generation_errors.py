"""Bad input to generate(): a clear error that names the argument, before any forward pass."""

import pytest
import torch
from generation_model import BLOCK, CONTEXT, MASK, PAD, VOCABULARY, make_model, make_prompt
from steerling_hf.modeling.cache_steerling import SteerlingCache
from steerling_hf.modeling.generation_config_steerling import SteerlingGenerationConfig
from transformers import CompileConfig, DynamicCache, GenerationConfig, TextStreamer


@pytest.fixture
def model():
    """Fails as soon as anything is computed."""
    model = make_model()

    def refuse(*_):
        raise AssertionError("a forward pass came before the error")

    model.transformer.register_forward_pre_hook(refuse)
    return model


VALUES = [
    ("steps", 0),
    ("steps", 2.5),
    ("steps", True),
    ("unmasking", "random"),
    ("unmasking", 3),
    ("entropy_temperature", 0.5),
    ("seed", -1),
    ("seed", "x"),
    ("seed", [1, -2]),
    ("seed", 2**63),
    ("temperature", -0.5),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_p", 1.5),
    ("top_p", -0.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("guidance_scale", -1),
    ("guidance_scale", float("nan")),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2.5),
    ("threshold", 0.0),
    ("threshold", 1.5),
    ("factor", 0),
    ("entropy_bound", -0.1),
    ("entropy_bound", "low"),
    ("align_blocks", 1),
    ("cache_implementation", "offloaded"),
    ("cache_implementation", "paged"),
    ("bad_words_ids", [3, 4]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [[-1]]),
    ("max_time", 0),
    ("max_length", [1]),
    ("max_new_tokens", []),
    ("min_new_tokens", -1),
    ("min_length", 1.5),
    ("stop_strings", 5),
    ("stop_strings", [""]),
    ("eos_token_id", [None]),
    ("eos_token_id", []),
    ("eos_token_id", -2),
    ("eos_token_id", "5"),
    ("pad_token_id", "5"),
    ("pad_token_id", -1),
    ("suppress_tokens", 1.5),
    ("suppress_tokens", [True]),
    ("sequence_bias", {(3,): float("nan")}),
    ("sequence_bias", [[3, 1.0]]),
    ("sequence_bias", 2),
    ("num_return_sequences", 0),
    ("do_sample", "no"),
    ("use_cache", 1),
    ("output_scores", "yes"),
    ("return_dict_in_generate", 1),
    ("min_p", "x"),
    ("typical_p", 2),
]

INAPPLICABLE = [
    ("num_beams", 2),
    ("penalty_alpha", 0.6),
    ("prompt_lookup_num_tokens", 3),
    ("assistant_early_exit", 1),
    ("token_healing", True),
    ("no_repeat_ngram_size", 2),
    ("forced_eos_token_id", 3),
    ("begin_suppress_tokens", [3]),
    ("exponential_decay_length_penalty", (3, 1.1)),
    ("encoder_repetition_penalty", 1.5),
    ("output_attentions", True),
    ("output_hidden_states", True),
]

ARGUMENTS = [
    ("assistant_model", torch.nn.Identity()),
    ("prefix_allowed_tokens_fn", lambda *_: [3]),
    ("negative_prompt_ids", torch.zeros(1, 3, dtype=torch.long)),
    ("negative_prompt_attention_mask", torch.ones(1, 3, dtype=torch.long)),
    ("synced_gpus", True),
    ("cache", DynamicCache()),
    ("inputs_embeds", torch.zeros(1, 3, 32)),
    ("position_ids", torch.arange(9)[None]),
    ("labels", make_prompt(9)),
    ("output_concepts", True),
    ("max_new_token", 8),
    ("stop_strings", ["."]),  # without a tokenizer
    ("eos_token_id", VOCABULARY),
    ("compile_config", CompileConfig()),  # without a static cache
    ("prefill_chunk_size", 128),
    ("max_new_tokens", 0),  # nothing to fill in
    ("suppress_tokens", [VOCABULARY]),
    ("bad_words_ids", [[3, VOCABULARY]]),
    ("sequence_bias", {(3, VOCABULARY): 1.0}),
    ("pad_token_id", VOCABULARY),
    ("suppress_tokens", list(range(VOCABULARY))),
    ("streamer", True),
    ("temperature", 1e-9),
    ("generation_config", {"steps": 3}),
    ("logits_processor", 3),
    ("logits_processor", [3]),
    ("stopping_criteria", [None]),
    ("logit_bias", {3: 1.0}),
]


@pytest.mark.parametrize(("name", "value"), VALUES + INAPPLICABLE + ARGUMENTS)
def test_arguments(model, name, value):
    with pytest.raises(ValueError, match=name):
        model.generate(make_prompt(9), **{"max_new_tokens": 8, "do_sample": True, name: value})


@pytest.mark.parametrize(("name", "value"), VALUES + INAPPLICABLE)
def test_configurations(name, value):
    with pytest.raises(ValueError, match=name):
        SteerlingGenerationConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("num_beams", 2)])
def test_configurations_given_or_stored(model, name, value):
    with pytest.raises(ValueError, match=name):
        model.generate(make_prompt(9), generation_config=GenerationConfig(max_new_tokens=8, **{name: value}))
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=name):
        model.generate(make_prompt(9), max_new_tokens=8)


def test_the_message_has_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"`steps` is 0: choose a whole number of 1 or more"):
        SteerlingGenerationConfig(steps=0)
    with pytest.raises(ValueError, match=r"`num_beams` is 4, .* Leave it out"):
        SteerlingGenerationConfig(num_beams=4)


def ones(*shape: int) -> torch.LongTensor:
    return torch.ones(shape, dtype=torch.long)


PROMPTS = {
    "a list": [[1, 2, 3]],
    "one dimension": ones(3),
    "three dimensions": ones(1, 3, 3),
    "no token": torch.zeros(1, 0),
    "no row": ones(0, 3),
    "floats": torch.ones(1, 3),
    "booleans": torch.ones(1, 3, dtype=torch.bool),
    "a negative id": -ones(1, 3),
    "an id beyond the vocabulary": VOCABULARY * ones(1, 3),
    "no room in the context": ones(1, CONTEXT + 1),
    "padding without attention_mask": torch.tensor([[PAD, 1, 2], [3, 1, 2]]),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("keyword", [False, True])
def test_prompts(model, prompt, keyword):
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(**({"input_ids": prompt} if keyword else {"inputs": prompt}), max_new_tokens=8)


MASKS = {
    "a gap": torch.tensor([[1, 0, 1], [1, 1, 1]]),
    "an empty row": torch.tensor([[0, 0, 0], [1, 1, 1]]),
    "a list": [[1, 1, 1], [1, 1, 1]],
    "another shape": ones(2, 4),
    "four dimensions": ones(2, 1, 3, 3),
    "numbers that are neither 0 nor 1": torch.tensor([[0, 2, 1], [1, 1, 1]]),
    "not a number": torch.tensor([[0, float("nan"), 1], [1, 1, 1]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_attention_masks(model, mask):
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(make_prompt(3, rows=2), attention_mask=mask, max_new_tokens=8)


def test_padding_tokens_may_be_text():
    prompt = torch.tensor([[PAD, 1, 2]])
    tokens = make_model().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
    assert tokens.shape == (1, 11)


def test_the_context_is_the_limit():
    model = make_model()
    assert model.generate(make_prompt(9), max_new_tokens=CONTEXT - 9, steps=1).shape == (1, CONTEXT)
    for length in ({"max_new_tokens": CONTEXT - 8}, {"max_length": CONTEXT + 1}):
        with pytest.raises(ValueError, match=f"max_new_tokens.*{CONTEXT}"):
            model.generate(make_prompt(9), steps=1, **length)


def test_sampling_arguments(model):
    for settings, name in (
        ({"do_sample": True, "temperature": 0.0}, "do_sample"),
        ({"do_sample": True, "seed": [1, 2, 3]}, "seed"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"eos_token_id": [3, MASK]}, "eos_token_id"),
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(make_prompt(9, rows=2), max_new_tokens=BLOCK, **settings)


def test_caches_that_do_not_fit(model):
    config = model.config
    filled, small = SteerlingCache(config), SteerlingCache(config, columns=16)
    filled.start(3)
    for cache, settings, match in (
        (filled, {}, "3 rows"),
        (small, {}, "fixed at 16 columns"),
        (SteerlingCache(config), {"cache_implementation": "static"}, "cache_implementation"),
        (SteerlingCache(make_model(n_layers=1).config), {}, "depth"),
    ):
        with pytest.raises(ValueError, match=f"past_key_values.*{match}"):
            model.generate(make_prompt(9), cache=cache, max_new_tokens=8, **settings)


def test_a_prompt_that_fills_the_context_leaves_no_room(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(make_prompt(CONTEXT), max_new_tokens=1)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(make_prompt(9), max_length=9)


def test_what_does_not_go_together(model):
    cache = SteerlingCache(model.config)
    for settings, match in (
        ({"cache": cache, "use_cache": False}, "cache"),
        ({"streamer": TextStreamer(None)}, "streamer"),
    ):
        with pytest.raises(ValueError, match=match):
            model.generate(make_prompt(9, rows=2), max_new_tokens=8, **settings)
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(attention_mask=ones(1, 3), max_new_tokens=8)


def test_the_padding_token_may_be_a_word_of_the_text():
    model = make_model()
    prompt = make_prompt(9)
    plain = model.generate(prompt, max_new_tokens=4)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, pad_token_id=int(prompt[0, 4])), plain)


def test_an_end_token_as_a_tensor():
    model = make_model()
    token = int(model.generate(make_prompt(9), max_new_tokens=8)[0, 12])
    expected = model.generate(make_prompt(9), max_new_tokens=8, eos_token_id=token)
    assert torch.equal(model.generate(make_prompt(9), max_new_tokens=8, eos_token_id=torch.tensor([token])), expected)


def test_prompts_of_embeddings(model):
    """peft brings the virtual tokens of prompt tuning in so; they would have no effect."""
    model.prepare_inputs_for_generation = lambda *arguments, **given: given
    with pytest.raises(ValueError, match="`prepare_inputs_for_generation` was replaced.*use LoRA"):
        model.generate(make_prompt(5), max_new_tokens=4)
