"""The commands `steerling-hf trace build|query`: what they print, and errors of one line."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from steerling_hf import checkpoint
from steerling_hf.cli import main
from steerling_hf.trace_results import MEANING

pytest.importorskip("milvus_lite")

RECORDS = [
    {"text": "You can reach Mara Ellison at 555-0142.", "source": "cards", "topic": "contact", "year": 2001},
    {"text": "The gardener watered the new roses in the garden.", "source": "a.txt", "topic": "garden", "year": 2002},
    {"text": "The gardener planted a tree in the garden.", "source": "a.txt", "topic": "garden", "year": 2003},
    {"text": "A song of the sea, with drums.", "source": "b.txt", "topic": "music", "year": 2004},
]
HOSTILE = "The captain \x1b[2Jraised\n the sail \u202e<script>."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "more").mkdir()
    (folder / "more" / "sea.txt").write_text(HOSTILE)
    return [str(file), str(folder / "more")]


@pytest.fixture(scope="module")
def index(tmp_path_factory, corpus):
    """An index of the five documents, which no test changes."""
    path, printed = str(tmp_path_factory.mktemp("index") / "index.db"), StringIO()
    with redirect_stdout(printed):
        assert main(["trace", "build", *corpus, "--index", path, "--json"]) == 0
    assert json.loads(printed.getvalue()) == {"documents": 5, "chunks": 5, "added": 5, "total": 5, "index": path}
    return path


def query(capsys, *arguments):
    assert main(["trace", "query", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_building_again_adds_nothing(index, corpus, capsys):
    assert main(["trace", "build", *corpus, "--index", index]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"5 documents, 5 chunks, 0 of them new: 5 chunks in {index}\n"


def test_a_query_prints_scores_sources_concepts_and_what_they_mean(index, capsys):
    assert main(["trace", "query", RECORDS[0]["text"], "--index", index, "-k", "3"]) == 0
    first, text, concepts, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == ["1", "1.000", "cards"]
    assert text.strip() == RECORDS[0]["text"]
    assert concepts.startswith("      shared concepts: ")
    assert "contact information 0." in concepts
    assert [line.split()[0] for line in rest[:6:3]] == ["2", "3"]
    assert any(line.endswith("source cards: 1 hit, best 1.000") for line in rest[6:-1])
    assert rest[-1] == MEANING
    assert "not which documents caused it" in rest[-1]


@pytest.mark.parametrize("kind", ["dense", "sparse", "hybrid"])
def test_kinds_filters_and_groups(kind, index, capsys, tmp_path):
    garden = query(capsys, "The gardener", "--index", index, "--kind", kind, "--where", "topic=garden", "--by", "year")
    assert garden["kind"] == kind
    assert {hit["text"] for hit in garden["hits"]} == {record["text"] for record in RECORDS[1:3]}
    assert all(0 <= hit["score"] <= 1 for hit in garden["hits"])
    assert {source["source"] for source in garden["sources"]} == {2002, 2003}
    assert garden["meaning"] == MEANING
    file = tmp_path / "answer.txt"
    file.write_text("The gardener")
    same = query(
        capsys, "--file", str(file), "--index", index, "--kind", kind, "--where", "topic=garden", "--by", "year"
    )
    assert same == garden


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["source=a.txt", "source=b.txt"], {1, 2, 3}),
        (["year=2001"], {0}),
        (["topic=garden", "topic=music"], {1, 2, 3}),
        (['metadata["year"] > 2002'], {2, 3}),
        (["topic=garden", 'metadata["year"] < 2003 or metadata["year"] > 2003'], {1}),
        (["topic=nothing"], set()),
        (["topic=NaN"], set()),
        (['source="a.txt"'], {1, 2}),
        (['source="a.txt"', "source=b.txt"], {1, 2, 3}),
    ],
)
def test_conditions(conditions, found, index, capsys):
    where = [part for condition in conditions for part in ("--where", condition)]
    hits = query(capsys, "The gardener", "--index", index, *where)["hits"]
    assert {hit["text"] for hit in hits} == {RECORDS[i]["text"] for i in found}


def test_documents_cannot_write_to_the_terminal(index, capsys):
    assert main(["trace", "query", "The captain raised the sail.", "--index", index]) == 0
    printed = capsys.readouterr().out
    assert "The captain \\x1b[2Jraised the sail \\x202e<script>." in printed
    assert printed.replace("\n", "").isprintable()


def test_names_of_concepts_from_elsewhere(index, capsys, tmp_path):
    labels = json.loads(Path(checkpoint("steerling-nano"), "concept_labels.json").read_text())
    for row in labels:
        row["concept_name"] = f"my {row['concept_name']}"
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(labels))
    hit = query(capsys, RECORDS[0]["text"], "--index", index, "--labels", str(file))["hits"][0]
    names = {concept["name"] for concept in hit["concepts"]} - {None}
    assert "my contact information" in names
    assert all(name.startswith("my ") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "none.jsonl", "--index", "new.db"], "error: `documents` is 'none.jsonl': there is no such file"),
        (["build", "good.txt", "none.jsonl", "--index", "new.db"], "error: `documents` is 'none.jsonl': there is no"),
        (["build", "bad.jsonl", "--index", "new.db"], "error: bad.jsonl, line 1 is not JSON"),
        (["build", "empty.jsonl", "--index", "new.db"], "error: `documents` has no text in it"),
        (["build", "notes.doc", "--index", "new.db"], "error: `documents` is 'notes.doc': give a file that ends in"),
        (["build", "good.txt", "--index", "new"], "error: `uri` is 'new': give http://host:port"),
        (["build", "good.txt", "--index", "none/new.db"], "error: `uri` is 'none/new.db': there is no folder"),
        (["build", "good.txt", "--index", "bad.jsonl/new.db"], "error: "),
        (["build", "good.txt", "--index", "new.db", "--chunk-tokens", "9999"], "error: `chunk_tokens` is 9999"),
        (["build", "good.txt", "--index", "new.db", "--model", "steerling-8b"], "error: steerling-8b has no weights"),
        (["build", "good.txt", "--index", "http://127.0.0.1:9"], "error: `uri` is 'http://127.0.0.1:9', where no"),
        (["query", "Rain", "--index", "new.db"], "error: There is no index at 'new.db': build one with"),
        (["query", "--file", "none.txt", "--index", "new.db"], "error: `--file` is 'none.txt', which is no file"),
        (["query", "Rain", "--index", "http://127.0.0.1:9"], "error: `uri` is 'http://127.0.0.1:9', where no"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"good.txt": "Rain.", "bad.jsonl": "{", "empty.jsonl": "", "notes.doc": "x"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["trace", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_errors_of_an_index_that_is_there(index, corpus, capsys, exported_folder):
    for arguments, message in [
        (["build", *corpus, "--index-kind", "DISKANN"], "`index` is 'DISKANN': the embedded engine"),
        (["build", *corpus, "--index-kind", "HNSW"], "`index` is 'HNSW', but the index at"),
        (["build", *corpus, "--model", str(exported_folder)], "holds vectors of 256 dimensions from a model with"),
        (["query", "Rain", "--model", str(exported_folder)], "holds vectors of 256 dimensions from a model with"),
        (["query", "Rain", "-k", "0"], "`k` is 0"),
        (["query", ""], "has no tokens"),
        (["query", "rain " * 3000], "split the text"),
        (["query", "Rain", "--where", "year ==== 1"], "cannot search with `where`"),
    ]:
        assert main(["trace", *arguments, "--index", index]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out


@pytest.mark.parametrize(
    "arguments",
    [[], ["build", "a.txt"], ["query", "--index", "a.db"], ["query", "a", "--file", "b", "--index", "a.db"]],
)
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trace", *arguments])
    assert stop.value.code == 2
    assert "usage: steerling-hf trace" in capsys.readouterr().err
