"""Text generation by block-wise unmasking, behind the `generate` of transformers."""

# The library declares `self` in its mixin as a protocol, which only the finished model satisfies.
# mypy: disable-error-code="misc, override"

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Number
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)
from transformers.generation import BaseStreamer

from .attribution_steerling import ConceptRecorder, SteerlingAttributions
from .cache_steerling import GROWTH, SteerlingCache
from .canvas_steerling import Canvas, Rows
from .compatibility_steerling import CACHE_NAME, CacheOutput, accept_past_key_values
from .criteria_steerling import RowCriteria
from .decoding_steerling import BlockStream, Decisions, unmask
from .generation_config_steerling import (
    NO_TOKEN,
    SAMPLING_KEYS,
    SteerlingGenerationConfig,
    check_values,
    refuse_inapplicable,
)
from .hooks_steerling import SteeringReport
from .packing_steerling import packed_weights
from .processors_steerling import OwnProcessors, SequenceBias
from .prompts_steerling import check_prompt, refuse_adapter_names
from .sharded_steerling import gathered_weights
from .steered_steerling import SteerableMixin, operations_by_row
from .trace_steerling import SteerlingTrace
from .unmasking_steerling import EntropyTemperatureLogitsWarper, ForbiddenPhrases, TokenSampler, make_rule
from .windows_steerling import WindowEncoder


@dataclass
class SteerlingGenerateOutput(CacheOutput):
    """
    Output of `generate` with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(rows, T)`): Token ids, prompt included. T is the length of the longest
            row; what follows the end of a row is `pad_token_id`.
        step_map (`torch.LongTensor` of shape `(rows, T)`): The step, counted from 0 in each row, that decided a
            position; -1 for what was given and for padding.
        tokens_per_forward (`torch.FloatTensor` of shape `(rows,)`): Decided tokens of a row, its end token included, over
            its steps. A guided step is one, and what is computed of the prompt before the first is none.
        log_probabilities (`torch.FloatTensor` of shape `(rows, T)`): With `output_scores=True`, the logarithm of each
            decided token's probability when it was decided, before what only shapes the sampling; 0 elsewhere.
        scores, logits (`tuple[torch.FloatTensor]`): With `output_scores=True`, or `output_logits=True`: for each new column,
            (rows, V) logits of the step that decided the position there, with guidance; `scores` after all processors but those
            that only shape the sampling. What would be padding has all its probability on `pad_token_id`. They take 4 bytes
            for each new token and token of the vocabulary.
        cache (`SteerlingCache`): The cache, for a prompt that continues these rows. `None` without one.
        steering (`SteeringReport`): With `steering`, what its operations changed where.
        attributions (`SteerlingAttributions`): With `output_attributions=True`, the concepts behind each decided token.
        traces (`list[SteerlingTrace]`): How each row was written, to replay it for explanations.
    """

    sequences: torch.Tensor | None = None
    step_map: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    log_probabilities: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    cache: SteerlingCache | None = None
    steering: SteeringReport | None = None
    attributions: SteerlingAttributions | None = None
    traces: list[SteerlingTrace] | None = None


class SteerlingGenerationMixin(SteerableMixin, GenerationMixin):
    """`generate` for a model that has `transformer`, `compute_logits` and a Steerling configuration."""

    config: Any
    transformer: PreTrainedModel
    compute_logits: Callable
    concept_heads: Callable
    _default_compile_config: Callable
    training: bool
    device: torch.device
    generation_config_class: type[GenerationConfig] = SteerlingGenerationConfig

    @accept_past_key_values
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: Any = None,
        custom_generate: Any = None,
        **kwargs,
    ) -> SteerlingGenerateOutput | torch.Tensor:
        """
        Fill in the mask tokens of each prompt, and continue it by unmasking `max_new_tokens` positions, block by block.

        The library prepares and checks the arguments; then, in `_unmask`:
        ```
        1. A canvas for each row: its prompt without padding, and one mask token for each new position.
        2. The attention blocks of the prompts that are complete go to the cache.
        3. Until every canvas is decided, for all unfinished rows together:
            a. A forward pass over each row's window, from its first block that is not cached to the end of what its
               current generation block can see.
            b. Logits at the block's masked positions, guided and processed.
            c. The unmasking rule picks positions, and their tokens are drawn.
            d. Behind a row's first end token no further position is decided; those before it still are, and the row
               ends with the block. Stopping criteria end it at once.
        4. The rows are cut after the longest one.
        ```
        Rows are independent of each other: each has its own positions, blocks, steps, end and random numbers.

        A mask token in a prompt is filled in by what attention shows it: its own block of `diff_block_size` positions,
        both ways, and all earlier ones, but no later block. Blocks are filled in from left to right; other tokens stay.

        Args:
            inputs: (rows, length) prompts, also as `input_ids`. Without any, a row starts from `bos_token_id`.
            generation_config: A `SteerlingGenerationConfig`, or any `GenerationConfig`; what it leaves unset is taken
                from the model's.
            logits_processor: Further processors, applied before those that only shape the sampling; see `OwnProcessors`.
            stopping_criteria: Further criteria; see `RowCriteria`.
            streamer: Receives the prompts, then each block as it is complete, both of shape (rows, tokens); one that
                has `put_draft` also receives the undecided block after each step.
            tokenizer: Needed for `stop_strings`.
            steering: Operations or recipes for this call, after those that the model has: one for all rows, a tuple of
                them, or a list with an entry for each prompt (`None` for none).
            custom_generate: A decoding method in place of this one, as in transformers. It is called with what this one
                would be: the user's own stopping criteria only, and no processors that only shape the sampling.
            kwargs: `attention_mask`, 0 for padding on either side (rows come back padded on the left);
                `cache`, a `SteerlingCache`; and parameters of `SteerlingGenerationConfig`. `guidance_scale`
                compares with the prompt masked: `logits = masked + guidance_scale * (full - masked)`.

        Returns:
            (rows, T) token ids, prompt included, or a `SteerlingGenerateOutput` if `return_dict_in_generate`.

        Raises:
            ValueError: An argument cannot be used; raised before any computation.
        """
        kwargs = {name: _as_python(value) for name, value in kwargs.items()}
        if "cache" in kwargs:
            kwargs[CACHE_NAME] = kwargs.pop("cache")
        if not all(callable(getattr(streamer, method, None)) for method in ("put", "end")) and streamer is not None:
            raise ValueError(
                f"`streamer` is {streamer!r}: give an object with put() and end(), such as a TextStreamer."
            )
        arguments: dict[str, Any] = {"generation_config": generation_config, "logits_processor": logits_processor}
        arguments |= {"stopping_criteria": stopping_criteria, **kwargs}
        output: Any  # the library names its own classes
        try:
            if custom_generate is not None:
                if steering is not None:
                    raise ValueError(
                        "`steering` is for this model's own decoding: with `custom_generate`, use model.steer()."
                    )
                arguments |= {"streamer": streamer, "tokenizer": tokenizer, "custom_generate": custom_generate}
                output = super().generate(inputs, **arguments)
                return output
            refuse_inapplicable(kwargs)
            check_values(kwargs)
            _check_objects(generation_config, logits_processor, stopping_criteria)
            own = getattr(self.prepare_inputs_for_generation, "__func__", None)
            if own is not type(self).prepare_inputs_for_generation:
                raise ValueError(
                    "`prepare_inputs_for_generation` was replaced, as prompt tuning and its like do to bring embeddings in, but "
                    "this generate() has tokens only and would ignore it: use LoRA or another method that changes weights."
                )
            refuse_adapter_names(self)
            started = time.monotonic()

            # The library hands neither streamer nor tokenizer on to a decoding method that is a callable.
            def decode(model, *args, **prepared):
                return model._unmask(
                    *args,
                    **prepared,
                    own_processors=list(logits_processor or []),
                    streamer=streamer,
                    tokenizer=tokenizer,
                    steering=steering,
                    started=started,
                )

            with gathered_weights(self):
                output = super().generate(inputs, custom_generate=decode, **arguments)
            return output
        finally:
            if streamer is not None and custom_generate is None:
                streamer.end()

    def _unmask(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        own_processors: list[Callable] | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: Any = None,
        started: float = 0.0,
        **model_kwargs,
    ) -> SteerlingGenerateOutput | torch.Tensor:
        """The decoding method; the steps are those of `generate`'s docstring."""
        device, cache = input_ids.device, model_kwargs.get(CACHE_NAME)
        if isinstance(streamer, TextStreamer) and len(input_ids) > 1:
            raise ValueError(f"`streamer` is a {type(streamer).__name__}, which shows one row, not {len(input_ids)}.")
        ends = generation_config._eos_token_tensor
        ends = None if ends is None or not (ends >= 0).any() else ends[ends >= 0].cpu()
        guidance_scale = None if generation_config.guidance_scale == 1 else generation_config.guidance_scale
        deadlines, criteria = _deadlines(stopping_criteria)
        if generation_config.max_time is not None:
            deadlines.append(started + generation_config.max_time)
        if generation_config.stop_strings is not None:
            if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
                raise ValueError("`stop_strings` need the tokenizer: pass `tokenizer=tokenizer` to generate().")
            criteria.append(StopStringCriteria(cast(Any, tokenizer), generation_config.stop_strings))
        # 1.
        canvases = self._make_canvases(input_ids, model_kwargs.get("attention_mask"), generation_config)
        rows = Rows(input_ids, canvases, self._filler(generation_config))
        own = own_processors or []
        decisions = Decisions(
            rule=make_rule(generation_config),
            sampler=self._make_sampler(generation_config, len(canvases), device),
            processors=LogitsProcessorList([p for p in logits_processor if not any(p is given for given in own)]),
            forbidden=torch.tensor(self._forbidden_tokens(generation_config), device=device),
            phrases=self._forbidden_phrases(generation_config),
            bias=self._sequence_bias(generation_config, device),
            own=OwnProcessors(own, rows) if own else None,
            guidance_scale=guidance_scale,
            ends=ends,
            least=max(0, (generation_config.min_length or 0) - input_ids.shape[1]),
            criteria=RowCriteria(criteria, rows, device) if criteria else None,
            deadline=min(deadlines, default=None),
            log_probabilities=bool(generation_config.output_scores),
            keep_scores=bool(generation_config.output_scores and generation_config.return_dict_in_generate),
            keep_logits=bool(generation_config.output_logits and generation_config.return_dict_in_generate),
            computed=lambda: self._how_computed(steering, len(canvases), generation_config),
            constraints=_constraints(generation_config, own),
        )
        recorder = ConceptRecorder(self, guidance_scale) if generation_config.output_attributions else None
        # 2.
        width = None
        if cache is not None and cache.fixed:
            width = self.config.diff_block_size * (1 if generation_config.align_blocks else 2)
        compiled = width and self._valid_auto_compile_criteria({CACHE_NAME: cache}, generation_config)
        encoder = WindowEncoder(
            self.transformer,
            self.config,
            canvases,
            copies=generation_config.num_return_sequences,
            device=device,
            cache=cache,
            guided=guidance_scale is not None,
            width=width,
        )
        # 3.
        with (
            self._steered(steering, canvases, generation_config.num_return_sequences) as (encoder.steering, report),
            packed_weights(
                self.transformer,
                [head.scored_table for head in self.concept_heads()],
                passes=max(canvas.planned for canvas in canvases),
            ),
        ):
            if compiled:
                encoder.step = self._compiled_backbone(generation_config.compile_config)
            try:
                unmask(self.compute_logits, encoder, canvases, decisions, BlockStream(streamer, rows), recorder)
            finally:
                encoder.forget_steered()
            attributions = recorder.collect(rows) if recorder is not None else None
        encoder.restore_order(canvases)
        # 4.
        if not generation_config.return_dict_in_generate:
            return rows.tokens().to(device)
        decided = [int((canvas.step_map[: canvas.length] >= 0).sum()) for canvas in canvases]
        forwards = [max(canvas.forwards, 1) for canvas in canvases]
        return SteerlingGenerateOutput(
            sequences=rows.tokens().to(device),
            step_map=rows.gather([canvas.step_map for canvas in canvases], -1).to(device),
            tokens_per_forward=torch.tensor(
                [count / passes for count, passes in zip(decided, forwards)], dtype=torch.float32, device=device
            ),
            log_probabilities=rows.gather([canvas.log_probabilities for canvas in canvases], 0.0).to(device)
            if generation_config.output_scores
            else None,
            scores=self._columns(rows, [c.scores for c in canvases], device) if decisions.keep_scores else None,
            logits=self._columns(rows, [c.logits for c in canvases], device) if decisions.keep_logits else None,
            cache=cache,
            steering=report,
            attributions=attributions,
            traces=self._traces(canvases, generation_config, guidance_scale, steering, decisions.sampler),
        )

    def _traces(
        self,
        canvases: list[Canvas],
        generation_config: Any,
        guidance_scale: float | None,
        steering: Any,
        sampler: TokenSampler,
    ) -> list[SteerlingTrace]:
        given = operations_by_row(self, steering, len(canvases), generation_config.num_return_sequences)
        return [
            SteerlingTrace.of(
                canvas,
                align_blocks=bool(generation_config.align_blocks),
                guidance_scale=guidance_scale,
                seed=sampler.generators[canvas.index].initial_seed() if sampler.generators else None,
                steering=tuple(operation for operation, rows in given if rows is None or canvas.index in rows),
                attached=self.attached_operations,
            )
            for canvas in canvases
        ]

    def _how_computed(self, steering: Any, rows: int, generation_config: Any) -> str:
        """What can have made logits infinite or NaN, and what helps."""
        kind = self.transformer.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.transformer.dtype
        given = operations_by_row(self, steering, rows, generation_config.num_return_sequences)
        names = [
            type(operation).__name__
            for operation in (*self.attached_operations, *(operation for operation, _ in given))
        ]
        names = [f"steering by {name}" for name in dict.fromkeys(names)]
        for key in ("guidance_scale", "repetition_penalty"):
            if getattr(generation_config, key) not in (None, 1):
                names.append(f"`{key}` {getattr(generation_config, key)}")
        causes = f" with {', '.join(names)}" if names else ""
        wider = (
            "use bfloat16 or float32" if dtype == torch.float16 else "look for weights and hooks that are not finite"
        )
        return f"computed in {dtype}{causes}; {wider}{', or less of these' if names else ''}"

    def _columns(
        self, rows: Rows, values: list[dict[int, torch.Tensor]], device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        padding = torch.full((self.config.vocab_size,), -torch.inf, dtype=torch.float32, device=device)
        padding[rows.filler] = 0.0
        return rows.columns(values, padding)

    def _compiled_backbone(self, compile_config: Any) -> Callable:
        """The backbone's compiled call, kept for further calls with the same options, as the library keeps the model's."""
        options: dict[str, Any] = {"isolate_recompiles": True}
        options |= (compile_config or self._default_compile_config()).to_dict()
        made_for = (id(self.transformer), options)
        if getattr(self, "_compiled_for", None) != made_for:
            self._compiled_for = made_for
            self._compiled_steps: dict[tuple, Callable] = {}
        # Compiled code is not told of hooks that come and go, only of what is in them; so each set of hooked modules has its own.
        hooked = tuple(
            (name, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in self.transformer.named_modules()
            if (module._forward_pre_hooks or module._forward_hooks) and module is not self.transformer.lm_head
        )
        if hooked not in self._compiled_steps:
            self._compiled_steps[hooked] = torch.compile(self.transformer.__call__, **options)
        return self._compiled_steps[hooked]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without what was compiled for this very model."""
        state: Any = super().__getstate__()  # that of torch's modules, which mypy does not see from a mixin
        return {key: value for key, value in state.items() if key not in ("_compiled_for", "_compiled_steps")}

    def _make_canvases(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, generation_config: Any
    ) -> list[Canvas]:
        ids = input_ids.cpu()
        text = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        prompts = [row[here.bool()] for row, here in zip(ids, text)]
        new_tokens, longest = generation_config.max_length - input_ids.shape[1], max(map(len, prompts))
        if longest + new_tokens > self.config.block_size:
            raise ValueError(
                f"`max_new_tokens` is {new_tokens}, but after a prompt of {longest} tokens the context of "
                f"{self.config.block_size} leaves {self.config.block_size - longest}."
            )
        mask = self.config.mask_token_id
        if new_tokens == 0 and not (ids == mask).any():
            raise ValueError(
                "`max_new_tokens` is 0, but `input_ids` holds no mask token to fill in: ask for new tokens."
            )
        return [
            Canvas(
                index,
                prompt,
                new_tokens,
                grid=self.config.diff_block_size,
                mask_token=mask,
                steps=generation_config.steps,
                aligned=generation_config.align_blocks,
            )
            for index, prompt in enumerate(prompts)
        ]

    def _filler(self, generation_config: Any) -> int:
        pad = generation_config._pad_token_tensor
        return int(pad) if pad is not None and pad >= 0 else (self.config.pad_token_id or 0)

    def _make_sampler(self, generation_config: SteerlingGenerationConfig, rows: int, device) -> TokenSampler:
        """Greedy, or with the library's warpers and a generator per row."""
        seeds = generation_config.seed
        if isinstance(seeds, (list, tuple)) and len(seeds) != rows:
            raise ValueError(f"`seed` has {len(seeds)} values for {rows} rows: give one per row, or a single number.")
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
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (rows,), device="cpu").tolist()
        elif isinstance(seeds, int):
            seeds = [(seeds + row) % 2**63 for row in range(rows)]
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
        if kwargs.get("max_new_tokens") == 0:  # which the library refuses
            diffusion["max_new_tokens"] = kwargs.pop("max_new_tokens")
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
        if "logit_bias" in model_kwargs:
            raise ValueError("`logit_bias` is called sequence_bias={(token,): bias} in transformers: give that.")
        super()._validate_model_kwargs(model_kwargs)
        for name, value in model_kwargs.items():
            if value is not None and name not in ("input_ids", "attention_mask", CACHE_NAME):
                raise ValueError(f"`{name}` is an argument of the model, but not of generate(). Leave it out.")

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Check the prompts before anything is computed, bring padding to the left and all to the model's device."""
        prompt = inputs if inputs is not None else model_kwargs.get("input_ids")
        mask = model_kwargs.get("attention_mask")
        if prompt is not None:
            check_prompt(self.config, prompt, mask)
        elif mask is not None:
            raise ValueError("`attention_mask` is given without `input_ids`: leave it out, or give the prompts.")
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        device = inputs.device if self.device.type == "meta" else self.device
        inputs = inputs.to(device, torch.long)
        if mask is not None and not bool(mask[:, -1].all()):
            order = mask.to(device).bool().long().argsort(dim=1, stable=True)
            inputs = inputs.gather(1, order)
            model_kwargs = {**model_kwargs, "attention_mask": mask.to(device).gather(1, order)}
        return inputs, name, model_kwargs

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        new_tokens = generation_config.max_length - input_ids_length
        if new_tokens < 0 or (new_tokens == 0 and generation_config.max_new_tokens != 0):
            raise ValueError(
                f"`max_length` is {generation_config.max_length}, but the prompt has {input_ids_length} tokens: give "
                "`max_new_tokens`, 0 if only mask tokens in the prompt are to be filled in."
            )
        if new_tokens:
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """The exact block cache; a given one must fit."""
        cache, implementation = model_kwargs.get(CACHE_NAME), generation_config.cache_implementation
        without = generation_config.use_cache is False
        rows = batch_size * generation_config.num_return_sequences
        lanes = 1 if generation_config.guidance_scale in (None, 1) else 2
        grid = self.config.diff_block_size
        # All positions, whole blocks, and a window that may reach beyond them.
        columns = -(-generation_config.max_length // grid) * grid + 2 * grid
        if generation_config.compile_config is not None and implementation != "static" and cache is None:
            raise ValueError("`compile_config` needs shapes that do not change: add cache_implementation='static'.")
        if cache is None and not without:
            static = -(-columns // GROWTH) * GROWTH if implementation == "static" else None
            model_kwargs[CACHE_NAME] = SteerlingCache(self.config, static)
        if cache is None and (implementation is None or not without):
            return
        if without:
            name = "`cache_implementation`" if cache is None else "`cache` (`past_key_values`)"
            raise ValueError(f"{name} is given, but there is no cache under use_cache=False: leave one of them out.")
        if not isinstance(cache, SteerlingCache) or len(cache.layers) != self.config.n_layers:
            problem = (
                f"a {type(cache).__name__} of another kind or depth: pass a SteerlingCache of this model, or none"
            )
        elif implementation is not None:
            problem = f"given beside cache_implementation={implementation!r}: leave one of them out"
        elif cache.rows not in (0, batch_size * lanes, rows * lanes):
            problem = f"of {cache.rows} rows, and {rows * lanes} are needed (a guided row counts twice)"
        elif cache.fixed and cache.columns < columns:
            problem = f"fixed at {cache.columns} columns, and {columns} are needed"
        else:
            return
        raise ValueError(f"`cache` (`past_key_values`) is {problem}.")

    def _get_stopping_criteria(self, generation_config, stopping_criteria, tokenizer=None) -> StoppingCriteriaList:
        """The user's criteria; what the library would add is done by the canvases and in `_unmask`."""
        return StoppingCriteriaList(stopping_criteria or [])

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        """The library's processors but for what is done by position here, and for what only shapes the sampling."""
        constraints = copy.copy(generation_config)
        constraints.guidance_scale = constraints.bad_words_ids = constraints.suppress_tokens = None
        constraints.sequence_bias = constraints.min_length = constraints.min_new_tokens = None
        constraints.do_sample = False
        if constraints.repetition_penalty is not None:
            constraints.repetition_penalty = float(constraints.repetition_penalty)
        # Its own padding would be the library's business; canvases have none.
        return super()._get_logits_processor(constraints, *args, **{**kwargs, "model_kwargs": None})

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs) -> torch.Tensor:
        """All is text unless the user says otherwise; the library guesses padding from the padding token."""
        return torch.ones_like(inputs_tensor)

    def _forbidden_tokens(self, generation_config) -> list[int]:
        """What the user suppresses, the mask token, and tokens that are no text unless a row may end in them."""
        ends = set(_as_list(generation_config.eos_token_id)) - {NO_TOKEN}
        if self.config.mask_token_id in ends:
            raise ValueError(f"`eos_token_id` holds the mask token ({self.config.mask_token_id}): choose another.")
        phrases = generation_config.bad_words_ids or []
        biased = _biases(generation_config.sequence_bias)
        named = {
            "eos_token_id": ends,
            "pad_token_id": _as_list(generation_config.pad_token_id),
            "suppress_tokens": _as_list(generation_config.suppress_tokens),
            "bad_words_ids": [token for phrase in phrases for token in phrase],
            "sequence_bias": [token for sequence in biased for token in sequence],
        }
        for name, tokens in named.items():
            outside = [token for token in tokens if not 0 <= token < self.config.vocab_size]
            if outside:
                raise ValueError(f"`{name}` holds {outside[0]}: use ids from 0 to {self.config.vocab_size - 1}.")
        suppressed = {*named["suppress_tokens"], *(phrase[0] for phrase in phrases if len(phrase) == 1)}
        textless = {*_as_list(self.config.pad_token_id), *self.config.eos_token_ids}
        forbidden = suppressed | {self.config.mask_token_id} | (textless - ends)
        if len(forbidden) == self.config.vocab_size:
            name = "suppress_tokens" if named["suppress_tokens"] else "bad_words_ids"
            raise ValueError(f"`{name}` leaves no token of the {self.config.vocab_size} to write: suppress fewer.")
        return sorted(forbidden)

    def _sequence_bias(self, generation_config, device: torch.device) -> SequenceBias | None:
        biases = _biases(generation_config.sequence_bias)
        return SequenceBias(biases, self.config.vocab_size, device) if biases else None

    @staticmethod
    def _forbidden_phrases(generation_config) -> ForbiddenPhrases | None:
        phrases = [phrase for phrase in generation_config.bad_words_ids or [] if len(phrase) > 1]
        return ForbiddenPhrases(phrases) if phrases else None

    def init_continuous_batching(self, *args, **kwargs):
        """Continuous batching decodes token after token, which this model cannot do."""
        raise NotImplementedError("Continuous batching decodes from left to right; use generate() on a batch instead.")


def _check_objects(generation_config: Any, logits_processor: Any, stopping_criteria: Any) -> None:
    """Refuse what cannot be used in place of a configuration, of processors and of criteria."""
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        kind = type(generation_config).__name__
        raise ValueError(
            f"`generation_config` is a {kind}: give a SteerlingGenerationConfig, or arguments one by one."
        )
    for name, given in {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}.items():
        if given is not None and not (isinstance(given, Iterable) and all(map(callable, given))):
            raise ValueError(f"`{name}` is {given!r}: give a list of callables.")


def _deadlines(criteria: Iterable[Callable]) -> tuple[list[float], list[Callable]]:
    """Deadlines of criteria that only look at the time, which is over between columns as well, and the other criteria."""
    deadlines, others = [], []
    for criterion in criteria:
        if type(criterion) is MaxTimeCriteria:
            deadlines.append(time.monotonic() + criterion.initial_timestamp + criterion.max_time - time.time())
        else:
            others.append(criterion)
    return deadlines, others


def _constraints(generation_config: Any, own: list[Callable]) -> list[str]:
    """Names of the arguments that can rule tokens out."""
    names = ("suppress_tokens", "bad_words_ids", "sequence_bias", "min_new_tokens", "min_length", "eos_token_id")
    given = [name for name in names if getattr(generation_config, name)]
    return given + ["logits_processor"] * bool(own)


def _biases(given: Any) -> dict[tuple[int, ...], float]:
    """`sequence_bias` in either of transformers' forms, by sequence."""
    pairs = given.items() if isinstance(given, dict) else given or []
    return {tuple(sequence): float(bias) for sequence, bias in pairs}


def _as_python(value: Any) -> Any:
    """NumPy's numbers, alone or in lists, as Python's, which the library and we ask for."""
    if type(value) in (list, tuple):
        return type(value)(map(_as_python, value))
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _as_list(ids: int | list[int] | torch.Tensor | None) -> list[int]:
    if isinstance(ids, torch.Tensor):
        ids = ids.flatten().tolist()
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


__all__ = ["SteerlingGenerateOutput", "SteerlingGenerationMixin"]
