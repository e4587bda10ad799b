"""Make the explanation of an answer: one that is generated now, one that was, or one that is given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .belief import measure_belief
from .checks import check_catalog, check_model, check_switches, check_tokenizer, check_whole, short
from .chunks import Spans, aggregate, check_by, split
from .concept_attribution import attribute_concepts
from .explanation import AnswerToken, Chunk, ConceptShare, Explanation, PromptToken
from .fingerprint import concept_fingerprint
from .input_attribution import InputAttributions, attribute_inputs, check_settings
from .modeling.attribution_steerling import SteerlingAttributions
from .modeling.lookup_steerling import device_of
from .modeling.trace_steerling import SteerlingTrace
from .reading import prompt_ids
from .torch_state import check_differentiable

CONCEPTS_KEPT = 64  # of each head


def explain(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    *,
    by: str | Spans = "chunk",
    catalog: Any = None,
    inputs: bool = True,
    belief: bool = False,
    progress: bool = False,
    attribution: Mapping[str, Any] | None = None,
    **generation: Any,
) -> Explanation:
    """
    Generate an answer and say why it says what it says.

    Args:
        model: A `SteerlingForDiffusionLM` with concept heads.
        tokenizer: Its tokenizer.
        prompt: A text; (T,) or (1, T) token ids; what a tokenizer returns; or messages, which the assistant is to answer.
        by: How to cut the answer: "chunk", "sentence", or spans of positions.
        catalog: A `ConceptCatalog` that names the concepts.
        inputs: Whether to attribute tokens to the input as well, which takes a multiple of the time of generation.
        belief: Whether to measure how far the latter can be believed.
        progress: Whether to show a progress bar.
        attribution: Further arguments of `attribute_inputs`: `n_steps`, `method`, `memory_budget`.
        generation: Arguments of `generate`, for one row.

    Raises:
        ValueError: An argument cannot be used.
        ImportError: captum is not installed, and `inputs` are wanted.
    """
    _check_parts(model, tokenizer, catalog)
    check_switches(inputs=inputs, belief=belief, progress=progress)
    catalog = _fitted(catalog, model)
    _check_inputs(model, inputs, belief, attribution)
    given = prompt_ids(tokenizer, prompt)
    if (generation.get("num_return_sequences") or 1) != 1:
        raise ValueError(
            f"`num_return_sequences` is {generation['num_return_sequences']}: explain() takes one text; for more, "
            "explain_output() takes the rows of an output."
        )
    _check_gaps("`prompt`", model.config.mask_token_id in given)
    check_by(by, len(given))
    fixed = {"return_dict_in_generate": True, "output_attributions": True, "output_scores": True}
    ids = torch.tensor([given], device=device_of(model))
    output = model.generate(ids, **{"tokenizer": tokenizer, **generation, **fixed})
    settings = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in generation.items()
        if isinstance(value, (int, float, str, bool))
    }
    return explain_output(
        model,
        tokenizer,
        output,
        by=by,
        catalog=catalog,
        inputs=inputs,
        belief=belief,
        progress=progress,
        attribution=attribution,
        settings=settings,
    )


def explain_output(
    model: Any,
    tokenizer: Any,
    output: Any,
    row: int = 0,
    *,
    by: str | Spans = "chunk",
    catalog: Any = None,
    inputs: bool = True,
    belief: bool = False,
    progress: bool = False,
    attribution: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Explanation:
    """
    The explanation of one row of `generate(..., return_dict_in_generate=True, output_attributions=True)`; the arguments are
    those of `explain`, and `settings` are shown with it.

    Raises:
        ValueError: The output has no attributions, or no such row; or an argument cannot be used.
        ImportError: captum is not installed, and `inputs` are wanted.
    """
    _check_parts(model, tokenizer, catalog)
    check_switches(inputs=inputs, belief=belief, progress=progress)
    check_whole("row", row)
    check_by(by)
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"`settings` is {short(settings)}: give a dictionary, or None.")
    catalog = _fitted(catalog, model)
    _check_inputs(model, inputs, belief, attribution)
    if getattr(output, "attributions", None) is None:
        raise ValueError(
            "`output` has no attributions: generate with return_dict_in_generate=True and output_attributions=True."
        )
    if not 0 <= row < len(output.traces):
        raise ValueError(f"`row` is {row}, but `output` has the rows 0 to {len(output.traces) - 1}.")
    trace: SteerlingTrace = output.traces[row]
    _check_gaps("The prompt of `output`", bool((trace.step_map[: trace.prompt_length] >= 0).any()))
    written = _Row(
        trace.tokens[: trace.length].tolist(),
        token_texts(tokenizer, trace.tokens[: trace.length].tolist()),
        trace.prompt_length,
        output.attributions,
        row,
        first_column(output, row),
        [None if step < 0 else step for step in trace.step_map[: trace.length].tolist()],
        output.log_probabilities,
    )
    spans = written.spans(model, by)
    found = None
    if inputs:
        found = attribute_inputs(model, trace, progress=progress, **(attribution or {}))
    return Explanation(
        prompt=written.prompt(),
        answer=written.answer(),
        chunks=written.chunks(model, spans, catalog, found),
        metrics=_metrics(model, trace, found, belief),
        model=_identity(model),
        generation={"seed": trace.seed, "settings": dict(settings or {})},
        steering=[operation.to_dict() for operation in (*trace.attached, *trace.steering)],
        trace=trace,
    )


def explain_text(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    answer: str | Sequence[int],
    *,
    by: str | Spans = "chunk",
    catalog: Any = None,
) -> Explanation:
    """
    Say which concepts stand behind an answer that is given, each token seen in its place; what steers the model applies. How
    the answer came about is unknown, so nothing is attributed to the prompt.

    Args:
        model, tokenizer, by, catalog: As in `explain`.
        prompt, answer: Texts or token ids; an answer goes on where the prompt ends.

    Raises:
        ValueError: The answer is empty, both are longer than the context, or the model has no concept heads.
    """
    _check_parts(model, tokenizer, catalog)
    for name, part in (("prompt", prompt), ("answer", answer)):
        if not isinstance(part, str):
            whole = isinstance(part, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in part)
            if not whole or isinstance(part, bytes) or not all(0 <= i < model.config.vocab_size for i in part):
                raise ValueError(f"`{name}` is {short(part)}: give a text, or a list of token ids.")
    given, said = (
        tokenizer(part, add_special_tokens=False)["input_ids"] if isinstance(part, str) else list(part)
        for part in (prompt, answer)
    )
    if not said:
        raise ValueError("`answer` has no tokens: give the text that is to be explained.")
    tokens = [*given, *said]
    check_by(by, len(given), len(tokens))
    catalog = _fitted(catalog, model)
    written = _Row(
        tokens,
        token_texts(tokenizer, tokens),
        len(given),
        attribute_concepts(model, tokenizer, [tokens]),
        steps=[None] * len(tokens),
    )
    return Explanation(
        prompt=written.prompt(),
        answer=written.answer(),
        chunks=written.chunks(model, written.spans(model, by), catalog),
        model=_identity(model),
        generation={"seed": None, "settings": {}},
        steering=[operation.to_dict() for operation in model.attached_operations],
    )


def first_column(output: Any, row: int) -> int:
    """Column of a row's first token in the tensors of an output; prompts are padded on the left, so that their ends meet."""
    longest = max(trace.length - trace.prompt_length for trace in output.traces)
    return output.sequences.shape[1] - longest - output.traces[row].prompt_length


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token writes; the last of those that share a character has all of it, and the others nothing."""
    texts: list[str] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        # No character of UTF-8 has more than four bytes; what is still broken then stays so.
        whole = not text.endswith("�") or len(waiting) == 4
        texts.append(text if whole else "")
        waiting = [] if whole else waiting
    if waiting:
        texts[-1] = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
    return texts


@dataclass(frozen=True)
class _Row:
    """A text of `prompt_length` given tokens and an answer, which the attributions hold `offset` columns further right."""

    tokens: Sequence[int]
    texts: Sequence[str]
    prompt_length: int
    attributions: SteerlingAttributions
    row: int = 0
    offset: int = 0
    steps: Sequence[int | None] = ()
    log_probabilities: torch.Tensor | None = None

    def prompt(self) -> tuple[PromptToken, ...]:
        return tuple(PromptToken(*pair) for pair in zip(self.texts[: self.prompt_length], self.tokens))

    def answer(self) -> tuple[AnswerToken, ...]:
        logits, residual = (self.attributions[name][self.row] for name in ("logits", "residual"))
        totals = {}
        for name in ("known", "unknown"):
            values = self.attributions.get(f"{name}_contributions")
            totals[name] = torch.zeros_like(logits) if values is None else values[self.row].sum(dim=-1)
        tokens = []
        for position in range(self.prompt_length, len(self.tokens)):
            column, step = position + self.offset, self.steps[position]
            scores = None if step is None else self.log_probabilities
            tokens.append(
                AnswerToken(
                    self.texts[position],
                    self.tokens[position],
                    position,
                    step,
                    float(logits[column]),
                    None if scores is None else float(scores[self.row, column].exp()),
                    float(totals["known"][column]),
                    float(totals["unknown"][column]),
                    float(residual[column]),
                )
            )
        return tuple(tokens)

    def spans(self, model: Any, by: str | Spans) -> list[tuple[int, int]]:
        return split(self.tokens, self.texts, model.config, by, self.prompt_length)

    def chunks(
        self, model: Any, spans: Spans, catalog: Any, found: InputAttributions | None = None
    ) -> tuple[Chunk, ...]:
        return tuple(self._chunk(model.config.n_concepts, start, stop, catalog, found) for start, stop in spans)

    def _chunk(self, n_known: int, start: int, stop: int, catalog: Any, found: InputAttributions | None) -> Chunk:
        parts = aggregate(self.attributions, self.row, start + self.offset, stop + self.offset, n_known)
        kept: dict[str, list[ConceptShare]] = {"known": [], "unknown": []}
        for concept, share in zip(parts.ids.tolist(), parts.contributions.tolist()):
            head = "known" if concept < n_known else "unknown"
            if len(kept[head]) < CONCEPTS_KEPT:
                kept[head].append(ConceptShare(concept, head, _name(concept, n_known, catalog), share))
        concepts = sorted([*kept["known"], *kept["unknown"]], key=lambda concept: -abs(concept.contribution))
        scores: dict[str, tuple[float, ...]] = {}
        if found is not None:
            whole = found.aggregate(start, stop, "all")[: len(self.tokens)].tolist()
            scores = {"inputs": tuple(whole[: self.prompt_length]), "context": tuple(whole[self.prompt_length :])}
        return Chunk(
            start - self.prompt_length,
            stop - self.prompt_length,
            "".join(self.texts[start:stop]),
            parts.known,
            parts.unknown,
            parts.residual,
            tuple(concepts),
            **scores,
        )


def _check_parts(model: Any, tokenizer: Any, catalog: Any) -> None:
    check_model(model)
    check_tokenizer(tokenizer)
    check_catalog(catalog)


def _fitted(catalog: Any, model: Any) -> Any:
    return None if catalog is None else catalog.fit(model.config)


def _check_gaps(where: str, gaps: bool) -> None:
    if gaps:
        raise ValueError(
            f"{where} has gaps (mask tokens), and an explanation has a prompt that is given and an answer behind "
            "it: for what fills gaps, ask attribute_inputs(model, trace) and the `attributions` of generate()."
        )


def _check_inputs(model: Any, inputs: bool, belief: bool, attribution: Mapping[str, Any] | None) -> None:
    """Before an answer is generated that could not be explained."""
    if attribution is not None and not isinstance(attribution, Mapping):
        raise ValueError(f"`attribution` is {short(attribution)}: give a dictionary, or None.")
    settings = dict(attribution or {})
    unknown = sorted(map(str, settings.keys() - {"n_steps", "method", "memory_budget"}))
    if unknown:
        raise ValueError(f"`attribution` has {unknown[0]!r}: choose from 'n_steps', 'method' and 'memory_budget'.")
    if inputs:
        check_settings(**settings)
        check_differentiable(model)
    elif belief or attribution:
        raise ValueError("`inputs` is False, so there is nothing for `belief` or `attribution`: leave them out.")


def _identity(model: Any) -> dict[str, Any]:
    """What a report calls the model: where a folder lies is nobody's business to whom it is shown."""
    folder = model.config.name_or_path.rstrip("/")
    name = Path(folder).name if folder and Path(folder).is_dir() else folder or "unnamed"
    return {"name": name, "fingerprint": concept_fingerprint(model)}


def _name(concept: int, n_known: int, catalog: Any) -> str:
    """What a concept is called, or its number."""
    named = "" if catalog is None else catalog[concept].name
    return named or f"{'known' if concept < n_known else 'discovered'} concept {concept}"


def _metrics(
    model: Any, trace: SteerlingTrace, found: InputAttributions | None, belief: bool
) -> dict[str, float | None]:
    if found is None or not len(found.positions):
        return {}
    metrics: dict[str, float | None] = {"median completeness error": statistics.median(found.errors.abs().tolist())}
    if belief:
        metrics |= {
            name.replace("_", " "): value for name, value in asdict(measure_belief(model, trace, found)).items()
        }
    return metrics
