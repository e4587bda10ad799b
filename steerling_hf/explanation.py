"""Why a text says what it says: its tokens, chunks, concepts and inputs in one object that can be kept, shared and shown."""

from __future__ import annotations

import html
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .belief import measure_belief
from .chunks import Spans, aggregate, split
from .fingerprint import concept_fingerprint
from .input_attribution import InputAttributions, attribute_inputs
from .modeling.steering_steerling import device_of
from .modeling.trace_steerling import SteerlingTrace
from .report import render_report

FORMAT = 1
CONCEPTS_KEPT = 64
ENDINGS = (".html", ".json", ".parquet")
PARQUET_KEY = b"steerling_explanation"


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt: what it writes (nothing, if a character takes several tokens and goes on), and its id."""

    text: str
    id: int


@dataclass(frozen=True)
class AnswerToken:
    """
    One token of the answer.

    Args:
        text, id: As in the prompt.
        position: Its place, counted from the first token of the prompt.
        step: Which step decided it; `None` if it was given.
        logit: At that step. It is the sum of `known`, `unknown` and `residual`.
        probability: With which it was decided; `None` if that was not recorded.
    """

    text: str
    id: int
    position: int
    step: int | None
    logit: float
    probability: float | None
    known: float
    unknown: float
    residual: float


@dataclass(frozen=True)
class ConceptShare:
    """A concept's part in a chunk: signed, of the sum of all absolute contributions at a token, mean over its tokens."""

    id: int
    head: str
    name: str
    contribution: float


@dataclass(frozen=True)
class Chunk:
    """
    A piece of the answer.

    Args:
        start, end: Its tokens [start, end) in the answer.
        text: What it says.
        known, unknown, residual: Signed shares of either head and of the residual.
        concepts: The strongest first.
        inputs, context: Signed scores of the tokens of the prompt, and of the answer; `None` if they were not asked for.
    """

    start: int
    end: int
    text: str
    known: float
    unknown: float
    residual: float
    concepts: tuple[ConceptShare, ...]
    inputs: tuple[float, ...] | None = None
    context: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Explanation:
    """
    Why an answer says what it says. Made by `explain`; a notebook shows it as the report of `save("report.html")`.

    Args:
        prompt, answer: Tokens.
        chunks: Pieces of the answer, from left to right.
        metrics: How far this can be believed, by name.
        model: Its "name" and the "fingerprint" of its concepts.
        generation: The "seed" and further "settings" of the generation.
        steering: The operations under which it was generated, as recipes write them.
        trace: How the answer was written, to replay it.
    """

    prompt: tuple[PromptToken, ...]
    answer: tuple[AnswerToken, ...]
    chunks: tuple[Chunk, ...]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    steering: Sequence[Mapping[str, Any]] = ()
    trace: SteerlingTrace | None = None

    @property
    def text(self) -> str:
        """The answer, control tokens included."""
        return "".join(token.text for token in self.answer)

    def to_dict(self) -> dict[str, Any]:
        """What a JSON file can hold."""
        values = {
            "format": FORMAT,
            "model": self.model,
            "generation": self.generation,
            "steering": self.steering,
            **{name: [asdict(part) for part in getattr(self, name)] for name in ("prompt", "answer", "chunks")},
            "metrics": self.metrics,
            "trace": None if self.trace is None else self.trace.to_dict(),
        }
        return json.loads(json.dumps(values))  # lists in place of tuples, and nothing shared with this object

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """
        The explanation of `to_dict`.

        Raises:
            ValueError: It is of another format.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"`format` of the explanation is {values.get('format')!r}, and this version reads {FORMAT}."
            )
        chunks = []
        for chunk in values["chunks"]:
            concepts = tuple(ConceptShare(**concept) for concept in chunk["concepts"])
            scores = {name: None if chunk[name] is None else tuple(chunk[name]) for name in ("inputs", "context")}
            chunks.append(Chunk(**{**chunk, "concepts": concepts, **scores}))
        return cls(
            tuple(PromptToken(**token) for token in values["prompt"]),
            tuple(AnswerToken(**token) for token in values["answer"]),
            tuple(chunks),
            trace=None if values.get("trace") is None else SteerlingTrace.from_dict(values["trace"]),
            **{name: values[name] for name in ("metrics", "model", "generation", "steering")},
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row for each concept of each chunk, ready for a table."""
        return [
            {"chunk": number, "text": chunk.text, "rank": rank, **asdict(concept)}
            for number, chunk in enumerate(self.chunks)
            for rank, concept in enumerate(chunk.concepts)
        ]

    def to_dataframe(self) -> Any:
        """The `rows` as a pandas `DataFrame` (pandas is not installed with this package)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def save(self, path: str | os.PathLike) -> Path:
        """
        Write a file, whole or not at all.

        Args:
            path: Ends in `.html` (the report), `.json`, or `.parquet` (the `rows` as a table, the rest in its metadata; needs
                the extra `concepts`).

        Raises:
            ValueError: It has another ending.
            FileNotFoundError: Its folder does not exist.
        """
        target = check_file(path)
        writers: dict[str, Callable[[Path], object]] = {
            ".html": lambda whole: whole.write_text(render_report(self.to_dict()), encoding="utf-8"),
            ".json": lambda whole: whole.write_text(
                json.dumps(self.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8"
            ),
            ".parquet": self._write_parquet,
        }
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
            whole = Path(staging) / target.name
            writers[target.suffix](whole)
            whole.replace(target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike) -> Explanation:
        """
        Read what `save` has written as `.json` or `.parquet`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no explanation.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(
                f"`path` is {str(path)!r}, where no file is: give one that Explanation.save() wrote."
            )
        try:
            content = _read_parquet(source) if source.suffix == ".parquet" else source.read_bytes()
            return cls.from_dict(json.loads(content))
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(source)!r} holds no explanation: {error!r}.") from error

    def _write_parquet(self, whole: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(self.rows())
        content = json.dumps(self.to_dict(), ensure_ascii=False).encode()
        pyarrow.parquet.write_table(table.replace_schema_metadata({PARQUET_KEY: content}), whole)

    def _repr_html_(self) -> str:
        page = html.escape(render_report(self.to_dict()), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 48rem; border: 0" title="Explanation"></iframe>'


def check_file(path: str | os.PathLike) -> Path:
    """
    The path, if an explanation can be saved there.

    Raises:
        ValueError: It has none of the endings that `Explanation.save` knows.
        FileNotFoundError: Its folder does not exist.
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
        raise ValueError(f"`path` is {str(path)!r}: choose a name that ends in {', '.join(ENDINGS)}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"`path` is {str(path)!r}, but there is no folder {str(target.parent)!r}: make it first."
        )
    return target


def explain(
    model: Any,
    tokenizer: Any,
    prompt: str | torch.Tensor,
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
        prompt: A text, or (1, T) or (T,) token ids.
        by: How to cut the answer: "chunk", "sentence", or spans of positions.
        catalog: A `ConceptCatalog` that names the concepts.
        inputs: Whether to attribute tokens to the input as well, which takes a multiple of the time of generation.
        belief: Whether to measure how far the latter can be believed.
        progress: Whether to show a progress bar.
        attribution: Further arguments of `attribute_inputs`: `n_steps`, `method`, `memory_budget`.
        generation: Arguments of `generate`, for one row.

    Raises:
        ValueError: An argument cannot be used.
    """
    ids = (
        tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if isinstance(prompt, str)
        else prompt
    )
    ids = (ids[None] if ids.dim() == 1 else ids).to(device_of(model))
    if len(ids) != 1 or (generation.get("num_return_sequences") or 1) != 1:
        raise ValueError(
            f"`prompt` has {len(ids)} rows: explain() takes one; for more, explain_output() takes the rows of an output."
        )
    fixed = {"return_dict_in_generate": True, "output_attributions": True, "output_scores": True}
    output = model.generate(ids, **{**generation, **fixed})
    settings = {key: value for key, value in generation.items() if isinstance(value, (int, float, str, bool))}
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
        ValueError: The output has no attributions, or no such row.
    """
    if getattr(output, "attributions", None) is None:
        raise ValueError(
            "`output` has no attributions: generate with return_dict_in_generate=True and output_attributions=True."
        )
    if not 0 <= row < len(output.traces):
        raise ValueError(f"`row` is {row}, but `output` has the rows 0 to {len(output.traces) - 1}.")
    trace: SteerlingTrace = output.traces[row]
    folder = model.config.name_or_path.rstrip("/")
    offset = first_column(output, row)
    tokens = trace.tokens[: trace.length].tolist()
    texts = token_texts(tokenizer, tokens)
    spans = split(tokens, texts, model.config, by, trace.prompt_length)
    found = None
    if inputs:
        found = attribute_inputs(model, trace, progress=progress, **(attribution or {}))
    metrics = _metrics(model, trace, found, belief)
    return Explanation(
        prompt=tuple(PromptToken(*pair) for pair in zip(texts[: trace.prompt_length], tokens)),
        answer=_answer(trace, texts, output, row, offset),
        chunks=tuple(
            _chunk(model, trace, texts, span, output.attributions, row, offset, catalog, found) for span in spans
        ),
        metrics=metrics,
        # Where a folder lies is nobody's business to whom the report is shown.
        model={
            "name": Path(folder).name if folder and Path(folder).is_dir() else folder or "unnamed",
            "fingerprint": concept_fingerprint(model),
        },
        generation={"seed": trace.seed, "settings": dict(settings or {})},
        steering=[operation.to_dict() for operation in (*trace.attached, *trace.steering)],
        trace=trace,
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


def _answer(trace: SteerlingTrace, texts: list[str], output: Any, row: int, offset: int) -> tuple[AnswerToken, ...]:
    attributions, scores = output.attributions, output.log_probabilities
    totals = {}
    for name in ("known", "unknown"):
        values = attributions.get(f"{name}_contributions")
        totals[name] = torch.zeros(len(attributions.logits[row])) if values is None else values[row].sum(dim=-1)
    tokens = []
    for position in range(trace.prompt_length, trace.length):
        column, step = position + offset, int(trace.step_map[position])
        tokens.append(
            AnswerToken(
                texts[position],
                int(trace.tokens[position]),
                position,
                None if step < 0 else step,
                float(attributions.logits[row, column]),
                None if scores is None or step < 0 else float(scores[row, column].exp()),
                float(totals["known"][column]),
                float(totals["unknown"][column]),
                float(attributions.residual[row, column]),
            )
        )
    return tuple(tokens)


def _chunk(
    model: Any,
    trace: SteerlingTrace,
    texts: list[str],
    span: tuple[int, int],
    attributions: Any,
    row: int,
    offset: int,
    catalog: Any,
    found: InputAttributions | None,
) -> Chunk:
    start, stop = span
    n_known = model.config.n_concepts
    parts = aggregate(attributions, row, start + offset, stop + offset, n_known)
    concepts = tuple(
        ConceptShare(concept, "known" if concept < n_known else "unknown", _name(concept, n_known, catalog), share)
        for concept, share in zip(parts.ids[:CONCEPTS_KEPT].tolist(), parts.contributions.tolist())
    )
    scores: dict[str, tuple[float, ...]] = {}
    if found is not None:
        whole = found.aggregate(start, stop, "all")[: trace.length].tolist()
        scores = {"inputs": tuple(whole[: trace.prompt_length]), "context": tuple(whole[trace.prompt_length :])}
    return Chunk(
        start - trace.prompt_length,
        stop - trace.prompt_length,
        "".join(texts[start:stop]),
        parts.known,
        parts.unknown,
        parts.residual,
        concepts,
        **scores,
    )


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


def _read_parquet(source: Path) -> bytes:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(source).metadata or {}
    return metadata[PARQUET_KEY]
