"""What callers set in torch for all of their program: the same is said under other defaults, and inside inference mode."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from steerling_hf.modeling.unmasking_steerling import EntropyTemperatureLogitsWarper

from steerling_hf import (
    Amplify,
    Concept,
    ConceptCatalog,
    DiffusionCollator,
    Imitate,
    Inject,
    PatternJudge,
    SetConcepts,
    SteerlingTokenizer,
    Suppress,
    attribute_concepts,
    attribute_inputs,
    audit,
    checkpoint,
    concept_vectors,
    embed,
    evaluate_attacks,
    explain,
    explain_text,
    measure_belief,
    search_strength,
)
from steerling_hf.belief import ablate_concepts
from steerling_hf.input_attribution import METHODS
from steerling_hf.trace_results import hit_of
from steerling_hf.trace_vectors import trace_vectors

ROOT = Path(__file__).parents[1]
TEXT, OTHER = "The gardener waters the rose", "The sailor mends a net"
SHORT = {"max_new_tokens": 6, "seed": 3}
WHOLE = {"return_dict_in_generate": True, "output_attributions": True, "output_scores": True}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    """What is not initialised is not a number either."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "set_default_device": default_device,
    "device": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


class World:
    """A model and what its functions are given; tensors of it were made before any state was set."""

    def __init__(self, tokenizer):
        self.model, self.tokenizer = make_model(), tokenizer
        self.catalog = ConceptCatalog([Concept(i, "known", name=f"concept {i}") for i in range(20)], 20, 30)
        texts = [TEXT, OTHER]
        self.ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        self.one = tokenizer(TEXT, return_tensors="pt")
        self.written = self.generate(self.one, **WHOLE)
        vectors = trace_vectors(self.model, tokenizer, [OTHER])
        self.row = {"text": OTHER, "source": "b", "metadata": {}}
        self.row |= {"dense": vectors.dense[0].tolist(), "sparse": vectors.sparse()[0]}

    def generate(self, inputs, **settings) -> Any:
        return self.model.generate(**inputs, **{**SHORT, **settings})

    def loss(self) -> Any:
        torch.manual_seed(0)
        rows = [{"input_ids": list(range(40, 60 + i)), "concept_labels": [[3]] * (20 + i)} for i in range(3)]
        batches = [DiffusionCollator(self.model.config, 0.5, 0.5, seed=seed)(rows) for seed in (5, None)]
        ids = self.one["input_ids"]
        return batches, [self.model(**batch).loss for batch in batches], self.model(input_ids=ids, labels=ids).loss

    def attached(self) -> Any:
        with self.model.steer(Amplify(3), SetConcepts([2, 25], value=0.5)):
            return self.model(**self.ids, output_concepts=True)


TARGET = (5, 6, 7)
CALLS: dict[str, Callable[[World], Any]] = {
    "generate": lambda w: w.generate(w.ids, do_sample=False, **WHOLE),
    "sampled": lambda w: w.generate(
        w.ids, do_sample=True, temperature=0.8, top_k=50, entropy_temperature=True, top_p=0.9
    ),
    "entropy temperature": lambda w: EntropyTemperatureLogitsWarper(0.9)(None, w.written.attributions.logits),
    "seedless": lambda w: [torch.manual_seed(0), w.generate(w.ids, do_sample=True, seed=None)][1],
    "guided": lambda w: w.generate(w.ids, guidance_scale=1.5, use_cache=False, **WHOLE),
    "steered": lambda w: w.generate(
        w.ids, steering=(Amplify(3), Suppress(4), Inject(25, 7.3, cutoff=3)), guidance_scale=1.5, **WHOLE
    ),
    "imitated": lambda w: w.generate(w.ids, steering=[Imitate(TARGET), Imitate(TARGET, pooled=True)]),
    "phrases": lambda w: w.generate(w.ids, bad_words_ids=[[5, 6]], suppress_tokens=[9], repetition_penalty=1.2),
    "static": lambda w: w.generate(w.ids, cache_implementation="static", disable_compile=True),
    "parallel": lambda w: [
        w.generate(w.ids, unmasking=rule, steps=3) for rule in ("entropy_bound", "factor", "threshold")
    ],
    "turns": lambda w: w.generate(w.one, cache=w.generate(w.one, return_dict_in_generate=True).cache),
    "many": lambda w: w.generate(w.one, do_sample=True, num_return_sequences=2),
    "forward": lambda w: w.model(**w.ids, output_concepts=True, output_hidden_states=True),
    "attached": lambda w: w.attached(),
    "backbone": lambda w: w.model.transformer(**w.ids),
    "loss": lambda w: w.loss(),
    "embed": lambda w: [embed(w.model, w.tokenizer, [TEXT, OTHER], kind) for kind in ("composed", "known", "unknown")],
    "embed nothing": lambda w: embed(w.model, w.tokenizer, []),
    "concept_vectors": lambda w: [
        (v := concept_vectors(w.model, w.tokenizer, [TEXT, OTHER])),
        v.to_dense(),
        v.similarity(v),
    ],
    "attribute_concepts": lambda w: attribute_concepts(w.model, w.tokenizer, [TEXT, OTHER]),
    "top_tokens": lambda w: w.catalog.top_tokens(w.model, w.tokenizer, 3),
    "active_in": lambda w: w.catalog.active_in(w.model, w.tokenizer, [TEXT, OTHER]),
    "contrast": lambda w: w.catalog.contrast(w.model, w.tokenizer, [TEXT, TEXT + "s"], [OTHER, "Rain."]),
    "propose_labels": lambda w: w.catalog.propose_labels(w.model, w.tokenizer, [TEXT, OTHER]),
    "explain": lambda w: explain(w.model, w.tokenizer, TEXT, belief=True, **SHORT).to_dict(),
    "explain guided": lambda w: explain(
        w.model, w.tokenizer, TEXT, guidance_scale=1.5, steering=Amplify(3), **SHORT
    ).to_dict(),
    "explain_text": lambda w: explain_text(w.model, w.tokenizer, TEXT, " and the tree.").to_dict(),
    "belief": lambda w: measure_belief(
        w.model, w.written.traces[0], attribute_inputs(w.model, w.written.traces[0], n_steps=2)
    ),
    "audit": lambda w: audit(w.model, w.tokenizer, TEXT, catalog=w.catalog, inputs=True, **SHORT).to_dict(),
    "attacks": lambda w: (
        evaluate_attacks(
            w.model, w.tokenizer, [TEXT], PatternJudge(r"\w"), {"base": None, "steered": Amplify(3)}, max_new_tokens=4
        ).records
    ),
    "trace": lambda w: (
        (v := trace_vectors(w.model, w.tokenizer, [TEXT])),
        hit_of(w.row, v.dense[0], v.sparse()[0], "hybrid", None),
    ),
    "ablate_concepts": lambda w: ablate_concepts(
        w.model, w.written.traces[0], w.written.traces[0].decided[:2].tolist(), [3, 25]
    ),
    "saved trace": lambda w: attribute_inputs(
        w.model, type(t := w.written.traces[0]).from_dict(t.to_dict()), n_steps=2
    ),
    "search_strength": lambda w: search_strength(
        w.model, w.tokenizer, Amplify(3), [TEXT], lambda text: len(text), strengths=(1.0, 2.5), max_new_tokens=4
    ).to_dicts(),
    **{
        f"attribute_inputs {method}": lambda w, method=method: attribute_inputs(
            w.model, w.written.traces[0], method=method, n_steps=10
        )
        for method in METHODS
    },
    "attribute_inputs to a concept": lambda w: attribute_inputs(w.model, w.written.traces[0], concept=25, n_steps=2),
    "attribute_inputs to nothing": lambda w: attribute_inputs(w.model, w.written.traces[0], []),
}


def parts_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a result consists of, with a name for each part."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from parts_of(part, f"{name}.{key}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from parts_of(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, part in enumerate(value):
            yield from parts_of(part, f"{name}[{i}]")
    elif isinstance(value, torch.Tensor | float | int | str | None):
        yield name, value


def snapshot(value: Any) -> list[tuple[str, Any]]:
    """The parts, cut loose from gradients and from inference mode."""
    return [
        (name, part.detach().clone() if isinstance(part, torch.Tensor) else part) for name, part in parts_of(value)
    ]


def assert_same(found: list[tuple[str, Any]], expected: list[tuple[str, Any]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert expected
    for (name, ours), (_, theirs) in zip(found, expected):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        elif isinstance(theirs, float):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True), name
        else:
            assert ours == theirs, name


@pytest.fixture(scope="module")
def world() -> World:
    return World(SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano")))


@pytest.fixture(scope="module")
def expected(world) -> Callable[[str], list[tuple[str, Any]]]:
    known: dict[str, Any] = {}

    def of(call: str) -> list[tuple[str, Any]]:
        if call not in known:
            known[call] = snapshot(CALLS[call](world))
        return known[call]

    return of


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_the_same_under_every_state_of_torch(state, call, world, expected):
    wanted = expected(call)
    with STATES[state]():
        found = CALLS[call](world)
    assert_same(snapshot(found), wanted)
    assert torch.get_default_dtype() == torch.float32
    assert all(weight.requires_grad for weight in world.model.parameters())


@pytest.mark.parametrize("call", CALLS)
def test_autocast_gives_the_same_kinds_of_things(call, world, expected):
    """Numbers are those of half precision, so that texts may differ; shapes of what does not depend on them do not."""
    with torch.autocast("cpu", torch.bfloat16):
        found = snapshot(CALLS[call](world))
    for name, part in found:
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            # Processed logits rule tokens out by -inf.
            assert not part.isnan().any(), name
            assert not part.isposinf().any(), name
    if call in ("forward", "embed", "loss", "concept_vectors", "top_tokens", "active_in", "contrast"):
        assert [name for name, _ in found] == [name for name, _ in expected(call)]
    if call == "embed":
        for (_, ours), (_, theirs) in zip(found, expected(call)):
            assert ours.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


@pytest.mark.parametrize("tell", ["inputs", "belief", "concepts"])
def test_what_inference_mode_made_can_be_explained_outside(tell, world):
    with torch.inference_mode():
        written = world.generate(world.one, steering=Inject(3, 20.0), guidance_scale=1.5, **WHOLE)
        inside = attribute_inputs(world.model, written.traces[0], n_steps=2)
    outside = attribute_inputs(world.model, written.traces[0], n_steps=2)
    if tell == "inputs":
        assert_same(snapshot(inside), snapshot(outside))
    elif tell == "belief":
        assert measure_belief(world.model, written.traces[0], inside) == measure_belief(
            world.model, written.traces[0], outside
        )
    else:
        values = written.attributions
        total = values.known_contributions.sum(-1) + values.unknown_contributions.sum(-1) + values.residual
        torch.testing.assert_close(total, values.logits, atol=1e-4, rtol=1e-4)


def test_a_cache_that_inference_mode_made_works_outside(world):
    expected = world.generate(world.ids, **WHOLE)
    with torch.inference_mode():
        cache = world.generate(world.ids, return_dict_in_generate=True).cache
    assert torch.equal(world.generate(world.ids, cache=cache), expected.sequences)


def test_steering_that_was_attached_in_inference_mode_works_outside(world):
    operations = (Amplify(3), Imitate(TARGET), SetConcepts([2, 25], value=0.5), Suppress(4))

    def tell() -> Any:
        written = world.generate(world.one, **WHOLE)
        return attribute_inputs(world.model, written.traces[0], n_steps=2)

    with world.model.steer(*operations):
        expected = snapshot(tell())
    with torch.inference_mode():
        steered = world.model.steer(*operations)
        steered.__enter__()
    try:
        assert_same(snapshot(tell()), expected)
    finally:
        steered.__exit__(None, None, None)


def test_weights_that_inference_mode_made_are_refused_before_anything_is_written(world, monkeypatch):
    with torch.inference_mode():
        model = make_model()
    assert torch.equal(model.generate(**world.one, **SHORT), world.generate(world.one))
    monkeypatch.setattr(type(model), "generate", None)
    for ask in (
        lambda: explain(model, world.tokenizer, TEXT, **SHORT),
        lambda: audit(model, world.tokenizer, TEXT, inputs=True, **SHORT),
        lambda: attribute_inputs(model, world.written.traces[0]),
    ):
        with pytest.raises(
            ValueError, match=r"weights \(.*\) that were made inside torch.inference_mode.*load the model"
        ):
            ask()


def test_offloaded_weights_in_inference_mode(world):
    """Rows of an offloaded projection are gradients."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(make_model(weight_sharing=False), execution_device="cpu")
    expected = model.generate(**world.one, **SHORT, **WHOLE)
    with torch.inference_mode():
        found = model.generate(**world.one, **SHORT, **WHOLE)
    assert_same(snapshot(found.attributions), snapshot(expected.attributions))


# The same of the code itself, so that a branch that no test here takes is no exception

FRACTIONS = {"zeros", "ones", "empty", "full", "linspace", "logspace", "rand", "randn", "eye", "normal"}
FACTORIES = FRACTIONS | {"tensor", "as_tensor", "asarray", "arange", "range", "randint", "randperm", "Generator"}
# Functions (file and name) whose tensors are where and what torch's defaults say, and why.
EXCEPTIONS = {
    "backbone_steerling.py __init__": "weights: from_pretrained and users choose by the defaults",
    "concepts_steerling.py __init__": "weights",
}


def unguarded(source: str) -> Iterator[tuple[str, str]]:
    """Calls that make a tensor and leave its device, or the type of a fraction, to torch's defaults: function and call."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = node.func.value, node.func.attr
            if isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES:
                given = {keyword.arg for keyword in node.keywords}
                located = "device" in given or (name == "Generator" and node.args)
                if not located or (name in FRACTIONS and "dtype" not in given):
                    yield function, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(ast.parse(source), "")


def test_no_tensor_is_left_to_the_defaults():
    found = [
        (f"{path.name} {function}", call)
        for folder in ("modeling", "tokenization", "steerling_hf")
        for path in sorted((ROOT / folder).glob("*.py"))
        for function, call in unguarded(path.read_text())
    ]
    assert [call for place, call in found if place not in EXCEPTIONS] == []
    assert {place for place, _ in found} == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "call",
    ["torch.tensor(x)", "torch.zeros(3, device='cpu')", "torch.Generator()", "torch.arange(3, dtype=torch.long)"],
)
def test_the_guard_sees_a_call(call):
    assert list(unguarded(f"def f(x):\n    return {call}")) == [("f", call)]
