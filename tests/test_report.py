"""The report's page as text: what it refuses, that data stays data, and that it stands alone. Browsers: test_report_in_browser."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from report_cases import make_explanation

from steerling_hf.report import render_report

HOSTILE = "</script><script>alert(1)</script><!-- \"'& {{ style }}"


class Elements(HTMLParser):
    """All start tags with their attributes, and the text of each script and style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.open = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")
            self.open = True

    def handle_data(self, data):
        if self.open:
            self.raw[-1] += data

    def handle_endtag(self, tag):
        self.open = False


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_the_explanation():
    explanation = make_explanation()
    data = embedded(render_report(explanation))
    assert data["prompt"] == explanation["prompt"]
    assert [chunk["text"] for chunk in data["chunks"]] == [chunk["text"] for chunk in explanation["chunks"]]
    assert data["answer"][3]["logit"] == pytest.approx(explanation["answer"][3]["logit"], rel=1e-6)
    assert data["metrics"]["mean_sufficiency"] is None


def test_hostile_text_stays_data():
    explanation = make_explanation([HOSTILE], [[HOSTILE]])
    explanation["model"]["name"] = explanation["chunks"][0]["concepts"][0]["name"] = HOSTILE
    explanation["steering"][0]["operation"] = HOSTILE
    page = render_report(explanation)
    assert "alert(1)</" not in page
    assert "<!-- " not in page
    assert [tag for tag, _ in Elements(page).tags] == [
        tag for tag, _ in Elements(render_report(make_explanation())).tags
    ]
    assert embedded(page)["prompt"][0]["text"] == HOSTILE
    assert embedded(page)["model"]["name"] == HOSTILE


@pytest.mark.parametrize("text", ["\ud83d", "\u2028\x00\r\n", "שלום 👩‍👧", ""])
def test_any_text_survives_and_can_be_written(text):
    page = render_report(make_explanation([text], [["a"]]))
    page.encode("utf-8")
    assert embedded(page)["prompt"][0]["text"] == text


def test_the_page_loads_nothing():
    page = render_report(make_explanation())
    elements = Elements(page)
    assert not re.search(
        r"(https?:)?//[a-z]|url\(|@import|\bimport\b|fetch\(|innerHTML|insertAdjacentHTML|eval\(", page
    )
    assert not {tag for tag, _ in elements.tags} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
    }
    assert not [attributes for _, attributes in elements.tags if {"src", "style", "srcset", "data"} & set(attributes)]
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]


def test_the_policy_allows_the_page_s_own_style_and_script_alone():
    page = render_report(make_explanation())
    elements = Elements(page)
    (policy,) = [
        a["content"] for t, a in elements.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    style, _, script = elements.raw
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (script, style)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_the_page_is_small():
    page = render_report(make_explanation())
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert len(page.encode()) - len(data) < 40_000


def test_whole_numbers_too_large_for_javascript_stay_exact():
    explanation = make_explanation()
    explanation["generation"] |= {"seed": 2**63 + 1, "settings": {"bound": -(2**60), "nested": [2**60]}}
    generation = embedded(render_report(explanation))["generation"]
    assert generation == {"seed": str(2**63 + 1), "settings": {"bound": str(-(2**60)), "nested": [str(2**60)]}}


def test_rendering_leaves_the_explanation_alone_and_ignores_keys_it_does_not_know():
    explanation = make_explanation()
    explanation["chunks"][0]["sources"] = []
    before = copy.deepcopy(explanation)
    render_report(explanation)
    assert explanation == before


def test_nothing_to_explain_is_a_page_too():
    render_report(make_explanation([], [], steering=[], metrics={}))
    explanation = make_explanation()
    for chunk in explanation["chunks"]:
        chunk["inputs"] = chunk["context"] = None
    for token in explanation["answer"]:
        token["step"] = token["probability"] = None
    render_report(explanation)


def at(explanation, path):
    for key in path:
        explanation = explanation[key]
    return explanation


@pytest.mark.parametrize(
    "path",
    [
        ("format",),
        ("model", "fingerprint"),
        ("generation", "seed"),
        ("steering", 1, "operation"),
        ("prompt", 3, "text"),
        ("answer", 2, "logit"),
        ("answer", 5, "unknown"),
        ("chunks", 1, "inputs"),
        ("chunks", 1, "concepts", 4, "head"),
        ("metrics",),
    ],
)
def test_a_missing_key_is_named(path):
    explanation = make_explanation()
    del at(explanation, path[:-1])[path[-1]]
    place = "explanation" + "".join(f"[{key!r}]" for key in path[:-1])
    with pytest.raises(ValueError, match=re.escape(f"`{place}` has no key {path[-1]!r}")):
        render_report(explanation)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "`explanation['format']` is 2, and this version shows format 1"),
        (("chunks", 4, "end"), 61, "`explanation['chunks'][4]` spans tokens 47 to 61, but the answer has 60"),
        (("chunks", 0, "start"), -1, "`explanation['chunks'][0]` spans tokens -1 to 13"),
        (("chunks", 0, "end"), 0, "`explanation['chunks'][0]` spans tokens 0 to 0"),
        (("chunks", 1, "start"), 12, "`explanation['chunks'][1]` starts at token 12, and the chunk before ends at 13"),
        (("chunks", 2, "inputs"), [0.5], "`explanation['chunks'][2]['inputs']` has 1 values, and there are 10 tokens"),
        (("chunks", 2, "context"), [], "`explanation['chunks'][2]['context']` has 0 values, and there are 60 tokens"),
        (("chunks", 2, "concepts", 0, "head"), "discovered", "['head']` is 'discovered', not 'known' or 'unknown'"),
        (("answer", 2, "logit"), float("nan"), "`explanation['answer'][2]['logit']` is nan"),
        (("answer", 2, "text"), None, "`explanation['answer'][2]['text']` is None (NoneType), not of the type str"),
        (("answer", 2, "id"), True, "`explanation['answer'][2]['id']` is True (bool), not of the type int"),
        (("prompt",), {}, "`explanation['prompt']` is {} (dict), not of the type list"),
        (("metrics", "loss"), "low", "`explanation['metrics']['loss']` is 'low' (str), not of the type float"),
        (
            ("generation", "settings", "stop"),
            {1},
            "`explanation['generation']['settings']['stop']` is {1} (set), which JSON",
        ),
        (("steering", 0, "strength"), float("inf"), "`explanation['steering'][0]['strength']` is inf"),
    ],
)
def test_a_wrong_value_is_named(path, value, message):
    explanation = make_explanation()
    at(explanation, path[:-1])[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        render_report(explanation)
