"""Every public entry but generation and steering: a wrong argument is named before any work is done."""

import math

import pytest
import torch
from conftest import make_model

import steerling_hf
from steerling_hf import (
    Amplify,
    AttackPrompt,
    AttackReport,
    Audit,
    ClassifierJudge,
    Concept,
    ConceptCatalog,
    ConceptVectors,
    Explanation,
    InstructJudge,
    PatternJudge,
    SteeringRecipe,
    SteerlingTokenizer,
    attribute_concepts,
    attribute_inputs,
    audit,
    checkpoint,
    concept_vectors,
    embed,
    evaluate_attacks,
    explain,
    explain_output,
    explain_text,
    measure_belief,
    read_prompts,
    search_strength,
)

NAN = math.nan
NO_NUMBERS = (0, -1, 1.5, "3", None, True, NAN, [1])
NO_SWITCH = (None, "no", 2, [])
NO_TEXTS = (None, 5, b"ab", ["a", 5], [None])
NO_MODEL = (None, "steerling-nano", 5, torch.nn.Linear(2, 2))
NO_TOKENIZER = (None, "steerling-nano", 5)
NO_CATALOG = (5, "names", {})
NO_PATH = (None, 5, "", "a\0b", b"x")


@pytest.fixture(scope="module")
def made():
    model = make_model()
    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
    output = model.generate(
        torch.arange(5)[None], max_new_tokens=4, return_dict_in_generate=True, output_attributions=True
    )
    found = attribute_inputs(model, output.traces[0], n_steps=2) if _has_captum() else None
    return {"model": model, "tokenizer": tokenizer, "output": output, "trace": output.traces[0], "found": found}


def _has_captum() -> bool:
    try:
        import captum  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture
def idle(made, monkeypatch):
    """Fails where the model computes anything."""

    def busy(*args, **kwargs):
        raise AssertionError("the model worked before the argument was checked")

    monkeypatch.setattr(made["model"].transformer, "forward", busy)
    return made


def catalog(**wrong):
    return ConceptCatalog(
        **{"concepts": [Concept(i, "known", f"rose {i}") for i in range(20)], "n_known": 20, **wrong}
    )


# Entry -> what it takes when all is right ("model", "tokenizer", ... are those of the fixture), and wrong values by argument.
READER = {"model": "model", "tokenizer": "tokenizer"}
WRONG_READER = {"model": NO_MODEL, "tokenizer": NO_TOKENIZER}
OPERATION = Amplify(3)
CASES = {
    "embed": (
        embed,
        {**READER, "texts": ["a"]},
        {
            **WRONG_READER,
            "texts": (*NO_TEXTS, [""]),
            "kind": (None, "all", 5, [], ["known"]),
            "pooling": (None, "max", 5, {}),
            "normalize": NO_SWITCH,
            "batch_size": NO_NUMBERS,
            "progress": NO_SWITCH,
            "max_length": tuple(value for value in NO_NUMBERS if value is not None),
        },
    ),
    "concept_vectors": (
        concept_vectors,
        {**READER, "texts": ["a"]},
        {
            **WRONG_READER,
            "texts": NO_TEXTS,
            "top_known": (-1, 1.5, "3", None, True, NAN),
            "top_unknown": (-1, 1.5, "3", None, True, NAN),
            "batch_size": NO_NUMBERS,
            "progress": NO_SWITCH,
            "max_length": (0, "3", 1.5),
        },
    ),
    "attribute_concepts": (
        attribute_concepts,
        {**READER, "texts": ["a"]},
        {
            **WRONG_READER,
            "texts": (None, 5, b"ab", [5], [[1.5]], [["a"]], [[True]], [[]], [[10**9]], [[-1]], {"a": 1}),
            "batch_size": NO_NUMBERS,
            "progress": NO_SWITCH,
        },
    ),
    "attribute_inputs": (
        attribute_inputs,
        {"model": "model", "trace": "trace"},
        {
            "model": NO_MODEL,
            "trace": (None, 5, {}, []),
            "positions": (5, "5", [1.5], [None], [True], ["6"]),
            "concept": (1.5, "rose", True, -1, 10**9, [1]),
            "n_steps": (0, -2, 1.5, "4", None, True),
            "method": (None, 5, "newton", []),
            "memory_budget": (None, "1GB", NAN, -1, True),
            "progress": NO_SWITCH,
        },
    ),
    "explain": (
        explain,
        {**READER, "prompt": "a", "max_new_tokens": 2},
        {
            **WRONG_READER,
            "prompt": (None, 5, 1.5, [], "", ["a"], [[1], [2]], [1.5], [{"role": 5, "content": "a"}]),
            "by": (None, 5, "word", [5], [(1,)], [("a", "b")], [(0.5, 2)], [(True, 3)]),
            "catalog": NO_CATALOG,
            "inputs": NO_SWITCH,
            "belief": NO_SWITCH,
            "progress": NO_SWITCH,
            "attribution": (5, "n_steps", [4], {"steps": 3}, {5: 3}),
        },
    ),
    "explain_output": (
        explain_output,
        {**READER, "output": "output", "inputs": False},
        {
            **WRONG_READER,
            "output": (None, 5, torch.zeros(1, 4), {}),
            "row": (-1, 1, 1.5, "0", None, True),
            "by": (None, 5, "word", [5]),
            "catalog": NO_CATALOG,
            "inputs": NO_SWITCH,
            "belief": NO_SWITCH,
            "progress": NO_SWITCH,
            "attribution": (5, "n_steps"),
            "settings": (5, "steps", [1]),
        },
    ),
    "explain_text": (
        explain_text,
        {**READER, "prompt": "a", "answer": "b"},
        {
            **WRONG_READER,
            "prompt": (None, 5, [1.5], ["a"], [10**9], [-1], b"a"),
            "answer": (None, 5, [1.5], ["a"], [10**9], [-1], b"a", "", []),
            "by": (None, 5, "word", [5]),
            "catalog": NO_CATALOG,
        },
    ),
    "audit": (
        audit,
        {**READER, "prompt": "a", "max_new_tokens": 2},
        {
            **WRONG_READER,
            "prompt": (None, 5, 1.5, [], "", [{"role": "tool", "content": "a"}], [{"role": "user", "content": 5}]),
            "index": (5, "index.db", {}),
            "catalog": NO_CATALOG,
            "by": (None, 5, "word", [5]),
            "inputs": NO_SWITCH,
            "trace": (5, "k", [5], {"k": 5}, {"n": 5}),
            "progress": NO_SWITCH,
        },
    ),
    "search_strength": (
        search_strength,
        {**READER, "operation": OPERATION, "prompts": ["a"], "objective": len, "strengths": [1.0]},
        {
            **WRONG_READER,
            "operation": (None, 5, "Amplify", [OPERATION]),
            "prompts": (*NO_TEXTS, "a", []),
            "objective": (None, 5, "len"),
            "strengths": (5, "1", [None], ["1"], [NAN], [math.inf], [True], []),
            "trials": NO_NUMBERS,
            "field": (None, 5, "volume", "name", "check"),
        },
    ),
    "search_strength between": (
        search_strength,
        {**READER, "operation": OPERATION, "prompts": ["a"], "objective": len, "between": (0, 1), "least_effect": 1.0},
        {"between": (5, "12", (1,), (1, 2, 3), (0, NAN), (None, 1)), "least_effect": (NAN, "1", True, [])},
    ),
    "measure_belief": (
        measure_belief,
        {"model": "model", "trace": "trace", "attributions": "found"},
        {
            "model": NO_MODEL,
            "trace": (None, 5, {}),
            "attributions": (None, 5, torch.zeros(3)),
            "fractions": (None, 0.5, "1", (), (0,), (1,), (NAN,), ("a",), (True,)),
            "draws": NO_NUMBERS,
            "seed": (-1, 1.5, None, "3", 2**70, True),
        },
    ),
    "evaluate_attacks": (
        evaluate_attacks,
        {
            **READER,
            "prompts": ["a"],
            "judge": PatternJudge("x"),
            "conditions": {"base": None},
            "broken": lambda p, a: (1, 1),
        },
        {
            "model": NO_MODEL,
            "tokenizer": NO_TOKENIZER,
            "prompts": (
                None,
                5,
                "a",
                [],
                [5],
                [None],
                [AttackPrompt("a", False, "x")],
                ["a", AttackPrompt("b", True, "0")],
            ),
            "judge": (None, 5, "x"),
            "conditions": (None, 5, {}, ["base"], {5: None}, {"": None}, {"a": 5}, {"a": "recipe.json"}),
            "broken": (5, "x"),
            "chat": NO_SWITCH,
            "batch_size": NO_NUMBERS,
            "max_new_tokens": NO_NUMBERS,
            "progress": NO_SWITCH,
            "do_sample": (True,),
            "num_return_sequences": (2,),
        },
    ),
    "ConceptCatalog": (
        catalog,
        {},
        {"concepts": (None, 5, ["rose"], [None], [5]), "n_known": (-1, 1.5, "20", True), "n_unknown": (-1, 1.5, "2")},
    ),
    "catalog.filter": (
        lambda **options: catalog().filter(**options),
        {},
        {"head": (5, "seen", [], ["known"]), "group": (1.5, "none", 99, True, [1]), "flags": (5, "loud", [5], [None])},
    ),
    "catalog.search": (
        lambda **options: catalog().search(**{"query": "rose", **options}),
        {},
        {
            "query": (None, 5, ["rose"]),
            "limit": NO_NUMBERS,
            "head": (5, "seen"),
            "group": (1.5, "none"),
            "flags": (5, "loud"),
        },
    ),
    "catalog.near": (
        lambda **options: catalog().near(**{"name": "rose", **options}),
        {},
        {"name": (None, 5, ["rose"]), "limit": NO_NUMBERS},
    ),
    "catalog[...]": (lambda concept: catalog()[concept], {}, {"concept": (None, 1.5, [1], True)}),
    "catalog.group": (lambda concept: catalog().group(concept), {}, {"concept": (None, 1.5, [1])}),
    "catalog.top_tokens": (
        lambda **options: catalog().top_tokens(**options),
        {**READER, "concept": 3},
        {**WRONG_READER, "concept": (None, 1.5, [1]), "k": NO_NUMBERS},
    ),
    "catalog.active_in": (
        lambda **options: catalog().active_in(**options),
        {**READER, "texts": ["a"]},
        {**WRONG_READER, "texts": (*NO_TEXTS, "a", []), "k": NO_NUMBERS, "head": (5, "seen", [])},
    ),
    "catalog.contrast": (
        lambda **options: catalog().contrast(**options),
        {**READER, "positive": ["a", "b"], "negative": ["c", "d"]},
        {
            **WRONG_READER,
            "positive": (*NO_TEXTS, "a", []),
            "negative": (*NO_TEXTS, "a", []),
            "k": NO_NUMBERS,
            "head": (5, "seen", []),
        },
    ),
    "catalog.propose_labels": (
        lambda **options: catalog().propose_labels(**options),
        {**READER, "texts": ["a"]},
        {**WRONG_READER, "texts": (*NO_TEXTS, "a", []), "limit": NO_NUMBERS, "concepts": (5, "rose", [3])},
    ),
    "catalog.for_model": (lambda **options: ConceptCatalog.for_model(**options), {}, {"model": NO_MODEL}),
    "catalog.fit": (lambda **options: catalog().fit(**options), {}, {"config": (None, 5, "nano")}),
    "catalog.save": (lambda **options: catalog().save(**options), {}, {"path": (*NO_PATH, "labels.csv")}),
    "catalog.with_labels": (lambda **options: catalog().with_labels(**options), {}, {"concepts": (None, 5, ["a"])}),
    "ConceptCatalog.from_pretrained": (ConceptCatalog.from_pretrained, {}, {"source": NO_PATH}),
    "vectors.similarity": (
        lambda **options: ConceptVectors(torch.zeros(1, 1).long(), torch.ones(1, 1), 5).similarity(**options),
        {},
        {"other": (None, 5, torch.zeros(1))},
    ),
    "SteeringRecipe.load": (SteeringRecipe.load, {}, {"source": NO_PATH}),
    "recipe.save": (lambda **options: SteeringRecipe((OPERATION,)).save(**options), {}, {"path": NO_PATH}),
    "recipe.push_to_hub": (
        lambda **options: SteeringRecipe((OPERATION,)).push_to_hub(**options),
        {},
        {"repo_id": (None, 5, "", "a/b/c", "../a", "a b/c")},
    ),
    "Explanation.load": (Explanation.load, {}, {"path": NO_PATH}),
    "Audit.load": (Audit.load, {}, {"path": NO_PATH}),
    "AttackReport.load": (AttackReport.load, {}, {"path": NO_PATH}),
    "read_prompts": (
        read_prompts,
        {"source": [{"text": "a", "harmful": True}]},
        {"source": (None, 5, "", "a\0b", [], [5], {"a": 1}, "a.csv"), "adversarial": (1, "yes")},
    ),
    "checkpoint": (checkpoint, {}, {"name": (None, 5, "../nano", "steerling-nano/../steerling-8b", "")}),
    "PatternJudge": (
        PatternJudge,
        {"success": "x"},
        {"success": (None, 5, [], "(", [5]), "refusal": (5, [], "(", [None])},
    ),
    "InstructJudge": (
        InstructJudge,
        {"name_or_model": "model", "tokenizer": "tokenizer"},
        {"name_or_model": (None, 5), "tokenizer": (None,), "format": (None, 5, "llama", []), "batch_size": NO_NUMBERS},
    ),
    "ClassifierJudge": (
        ClassifierJudge,
        {"name_or_model": "model", "tokenizer": "tokenizer", "success_labels": ["LABEL_0"]},
        {
            "name_or_model": (None, 5),
            "tokenizer": (None,),
            "success_labels": (None, 5, [5], "unsafe", []),
            "refusal_labels": (None, 5, [5], "unsafe"),
            "batch_size": NO_NUMBERS,
        },
    ),
    "AttackPrompt": (
        AttackPrompt,
        {"text": "a", "harmful": True, "id": "x"},
        {
            "text": (None, 5, "", " "),
            "harmful": (None, 1, "yes"),
            "id": (None, 5, ""),
            "target": (object(), NAN, {"a": {1}}),
            "category": (5, []),
            "benign_of": ("x", 5),
        },
    ),
}


@pytest.mark.parametrize(
    ("entry", "argument"), [(entry, argument) for entry, (_, _, wrong) in CASES.items() for argument in wrong]
)
def test_a_wrong_argument_is_named(idle, entry, argument):
    function, right, wrong = CASES[entry]
    if "Input" in str(function) or entry in ("attribute_inputs", "measure_belief", "explain", "audit"):
        pytest.importorskip("captum")
    fixed = {key: idle[value] if isinstance(value, str) and value in idle else value for key, value in right.items()}
    for value in wrong[argument]:
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
            function(**{**fixed, argument: value})
        words = str(caught.value)
        assert f"`{argument}" in words or f"Give either `{argument}`" in words or "`tokenizer` is missing" in words, (
            value,
            caught.value,
        )


def test_every_public_function_is_in_the_table():
    """Classes that are made by generation, steering and training, and what only holds values, have tests elsewhere."""
    elsewhere = {
        *("Amplify", "Condition", "Imitate", "Inject", "SetConcepts", "Suppress", "SuppressTokens"),
        *("SteerlingCache", "SteerlingConfig", "SteerlingForDiffusionLM", "SteerlingGenerationConfig"),
        *("SteerlingTokenizer", "DiffusionCollator", "TraceIndex", "Trace", "TraceHit"),
        *("Concept", "ConceptNotFoundError", "ConceptVectors", "Remedy", "Verdict", "AttackError"),
        *("checkpoint_names", "export"),
    }
    named = {entry.split(".")[0] for entry in CASES}
    assert set(steerling_hf.__all__) - elsewhere - named == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a", "--steps", "0"], "`steps` is 0"),
        (["generate", "a", "--seed", "-1"], "`seed` is -1"),
        (["generate", "a", "--max-new-tokens", "x"], "argument --max-new-tokens: invalid int value: 'x'"),
        (["explain", "a", "--no-inputs", "--max-new-tokens", "0"], "`max_new_tokens` is"),
        (["explain", "a", "--by", "word"], "argument --by"),
        (["audit", "a", "-k", "0"], "-k belongs to --index"),
        (["audit", "a", "--reject", "("], "argument --reject"),
        (["concepts", "search", "a", "--limit", "0"], "`limit` is 0"),
        (["concepts", "show", "9" * 5000, "--tokens", "0"], "No concept is named"),
        (["concepts", "contrast", __file__, "nowhere"], "'nowhere' is no file"),
        (["export", "steerling-nano", "out", "--repo-id", "a b"], "`repo_id` is 'a b'"),
        (["generate", "a", "--steer", "a\0b"], "`source` is"),
    ],
)
def test_options_of_commands_are_named(capsys, tmp_path, monkeypatch, arguments, words):
    from steerling_hf.cli import main

    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stopped:  # of argparse
        code = stopped.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
