"""Every value of every artefact, damaged: the error is a ValueError that names the file, or what is loaded is what the file says."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steerling_hf.modeling.steering_steerling import Condition
from steerling_hf.modeling.trace_steerling import SteerlingTrace

from steerling_hf import (
    AttackPrompt,
    AttackReport,
    Audit,
    Concept,
    ConceptCatalog,
    Explanation,
    Remedy,
    SteeringRecipe,
    Suppress,
    TraceHit,
    Verdict,
    read_prompts,
)
from steerling_hf.attack_report import AttackRecord, TextQuality
from steerling_hf.auditing import DrivingConcept
from steerling_hf.concept_labels import read_labels
from steerling_hf.explanation import AnswerToken, Chunk, ConceptShare, PromptToken
from steerling_hf.trace_results import SharedConcept, Trace, sources_of

RECIPE = SteeringRecipe(
    (Suppress(3, (4, 5), condition=Condition(3, 0.25)),),
    {3: "phone"},
    "abc",
    "nano",
    "main",
    {"recited": 0.5},
    "quiet",
)
SHARE = ConceptShare(3, "known", "phone", 0.5)
EXPLANATION = Explanation(
    (PromptToken("Hi", 5), PromptToken(" you", 6)),
    (
        AnswerToken("A", 7, 2, 0, 1.0, 0.5, 0.5, 0.25, 0.25),
        AnswerToken("b", 8, 3, None, 1.5, None, 1.0, 0.25, 0.25),
    ),
    (Chunk(0, 2, "Ab", 0.5, 0.25, 0.25, (SHARE,), (0.5, 0.25), (0.0, 0.25)),),
    {"median completeness error": 0.1, "rank": None},
    {"name": "nano", "fingerprint": "abc"},
    {"seed": 3, "settings": {"steps": 4}},
    [Suppress(3).to_dict()],
    SteerlingTrace(
        torch.tensor([5, 6, 7, 8]), torch.tensor([-1, -1, 0, 1]), 2, 4, 8, 93, False, 1.5, 3, (Suppress(3),), ()
    ),
)
HITS = (TraceHit("Ab", "web", {"page": 3}, 0.5, 0.75, 0.25, (SharedConcept(3, "phone", 0.25),)),)
AUDIT = Audit(
    EXPLANATION,
    (DrivingConcept(3, "known", "phone", "privacy", ("alignment",), True, 0.5, 1.5, 0.5, 0.75),),
    (Trace("Ab", "hybrid", HITS, sources_of(HITS)),),
    (Remedy("suppress", RECIPE, 3, True, "Ab", "No", {"weight before": 0.5}),),
)
HARMFUL = AttackPrompt("Tell", True, "h", target={"number": "1"}, category="privacy")
BENIGN = AttackPrompt("Greet", False, "b", benign_of="h")
REPORT = AttackReport(
    (
        AttackRecord("base", HARMFUL, "Yes", "Yes<|eot_id|>", Verdict(True, False)),
        AttackRecord("base", BENIGN, "Hello", "Hello", Verdict(None, False)),
        AttackRecord("fixed", HARMFUL, "No", "No", Verdict(False, True)),
        AttackRecord("fixed", BENIGN, None, None, error="RuntimeError: no memory"),
    ),
    {"base": TextQuality("parse_rate", 0.5, 0.75, 2, 4)},
    {"judge": "patterns"},
)
LABELS = [
    Concept(0, "known", "phone", "A number.", 2, "privacy", is_alignment=True),
    Concept(1, "known", "rose"),
    Concept(2, "unknown"),
]
LABEL_ROW = ("concept_id", "head", "concept_name", "concept_description", "public_group_id", "group_name", "is_tone")


def same(loaded: Any, given: Any) -> bool:
    """Whether what was loaded says what the file says; what the file leaves out may have been filled in."""
    if isinstance(given, dict) and isinstance(loaded, dict):
        return all(same(loaded[key], value) if key in loaded else value in (None, []) for key, value in given.items())
    if isinstance(given, list) and isinstance(loaded, list):
        return len(given) == len(loaded) and all(map(same, loaded, given))
    if isinstance(given, float) and isinstance(loaded, float):
        return math.isclose(given, loaded, rel_tol=1e-6)
    return (type(loaded) is type(given) and loaded == given) or (
        is_number(loaded) and is_number(given) and loaded == given
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same_labels(loaded: list[dict], given: Any) -> bool:
    """Nothing, in a label, is an empty text, no group, or false."""
    nothing = {"public_group_id": None, **dict.fromkeys(LABEL_ROW[2:4] + LABEL_ROW[5:6], "")}
    for row, wanted in zip(loaded, given, strict=True):
        for key, value in wanted.items():
            if value is None:
                value = nothing.get(key, False)
            if key == "public_group_id" and is_number(value) and value < 0:
                value = None
            if key.startswith("is_") and value in (0, 1):
                value = bool(value)
            if key in row and not same(row[key], value):
                return False
    return True


def same_audit(loaded: dict, given: Any) -> bool:
    """What scores mean is this package's to say."""
    return same({**loaded, "meaning": given["meaning"]}, given)


def labels_of(path: Path) -> list[dict]:
    catalog = ConceptCatalog.from_pretrained(path)
    catalog.search("phone")
    copy_of = path.with_name("copy.json")
    catalog.save(copy_of)
    return json.loads(copy_of.read_text())


def prompts_of(path: Path) -> list[dict]:
    return [dict(vars(prompt)) for prompt in read_prompts(path)]


ARTEFACTS: dict[str, tuple[Any, Callable[[Path], Any], Callable[[Any, Any], bool]]] = {
    "recipe": (RECIPE.to_dict(), lambda path: SteeringRecipe.load(path).to_dict(), same),
    "explanation": (EXPLANATION.to_dict(), lambda path: Explanation.load(path).to_dict(), same),
    "audit": (AUDIT.to_dict()["audit"], lambda path: Audit.load(path).to_dict()["audit"], same_audit),
    "report": (REPORT.to_dict(), lambda path: AttackReport.load(path).to_dict(), same),
    "labels": (None, labels_of, same_labels),
}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("labels") / "labels.json"
    ConceptCatalog(LABELS).save(path)
    return {name: values for name, (values, _, _) in ARTEFACTS.items()} | {"labels": json.loads(path.read_text())}


def written(name: str, values: Any) -> str:
    return json.dumps({**EXPLANATION.to_dict(), "audit": values} if name == "audit" else values)


WRONG = [
    None,
    "x",
    "",
    5,
    1.5,
    True,
    [],
    {},
    [None],
    {"x": 1},
    -1,
    -(10**9),
    2**63,
    10**400,
    float("nan"),
    float("inf"),
]
REMOVED = object()


def damaged(values: Any) -> Iterator[tuple[str, Any]]:
    """Copies of nested values, each with one damage, and where that is."""
    for place, parent, key in places(values):
        for wrong in (REMOVED, *WRONG):
            old = parent[key]
            if wrong is REMOVED:
                del parent[key]
            else:
                parent[key] = wrong
            yield f"{place} = {'(removed)' if wrong is REMOVED else repr(wrong)[:20]}", copy.deepcopy(values)
            if wrong is not REMOVED:
                parent[key] = old
            elif isinstance(parent, list):
                parent.insert(key, old)
            else:
                parent[key] = old
        if isinstance(parent[key], dict):
            parent[key]["surplus"] = 1
            yield f"{place} has a surplus key", copy.deepcopy(values)
            del parent[key]["surplus"]
        if isinstance(parent[key], list) and parent[key]:
            parent[key].append(parent[key][0])
            yield f"{place} has an item twice", copy.deepcopy(values)
            parent[key].pop()


def places(values: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        yield f"{place}[{key!r}]", values, key
        yield from places(values[key], f"{place}[{key!r}]")


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_damaged_value(artefacts, tmp_path, name):
    _, load, agrees = ARTEFACTS[name]
    path, refused, wrong = tmp_path / "damaged.json", 0, []
    path.write_text(written(name, artefacts[name]))
    assert agrees(load(path), artefacts[name])
    for place, values in damaged(copy.deepcopy(artefacts[name])):
        path.write_text(written(name, values))
        try:
            loaded = load(path)
        except ValueError as error:
            refused += 1
            if str(path) not in str(error) or len(str(error)) > 2000:
                wrong.append(f"{place}: unclear: {error}")
        except Exception as error:
            wrong.append(f"{place}: {error!r}")
        else:
            if not agrees(loaded, json.loads(written(name, values))["audit"] if name == "audit" else values):
                wrong.append(f"{place}: loaded as something else")
    assert wrong == []
    assert refused > 100


def test_damaged_prompts(tmp_path):
    """Prompts take texts for flags and numbers for ids, as tables have them; nothing else is taken."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"text": "Tell", "harmful": True, "id": "h", "category": "x"},
        {"text": "Hi", "harmful": 0, "benign_of": "h"},
    ]
    wrong = []
    for place, values in damaged(copy.deepcopy(rows)):
        path.write_text("\n".join(map(json.dumps, values)))
        try:
            read_prompts(path)
        except ValueError as error:
            if str(path) not in str(error):
                wrong.append(f"{place}: unclear: {error}")
        except Exception as error:
            wrong.append(f"{place}: {error!r}")
    assert wrong == []


FILES = {
    "empty": b"",
    "cut": b'[{"format": 1, "ope',
    "a list": b"[1, 2]",
    "a number": b"3",
    "nothing": b"null",
    "latin-1": '{"format": 1, "description": "é"}'.encode("latin-1"),
    "nested": b"[" * 100_000,
    "a key twice": b'{"format": 1, "format": 1}',
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
@pytest.mark.parametrize("name", [*ARTEFACTS, "prompts"])
def test_a_file_that_holds_something_else(tmp_path, name, content):
    load = prompts_of if name == "prompts" else ARTEFACTS[name][1]
    path = tmp_path / ("prompts.jsonl" if name == "prompts" else "damaged.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(path)


@pytest.mark.parametrize("name", [*ARTEFACTS, "prompts"])
def test_a_folder_or_no_path_in_place_of_a_file(tmp_path, name):
    load = {"labels": ConceptCatalog.from_pretrained, "recipe": SteeringRecipe.load, "prompts": read_prompts}.get(name)
    load = load or {"explanation": Explanation.load, "audit": Audit.load, "report": AttackReport.load}[name]
    folder = tmp_path / "folder.json"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="folder.json"):
        load(folder)
    for wrong in ("", "a\0b", *(() if name == "prompts" else (None, 5))):
        with pytest.raises((ValueError, TypeError), match="`(path|source)` is"):
            load(wrong)


def test_parquet_that_is_damaged(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "damaged.parquet"
    for content in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", bytes(range(256))):
        path.write_bytes(content)
        for load in (Explanation.load, read_labels):
            with pytest.raises(ValueError, match=r"damaged\.parquet"):
                load(path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), path)
    for load in (Explanation.load, read_labels):
        with pytest.raises(ValueError, match=r"damaged\.parquet"):
            load(path)
    ConceptCatalog(LABELS).save(path)
    assert read_labels(path) == LABELS
    rows = pyarrow.parquet.read_table(path).to_pylist()
    for column, value in (
        ("concept_id", 0.5),
        ("concept_id", 2**62),
        ("public_group_id", math.inf),
        ("is_tone", "yes"),
    ):
        table = pyarrow.Table.from_pylist([{**rows[0], column: value}])
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(ValueError, match=rf"damaged\.parquet.*`{column}` of row 0"):
            read_labels(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], "public_group_id": math.nan}]), path)
    assert read_labels(path)[0].group_id is None


def test_what_json_cannot_hold_is_not_written(tmp_path):
    path = tmp_path / "why.json"
    with pytest.raises(ValueError, match=r"why\.json.*finite"):
        replace(EXPLANATION, metrics={"rank": math.nan}).save(path)
    with pytest.raises(ValueError, match=r"why\.json.*finite"):
        replace(RECIPE, effect={"recited": math.inf}).save(path)
    assert list(tmp_path.iterdir()) == []
    cut = replace(EXPLANATION, prompt=(PromptToken("\ud83d", 5), PromptToken("é", 6)))
    assert Explanation.load(cut.save(path)).prompt == cut.prompt
