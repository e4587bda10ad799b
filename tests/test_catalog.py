"""ConceptCatalog without a model: label files, lookup with near matches, groups, filters, ranked search."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from pyarrow import parquet

from steerling_hf import Concept, ConceptCatalog, ConceptNotFoundError, checkpoint, concept_labels

PETS = Concept(0, "known", "pets", "Cats, dogs and other animals at home.", 7, "home")
GARDENING = Concept(1, "known", "gardening", "Growing flowers in beds.", 7, "home")
LEGAL = Concept(2, "known", "legal", "Courts and their judges.", 3, "work")
POLITE = Concept(3, "known", "polite", "Courteous wording.", None, "", is_steerable=False, is_tone=True)
PHONE = Concept(4, "known", "phone number", "How to call a person.", 9, "privacy", is_alignment=True)
FOUND = Concept(6, "unknown", "numerals", "Number words such as seven.")
CONCEPTS = [PETS, GARDENING, LEGAL, POLITE, PHONE, FOUND]


@pytest.fixture
def catalog() -> ConceptCatalog:
    return ConceptCatalog(CONCEPTS, n_known=5, n_unknown=4)


@pytest.fixture(scope="module")
def nano() -> ConceptCatalog:
    return ConceptCatalog.from_pretrained("steerling-nano")


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_labels_survive_a_file(ending, catalog, tmp_path):
    catalog.save(tmp_path / f"concept_labels.{ending}")
    for source in (tmp_path, str(tmp_path / f"concept_labels.{ending}")):
        read = ConceptCatalog.from_pretrained(source)
        assert list(read) == [*CONCEPTS[:5], Concept(5, "unknown"), FOUND]
        assert (read.n_known, read.n_unknown) == (5, 2)


def test_saved_parquet_has_the_released_schema(catalog, tmp_path):
    catalog.save(tmp_path / "labels.parquet")
    table = parquet.read_table(tmp_path / "labels.parquet")
    columns = "concept_id head concept_name concept_description public_group_id group_name"
    flags = "is_steerable is_tone is_alignment is_demographic"
    assert table.column_names == f"{columns} {flags}".split()
    assert table.to_pylist()[3] == {
        "concept_id": 3,
        "head": "known",
        "concept_name": "polite",
        "concept_description": "Courteous wording.",
        "public_group_id": None,
        "group_name": "",
        "is_steerable": False,
        "is_tone": True,
        "is_alignment": False,
        "is_demographic": False,
    }


def test_tables_of_other_writers_are_read(tmp_path):
    """What pandas makes of missing values, in another order of columns and rows, with a column of its own."""
    table = {
        "is_steerable": [True] * 4,
        "head": ["unknown", "unknown", "known", "known"],
        "concept_id": [2, 3, 1, 0],
        "score": [0.5] * 4,
        "concept_name": [None, "c", "b", "a"],
        "concept_description": [None, "", None, "first"],
        "public_group_id": [float("nan"), -1.0, None, 4.0],
        "group_name": [None, "", None, "g"],
        **{name: [False] * 4 for name in ("is_tone", "is_alignment", "is_demographic")},
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "concept_labels.parquet")
    assert list(ConceptCatalog.from_pretrained(tmp_path)) == [
        Concept(0, "known", "a", "first", 4, "g"),
        Concept(1, "known", "b"),
        Concept(2, "unknown"),
        Concept(3, "unknown", "c"),
    ]


def test_nano_labels(nano):
    rows = json.loads(Path(checkpoint("steerling-nano"), "concept_labels.json").read_text())
    assert [c.name for c in nano] == [row["concept_name"] for row in rows]
    assert nano.n_known == len(nano) == 60
    assert nano["gloomy tone"].is_tone
    assert nano["refusal"].flags == ("steerable", "alignment")


def test_labels_come_from_the_hub(monkeypatch, tmp_path):
    asked = []

    def download(repo, name, revision):
        asked.append((repo, name, revision))
        if name.endswith(".parquet"):
            raise LocalEntryNotFoundError("not there")
        ConceptCatalog(CONCEPTS).save(tmp_path / name)
        return str(tmp_path / name)

    monkeypatch.setattr(concept_labels, "hf_hub_download", download)
    assert ConceptCatalog.from_pretrained("owner/name", revision="v1")["legal"] == LEGAL
    assert asked == [("owner/name", f"concept_labels.{ending}", "v1") for ending in ("parquet", "json")]


def test_labels_that_are_nowhere(tmp_path):
    for source in (tmp_path, "steerling-8b", "owner/name"):
        with pytest.raises(FileNotFoundError, match=r"`source` is .*concept_labels.parquet.*'guidelabs/steerling'"):
            ConceptCatalog.from_pretrained(source)


def test_json_needs_no_extra_and_the_rest_names_it(monkeypatch, catalog, tmp_path):
    catalog.save(tmp_path / "labels.parquet")
    for module in ("pyarrow", "bm25s", "Stemmer"):
        monkeypatch.setitem(sys.modules, module, None)
    catalog.save(tmp_path / "labels.json")
    assert ConceptCatalog.from_pretrained(tmp_path / "labels.json")["pets"] == PETS
    for call in (
        lambda: ConceptCatalog.from_pretrained(tmp_path / "labels.parquet"),
        lambda: catalog.save(tmp_path / "again.parquet"),
        lambda: catalog.search("pets"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'steerling-hf\[concepts\]'"):
            call()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"concept_id": 0}, "is no list of rows"),
        ([{"concept_id": 0, "head": "known"}], "lacks concept_name, concept_description, public_group_id"),
        ([{**concept_labels._row(PETS), "head": "seen"}], "`head` of row 0 is 'seen'"),
        ([concept_labels._row(PETS)] * 2, "two rows have the `concept_id` 0"),
    ],
)
def test_broken_files_are_refused(content, message, tmp_path):
    (tmp_path / "concept_labels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        ConceptCatalog.from_pretrained(tmp_path)


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_an_interrupted_save_leaves_the_old_labels(ending, catalog, tmp_path, monkeypatch):
    file = tmp_path / f"labels.{ending}"
    catalog.save(file)
    before = file.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catalog.with_labels([]).save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_labels_are_not_saved_in_a_folder_that_is_not_there(catalog, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        catalog.save(tmp_path / "nowhere" / "labels.json")


def test_a_mistyped_path_is_told():
    with pytest.raises(FileNotFoundError, match=r"`source` is './labels/v2/typo.json'"):
        ConceptCatalog.from_pretrained("./labels/v2/typo.json")


def test_a_repository_without_access_says_so(monkeypatch):
    def refused(*_, **__):
        raise GatedRepoError("ask for access", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("steerling_hf.concept_labels.hf_hub_download", refused)
    with pytest.raises(GatedRepoError, match="ask for access"):
        ConceptCatalog.from_pretrained("someone/gated")


def test_other_endings_are_refused(catalog, tmp_path):
    with pytest.raises(ValueError, match=r"`path` is .*labels.csv.*\.parquet or \.json"):
        catalog.save(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(ValueError, match=r"`path` is .*labels.csv"):
        ConceptCatalog.from_pretrained(tmp_path / "labels.csv")


def test_ids_must_be_where_their_head_is():
    with pytest.raises(
        ValueError, match="legal as a concept of the known head with id 2, but known concepts have ids below 2"
    ):
        ConceptCatalog([LEGAL], n_known=2)
    with pytest.raises(ValueError, match="numerals as a concept of the unknown head with id 6, but known .* below 7"):
        ConceptCatalog([FOUND], n_known=7, n_unknown=3)


def test_lookup(catalog):
    assert catalog[1] == catalog["gardening"] == catalog["Gardening"] == catalog[GARDENING] == GARDENING
    assert catalog[6] == catalog["numerals"] == FOUND
    assert catalog[8] == Concept(8, "unknown")
    assert (str(catalog[8]), str(GARDENING)) == ("discovered concept 8", "gardening")
    assert len(catalog) == len(list(catalog)) == 9
    assert [x in catalog for x in (8, 9, -1, "pets", "pet", PETS, None)] == [
        True,
        False,
        False,
        True,
        False,
        True,
        False,
    ]


def test_unknown_concepts_come_with_near_matches(catalog):
    with pytest.raises(ConceptNotFoundError, match=r"^No concept is named 'gardning'; near: 'gardening' \(1\)\.$"):
        catalog["gardning"]
    with pytest.raises(ConceptNotFoundError, match=r"near: 'phone number' \(4\)"):
        catalog["phone"]
    with pytest.raises(ConceptNotFoundError, match=r"nothing looks like it"):
        catalog["xyzzy"]
    with pytest.raises(
        ConceptNotFoundError, match=r"id 9: ids go from 0 to 8, the nearest is 8 \(discovered concept 8\)"
    ):
        catalog[9]
    with pytest.raises(ConceptNotFoundError, match=r"id -1: .* the nearest is 0 \(pets\)"):
        catalog[-1]
    with pytest.raises(ConceptNotFoundError, match=r"discovered concepts are in the catalog of .*for_model"):
        ConceptCatalog(CONCEPTS[:5])[5]
    with pytest.raises(ConceptNotFoundError, match="this catalog is empty"):
        ConceptCatalog([])[0]


def test_a_missing_concept_is_a_key_error_and_a_value_error(catalog):
    for kind in (KeyError, ValueError):
        with pytest.raises(kind):
            catalog["gardning"]


def test_names_that_several_concepts_share():
    catalog = ConceptCatalog([Concept(i, "known", name) for i, name in enumerate(("Law", "law", "tea", "tea"))])
    assert catalog["Law"].id == 0
    assert catalog["law"].id == 1
    for name, ids in (("LAW", "0, 1"), ("tea", "2, 3")):
        with pytest.raises(ConceptNotFoundError, match=f"'{name}' is the name of several concepts: .* ids {ids}"):
            catalog[name]


def test_groups(catalog, nano):
    assert catalog.group("gardening") == [1, 0]
    assert catalog.group(8) == [8]
    assert catalog.group("polite") == [3]
    assert nano.group("gardening") == [1, 0, 2, 24]


def test_filters(catalog):
    assert [c.id for c in catalog.filter("unknown")] == [5, 6, 7, 8]
    assert catalog.filter(group="Home") == catalog.filter(group=7) == [PETS, GARDENING]
    assert catalog.filter(flags="tone") == [POLITE]
    assert catalog.filter("known", flags=["steerable", "alignment"]) == [PHONE]
    assert catalog.filter("unknown", group="home") == []
    with pytest.raises(ValueError, match="`head` has 'discovered': choose from 'known', 'unknown'"):
        catalog.filter("discovered")
    with pytest.raises(ValueError, match="`flags` has 'is_tone': choose from 'steerable', 'tone'"):
        catalog.filter(flags=["is_tone"])
    with pytest.raises(ValueError, match="`group` is 'hone': no group has this id or name; near: 'home'"):
        catalog.filter(group="hone")
    with pytest.raises(ValueError, match="`group` is 8: no group"):
        catalog.filter(group=8)


def test_search_finds_every_concept_by_a_word_of_its_description(nano):
    for concept in nano:
        longest = max(concept.description.strip(".").split(), key=len)
        found = [match.concept for match in nano.search(longest.strip("',.:"), limit=60)]
        assert concept in found, (concept, longest)


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("because", "cause"),
        ("if", "condition"),
        ("rain", "weather"),
        ("Garden!", "gardening"),
        ("how to reach somebody", "contact information"),
        ("complaints", "plain tone"),
    ],
)
def test_search_ranks_what_is_meant_first(nano, query, best):
    assert nano.search(query)[0].concept.name == best


def test_search_prefers_names_to_descriptions_and_ties_by_id():
    catalog = ConceptCatalog(
        [
            Concept(0, "known", "home", "For cats and cats."),
            Concept(1, "known", "cats", "Animals that purr."),
            Concept(2, "known", "dogs", "Animals that bark."),
        ]
    )
    assert [m.concept.id for m in catalog.search("cat")] == [1, 0]
    matches = catalog.search("animal")
    assert [m.concept.id for m in matches] == [1, 2]
    assert matches[0].score == matches[1].score > 0


def test_search_is_limited_and_filtered(catalog, nano):
    assert [m.concept for m in catalog.search("number", head="unknown")] == [FOUND]
    assert [m.concept for m in catalog.search("number", flags=["alignment"])] == [PHONE]
    assert len(nano.search("text about", limit=3)) == 3
    assert {m.concept.group_name for m in nano.search("text", limit=60, group="nature")} == {"nature"}
    assert catalog.search("xyzzy") == catalog.search("") == ConceptCatalog([], 2, 2).search("pets") == []
    with pytest.raises(ValueError, match="`limit` is 0"):
        catalog.search("pets", limit=0)


def test_labels_can_be_replaced(catalog):
    named = dataclasses.replace(catalog[8], name="colours", description="Words for colours.")
    changed = catalog.with_labels([named])
    assert changed["colours"] == changed.search("colour")[0].concept == named
    assert changed["pets"] == PETS
    assert len(changed) == len(catalog)
    assert "colours" not in catalog


def test_a_catalog_fits_its_own_model_only(catalog, tiny_config):
    fitted = catalog.fit(tiny_config(n_concepts=5, n_unknown_concepts=30))
    assert (fitted.n_unknown, len(fitted)) == (30, 35)
    assert fitted[34].head == "unknown"
    for sizes in ({"n_concepts": 6}, {"n_concepts": 5, "n_unknown_concepts": 3}):
        with pytest.raises(ValueError, match="5 known and 4 discovered concepts, the model .*for_model"):
            catalog.fit(tiny_config(**sizes))


def test_importing_the_package_imports_none_of_the_extra(isolated):
    # `isolated` hides steerling_hf, which is what is looked at here.
    code = """
del sys.modules["steerling_hf"]
sys.modules.update(pyarrow=None, bm25s=None, Stemmer=None)
from steerling_hf import ConceptCatalog
print(ConceptCatalog.from_pretrained("steerling-nano")["pets"].id)
"""
    assert isolated(code).strip() == "2"
