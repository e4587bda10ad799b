"""Why a text says what it says: its tokens, chunks, concepts and inputs in one object that can be kept, shared and shown."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .checks import check_path
from .files import (
    check_file,
    check_format,
    parquet_library,
    parse_json,
    reading_artefact,
    whole_file,
    write_json,
    write_whole,
)
from .modeling.trace_steerling import SteerlingTrace
from .operations import read_operations
from .report import render_report
from .report.checking import SHAPE as REPORTED
from .report.checking import TOKEN, check_chunks
from .shapes import COUNT, check_shape

FORMAT = 1
ENDINGS = (".html", ".json", ".parquet")
PARQUET_KEY = b"steerling_explanation"
TRACE = {
    "tokens": [COUNT],
    "step_map": [int],
    "prompt_length": COUNT,
    "length": COUNT,
    "grid": COUNT,
    "mask_token": COUNT,
    "align_blocks": bool,
    "guidance_scale": (float, None),
    "seed": (int, None),
    "steering": [{"operation": str, ...: object}],
    "attached": [{"operation": str, ...: object}],
}
# What a report shows, and all that it does not.
SHAPE: dict[str, Any] = {
    **REPORTED,
    "model": {...: (str, None)},
    "steering": [{"operation": str, ...: object}],
    "prompt": [{**TOKEN, "id": COUNT}],
    "answer": [{**REPORTED["answer"][0], "id": COUNT, "position": COUNT, "step": (COUNT, None)}],
    "trace?": (TRACE, None),
    "audit?": object,
}


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
        concepts: The strongest first, at most 64 of each head.
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
    Why an answer says what it says. Made by `explain` and `explain_text`; a notebook shows it as the report of `save("report.html")`.

    Args:
        prompt, answer: Tokens.
        chunks: Pieces of the answer, from left to right.
        metrics: How far this can be believed, by name.
        model: Its "name" and the "fingerprint" of its concepts.
        generation: The "seed" and further "settings" of the generation.
        steering: The operations under which it was generated, as recipes write them.
        trace: How the answer was written, to replay it; `None` if it was given.
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
            ValueError: It is of another format, or a value is not what it should be; the message names its place.
        """
        check_format(values, FORMAT, "explanation")
        check_shape(values, SHAPE, "explanation", exact=True)
        check_chunks(dict(values))
        _check_positions([token["position"] for token in values["answer"]])
        read_operations(values["steering"], "explanation['steering']")
        chunks = []
        for chunk in values["chunks"]:
            concepts = tuple(ConceptShare(**concept) for concept in chunk["concepts"])
            scores = {name: None if chunk[name] is None else tuple(chunk[name]) for name in ("inputs", "context")}
            chunks.append(Chunk(**{**chunk, "concepts": concepts, **scores}))
        return cls(
            tuple(PromptToken(**token) for token in values["prompt"]),
            tuple(AnswerToken(**token) for token in values["answer"]),
            tuple(chunks),
            trace=None if values.get("trace") is None else _read_trace(values["trace"]),
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
        target = check_target(path)
        if target.suffix == ".parquet":
            return self._save_parquet(target)
        if target.suffix == ".html":
            return write_whole(target, render_report(self.to_dict()))
        return write_json(target, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Explanation:
        """
        Read what `save` has written as `.json` or `.parquet`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no explanation.
        """
        check_path("path", path)
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(
                f"`path` is {str(path)!r}, where no file is: give one that Explanation.save() wrote."
            )
        with reading_artefact(source, "explanation"):
            content = _read_parquet(source) if source.suffix == ".parquet" else source.read_bytes()
            return cls.from_dict(parse_json(content))

    def _save_parquet(self, target: Path) -> Path:
        pyarrow = _parquet_library()
        table = pyarrow.Table.from_pylist(self.rows())
        content = json.dumps(self.to_dict(), allow_nan=False).encode()
        with whole_file(target) as whole:
            pyarrow.parquet.write_table(table.replace_schema_metadata({PARQUET_KEY: content}), whole)
        return target

    def _repr_html_(self) -> str:
        return in_frame(render_report(self.to_dict()), "Explanation")


def check_target(path: str | os.PathLike) -> Path:
    """
    The path, if an explanation can be saved there.

    Raises:
        ValueError, FileNotFoundError: See `check_file`.
        ImportError: Parquet needs pyarrow.
    """
    target = check_file(path, ENDINGS)
    if target.suffix == ".parquet":
        _parquet_library()
    return target


def _parquet_library() -> Any:
    return parquet_library("An explanation in parquet")


def in_frame(page: str, title: str) -> str:
    """A page inside another one, as a notebook shows it."""
    source = html.escape(page, quote=True)
    # Its own scripts may run, in an origin of their own: they cannot reach the notebook, its cookies or its kernel.
    return f'<iframe sandbox="allow-scripts" referrerpolicy="no-referrer" srcdoc="{source}" style="width: 100%; height: 48rem; border: 0" title="{title}"></iframe>'


def _read_parquet(source: Path) -> bytes:
    pyarrow = _parquet_library()
    try:
        metadata = pyarrow.parquet.read_schema(source).metadata or {}
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is no parquet file ({error}).") from error
    if PARQUET_KEY not in metadata:
        raise ValueError("it is a table without the metadata that Explanation.save() writes.")
    return metadata[PARQUET_KEY]


def _check_positions(positions: Sequence[int]) -> None:
    if any(left >= right for left, right in pairwise(positions)):
        raise ValueError("`explanation['answer']` has positions that do not rise from token to token.")


def _read_trace(values: Mapping[str, Any]) -> SteerlingTrace:
    tokens, step_map = values["tokens"], values["step_map"]
    if len(step_map) != len(tokens) or not values["prompt_length"] <= values["length"] <= len(tokens):
        raise ValueError(
            f"`explanation['trace']` has {len(tokens)} tokens, {len(step_map)} steps, a prompt of {values['prompt_length']} and a "
            f"text of {values['length']}, which do not fit together."
        )
    if min(step_map, default=0) < -1 or max(step_map, default=0) > len(tokens):
        raise ValueError(
            f"`explanation['trace']['step_map']` has steps from {min(step_map)} to {max(step_map)}; -1 to {len(tokens)} are "
            "possible."
        )
    if values["grid"] < 1:
        raise ValueError("`explanation['trace']['grid']` is 0; an attention block has 1 position or more.")
    for name in ("steering", "attached"):
        read_operations(values[name], f"explanation['trace'][{name!r}]")
    return SteerlingTrace.from_dict(values)
