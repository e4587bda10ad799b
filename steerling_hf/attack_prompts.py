"""Prompts to attack a model with, and harmless ones beside them: what is known of each, and the formats they come in."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import check_path, check_switches
from .files import read_json_lines

HARM = {
    **dict.fromkeys(("true", "1", "yes", "harmful"), True),
    **dict.fromkeys(("false", "0", "no", "unharmful", "benign"), False),
}
# How HarmBench's own baselines put a behaviour behind its context.
CONTEXT_MARK = "\n\n---\n\n"


@dataclass(frozen=True)
class AttackPrompt:
    """
    A message to a model.

    Args:
        text: The user's message, or a ready prompt.
        harmful: Whether answering it does harm. A harmless one should be answered.
        id: Names it among others.
        target: What a judge by rules needs, such as the number that must not be recited; as JSON can hold it.
        category: What kind of harm, or of request.
        benign_of: Id of the harmful prompt that this harmless one is the counterpart of.

    Raises:
        ValueError: A field is not what it should be.
    """

    text: str
    harmful: bool
    id: str
    target: Any = None
    category: str | None = None
    benign_of: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "id"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` of an AttackPrompt is {value!r}: give a string that is not empty.")
        if not isinstance(self.harmful, bool):
            raise ValueError(f"`harmful` of prompt {self.id!r} is {self.harmful!r}: give True or False.")
        if self.benign_of is not None and self.harmful:
            raise ValueError(f"`benign_of` of prompt {self.id!r} is {self.benign_of!r}, but the prompt is harmful.")
        for name in ("category", "benign_of"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` of prompt {self.id!r} is {value!r}: give a string, or None.")
        try:
            json.dumps(self.target, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`target` of prompt {self.id!r} is not JSON ({error}): reports could not keep it."
            ) from error


def read_prompts(source: Any, *, adversarial: bool | None = None) -> list[AttackPrompt]:
    """
    Read prompts in one of three formats, which their columns tell:

    - ours: `text` and `harmful` (true or false, 1 or 0, yes or no, "harmful", "unharmful" or "benign"), and if there are any
      `id`, `target`, `category`, `benign_of`;
    - WildGuardTest and WildGuardMix: `prompt` and `prompt_harm_label` ("harmful" or "unharmful"), with `subcategory` as the
      category. Prompts without a label, on which its annotators did not agree, are left out with a warning;
    - HarmBench's behaviours, all harmful: `Behavior`, and if there are any `BehaviorID`, `ContextString` (stands before the
      behaviour, as in HarmBench's own baselines), `SemanticCategory` and `FunctionalCategory`. The target is a mapping of
      "behavior", "context" and "functional_category", as HarmBench's classifier asks for them.

    Other columns are ignored. A prompt without an id is named by its number in the source.

    Args:
        source: A `.jsonl` or `.csv` file, a `datasets.Dataset`, or an iterable of records (mappings).
        adversarial: Only WildGuard's adversarial prompts (True), or only its plain ones (False).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The source cannot be read, is empty, has other columns, a wrong value or the same id twice.
    """
    if adversarial is not None:
        check_switches(adversarial=adversarial)
    read: Callable[[Mapping[str, Any], str], AttackPrompt | None] | None = None
    prompts: list[AttackPrompt] = []
    unlabelled = 0
    rows = 0
    for place, row in _rows(source):
        if read is None:
            read = _reader(row, adversarial, source)
        rows += 1
        if adversarial is not None and _boolean(row.get("adversarial"), "adversarial", place) is not adversarial:
            continue
        try:
            prompt = read(row, str(rows - 1))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if prompt is None:
            unlabelled += 1
        else:
            prompts.append(prompt)
    if not rows:
        raise ValueError(f"`source` is {_name(source)}, which has no prompts.")
    if not prompts:
        raise ValueError(f"`source` is {_name(source)}: none of its {rows} rows is a prompt that was asked for.")
    if unlabelled:
        warnings.warn(
            f"{unlabelled} of {rows} prompts have no `prompt_harm_label` and were left out.", UserWarning, stacklevel=2
        )
    try:
        check_ids(prompts)
    except ValueError as error:
        raise ValueError(f"`source` is {_name(source)}: {error}") from error
    return prompts


def check_ids(prompts: Iterable[AttackPrompt]) -> None:
    """
    Raises:
        ValueError: Two prompts have one id.
    """
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"Two prompts have the id {prompt.id!r}: answers are kept by id, so give each its own.")
        seen.add(prompt.id)


def _rows(source: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each record, and how errors call it."""
    if isinstance(source, (str, Path)):
        check_path("source", source)
        path = Path(source)
        reader = {".jsonl": _jsonl, ".csv": _csv}.get(path.suffix.lower())
        if not path.is_file():
            raise FileNotFoundError(f"`source` is {str(path)!r}: there is no such file.")
        if reader is None:
            raise ValueError(f"`source` is {str(path)!r}: give a file that ends in .jsonl or .csv, or a dataset.")
        try:
            yield from reader(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8 ({error}): convert it first.") from error
        return
    if isinstance(source, Mapping):
        inside = ", ".join(map(repr, source))
        raise ValueError(f"`source` is a mapping of {inside}: choose a split, or give a list of records.")
    if not isinstance(source, Iterable):
        raise ValueError(f"`source` is {source!r}: give a path, a dataset or an iterable of records.")
    for number, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} of `source` is a {type(row).__name__}: give records with named fields.")
        yield f"Row {number} of `source`", row


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in read_json_lines(path):
        place = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place} is a {type(row).__name__}: give an object with named fields.")
        yield place, row


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            for row in table:
                place = f"{path}, line {table.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place} has not as many fields as the header: quote fields that hold commas.")
                yield place, {name: value or None for name, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num} is not CSV: {error}.") from error


def _reader(
    row: Mapping[str, Any], adversarial: bool | None, source: Any
) -> Callable[[Mapping[str, Any], str], AttackPrompt | None]:
    """Which format the columns of the first row are of."""
    for columns, read in FORMATS.items():
        if set(columns) <= row.keys():
            if adversarial is not None and "adversarial" not in row:
                raise ValueError(
                    f"`adversarial` is {adversarial}, but the prompts have no such column: leave the argument out."
                )
            return read
    known = "; or ".join(" and ".join(columns) for columns in FORMATS)
    present = ", ".join(map(str, row)) or "(none)"
    raise ValueError(f"`source` is {_name(source)}, which has the columns {present}, but needs {known}.")


def _own(row: Mapping[str, Any], number: str) -> AttackPrompt:
    named = {name: _text(row.get(name)) for name in ("category", "benign_of")}
    harmful = _boolean(row.get("harmful"), "harmful", "The prompt")
    return AttackPrompt(row.get("text", ""), harmful, _text(row.get("id")) or number, row.get("target"), **named)


def _wildguard(row: Mapping[str, Any], number: str) -> AttackPrompt | None:
    label = row.get("prompt_harm_label")
    if label is None:
        return None
    harmful = _boolean(label, "prompt_harm_label", "The prompt")
    return AttackPrompt(row.get("prompt", ""), harmful, number, category=_text(row.get("subcategory")))


def _harmbench(row: Mapping[str, Any], number: str) -> AttackPrompt:
    behavior, context = row.get("Behavior") or "", row.get("ContextString") or ""
    functional = row.get("FunctionalCategory") or None
    return AttackPrompt(
        f"{context}{CONTEXT_MARK}{behavior}" if context and behavior else behavior,
        True,
        _text(row.get("BehaviorID")) or number,
        {"behavior": behavior, "context": context, "functional_category": functional},
        _text(row.get("SemanticCategory")) or functional,
    )


FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], AttackPrompt | None]] = {
    ("text", "harmful"): _own,
    ("prompt", "prompt_harm_label"): _wildguard,
    ("Behavior",): _harmbench,
}


def _boolean(value: Any, name: str, place: str) -> bool:
    found = HARM.get(str(value).strip().lower())
    if found is None:
        raise ValueError(f"{place} has {value!r} as `{name}`: give one of {', '.join(HARM)}.")
    return found


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"


__all__ = ["AttackPrompt", "check_ids", "read_prompts"]
