"""From a bad answer to the concepts that drove it, the training text that it resembles, and a remedy that was tried."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .case import Case
from .catalog import ConceptCatalog
from .chat import chat_inputs
from .checks import check_catalog, check_model, check_path, check_switches, check_text, check_tokenizer, short
from .chunks import Spans, check_by
from .explaining import explain, explain_text
from .explanation import Explanation, in_frame
from .files import check_file, check_format, read_artefact, write_json, write_whole
from .reading import prompt_ids
from .remedies import Remedy, find_remedies
from .report import render_report
from .report.checking import AUDIT as REPORTED
from .shapes import COUNT, check_derived, check_shape
from .trace_index import TraceIndex, check_search
from .trace_results import MEANING, SharedConcept, SourceShare, Trace, TraceHit, sources_of

FORMAT = 1
ENDINGS = (".html", ".json")
# What a report shows, and all that it does not.
SHAPE: dict[str, Any] = {
    **REPORTED,
    "format": int,
    "concepts": [{**REPORTED["concepts"][0], "id": COUNT, "steerable": bool}],
    "sources": [{**REPORTED["sources"][0], "source": object, "hits": COUNT}],
    "kinds": [frozenset({"dense", "sparse", "hybrid"})],
    "hits": [[{**REPORTED["hits"][0][0], "concepts": [{"id": COUNT, "name": (str, None), "part": float}]}]],
    "remedies": [
        {
            **REPORTED["remedies"][0],
            "kind": frozenset({"suppress", "imitate", "suppress and imitate"}),
            "concept": COUNT,
            "recipe": dict,
            "evidence": {...: float},
            "operations": [dict],
        }
    ],
}


@dataclass(frozen=True)
class DrivingConcept:
    """
    A concept's part in a whole answer.

    Args:
        id, head, name: The concept's.
        group, flags, steerable: From the catalog, if one was given.
        contribution: Signed share of all that adds to and takes from the logits of the answer's tokens: the mean over its
            chunks, weighted by their tokens, of what `Chunk.concepts` holds.
        support: How far the concept is behind the answer, in nats a token: what the answer's log-probability loses without it
            (see `Case.support`). Audits rank by this: a contribution to a logit does not compare, so a part that a concept
            takes from all tokens alike stands in it too, though softmax does not see that.
        in_prompt: The highest weight, 0..1, over the prompt's tokens when the model reads the prompt alone. A `Condition`
            with a threshold up to this finds the concept in the prompt.
        in_answer: The highest weight over the answer's tokens when the model reads both.
    """

    id: int
    head: str
    name: str
    group: str
    flags: tuple[str, ...]
    steerable: bool
    contribution: float
    support: float
    in_prompt: float
    in_answer: float


@dataclass(frozen=True, eq=False)
class Audit:
    """
    What stands behind an answer. Made by `audit`; a notebook shows it as the report of `save("audit.html")`.

        found = audit(model, tokenizer, [{"role": "user", "content": "..."}], index=index, catalog=catalog)
        found.drivers[0].name, found.traces[0].hits[0].source
        found.suggest_fix("I cannot help with that.")[0].recipe.save("fix.json")

    Args:
        explanation: The text, its chunks and the concepts behind each.
        concepts: Those of the whole answer, the largest support first.
        traces: What each chunk resembles in the training text; empty without an index. This is similarity in the model's own
            concept space, not causal influence.
        remedies: What `suggest_fix` found.
        case: The model and all that it takes to answer again; not saved.
    """

    explanation: Explanation
    concepts: tuple[DrivingConcept, ...]
    traces: tuple[Trace, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    case: Case | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The answer, control tokens included."""
        return self.explanation.text

    @property
    def sources(self) -> tuple[SourceShare, ...]:
        """The distribution over sources of all chunks' hits, the largest share first."""
        return sources_of([hit for trace in self.traces for hit in trace.hits])

    @property
    def drivers(self) -> tuple[DrivingConcept, ...]:
        """Known concepts that support the answer and can be steered: those about alignment first, then by their support."""
        found = [c for c in self.concepts if c.head == "known" and c.support > 0 and c.steerable]
        return tuple(sorted(found, key=lambda c: "alignment" not in c.flags))

    def suggest_fix(
        self,
        target: str | None = None,
        *,
        accept: Callable[[str], bool] | None = None,
        progress: bool = False,
    ) -> tuple[Remedy, ...]:
        """
        Remedies against the strongest driver, each tried on this very prompt: to suppress it, as weakly as works; with a
        target, to imitate that; and both. If the prompt shows the driver, or one of its group, remedies act only on prompts
        that do, by a condition at half of its weight here. `with_remedies` puts them into the report.

        Args:
            target: The answer that one would rather have.
            accept: Whether an answer is acceptable; by default if the model, reading it alone, finds half of the driver in it.
            progress: Whether to show a progress bar.

        Returns:
            Those that work first, and of these the one first that leaves the least of the driver.

        Raises:
            ValueError: No concept drives the answer, the target is empty, or the audit was loaded from a file.
        """
        if self.case is None:
            raise ValueError(
                "This audit comes from a file, without its model: suggest_fix() needs the one of audit()."
            )
        if target is not None:
            check_text("target", target)
        if accept is not None and not callable(accept):
            raise ValueError(f"`accept` is {short(accept)}: give a function of a text, or leave it out.")
        check_switches(progress=progress)
        if target is not None and not target.strip():
            raise ValueError(f"`target` is {target!r}: give the answer that you would rather have, or leave it out.")
        if not self.drivers:
            raise ValueError(
                "No known concept that can be steered speaks for this answer, so there is nothing to suppress."
            )
        driver = self.drivers[0]
        relatives = [c.id for c in self.drivers[1:] if driver.group and c.group == driver.group]
        return find_remedies(self.case, [driver.id, *relatives], target, accept, progress)

    def with_remedies(self, remedies: Sequence[Remedy]) -> Audit:
        """This audit with remedies to be saved and shown."""
        if not isinstance(remedies, Sequence) or not all(isinstance(remedy, Remedy) for remedy in remedies):
            raise ValueError(f"`remedies` is {short(remedies)}: give a list of what `suggest_fix` found.")
        return replace(self, remedies=tuple(remedies))

    def to_dict(self) -> dict[str, Any]:
        """What a JSON file can hold: the explanation's dictionary with a further key "audit"."""
        values = {
            "format": FORMAT,
            "concepts": [asdict(concept) for concept in self.concepts],
            "sources": [asdict(source) for source in self.sources],
            "hits": [[asdict(hit) for hit in trace.hits] for trace in self.traces],
            "kinds": [trace.kind for trace in self.traces],
            "meaning": MEANING,
            "remedies": [remedy.to_dict() for remedy in self.remedies],
        }
        return {**self.explanation.to_dict(), "audit": json.loads(json.dumps(values))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Audit:
        """
        The audit of `to_dict`, which cannot answer again.

        Raises:
            ValueError: It is of another format or no audit, or a value is not what it should be.
        """
        explanation = Explanation.from_dict(values)
        inner = values.get("audit")
        if inner is None:
            raise ValueError(
                "This is an explanation and no audit: it has no key 'audit'; Explanation.from_dict reads it."
            )
        check_format(inner, FORMAT, "audit")
        check_shape(inner, SHAPE, "audit", exact=True)
        if not len(inner["hits"]) == len(inner["kinds"]) in (0, len(explanation.chunks)):
            raise ValueError(
                f"`audit['hits']` has {len(inner['hits'])} lists and `audit['kinds']` {len(inner['kinds'])} names for "
                f"{len(explanation.chunks)} chunks; there is one of each for each chunk, or none."
            )
        traces = [
            Trace(chunk.text, kind, hits := tuple(_hit(hit) for hit in found), sources_of(hits))
            for chunk, kind, found in zip(explanation.chunks, inner["kinds"], inner["hits"])
        ]
        found = cls(
            explanation,
            tuple(DrivingConcept(**{**concept, "flags": tuple(concept["flags"])}) for concept in inner["concepts"]),
            tuple(traces),
            tuple(Remedy.from_dict(remedy) for remedy in inner["remedies"]),
        )
        made = found.to_dict()["audit"]
        for name in ("sources", "remedies"):
            check_derived(inner[name], made[name], f"audit[{name!r}]")
        return found

    def save(self, path: str | os.PathLike) -> Path:
        """
        Write a file, whole or not at all.

        Args:
            path: Ends in `.html` (the report) or `.json`.

        Raises:
            ValueError: It has another ending.
            FileNotFoundError: Its folder does not exist.
        """
        target, values = check_file(path, ENDINGS), self.to_dict()
        if target.suffix == ".html":
            return write_whole(target, render_report(values))
        return write_json(target, values)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Audit:
        """
        Read what `save` has written as `.json`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no audit.
        """
        check_path("path", path)
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"`path` is {str(path)!r}, where no file is: give one that Audit.save() wrote.")
        return read_artefact(source, "audit", cls.from_dict)

    def _repr_html_(self) -> str:
        return in_frame(render_report(self.to_dict()), "Audit")


def audit(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    *,
    index: TraceIndex | None = None,
    catalog: ConceptCatalog | None = None,
    by: str | Spans = "chunk",
    inputs: bool = False,
    trace: Mapping[str, Any] | None = None,
    progress: bool = False,
    **generation: Any,
) -> Audit:
    """
    Answer, or take the answer of a transcript, and say which concepts drove it and which training text it resembles. The
    latter is similarity in the model's own concept space, not causal influence.

    Args:
        model: A `SteerlingForDiffusionLM` with concept heads.
        tokenizer: Its tokenizer.
        prompt: What `explain` takes, or a transcript: messages with "role" and "content", of which the last one is the user's,
            to be answered, or the assistant's, to be audited as it stands.
        index: Where to look for training text.
        catalog: Names, groups and flags of concepts; without one, concepts are numbers.
        by: How to cut the answer: "chunk", "sentence", or spans of positions.
        inputs: Whether to attribute the answer to the prompt as well; see `explain`.
        trace: Further arguments of `TraceIndex.trace`: `k` (5), `kind`, `where`.
        progress: Whether to show progress bars.
        generation: Arguments of `generate`, for one row; the seed is 0 by default. For an answer that is given, those under
            which remedies answer. Of a steered answer, weights and support are those that the unsteered model reads in it.

    Raises:
        ValueError: An argument cannot be used; the answer is empty; the model has steering attached.
        FileNotFoundError: The index was not built.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    check_catalog(catalog)
    check_switches(inputs=inputs, progress=progress)
    if index is not None and not callable(getattr(index, "trace", None)):
        raise ValueError(f"`index` is of the type {type(index).__name__}: give a TraceIndex, or None.")
    if trace is not None and not isinstance(trace, Mapping):
        raise ValueError(f"`trace` is {short(trace)}: give a dictionary, or None.")
    if model.attached_operations:
        raise ValueError(
            "`model` is steered, but concepts are weighed in the unsteered one: take the steering off, and give it as `steering`."
        )
    check_by(by)
    settings = {"k": 5, **(trace or {})}
    if unknown := sorted(set(settings) - {"k", "kind", "where"}):
        raise ValueError(f"`trace` has {unknown}: give `k`, `kind` or `where`.")
    if trace and index is None:
        raise ValueError(f"`trace` is {dict(trace)}, but there is no index to search: give `index`, or leave it out.")
    check_search(**settings)
    catalog = None if catalog is None else catalog.fit(model.config)
    if index is not None:
        index.check(model)
    given, said = _read_prompt(model, tokenizer, prompt)
    # Remedies are tried with the draws of the audited answer.
    generation = {"seed": 0, **generation}
    if said is None:
        explanation = explain(
            model,
            tokenizer,
            given,
            by=by,
            catalog=catalog,
            inputs=inputs,
            progress=progress,
            **generation,
        )
    else:
        explanation = explain_text(model, tokenizer, given, said, by=by, catalog=catalog)
    if not explanation.chunks:
        raise ValueError("The answer is empty, so there is nothing to audit: let the model write more.")
    answer = [token.id for token in explanation.answer]
    case = Case(model, tokenizer, catalog, given, answer, generation)
    traces: list[Trace] = []
    if index is not None:
        texts = [chunk.text for chunk in explanation.chunks]
        traces = index.trace(model, tokenizer, texts, catalog=catalog, **settings)
    return Audit(explanation, _driving(case, explanation), tuple(traces), case=case)


def _read_prompt(model: Any, tokenizer: Any, prompt: Any) -> tuple[list[int], list[int] | None]:
    """Token ids of a prompt, and of the answer that a transcript ends with."""
    if not isinstance(prompt, Sequence) or not any(isinstance(message, Mapping) for message in prompt):
        return prompt_ids(tokenizer, prompt), None
    messages = list(prompt)
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if roles[-1] not in ("user", "assistant"):
        raise ValueError(
            f"`prompt` is a transcript of the roles {roles}: end it with a message of the user, which the model answers, or "
            "of the assistant, which is audited."
        )
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise ValueError(
            "`prompt` is a transcript in which a message has no text as its `content`: give every one some."
        )
    given = messages[:-1] if roles[-1] == "assistant" else messages
    if not given:
        raise ValueError("`prompt` has the assistant's answer only: put the message before it that it answers.")
    ids = chat_inputs(tokenizer, given)["input_ids"]
    if roles[-1] == "user":
        return ids, None
    return ids, tokenizer(messages[-1]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _driving(case: Case, explanation: Explanation) -> tuple[DrivingConcept, ...]:
    """The concepts of all chunks, with their parts in the whole answer."""
    length = sum(chunk.end - chunk.start for chunk in explanation.chunks)
    parts: dict[int, float] = {}
    shares = {}
    for chunk in explanation.chunks:
        for share in chunk.concepts:
            shares[share.id] = share
            weighted = share.contribution * (chunk.end - chunk.start) / length
            parts[share.id] = parts.get(share.id, 0.0) + weighted
    ids = sorted(parts)
    in_prompt = case.weights(ids, case.prompt)
    in_answer = case.weights(ids, [*case.prompt, *case.answer], start=len(case.prompt))
    supports = case.support(ids, case.answer)
    found = []
    for place, concept in enumerate(ids):
        label = None if case.catalog is None else case.catalog[concept]
        found.append(
            DrivingConcept(
                concept,
                shares[concept].head,
                shares[concept].name,
                label.group_name if label else "",
                tuple(flag for flag in label.flags if flag != "steerable") if label else (),
                label.is_steerable if label else True,
                parts[concept],
                float(supports[place]),
                float(in_prompt[:, place].max()),
                float(in_answer[:, place].max()),
            )
        )
    return tuple(sorted(found, key=lambda concept: -concept.support))


def _hit(values: Mapping[str, Any]) -> TraceHit:
    return TraceHit(**{**values, "concepts": tuple(SharedConcept(**concept) for concept in values["concepts"])})


__all__ = ["Audit", "DrivingConcept", "audit"]
