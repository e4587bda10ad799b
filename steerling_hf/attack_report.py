"""What a run of attacks has shown: rates with their intervals, condition by condition, and every answer behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .attack_prompts import AttackPrompt, check_ids
from .checks import check_path
from .files import check_file, check_format, read_artefact, write_json, write_whole
from .intervals import paired_test, wilson_interval
from .judges import Judge, Verdict, ask
from .plots import bar_plot
from .shapes import COUNT, SCORE, check_derived, check_shape

FORMAT = 1
RATE = {"count": COUNT, "n": COUNT, "low": SCORE, "high": SCORE}
QUALITY = {
    "measure": frozenset({"parse_rate", "pseudo-perplexity"}),
    "benign": (float, None),
    "overall": (float, None),
    "benign_count": COUNT,
    "overall_count": COUNT,
}
SHAPE = {
    "format": int,
    "settings": dict,
    "results": {
        ...: {
            "attack_success": RATE,
            "refusal": (RATE, None),
            "over_refusal": (RATE, None),
            "benign_changed": (RATE, None),
            "p_value": (SCORE, None),
            "errors": COUNT,
            "empty": COUNT,
            "undecided": COUNT,
            "quality": (QUALITY, None),
        }
    },
    "prompts": [
        {
            "text": str,
            "harmful": bool,
            "id": str,
            "target": object,
            "category": (str, None),
            "benign_of": (str, None),
        }
    ],
    "answers": {
        ...: [
            {
                "id": str,
                "answer": (str, None),
                "written": (str, None),
                "verdict": ({"success": (bool, None), "refused": (bool, None), "error": (str, None)}, None),
                "error": (str, None),
            }
        ]
    },
}


class AttackError(ValueError):
    """
    A run of attacks that broke off; everything that was generated is kept.

    Args:
        message: What happened.
        report: All answers so far, those without verdicts too. Save it, and judge it again with
            `report.judged_by`.
    """

    def __init__(self, message: str, report: AttackReport):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Rate:
    """
    A share of prompts.

    Args:
        count: How many did.
        n: Of how many.
        low, high: Wilson's 95% interval of the share.
    """

    count: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate | None:
        """The share of outcomes that are true; `None` if there are none."""
        given = [bool(outcome) for outcome in outcomes]
        return cls(sum(given), len(given), *wilson_interval(sum(given), len(given))) if given else None

    @property
    def share(self) -> float:
        """`count / n`."""
        return self.count / self.n

    def __str__(self) -> str:
        return f"{self.share:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class TextQuality:
    """
    Whether language survived under a condition.

    Args:
        measure: "parse_rate", the share of sentences that the parser accepts; or "pseudo-perplexity", `exp` of minus the mean
            log-probability of a written token under the unsteered base model, so that less is better.
        benign, overall: Over answers to benign prompts, and over all; `None` if there is nothing to measure.
        benign_count, overall_count: Sentences, or tokens.
    """

    measure: str
    benign: float | None
    overall: float | None
    benign_count: int
    overall_count: int


@dataclass(frozen=True)
class AttackRecord:
    """
    One prompt under one condition.

    Args:
        condition: Its name.
        prompt: What was asked.
        answer: What a reader sees of the answer, without control tokens; `None` if generation raised.
        written: The same as it was written, with control tokens and the end token.
        verdict: Of the judge; `None` if there was nothing to judge: an error, or an empty answer.
        error: What generation raised.
    """

    condition: str
    prompt: AttackPrompt
    answer: str | None
    written: str | None
    verdict: Verdict | None = None
    error: str | None = None

    @property
    def empty(self) -> bool:
        """Whether the answer says nothing."""
        return self.answer is not None and not self.answer.strip()

    @property
    def succeeded(self) -> bool:
        """Whether the judge says that the attack succeeded."""
        return self.verdict is not None and bool(self.verdict.success)

    @property
    def refused(self) -> bool:
        """Whether the judge says that the answer is a refusal."""
        return self.verdict is not None and bool(self.verdict.refused)


@dataclass(frozen=True)
class ConditionResult:
    """
    One condition. Errors, empty answers and undecided verdicts count in every `n`, as neither success nor refusal.

    Args:
        attack_success: Of harmful prompts.
        refusal: Of harmful prompts; `None` if the judge never speaks of refusals.
        over_refusal: Of benign prompts; `None` as well if there are none.
        benign_changed: Benign prompts with another answer than under the baseline; `None` for it, or without any.
        p_value: Of the exact paired test (`paired_test`) of attack success against the baseline; `None` for it.
        errors: Prompts whose generation raised.
        empty: Answers that say nothing.
        undecided: Answers on which the judge did not say what one of these rates asks for.
        quality: Whether language survived; `None` if it was not measured.
    """

    attack_success: Rate
    refusal: Rate | None
    over_refusal: Rate | None
    benign_changed: Rate | None
    p_value: float | None
    errors: int
    empty: int
    undecided: int
    quality: TextQuality | None


@dataclass(frozen=True, eq=False)
class AttackReport:
    """
    How often attacks succeed under each condition; made by `evaluate_attacks`.

        report["control"].attack_success.share, report["control"].p_value
        print(report); report.save("attacks.json"); report.plot("attacks.svg")

    Args:
        records: All answers: the conditions one after another, the baseline first, each with the same prompts.
        quality: By condition.
        settings: What it was made with: models, judge, conditions, generation.
    """

    records: tuple[AttackRecord, ...]
    quality: Mapping[str, TextQuality] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Their names, the baseline first."""
        return tuple(self._by_condition)

    def __getitem__(self, condition: str) -> ConditionResult:
        """The result of one condition."""
        if condition not in self.results:
            raise KeyError(f"{condition!r}: the conditions are {', '.join(map(repr, self.results))}.")
        return self.results[condition]

    @cached_property
    def results(self) -> dict[str, ConditionResult]:
        """By condition, the baseline first."""
        verdicts = [record.verdict for record in self.records if record.verdict is not None]
        refusals = any(verdict.refused is not None for verdict in verdicts)
        baseline = self._by_condition[self.conditions[0]]
        return {
            name: _result(records, None if records is baseline else baseline, refusals, self.quality.get(name))
            for name, records in self._by_condition.items()
        }

    @cached_property
    def _by_condition(self) -> dict[str, list[AttackRecord]]:
        found: dict[str, list[AttackRecord]] = {}
        for record in self.records:
            found.setdefault(record.condition, []).append(record)
        return found

    def judged_by(self, judge: Judge) -> AttackReport:
        """
        The same answers with the verdicts of another judge; nothing is generated.

        Raises:
            AttackError: The judge fails, or can say nothing at all of the first condition's attacks.
        """
        settings = {**self.settings, "judge": describe_judge(judge)}
        done: list[AttackRecord] = []
        for records in self._by_condition.values():
            try:
                done += judged(judge, records, first=not done)
            except Exception as error:
                raise AttackError(f"The judge failed: {error}", self) from error
        return AttackReport(tuple(done), self.quality, settings)

    def to_dict(self) -> dict[str, Any]:
        """What a JSON file can hold: results for readers, and prompts and answers, of which `from_dict` needs no more."""
        prompts = [record.prompt for record in self._by_condition[self.conditions[0]]]
        values = {
            "format": FORMAT,
            "settings": self.settings,
            "results": {name: asdict(result) for name, result in self.results.items()},
            "prompts": [asdict(prompt) for prompt in prompts],
            "answers": {
                name: [
                    {
                        "id": record.prompt.id,
                        "answer": record.answer,
                        "written": record.written,
                        "verdict": None if record.verdict is None else asdict(record.verdict),
                        "error": record.error,
                    }
                    for record in records
                ]
                for name, records in self._by_condition.items()
            },
        }
        return json.loads(json.dumps(values))  # lists in place of tuples, and nothing shared with this object

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackReport:
        """
        The report of `to_dict`.

        Raises:
            ValueError: It is of another format, a value is not what it should be, or prompts and answers do not fit.
        """
        check_format(values, FORMAT, "report")
        check_shape(values, SHAPE, "report", exact=True)
        read = [AttackPrompt(**prompt) for prompt in values["prompts"]]
        check_ids(read)
        prompts = {prompt.id: prompt for prompt in read}
        if not values["answers"] or values["answers"].keys() != values["results"].keys():
            raise ValueError(
                f"`report['answers']` has the conditions {', '.join(values['answers']) or '(none)'}, and `report['results']` "
                f"{', '.join(values['results']) or '(none)'}; they have the same, one or more."
            )
        for name, rows in values["answers"].items():
            if [row["id"] for row in rows] != list(prompts):
                raise ValueError(f"`report['answers'][{name!r}]` has not one answer to each prompt, in their order.")
            for number, row in enumerate(rows):
                if (row["answer"] is None) != (row["error"] is not None) or (row["written"] is None) != (
                    row["answer"] is None
                ):
                    raise ValueError(
                        f"`report['answers'][{name!r}][{number}]` needs an `answer` and `written`, or else an `error`."
                    )
        if not any(prompt.harmful for prompt in read):
            raise ValueError("`report['prompts']` has no harmful prompt; rates are over one or more.")
        records = [
            AttackRecord(
                name,
                prompts[row["id"]],
                row["answer"],
                row["written"],
                None if row["verdict"] is None else Verdict(**row["verdict"]),
                row["error"],
            )
            for name, rows in values["answers"].items()
            for row in rows
        ]
        quality = {
            name: TextQuality(**result["quality"])
            for name, result in values["results"].items()
            if result["quality"] is not None
        }
        report = cls(tuple(records), quality, values["settings"])
        check_derived(values["results"], report.to_dict()["results"], "report['results']")
        return report

    def save(self, path: str | os.PathLike) -> Path:
        """
        Write a JSON file, whole or not at all.

        Raises:
            ValueError: The path does not end in `.json`.
            FileNotFoundError: Its folder does not exist.
        """
        return write_json(check_file(path, (".json",)), self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttackReport:
        """
        Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no report.
        """
        check_path("path", path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"`path` is {str(path)!r}: there is no such file.")
        return read_artefact(Path(path), "report of attacks", cls.from_dict)

    def plot(self, path: str | os.PathLike) -> Path:
        """
        Draw the rates of each condition with their intervals, as SVG.

        Raises:
            ValueError: The path does not end in `.svg`.
            FileNotFoundError: Its folder does not exist.
        """
        groups = {
            name: {
                label: (rate.share, rate.low, rate.high)
                for label, rate in (
                    ("attack success", result.attack_success),
                    ("refusal", result.refusal),
                    ("over-refusal", result.over_refusal),
                )
                if rate is not None
            }
            for name, result in self.results.items()
        }
        n = self.results[self.conditions[0]].attack_success.n
        title = f"Attacks on {n} harmful prompts, 95% intervals"
        return write_whole(check_file(path, (".svg",)), bar_plot(groups, title=title, y="share of prompts"))

    def __str__(self) -> str:
        measures = {quality.measure for quality in self.quality.values()}
        measure = measures.pop().replace("_", " ") if measures else "text quality"
        header = ["condition", "attack success", "p", "refusal", "over-refusal", "benign changed"]
        header += [f"{measure}, benign", f"{measure}, all", "errors", "empty", "undecided"]
        table = [header]
        for name, result in self.results.items():
            quality = result.quality
            rates = [result.refusal, result.over_refusal, result.benign_changed]
            table.append(
                [
                    name,
                    str(result.attack_success),
                    "-" if result.p_value is None else f"{result.p_value:.2g}",
                    *("-" if rate is None else str(rate) for rate in rates),
                    *(_quality(quality, "benign"), _quality(quality, "overall")),
                    *(str(count) for count in (result.errors, result.empty, result.undecided)),
                ]
            )
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in table
        ]
        first = self.results[self.conditions[0]]
        benign = sum(not record.prompt.harmful for record in self._by_condition[self.conditions[0]])
        lines.append(
            f"{first.attack_success.n} harmful and {benign} benign prompts, one greedy answer each; [95% intervals]; p of the "
            f"exact paired test against {self.conditions[0]!r}."
        )
        return "\n".join(lines)


def judged(judge: Judge, records: Sequence[AttackRecord], first: bool) -> list[AttackRecord]:
    """
    Records of one condition with the judge's verdicts.

    Args:
        judge: Is asked about answers that say something, all at once.
        records: Of one condition.
        first: Insist that the judge can say something of an attack, if there is an answer to one.

    Raises:
        ValueError: It cannot, or it gives something else than one verdict for each answer.
    """
    asked = [record for record in records if record.answer is not None and not record.empty]
    verdicts = ask(judge, [record.prompt for record in asked], [str(record.answer) for record in asked])
    of_attacks = [verdict for record, verdict in zip(asked, verdicts) if record.prompt.harmful]
    if first and of_attacks and all(verdict.success is None for verdict in of_attacks):
        reason = next((verdict.error for verdict in of_attacks if verdict.error), "it gave no reason")
        raise ValueError(
            f"`judge` could not say of any of {len(of_attacks)} answers to harmful prompts whether the attack succeeded, so "
            f"there is nothing to report; the first reason: {reason}"
        )
    by_id = {record.prompt.id: verdict for record, verdict in zip(asked, verdicts)}
    return [replace(record, verdict=by_id.get(record.prompt.id)) for record in records]


def describe_judge(judge: Any) -> str:
    """A judge as settings name it."""
    name = getattr(judge, "__qualname__", type(judge).__qualname__)
    model = getattr(getattr(getattr(judge, "model", None), "config", None), "name_or_path", None)
    return f"{name} ({model})" if model else str(name)


def _result(
    records: Sequence[AttackRecord],
    baseline: Sequence[AttackRecord] | None,
    refusals: bool,
    quality: TextQuality | None,
) -> ConditionResult:
    harmful = [record for record in records if record.prompt.harmful]
    benign = [record for record in records if not record.prompt.harmful]
    success = Rate.of(record.succeeded for record in harmful)
    assert success is not None  # evaluate_attacks asks for harmful prompts
    changed = p_value = None
    if baseline is not None:
        before = {record.prompt.id: record for record in baseline}
        changed = Rate.of(record.written != before[record.prompt.id].written for record in benign)
        p_value = paired_test(
            [record.succeeded for record in harmful], [before[record.prompt.id].succeeded for record in harmful]
        )
    return ConditionResult(
        success,
        Rate.of(record.refused for record in harmful) if refusals else None,
        Rate.of(record.refused for record in benign) if refusals else None,
        changed,
        p_value,
        errors=sum(record.error is not None for record in records),
        empty=sum(record.empty for record in records),
        undecided=sum(_undecided(record, refusals) for record in records),
        quality=quality,
    )


def _undecided(record: AttackRecord, refusals: bool) -> bool:
    if record.error is not None or record.empty:
        return False
    verdict = record.verdict or Verdict(None, None)
    return (record.prompt.harmful and verdict.success is None) or (refusals and verdict.refused is None)


def _quality(quality: TextQuality | None, of: str) -> str:
    value = None if quality is None else getattr(quality, of)
    if quality is None or value is None:
        return "-"
    return f"{value:.1%}" if quality.measure == "parse_rate" else f"{value:.2f}"


__all__ = ["AttackError", "AttackRecord", "AttackReport", "ConditionResult", "Rate", "TextQuality"]
