"""Generation parameters: those of transformers that have a meaning in diffusion, and those of unmasking."""

import math
from typing import Any, TypeGuard

from transformers import GenerationConfig

from .unmasking_steerling import UNMASKING_RULES

SAMPLING_KEYS = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
CACHE_IMPLEMENTATIONS = ("dynamic", "static")

LEFT_TO_RIGHT = "it builds a text from left to right, and diffusion decides its positions in any order"
ONE_CANVAS = "it needs a second model or several hypotheses, and diffusion fills one canvas per row"
NOT_KEPT = (
    "unmasking keeps no such record; `return_dict_in_generate=True` returns `step_map` and `tokens_per_forward`, and "
    "with `output_scores=True` the tokens' `log_probabilities`"
)
GUIDANCE = "guidance compares with the prompt masked and takes `guidance_scale` only"
ROW_ENDS = (
    "rows end where `eos_token_id`, `stop_strings` or `stopping_criteria` say, and no later than `max_new_tokens`"
)
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
    "sequence_bias": (None, LEFT_TO_RIGHT),
    "watermarking_config": (None, LEFT_TO_RIGHT),
    "prefill_chunk_size": (None, "long prompts are computed in pieces by themselves"),
    "cache_config": (None, "the block cache takes `cache_implementation` only"),
    "assistant_tokenizer": (None, ONE_CANVAS),
    "min_length": (0, ROW_ENDS),
    "min_new_tokens": (0, ROW_ENDS),
    "negative_prompt_ids": (None, GUIDANCE),
    "negative_prompt_attention_mask": (None, GUIDANCE),
    "output_logits": (None, NOT_KEPT),
    "output_attentions": (None, NOT_KEPT),
    "output_hidden_states": (None, NOT_KEPT),
}


class SteerlingGenerationConfig(GenerationConfig):
    r"""
    A `GenerationConfig` with the parameters of unmasking. Those of transformers keep their names and meanings, with
    two other defaults: `top_k` is off, and without a generation_config.json rows end with a turn (`eot_id` of the
    model's configuration), or else at `max_new_tokens` only. `max_new_tokens=0` only fills in a prompt's mask tokens.

    The mask token is never generated, and neither are `pad_token_id` and `eos_token_id` of the model's configuration,
    unless they are among the `eos_token_id` here. `suppress_tokens` forbids more, `bad_words_ids` phrases too.

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
        self._check("steps", _is_integer(self.steps, 1), "choose a whole number of 1 or more, or None for one a token")
        whole = _is_integer(self.max_new_tokens, 0)
        self._check("max_new_tokens", whole, "choose a whole number, 0 for filling in the prompt's masks only")
        known = callable(self.unmasking) or (isinstance(self.unmasking, str) and self.unmasking in UNMASKING_RULES)
        self._check("unmasking", known, f"choose one of {', '.join(map(repr, UNMASKING_RULES))}, or a callable")
        probability = _is_number(self.threshold, 0, above=True) and self.threshold <= 1
        self._check("threshold", probability, "choose a probability above 0")
        self._check("factor", _is_number(self.factor, 0, above=True), "choose a number above 0")
        self._check("entropy_bound", _is_number(self.entropy_bound, 0), "choose a number of 0 or more, in nats")
        self._check("align_blocks", isinstance(self.align_blocks, bool), "choose True or False")
        self._check("entropy_temperature", isinstance(self.entropy_temperature, bool), "choose True or False")
        self._check("output_attributions", isinstance(self.output_attributions, bool), "choose True or False")
        attributing = not self.output_attributions or self.return_dict_in_generate is True
        self._check(
            "output_attributions", attributing, "add return_dict_in_generate=True, since the output holds them"
        )
        seeds = self.seed if isinstance(self.seed, (list, tuple)) and self.seed else [self.seed]
        fitting = all(_is_integer(seed, 0, below=2**63) for seed in seeds)
        self._check("seed", fitting, "choose whole numbers from 0 to 2**63 - 1")
        warm = _is_number(self.temperature, 0, above=self.do_sample is True)
        self._check("temperature", warm, "choose a number above 0; greedy decoding is do_sample=False")
        self._check("top_k", _is_integer(self.top_k, 0), "choose a whole number, 0 for no limit")
        self._check("top_p", _is_number(self.top_p, 0) and self.top_p <= 1, "choose a number from 0 to 1")
        penalty = _is_number(self.repetition_penalty, 0, above=True)
        self._check("repetition_penalty", penalty, "choose a number above 0, 1 for none")
        self._check("guidance_scale", _is_number(self.guidance_scale, 0), "choose a number of 0 or more, 1 for none")
        phrases = self.bad_words_ids if isinstance(self.bad_words_ids, (list, tuple)) else [None]
        tokens = all(
            isinstance(phrase, (list, tuple)) and phrase and all(_is_integer(i, 0) for i in phrase)
            for phrase in phrases
        )
        self._check("bad_words_ids", tokens, "give a list of phrases, each a list of token ids")
        self._check("max_time", _is_number(self.max_time, 0, above=True), "choose a number of seconds above 0")
        cached = self.cache_implementation in CACHE_IMPLEMENTATIONS
        self._check("cache_implementation", cached, f"choose one of {', '.join(map(repr, CACHE_IMPLEMENTATIONS))}")
        # The library has no use for no new tokens.
        filling_in = self.max_new_tokens == 0
        self.max_new_tokens = None if filling_in else self.max_new_tokens
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.max_new_tokens = 0 if filling_in else self.max_new_tokens

    def _check(self, key: str, valid: bool, remedy: str) -> None:
        if getattr(self, key) is not None and not valid:
            raise ValueError(f"`{key}` is {getattr(self, key)!r}: {remedy}.")


def _is_integer(value: Any, least: int, below: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _is_number(value: Any, least: float, above: bool = False) -> TypeGuard[float]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > least if above else value >= least)


def refuse_inapplicable(arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` for the first argument that is set and means nothing in diffusion."""
    for name, (neutral, reason) in INAPPLICABLE.items():
        value = arguments.get(name)
        unset = value is None or value is False or (isinstance(value, (int, float, list)) and value in (neutral, []))
        if not unset:
            shown = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
            raise ValueError(f"`{name}` is {shown}, but it does not apply to this model: {reason}. Leave it out.")


__all__ = ["SteerlingGenerationConfig"]
