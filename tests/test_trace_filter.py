"""Filters: any character means itself, and what cannot be right is refused."""

import math

import pytest
from conftest import make_model

from steerling_hf.trace_filter import expression
from steerling_hf.trace_index import TraceIndex

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

TEXTS = [
    "a\0b",
    'a"b',
    "a'b",
    "a\\b",
    "a\\",
    '\\"',
    "a\nb",
    "a\\nb",
    "a\r\tb",
    "".join(map(chr, range(1, 32))),
    "\x7f\x80",
    "\u2028\ufeff",
    "\u6f22\U0001f600",
    "\\u0041",
    "{x} $y %z_",
    'x" or 1 == 1 or source == "',
    '"] == 1 or metadata["topic',
    "x" * 20_000,
]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    from steerling_hf import SteerlingTokenizer, checkpoint

    tokenizer, model = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano")), make_model()
    documents = [
        {"text": f"Number {i}.", "source": text[:1000], "topic": text, text: "here", "i": i}
        for i, text in enumerate(TEXTS)
    ]
    with TraceIndex(tmp_path_factory.mktemp("filters") / "index.db") as index:
        index.build(model, tokenizer, documents, progress=False)
        yield lambda where: {hit.metadata["i"] for hit in index.trace(model, tokenizer, "x", k=100, where=where).hits}


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_any_character_means_itself(number, index):
    text = TEXTS[number]
    assert index({"topic": text}) == {number}
    assert index({text: "here"}) == {number}
    assert index({"source": text[:1000]}) == {number}
    assert index({"topic": ["elsewhere", text]}) == {number}
    assert index({"text": text}) == set()


def test_many_values_and_long_ones(index):
    assert index({"i": list(range(3000))}) == set(range(len(TEXTS)))
    assert index({"topic": "y" * 1_000_000}) == set()
    assert index({"z" * 100_000: 1}) == set()
    assert index("source == 'x' " + "or source == 'y' " * 3000) == set()


def test_surrogates_are_kept_as_documents_keep_them():
    assert expression({"source": "a\ud800"}) == expression({"source": "a\ufffd"})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": math.nan}, "`where` has nan for 'a': give a finite number"),
        ({"a": [1, math.inf]}, "`where` has inf for 'a'"),
        ({"a": 2**63}, "`where` has 9223372036854775808 for 'a': .* within 64 bits"),
        ({"source": 5}, "`where` has 5 for 'source', which is text"),
        ({"a": "\ud800"}, r"`where` has '\\ud800' for 'a'"),
        ({"\ud800": 1}, r"`where` has the field '\\ud800'"),
        ({5: 1}, "`where` has the field 5: give the name of a field as text"),
        ({None: 1}, "`where` has the field None"),
        ({"a": b"b"}, "`where` has b'b' for 'a'"),
        ({"a": {"b": 1}}, "`where` has {'b': 1} for 'a'"),
        ("a\ud800", r"`where` is 'a\\ud800'"),
        (5, "`where` is 5: give values by field"),
        (b"a", "`where` is b'a'"),
        ("x" * 10_000, "cannot search with `where` 'xxx"),
        ("(" * 5000, r"cannot search with `where` '\(\(\("),
        (" ", "cannot search with `where` ' '"),
        ("\0", r"cannot search with `where` '\\x00'"),
    ],
)
def test_filters_that_are_refused(where, message, index):
    with pytest.raises(ValueError, match=message) as caught:
        index(where)
    assert len(str(caught.value)) < 1500
