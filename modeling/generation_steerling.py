"""Text generation by block-wise unmasking, behind the `generate` of transformers."""

# The library declares `self` in its mixin as a protocol, which only the finished model satisfies.
# mypy: disable-error-code="misc, override"

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, SuppressTokensLogitsProcessor
from transformers.utils import ModelOutput

SAMPLING_KEYS = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

LEFT_TO_RIGHT = "it builds a text from left to right, and diffusion decides its positions in any order"
ONE_CANVAS = "it needs a second model or several hypotheses, and diffusion fills one canvas per row"
NOT_KEPT = "unmasking keeps no such record; `return_dict_in_generate=True` returns `step_map` and `tokens_per_forward`"
WHOLE_CANVAS = "every step computes the visible canvas anew and keeps no cache"
GUIDANCE = "guidance compares with the prompt masked and takes `guidance_scale` only"
ROW_ENDS = "a row ends at `max_new_tokens` or at a token of `eos_token_id`"
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
    "no_repeat_ngram_size": (0, LEFT_TO_RIGHT),
    "encoder_no_repeat_ngram_size": (0, LEFT_TO_RIGHT),
    "encoder_repetition_penalty": (1.0, LEFT_TO_RIGHT),
    "forced_bos_token_id": (None, LEFT_TO_RIGHT),
    "forced_eos_token_id": (None, LEFT_TO_RIGHT),
    "exponential_decay_length_penalty": (None, LEFT_TO_RIGHT),
    "begin_suppress_tokens": (None, LEFT_TO_RIGHT),
    "sequence_bias": (None, LEFT_TO_RIGHT),
    "bad_words_ids": (None, LEFT_TO_RIGHT + "; for single tokens use `suppress_tokens`"),
    "watermarking_config": (None, LEFT_TO_RIGHT),
    "min_length": (0, ROW_ENDS),
    "min_new_tokens": (0, ROW_ENDS),
    "max_time": (None, ROW_ENDS),
    "stop_strings": (None, ROW_ENDS),
    "stopping_criteria": (None, ROW_ENDS),
    "negative_prompt_ids": (None, GUIDANCE),
    "negative_prompt_attention_mask": (None, GUIDANCE),
    "cache_implementation": (None, WHOLE_CANVAS),
    "past_key_values": (None, WHOLE_CANVAS),
    "output_scores": (None, NOT_KEPT),
    "output_logits": (None, NOT_KEPT),
    "output_attentions": (None, NOT_KEPT),
    "output_hidden_states": (None, NOT_KEPT),
}


class SteerlingGenerationConfig(GenerationConfig):
    r"""
    A `GenerationConfig` with the parameters of unmasking. Those of transformers keep their names and meanings, with
    two other defaults: `top_k` is off, and without a generation_config.json rows end with a turn (`eot_id` of the
    model's configuration), or else at `max_new_tokens` only.

    The mask token is never generated, and neither are `pad_token_id` and `eos_token_id` of the model's configuration,
    unless they are among the `eos_token_id` here. `suppress_tokens` forbids more.

    Args:
        steps (`int`, *optional*): Forward passes in all; by default one a token. They are shared out among the blocks
            in proportion to their lengths (`share_steps`), at least one for each, at most one a token.
        unmasking (`str`, *optional*, defaults to `"confidence"`): Which positions a step decides; a key of
            `UNMASKING_RULES`.
        entropy_temperature (`bool`, *optional*, defaults to `False`): When sampling, adapt the temperature to each
            position's entropy (`EntropyTemperatureLogitsWarper`); `temperature` still multiplies.
        seed (`int` or `list[int]`, *optional*): Seed of the sampling, one generator per row: row i has `seed + i`, or
            the i-th of a list. By default torch's global generator gives the seeds.
        kwargs: Parameters of `GenerationConfig`.

    Raises:
        ValueError: A value is out of range or cannot apply to diffusion; the message names argument, value, remedy.
    """

    steps: int | None
    unmasking: str | None
    entropy_temperature: bool | None
    seed: int | list[int] | None
    diffusion_keys = ("steps", "unmasking", "entropy_temperature", "seed")

    def __init__(self, **kwargs):
        # Taken out before the library looks: it drops custom keys where a file says `_from_model_config`.
        for key in self.diffusion_keys:
            setattr(self, key, kwargs.pop(key, None))
        super().__init__(**kwargs)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        defaults = GenerationConfig._get_default_generation_params()
        defaults.pop("top_k", None)
        return {**defaults, "unmasking": "confidence", "entropy_temperature": False}

    @classmethod
    def from_model_config(cls, model_config) -> "SteerlingGenerationConfig":
        """Defaults for a checkpoint without generation_config.json: rows end with a turn (`eot_id`), or not at all."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        keys = ("pad_token_id", "bos_token_id")
        return cls(eos_token_id=values.get("eot_id"), **{key: values.get(key) for key in keys})

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; custom keys that are unset stay out."""
        return {key: value for key, value in super().to_diff_dict().items() if value is not None}

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raise a `ValueError` for the first value that cannot be used; warn or raise (strict) as the library does."""
        refuse_inapplicable(vars(self))
        self._check("steps", _is_integer(self.steps, 1), "choose a whole number of 1 or more, or None for one a token")
        self._check("max_new_tokens", _is_integer(self.max_new_tokens, 1), "choose a whole number of 1 or more")
        known = isinstance(self.unmasking, str) and self.unmasking in UNMASKING_RULES
        self._check("unmasking", known, f"choose one of {', '.join(map(repr, UNMASKING_RULES))}")
        self._check("entropy_temperature", isinstance(self.entropy_temperature, bool), "choose True or False")
        seeds = self.seed if isinstance(self.seed, (list, tuple)) and self.seed else [self.seed]
        self._check("seed", all(_is_integer(seed, 0) for seed in seeds), "choose whole numbers of 0 or more")
        warm = _is_number(self.temperature, 0, above=self.do_sample is True)
        self._check("temperature", warm, "choose a number above 0; greedy decoding is do_sample=False")
        self._check("top_k", _is_integer(self.top_k, 0), "choose a whole number, 0 for no limit")
        self._check("top_p", _is_number(self.top_p, 0) and self.top_p <= 1, "choose a number from 0 to 1")
        penalty = _is_number(self.repetition_penalty, 0, above=True)
        self._check("repetition_penalty", penalty, "choose a number above 0, 1 for none")
        self._check("guidance_scale", _is_number(self.guidance_scale, 0), "choose a number of 0 or more, 1 for none")
        super().validate(strict=strict, user_set_attributes=user_set_attributes)

    def _check(self, key: str, valid: bool, remedy: str) -> None:
        if getattr(self, key) is not None and not valid:
            raise ValueError(f"`{key}` is {getattr(self, key)!r}: {remedy}.")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float, above: bool = False) -> bool:
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


@dataclass
class SteerlingGenerateOutput(ModelOutput):
    """
    Output of `generate` with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(rows, T)`): Token ids, prompt included. T is the length of the longest
            row; what follows the end of a row is `pad_token_id`.
        step_map (`torch.LongTensor` of shape `(rows, T)`): The step, counted from 0 in each row, that decided a
            position; -1 for the prompt and for padding.
        tokens_per_forward (`torch.FloatTensor` of shape `(rows,)`): New tokens of a row, its end token included, over
            the forward passes in which the row took part. A guided pass is one.
    """

    sequences: torch.Tensor | None = None
    step_map: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None


class UnmaskingRule(ABC):
    """Chooses the positions that a step decides."""

    @abstractmethod
    def select(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """
        Choose among a row's masked positions of the current block.

        Args:
            logits: (n, V) float32 logits of these positions, from left to right, after all processors but those that
                only shape the sampling.
            count: How many positions the schedule gives to this step, 1 to n.

        Returns:
            (k,) distinct indices into the n positions, 1 <= k <= n; tokens are drawn in this order.
        """


class ConfidenceRule(UnmaskingRule):
    """The positions whose best token is the most probable (Chang et al. 2022, arXiv:2202.04200), as scheduled."""

    def select(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` most confident positions."""
        confidence = logits.softmax(dim=-1).amax(dim=-1)
        return confidence.topk(count).indices


UNMASKING_RULES: dict[str, type[UnmaskingRule]] = {"confidence": ConfidenceRule}


class EntropyTemperatureLogitsWarper(LogitsProcessor):
    """
    Divides logits by a temperature that grows with the entropy H of each position's distribution p, as the reference
    sampler of the released checkpoints does (package `steerling` 0.2.0):

        T = 0.3 + 0.4 * min(1, H / ln K),  K = max(2, 1 + number of sorted cumulative probabilities <= top_p)

    so that sure positions are drawn almost greedily. The nucleus itself is left to `TopPLogitsWarper`.

    Args:
        top_p: Mass of the nucleus whose size is K, 0..1.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, V) over their temperatures."""
        probabilities = scores.softmax(dim=-1)
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        mass = probabilities.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        nucleus = (1 + (mass <= self.top_p).sum(dim=-1)).clamp(min=2)
        temperature = 0.3 + 0.4 * (entropy / nucleus.log()).clamp(max=1.0)
        return scores / temperature[:, None]


def share_steps(new_tokens: int, block: int, steps: int) -> list[list[int]]:
    """
    How many tokens each step decides, per generation block.

    Blocks of `block` positions follow the prompt; the last may be shorter. By the end of a block, its share of `steps`
    is spent, rounded down: `steps * (new tokens so far) // new_tokens`; but each block has at least one step, and at
    most one a token. The steps of a block decide equal numbers of tokens, the first ones one more each for the rest.
    Where `new_tokens` is a multiple of `block`, and `steps` of the number of blocks, that is the reference's schedule.
    """
    schedule = []
    for start in range(0, new_tokens, block):
        stop = min(start + block, new_tokens)
        share = steps * stop // new_tokens - steps * start // new_tokens
        share = max(1, min(share, stop - start))
        each, left_over = divmod(stop - start, share)
        schedule.append([each + 1] * left_over + [each] * (share - left_over))
    return schedule


class TokenSampler:
    """
    Turns logits into tokens: the most probable ones, or draws from each row's own generator.

    Args:
        warpers: What shapes the distributions before a draw.
        generators: One per row, or `None` for the most probable token.
    """

    def __init__(self, warpers: Callable, generators: list[torch.Generator] | None):
        self.warpers = warpers
        self.generators = generators

    def draw(self, row: int, canvas: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(k,) tokens of row number `row`, whose canvas is (T,), from their (k, V) logits."""
        if self.generators is None:
            return logits.argmax(dim=-1)
        probabilities = self.warpers(canvas.expand(len(logits), -1), logits).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generators[row])[:, 0]


class SteerlingGenerationMixin(GenerationMixin):
    """`generate` for a model that has `transformer`, `compute_logits` and a Steerling configuration."""

    config: Any
    transformer: Callable
    compute_logits: Callable
    generation_config_class = SteerlingGenerationConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: BaseStreamer | None = None,
        custom_generate: Any = None,
        **kwargs,
    ) -> SteerlingGenerateOutput | torch.Tensor:
        """
        Continue each prompt by unmasking `max_new_tokens` positions, block by block.

        The library prepares and checks the arguments; then, in `_unmask`:
        ```
        1. The canvas is the prompt and one mask token for each new position.
        2. Generation blocks of `diff_block_size` positions count from the end of the prompt. For each of them:
            a. A forward pass over the canvas as far as the block can see, rows that have ended left out.
            b. Logits at the block's masked positions, guided and processed; processors see (positions, V) scores and,
               for each position, the whole canvas of its row.
            c. The unmasking rule picks positions, and their tokens are drawn.
            d. Behind a row's first end token no further position is decided; those before it still are.
            e. When none is left, what follows an end token becomes padding, and the block goes to the streamer.
        3. The canvas is cut after the longest row.
        ```

        Args:
            inputs: (rows, length) prompts, also as `input_ids`. Rows are independent of each other. Without any, a row
                starts from `bos_token_id`.
            generation_config: A `SteerlingGenerationConfig`, or any `GenerationConfig`; what it leaves unset is taken
                from the model's.
            logits_processor: Further processors, applied before those that only shape the sampling.
            stopping_criteria: Does not apply; rows end by `eos_token_id` and `max_new_tokens`.
            streamer: Receives the prompt, then each block as it is complete, both of shape (rows, tokens).
            custom_generate: A decoding method in place of this one, as in transformers.
            kwargs: `attention_mask` of ones, and parameters of `SteerlingGenerationConfig`. `guidance_scale` compares
                with the prompt masked: `logits = masked + guidance_scale * (full - masked)`.

        Returns:
            (rows, T) token ids, prompt included, or a `SteerlingGenerateOutput` if `return_dict_in_generate`.

        Raises:
            ValueError: An argument cannot be used; raised before any computation.
        """
        arguments: dict[str, Any] = {"generation_config": generation_config, "logits_processor": logits_processor}
        arguments |= kwargs
        output: Any  # the library names its own classes
        try:
            if custom_generate is not None:
                arguments |= {"stopping_criteria": stopping_criteria, "streamer": streamer}
                output = super().generate(inputs, custom_generate=custom_generate, **arguments)
                return output
            refuse_inapplicable({"stopping_criteria": stopping_criteria, **kwargs})
            # The library does not hand the streamer on to a decoding method that is a callable.
            decode = functools.partial(SteerlingGenerationMixin._unmask, streamer=streamer)
            output = super().generate(inputs, custom_generate=decode, **arguments)
            return output
        finally:
            if streamer is not None and custom_generate is None:
                streamer.end()

    def _unmask(
        self,
        input_ids: torch.Tensor,
        logits_processor: Callable,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> SteerlingGenerateOutput | torch.Tensor:
        """The decoding method; the steps are those of `generate`'s docstring."""
        rows, prompt = input_ids.shape
        length = generation_config.max_length
        grid, ends = self.config.diff_block_size, generation_config._eos_token_tensor
        rule = UNMASKING_RULES[generation_config.unmasking]()
        sampler = self._make_sampler(generation_config, rows, input_ids.device)
        steps = generation_config.steps or length - prompt
        guidance = generation_config.guidance_scale
        if streamer is not None:
            streamer.put(input_ids.cpu())

        # 1. The canvas
        canvas = input_ids.new_full((rows, length), self.config.mask_token_id)
        canvas[:, :prompt] = input_ids
        undecided = torch.zeros_like(canvas, dtype=torch.bool)
        undecided[:, prompt:] = True
        step_map = torch.full_like(canvas, -1)
        forwards = canvas.new_zeros(rows)

        # 2. Block by block
        start = prompt
        for counts in share_steps(length - prompt, grid, steps):
            stop = start + sum(counts)
            # Attention is causal across the blocks of the fixed grid: nothing behind the block's last one is visible.
            visible = min(-(-stop // grid) * grid, length)
            for count in counts:
                masked = undecided[:, start:stop]
                live = masked.any(dim=-1).nonzero()[:, 0]
                if not len(live):
                    break
                # 2.a, 2.b
                row, column = masked[live].nonzero(as_tuple=True)
                position = start + column
                logits = self._logits_at(canvas[live, :visible], row, position, prompt, guidance)
                logits = logits_processor(canvas[live[row]], logits)
                # 2.c
                sizes = masked[live].sum(dim=-1).tolist()
                for index, scores, places in zip(live.tolist(), logits.split(sizes), position.split(sizes)):
                    chosen = rule.select(scores, min(count, len(places)))
                    places = places[chosen]
                    canvas[index, places] = sampler.draw(index, canvas[index], scores[chosen])
                    undecided[index, places] = False
                    step_map[index, places] = forwards[index]
                forwards[live] += 1
                # 2.d
                if ends is not None:
                    undecided[:, prompt:] &= ~_behind_end(canvas[:, prompt:], ends)
            # 2.e
            if ends is not None:
                # Not before: the block's other positions went on seeing what was decided behind an end.
                behind = _behind_end(canvas[:, prompt:], ends)
                canvas[:, prompt:].masked_fill_(behind, generation_config._pad_token_tensor)
                step_map[:, prompt:].masked_fill_(behind, -1)
            if streamer is not None:
                longest = int((step_map[:, start:stop] >= 0).any(dim=0).sum())
                streamer.put(canvas[:, start : start + longest].cpu())
            if not undecided.any():
                break
            start = stop

        # 3. Cut after the longest row
        decided = step_map >= 0
        longest = prompt + int(decided.any(dim=0).sum())
        if not generation_config.return_dict_in_generate:
            return canvas[:, :longest]
        return SteerlingGenerateOutput(
            sequences=canvas[:, :longest],
            step_map=step_map[:, :longest],
            tokens_per_forward=decided.sum(dim=-1) / forwards,
        )

    def _logits_at(
        self,
        canvas: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        prompt: int,
        guidance_scale: float | None,
    ) -> torch.Tensor:
        """
        (n, V) float32 logits at n places `canvas[row, position]` of a (rows, T) canvas, no others being projected.

        Guidance is the classifier-free one (Ho and Salimans 2022, arXiv:2207.12598) against the canvas whose first
        `prompt` positions are masked; the reference's `cfg_scale` is `guidance_scale - 1`.
        """
        guided = guidance_scale is not None and guidance_scale != 1
        if guided:
            blind = canvas.clone()
            blind[:, :prompt] = self.config.mask_token_id
            row, position = torch.cat([row, row + len(canvas)]), position.repeat(2)
            canvas = torch.cat([canvas, blind])
        hidden_states = self.transformer(input_ids=canvas, use_cache=False).last_hidden_state
        device = hidden_states.device
        logits = self.compute_logits(hidden_states[row.to(device), position.to(device)])
        logits = logits.to(canvas.device, torch.float32)
        if guided:
            full, masked = logits.chunk(2)
            logits = masked + guidance_scale * (full - masked)
        return logits

    def _make_sampler(self, generation_config: SteerlingGenerationConfig, rows: int, device) -> TokenSampler:
        """Greedy, or with the library's warpers and a generator per row."""
        if not generation_config.do_sample:
            return TokenSampler(LogitsProcessorList(), None)
        shaping = SteerlingGenerationConfig()
        for key in SAMPLING_KEYS:
            setattr(shaping, key, getattr(generation_config, key, None))
        shaping.do_sample = True
        if shaping.temperature is not None:
            shaping.temperature = float(shaping.temperature)
        warpers = super()._get_logits_processor(shaping, device=device)
        if generation_config.entropy_temperature:
            top_p = 1.0 if shaping.top_p is None else shaping.top_p
            warpers.insert(0, EntropyTemperatureLogitsWarper(top_p))
        seeds = generation_config.seed
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (rows,)).tolist()
        elif isinstance(seeds, int):
            seeds = [seeds + row for row in range(rows)]
        elif len(seeds) != rows:
            raise ValueError(f"`seed` has {len(seeds)} values for {rows} rows: give one per row, or a single number.")
        return TokenSampler(warpers, [torch.Generator(device).manual_seed(seed) for seed in seeds])

    # What the library asks along the way

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
    ) -> None:
        """Load generation_config.json as a `SteerlingGenerationConfig`; the library would load its own class."""
        marks = {"_from_auto": from_auto_class, "_from_pipeline": from_pipeline}
        if generation_config is None and pretrained_model_name_or_path is not None:
            loading = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}
            try:
                generation_config = SteerlingGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **marks, **loading
                )
            except OSError:  # there is no such file: what __init__ derived from the model's configuration stays
                return
        super().adjust_generation_fn(
            generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
        )

    def _prepare_generation_config(self, generation_config, **kwargs):
        """The library's merge, as a `SteerlingGenerationConfig`: it starts from a plain one."""
        diffusion = {key: kwargs.pop(key) for key in SteerlingGenerationConfig.diffusion_keys if key in kwargs}
        merged, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        prepared = SteerlingGenerationConfig()
        vars(prepared).update(vars(merged), **diffusion)
        for key, value in SteerlingGenerationConfig._get_default_generation_params().items():
            if getattr(prepared, key) is None:
                setattr(prepared, key, value)
        # The merge has warned of what the user combined; what is inherited is harmless.
        prepared.validate(user_set_attributes={"do_sample", "num_beams"})
        return prepared, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Besides the library's check for typos: arguments of forward that generate() would silently drop."""
        super()._validate_model_kwargs(model_kwargs)
        for name, value in model_kwargs.items():
            if value is not None and name not in ("input_ids", "attention_mask"):
                raise ValueError(f"`{name}` is an argument of the model, but not of generate(). Leave it out.")

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Check the prompt before anything is computed, and bring it to the model's device."""
        prompt = inputs if inputs is not None else model_kwargs.get("input_ids")
        if prompt is not None:
            self._check_prompt(prompt, model_kwargs.get("attention_mask"))
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        device = inputs.device if self.device.type == "meta" else self.device
        return inputs.to(device, torch.long), name, model_kwargs

    def _check_prompt(self, prompt: Any, attention_mask: Any) -> None:
        vocabulary, context, pad = self.config.vocab_size, self.config.block_size, self.config.pad_token_id
        if not isinstance(prompt, torch.Tensor):
            problem = f"is a {type(prompt).__name__}: use generate(**tokenizer(text, return_tensors='pt'))"
        elif prompt.dim() != 2:
            problem = f"has shape {tuple(prompt.shape)}: pass (rows, length)"
        elif not prompt.numel():
            problem = f"is empty, of shape {tuple(prompt.shape)}: pass at least one token, such as bos_token_id"
        elif prompt.is_floating_point() or prompt.dtype == torch.bool:
            problem = f"has dtype {prompt.dtype}: pass token ids as torch.long"
        elif prompt.min() < 0 or prompt.max() >= vocabulary:
            problem = f"has ids from {int(prompt.min())} to {int(prompt.max())}: use ids from 0 to {vocabulary - 1}"
        elif (prompt == self.config.mask_token_id).any():
            problem = "holds the mask token, and generate() continues a text: fill masks with the model's logits"
        elif prompt.shape[1] >= context:
            problem = f"has {prompt.shape[1]} tokens for a context of {context}: shorten the prompt"
        elif attention_mask is None and pad is not None and (prompt == pad).any():
            problem = "holds the padding token: pass `attention_mask`, ones where it is meant as text"
        else:
            problem = ""
        if problem:
            raise ValueError(f"`input_ids` {problem}.")
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != prompt.shape:
                shape = f"not a tensor of the shape of `input_ids`, {tuple(prompt.shape)}"
                raise ValueError(f"`attention_mask` is {shape}: give one value per token.")
            if not (attention_mask == 1).all():
                remedy = "generate rows of equal length together, and others one by one without padding"
                raise ValueError(f"`attention_mask` has zeros, but padded prompts cannot be continued yet: {remedy}.")

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        context = self.config.block_size
        if generation_config.max_length > context:
            raise ValueError(
                f"`max_new_tokens` is {generation_config.max_length - input_ids_length}, but after a prompt of "
                f"{input_ids_length} tokens the context of {context} leaves {context - input_ids_length}."
            )
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(self, *args, **kwargs) -> None:
        """No cache: a step computes the canvas as far as its block can see."""

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        """The library's processors but for guidance, which is ours, and for what only shapes the sampling."""
        constraints = copy.copy(generation_config)
        constraints.guidance_scale = None
        constraints.do_sample = False
        if constraints.repetition_penalty is not None:
            constraints.repetition_penalty = float(constraints.repetition_penalty)
        processors = super()._get_logits_processor(constraints, *args, **kwargs)
        forbid = SuppressTokensLogitsProcessor(self._forbidden_tokens(generation_config), kwargs.get("device", "cpu"))
        return LogitsProcessorList([*processors, forbid])

    def _forbidden_tokens(self, generation_config) -> list[int]:
        """The mask token, and the tokens of the configuration that are no text unless a row may end in them."""
        ends = set(_as_list(generation_config.eos_token_id))
        if self.config.mask_token_id in ends:
            raise ValueError(f"`eos_token_id` holds the mask token ({self.config.mask_token_id}): choose another.")
        textless = {*_as_list(self.config.pad_token_id), *_as_list(self.config.eos_token_id)}
        return sorted({self.config.mask_token_id} | (textless - ends))

    def init_continuous_batching(self, *args, **kwargs):
        """Continuous batching decodes token after token, which this model cannot do."""
        raise NotImplementedError("Continuous batching decodes from left to right; use generate() on a batch instead.")


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def _behind_end(tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(rows, T) bool: the positions after the first of the end tokens in each row."""
    is_end = torch.isin(tokens, ends)
    return is_end.cumsum(dim=-1) > is_end


__all__ = [
    "ConfidenceRule",
    "EntropyTemperatureLogitsWarper",
    "SteerlingGenerateOutput",
    "SteerlingGenerationConfig",
    "SteerlingGenerationMixin",
    "UnmaskingRule",
]
