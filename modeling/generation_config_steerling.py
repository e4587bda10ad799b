"""Generation parameters: those of transformers that have a meaning in diffusion, and those of unmasking."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeGuard

import torch
from transformers import GenerationConfig

from .unmasking_steerling import UNMASKING_RULES

SAMPLING_KEYS = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
PROBABILITIES = ("top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
SWITCHES = (
    "do_sample",
    "use_cache",
    "align_blocks",
    "entropy_temperature",
    "output_attributions",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "remove_invalid_values",
    "renormalize_logits",
)
CACHE_IMPLEMENTATIONS = ("dynamic", "static")

LEFT_TO_RIGHT = "it builds a text from left to right, and diffusion decides its positions in any order"
ONE_CANVAS = "it needs a second model or several hypotheses, and diffusion fills one canvas per row"
NOT_KEPT = (
    "unmasking keeps no such record; `return_dict_in_generate=True` returns `step_map` and `tokens_per_forward`, and "
    "with `output_scores=True` the tokens' `log_probabilities` and `scores`"
)
NO_TOKEN = -1
"""As `eos_token_id`: no token ends a row, whatever the model's configuration says."""
GUIDANCE = "guidance compares with the prompt masked and takes `guidance_scale` only"
# Arguments of transformers' generate() that mean nothing here: the value at which they do nothing, and why.
INAPPLICABLE: dict[str, tuple[Any, str]] = {
    "num_beams": (1, ONE_CANVAS),
    "num_beam_groups": (1, ONE_CANVAS),
    "diversity_penalty": (0.0, ONE_CANVAS),
    "constraints": (None, ONE_CANVAS),
    "force_words_ids": (None, ONE_CANVAS),
    "penalty_alpha": (0.0, ONE_CANVAS),
    "dola_layers": (None, ONE_CANVAS),
    "assistant_model": (None, ONE_CANVAS),
    "assistant_early_exit": (None, ONE_CANVAS),
    "prompt_lookup_num_tokens": (None, ONE_CANVAS),
    "speculation_type": (None, ONE_CANVAS),
    "use_mtp": (None, ONE_CANVAS),
    "synced_gpus": (None, "the steps of several processes are not kept in time"),
    "token_healing": (None, LEFT_TO_RIGHT),
    "prefix_allowed_tokens_fn": (None, LEFT_TO_RIGHT),
    "no_repeat_ngram_size": (0, LEFT_TO_RIGHT + "; `repetition_penalty` applies"),
    "encoder_no_repeat_ngram_size": (0, LEFT_TO_RIGHT),
    "encoder_repetition_penalty": (1.0, LEFT_TO_RIGHT),
    "forced_bos_token_id": (None, LEFT_TO_RIGHT),
    "forced_eos_token_id": (None, LEFT_TO_RIGHT),
    "exponential_decay_length_penalty": (None, LEFT_TO_RIGHT),
    "begin_suppress_tokens": (None, LEFT_TO_RIGHT),
    "watermarking_config": (None, LEFT_TO_RIGHT),
    "prefill_chunk_size": (None, "long prompts are computed in pieces by themselves"),
    "cache_config": (None, "the block cache takes `cache_implementation` only"),
    "assistant_tokenizer": (None, ONE_CANVAS),
    "negative_prompt_ids": (None, GUIDANCE),
    "negative_prompt_attention_mask": (None, GUIDANCE),
    "output_attentions": (None, NOT_KEPT),
    "output_hidden_states": (None, NOT_KEPT),
}


class SteerlingGenerationConfig(GenerationConfig):
    r"""
    A `GenerationConfig` with the parameters of unmasking. Those of transformers keep their names and meanings, with
    two other defaults: `top_k` is off, and without a generation_config.json rows end with a turn (`eot_id` of the
    model's configuration), or else at `max_new_tokens` only. `max_new_tokens=0` only fills in a prompt's mask tokens.

    The mask token is never generated, and neither are `pad_token_id` and `eos_token_id` of the model's configuration,
    unless they are among the `eos_token_id` here. `suppress_tokens` forbids more, `bad_words_ids` phrases too. `eos_token_id=-1`
    means that no token ends a row. `min_new_tokens` counts positions: none of the first so many new ones is an end token.
    `sequence_bias` is added to the token that completes a sequence, from whichever side.

    Args:
        steps (`int`, *optional*): Forward passes in all; by default one a token. They are shared out among the blocks
            in proportion to their lengths (`share_steps`), at least one for each, at most one a token. An adaptive rule
            needs fewer.
        unmasking (`str` or `Callable`, *optional*, defaults to `"confidence"`): Which positions a step decides; a key
            of `UNMASKING_RULES`, or a callable such as `UnmaskingRule`.
        threshold (`float`, *optional*, defaults to 0.9): Probability, for the rule "threshold".
        factor (`float`, *optional*, defaults to 1.0): For the rule "factor".
        entropy_bound (`float`, *optional*, defaults to 0.1): Nats, for the rule "entropy_bound".
        align_blocks (`bool`, *optional*, defaults to `False`): End generation blocks where attention blocks end, which
            halves the window of a step. By default they count from the prompt's end, as in the reference.
        entropy_temperature (`bool`, *optional*, defaults to `False`): When sampling, adapt the temperature to each
            position's entropy (`EntropyTemperatureLogitsWarper`); `temperature` still multiplies.
        seed (`int` or `list[int]`, *optional*): Seed of the sampling, one generator per row: row i has `seed + i`, or
            the i-th of a list. By default torch's global generator gives the seeds.
        output_attributions (`bool`, *optional*, defaults to `False`): With `return_dict_in_generate=True`, attribute the
            logit of each decided token to concepts.
        cache_implementation (`str`, *optional*): "dynamic", the default, grows as it is filled and lets finished rows
            leave the batch; "static" keeps all shapes, for `torch.compile`.
        kwargs: Parameters of `GenerationConfig`.

    Raises:
        ValueError: A value is out of range or cannot apply to diffusion; the message names argument, value, remedy.
    """

    steps: int | None
    unmasking: Any
    threshold: float | None
    factor: float | None
    entropy_bound: float | None
    align_blocks: bool | None
    entropy_temperature: bool | None
    seed: int | list[int] | None
    output_attributions: bool | None
    diffusion_keys = (
        "steps",
        "unmasking",
        "threshold",
        "factor",
        "entropy_bound",
        "align_blocks",
        "entropy_temperature",
        "seed",
        "output_attributions",
    )

    def __init__(self, **kwargs):
        # Taken out before the library looks: it drops custom keys where a file says `_from_model_config`.
        for key in self.diffusion_keys:
            setattr(self, key, kwargs.pop(key, None))
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        defaults = GenerationConfig._get_default_generation_params()
        defaults.pop("top_k", None)
        return {
            **defaults,
            "unmasking": "confidence",
            "threshold": 0.9,
            "factor": 1.0,
            "entropy_bound": 0.1,
            "align_blocks": False,
            "entropy_temperature": False,
            "output_attributions": False,
        }

    @classmethod
    def from_model_config(cls, model_config) -> "SteerlingGenerationConfig":
        """Defaults for a checkpoint without generation_config.json: rows end with a turn (`eot_id`), or not at all."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        keys = ("pad_token_id", "bos_token_id")
        return cls(eos_token_id=values.get("eot_id"), **{key: values.get(key) for key in keys})

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; custom keys that are unset stay out, and a rule of the user's own is named."""
        different = {key: value for key, value in super().to_diff_dict().items() if value is not None}
        if callable(self.unmasking):
            different["unmasking"] = getattr(self.unmasking, "__name__", type(self.unmasking).__name__)
        return different

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in the library; a rule of the user's own cannot be stored."""
        if callable(self.unmasking):
            raise ValueError(
                f"`unmasking` is {self.unmasking!r}, which no file can hold: pass it to generate() instead."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raise a `ValueError` for the first value that cannot be used; warn or raise (strict) as the library does."""
        refuse_inapplicable(vars(self))
        check_values(vars(self))
        if self.output_attributions and self.return_dict_in_generate is not True:
            _fail("output_attributions", True, "add return_dict_in_generate=True, since the output holds them")
        if self.do_sample is True and self.temperature is not None and self.temperature < LEAST_TEMPERATURE:
            remedy = f"choose a number from {LEAST_TEMPERATURE}; greedy decoding is do_sample=False"
            _fail("temperature", self.temperature, remedy)
        # The library has no use for no new tokens.
        filling_in = self.max_new_tokens == 0
        self.max_new_tokens = None if filling_in else self.max_new_tokens
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.max_new_tokens = 0 if filling_in else self.max_new_tokens


def _is_integer(value: Any, least: int = 0, below: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _is_number(value: Any, least: float = 0.0, most: float = math.inf, above: bool = False) -> TypeGuard[float]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > least if above else value >= least) and value <= most


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _are_tokens(value: Any, least: int = 0) -> bool:
    if isinstance(value, torch.Tensor):
        whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        return whole and value.dim() <= 1 and value.numel() > 0 and int(value.min()) >= least
    return isinstance(value, (list, tuple)) and all(_is_integer(token, least) for token in value)


def _is_end(value: Any) -> bool:
    return _is_integer(value, NO_TOKEN) or (_are_tokens(value, NO_TOKEN) and value not in ([], ()))


def _are_phrases(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_are_tokens(phrase) and len(phrase) > 0 for phrase in value)


def _are_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, (list, tuple)) and len(texts) > 0 and all(isinstance(t, str) and t for t in texts)


def _are_biases(value: Any) -> bool:
    pairs = list(value.items()) if isinstance(value, dict) else value
    return isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and _are_phrases([pair[0]])
        and (_is_number(pair[1], -math.inf) or pair[1] == -math.inf)
        for pair in pairs
    )


def _are_seeds(value: Any) -> bool:
    seeds = value if isinstance(value, (list, tuple)) and value else [value]
    return all(_is_integer(seed, 0, below=2**63) for seed in seeds)


def _is_rule(value: Any) -> bool:
    return callable(value) or (isinstance(value, str) and value in UNMASKING_RULES)


LEAST_TEMPERATURE = 1e-6
WHOLE = "choose a whole number of {} or more"
SWITCH = (_is_switch, "choose True or False")
# What values the arguments of generate() may have, besides None: a test, and the remedy.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (lambda value: _is_integer(value, 1), WHOLE.format(1) + ", or None for one a token"),
    "max_new_tokens": (_is_integer, "choose a whole number, 0 for filling in the prompt's masks only"),
    "max_length": (lambda value: _is_integer(value, 1), WHOLE.format(1) + ", or give `max_new_tokens`"),
    "min_new_tokens": (_is_integer, WHOLE.format(0)),
    "min_length": (_is_integer, WHOLE.format(0)),
    "unmasking": (_is_rule, f"choose one of {', '.join(map(repr, UNMASKING_RULES))}, or a callable"),
    "threshold": (lambda value: _is_number(value, 0, 1, above=True), "choose a probability above 0"),
    "factor": (lambda value: _is_number(value, above=True), "choose a number above 0"),
    "entropy_bound": (_is_number, "choose a number of 0 or more, in nats"),
    "seed": (_are_seeds, "choose whole numbers from 0 to 2**63 - 1"),
    "temperature": (_is_number, "choose a number above 0; greedy decoding is do_sample=False"),
    "top_k": (_is_integer, "choose a whole number, 0 for no limit"),
    **{key: (lambda value: _is_number(value, 0, 1), "choose a number from 0 to 1") for key in PROBABILITIES},
    "repetition_penalty": (lambda value: _is_number(value, above=True), "choose a number above 0, 1 for none"),
    "guidance_scale": (_is_number, "choose a number of 0 or more, 1 for none"),
    "bad_words_ids": (_are_phrases, "give a list of phrases, each a list of token ids"),
    "sequence_bias": (_are_biases, "give {(token ids): number} or [[[token ids], number]]"),
    "suppress_tokens": (_are_tokens, "give a list of token ids"),
    "stop_strings": (_are_texts, "give a text or a list of texts, none of them empty"),
    "eos_token_id": (_is_end, "give a token id or a list of them, or -1 for none"),
    "pad_token_id": (lambda value: _is_integer(value) or _are_tokens(value), "give a token id"),
    "bos_token_id": (lambda value: _is_integer(value) or _are_tokens(value), "give a token id"),
    "max_time": (lambda value: _is_number(value, above=True), "choose a number of seconds above 0"),
    "num_return_sequences": (lambda value: _is_integer(value, 1), WHOLE.format(1)),
    "cache_implementation": (
        lambda value: isinstance(value, str) and value in CACHE_IMPLEMENTATIONS,
        f"choose one of {', '.join(map(repr, CACHE_IMPLEMENTATIONS))}",
    ),
    **dict.fromkeys(SWITCHES, SWITCH),
}


def check_values(arguments: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for the first argument whose value generate() cannot use."""
    for key, (usable, remedy) in VALUES.items():
        value = arguments.get(key)
        if value is not None and not usable(value):
            _fail(key, value, remedy)


def _fail(key: str, value: Any, remedy: str) -> NoReturn:
    raise ValueError(f"`{key}` is {value!r}: {remedy}.")


def refuse_inapplicable(arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` for the first argument that is set and means nothing in diffusion."""
    for name, (neutral, reason) in INAPPLICABLE.items():
        value = arguments.get(name)
        unset = value is None or value is False or (isinstance(value, (int, float, list)) and value in (neutral, []))
        if not unset:
            shown = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
            raise ValueError(f"`{name}` is {shown}, but it does not apply to this model: {reason}. Leave it out.")


__all__ = ["SteerlingGenerationConfig"]
