"""An index of documents: what it finds, what a kill leaves of it, what it refuses."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model

from steerling_hf import ConceptCatalog, concept_vectors, embed
from steerling_hf.concept_labels import Concept
from steerling_hf.trace_engine import EMBEDDED_KINDS
from steerling_hf.trace_filter import expression
from steerling_hf.trace_index import WRITTEN_AT_ONCE, TraceIndex
from steerling_hf.trace_results import MEANING
from steerling_hf.trace_store import PROPERTY, TraceStore, _info_of
from steerling_hf.trace_vectors import trace_vectors

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

WORDS = ["gardener", "rose", "bank", "lawyer", "pilot", "sailor", "joy", "rain", "sea", "winter", "blue", "stone"]
HOSTILE = 'a "quote", a \\ and <script>alert(1)</script> \u6f22 <|mask|>'


def make_documents(count, seed=0):
    rng = random.Random(seed)
    topics = ("plants", "law", HOSTILE)
    return [
        {
            "text": f"Number {i}: the " + " ".join(rng.choices(WORDS, k=8)) + ".",
            "source": f"file {i % 7}",
            "topic": topics[i % 3],
            "year": 2000 + i % 10,
        }
        for i in range(count)
    ]


DOCUMENTS = make_documents(60)
TEXTS = [document["text"] for document in DOCUMENTS]
QUERIES = ["The gardener saw a rose in the rain.", "Seven lawyers never sing.", TEXTS[5]]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def server(tmp_path):
    """Address of the embedded engine's own server, over HTTP/2 on loopback."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    running, database, port = start_server_in_thread(str(tmp_path / "server"))
    yield f"http://127.0.0.1:{port}"
    running.stop(grace=0)
    database.close()


@pytest.fixture(params=["file", "server"])
def uri(request, tmp_path):
    return str(tmp_path / "index.db") if request.param == "file" else request.getfixturevalue("server")


def build(index, /, model, tokenizer, documents=DOCUMENTS, **options):
    return index.build(model, tokenizer, documents, progress=False, **options)


def brute_force(model, tokenizer, texts, kind):
    """Scores (queries, documents)."""
    dense = (
        1 + embed(model, tokenizer, QUERIES, normalize=True) @ embed(model, tokenizer, texts, normalize=True).T
    ) / 2
    sparse = concept_vectors(model, tokenizer, QUERIES).similarity(concept_vectors(model, tokenizer, texts))
    return {"dense": dense, "sparse": sparse, "hybrid": (dense + sparse) / 2}[kind]


def test_vectors_are_those_of_embed_and_concept_vectors(model, tokenizer):
    for embedding in ("composed", "known"):
        vectors = trace_vectors(model, tokenizer, QUERIES, embedding, batch_size=2)
        torch.testing.assert_close(vectors.dense, embed(model, tokenizer, QUERIES, embedding, normalize=True))
    expected = concept_vectors(model, tokenizer, QUERIES).to_dense()
    torch.testing.assert_close(vectors.concepts.to_dense(), expected)
    for weights, row in zip(vectors.sparse(), expected):
        assert weights == {i: pytest.approx(row[i].item()) for i in row.nonzero().flatten().tolist()}


@pytest.mark.parametrize(
    ("kind", "index_kind"), [("dense", "FLAT"), ("dense", "HNSW"), ("sparse", "FLAT"), ("hybrid", "FLAT")]
)
def test_finds_what_brute_force_finds(kind, index_kind, uri, model, tokenizer):
    expected = brute_force(model, tokenizer, TEXTS, kind).sort(dim=1, descending=True)
    with TraceIndex(uri) as index:
        build(index, model, tokenizer, index=index_kind)
        for query, scores, order in zip(QUERIES, expected.values.tolist(), expected.indices.tolist()):
            trace = index.trace(model, tokenizer, query, k=8, kind=kind)
            assert [hit.text for hit in trace.hits] == [TEXTS[i] for i in order[:8]]
            assert [hit.score for hit in trace.hits] == pytest.approx(scores[:8], abs=1e-5)
            assert all(0 <= hit.score <= 1 for hit in trace.hits)
            for hit in trace.hits:
                document = DOCUMENTS[TEXTS.index(hit.text)]
                assert hit.source == document["source"]
                assert hit.metadata == {"topic": document["topic"], "year": document["year"]}
        assert trace.hits[0].score == pytest.approx(1, abs=1e-5)


def test_shared_concepts_name_the_reason(tmp_path, model, tokenizer):
    catalog = ConceptCatalog([Concept(i, "known", name=f"concept {i}") for i in range(20)], 20, 30)
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        for kind in ("dense", "sparse"):
            hit = index.trace(model, tokenizer, QUERIES[0], kind=kind, catalog=catalog).hits[0]
            mine, theirs = concept_vectors(model, tokenizer, [QUERIES[0], hit.text]).to_dense()
            parts = mine * theirs
            assert hit.sparse_score == pytest.approx(parts.sum().item(), abs=1e-5)
            best = parts.topk(10)
            assert [shared.part for shared in hit.concepts] == pytest.approx(best.values.tolist(), abs=1e-6)
            assert {shared.id for shared in hit.concepts} == set(best.indices.tolist())
            assert all(s.name == (f"concept {s.id}" if s.id < 20 else None) for s in hit.concepts)


def test_a_catalog_that_knows_of_no_discovered_concepts(tmp_path, model, tokenizer):
    labels = ConceptCatalog([Concept(i, "known", name=f"concept {i}") for i in range(20)], 20, 0)
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        found = index.trace(model, tokenizer, QUERIES, catalog=labels)
        assert {s.name for trace in found for hit in trace.hits for s in hit.concepts if s.id >= 20} == {None}
        with pytest.raises(ValueError, match="10 known"):
            index.trace(model, tokenizer, QUERIES, catalog=ConceptCatalog([], 10, 0))


def test_a_path_as_shells_complete_it(tmp_path, model, tokenizer):
    for uri in (f"{tmp_path}/index.db/", f"{tmp_path}/index.db", f"{tmp_path}/./index.db//"):
        with TraceIndex(uri) as index:
            assert index.build(model, tokenizer, DOCUMENTS, progress=False).added in (0, len(TEXTS))
            assert len(index) == len(TEXTS)


def test_filters_and_groups(uri, model, tokenizer):
    with TraceIndex(uri) as index:
        build(index, model, tokenizer)
        for where, keep in [
            ({"topic": "law"}, lambda d: d["topic"] == "law"),
            ({"topic": HOSTILE, "year": 2005}, lambda d: d["topic"] == HOSTILE and d["year"] == 2005),
            (
                {"topic": ["law", HOSTILE], "year": [2001]},
                lambda d: d["topic"] in ("law", HOSTILE) and d["year"] == 2001,
            ),
            ({"year": [np.int64(2001), np.float64(2005)]}, lambda d: d["year"] in (2001, 2005)),
            ({"source": ["file 1", "file 4"]}, lambda d: d["source"] in ("file 1", "file 4")),
            ('metadata["year"] > 2007', lambda d: d["year"] > 2007),
        ]:
            for kind in ("dense", "sparse", "hybrid"):
                found = index.trace(model, tokenizer, QUERIES[0], k=np.int64(60), kind=kind, where=where)
                assert {hit.text for hit in found.hits} == {d["text"] for d in DOCUMENTS if keep(d)}
        trace = index.trace(model, tokenizer, QUERIES[0], k=20)
        assert sum(source.share for source in trace.sources) == pytest.approx(1)
        for source in trace.sources:
            scores = [hit.score for hit in trace.hits if hit.source == source.source]
            assert (source.hits, source.score) == (len(scores), max(scores))
            assert source.share == pytest.approx(sum(scores) / sum(hit.score for hit in trace.hits))
        assert sorted((s.share for s in trace.sources), reverse=True) == [s.share for s in trace.sources]
        by_topic = index.trace(model, tokenizer, QUERIES[0], k=60, by="topic")
        assert {(s.source, s.hits) for s in by_topic.sources} == {("plants", 20), ("law", 20), (HOSTILE, 20)}


def test_lists_vectors_and_chunks_of_explanations(tmp_path, model, tokenizer):
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        one = [index.trace(model, tokenizer, query, kind="hybrid") for query in QUERIES]
        together = index.trace(model, tokenizer, QUERIES, kind="hybrid")
        assert [trace.text for trace in together] == QUERIES
        for alone, trace in zip(one, together):
            assert [hit.text for hit in trace.hits] == [hit.text for hit in alone.hits]
        vectors = index.trace(model, tokenizer, trace_vectors(model, tokenizer, QUERIES), kind="hybrid")
        assert [trace.hits for trace in vectors] == [trace.hits for trace in together]
        chunk = index.trace(model, tokenizer, SimpleNamespace(text=QUERIES[0]), kind="hybrid")
        assert chunk == one[0]
        assert index.trace(model, tokenizer, []) == []
        assert json.loads(json.dumps(one[0].to_dict()))["meaning"] == MEANING
        assert "not which documents caused it" in MEANING


def test_building_twice_changes_nothing(uri, model, tokenizer):
    with TraceIndex(uri) as index:
        assert len(index) == 0
        report = build(index, model, tokenizer, [*DOCUMENTS, DOCUMENTS[0]])
        assert (report.documents, report.chunks, report.added) == (61, 61, 60)
        assert len(index) == 60
    with TraceIndex(uri) as index:
        again = build(index, model, tokenizer, [*DOCUMENTS[30:], {"text": TEXTS[0], "source": "elsewhere"}])
        assert (again.chunks, again.added) == (31, 1)
        assert len(index) == 61
        hits = index.trace(model, tokenizer, TEXTS[0], k=2).hits
        assert {hit.source for hit in hits} == {"file 0", "elsewhere"}


def test_what_is_there_is_not_embedded_again(tmp_path, model, tokenizer, monkeypatch):
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        monkeypatch.setattr(model.transformer, "forward", None)
        assert build(index, model, tokenizer).added == 0


def test_shards_are_parts_of_the_whole(tmp_path, model, tokenizer):
    with TraceIndex(tmp_path / "index.db") as index:
        added = [build(index, model, tokenizer, shard=(i, 3)).added for i in range(3)]
        assert added == [20, 20, 20]
        assert len(index) == 60
        assert build(index, model, tokenizer).added == 0


def test_a_shard_may_be_empty(tmp_path, model, tokenizer):
    with TraceIndex(tmp_path / "index.db") as index:
        assert build(index, model, tokenizer, DOCUMENTS[:2], shard=(2, 3)).documents == 0
        assert build(index, model, tokenizer, DOCUMENTS[:2], shard=(1, 3)).documents == 1


def test_another_process_makes_the_index_first(server, model, tokenizer, monkeypatch):
    build(TraceIndex(server), model, tokenizer, shard=(0, 2))
    info, asked = TraceStore.info, []
    monkeypatch.setattr(TraceStore, "info", lambda self: info(self) if asked else asked.append(1))
    index = TraceIndex(server)
    assert build(index, model, tokenizer, shard=(1, 2)).added == 30
    assert len(index) == 60


def test_killed_after_any_batch_and_resumed(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr("steerling_hf.trace_index.WRITTEN_AT_ONCE", 7)
    write, rng = TraceStore.write, random.Random(0)

    class KilledError(Exception):
        pass

    def fail_somewhere(self, rows):
        when = rng.random()
        if when < 0.3:
            raise KilledError
        write(self, rows)
        if when < 0.6:
            raise KilledError

    monkeypatch.setattr(TraceStore, "write", fail_somewhere)
    kills = 0
    while True:
        with TraceIndex(tmp_path / "index.db") as index:
            try:
                build(index, model, tokenizer)
                break
            except KilledError:
                kills += 1
    assert kills >= 2
    with TraceIndex(tmp_path / "index.db") as index:
        found = index.trace(model, tokenizer, QUERIES[0], k=200).hits
        assert sorted(hit.text for hit in found) == sorted(TEXTS)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import make_model
from test_trace_index import make_documents
from steerling_hf import SteerlingTokenizer, checkpoint
from steerling_hf.trace_index import TraceIndex
from steerling_hf.trace_store import TraceStore
write = TraceStore.write
def last(self, rows):
    write(self, rows)
    os.kill(os.getpid(), signal.SIGKILL)
TraceStore.write = last
tokenizer = SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))
TraceIndex(sys.argv[2]).build(make_model(), tokenizer, make_documents(1000), progress=False)
"""


def test_killed_by_the_system_and_resumed(tmp_path, model, tokenizer):
    path = str(tmp_path / "index.db")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), path], capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -9, killed.stderr
    with TraceIndex(path) as index:
        assert len(index) == WRITTEN_AT_ONCE
        assert build(index, model, tokenizer, make_documents(1000)).added == 1000 - WRITTEN_AT_ONCE
        assert len(index) == 1000


def test_what_the_engine_is_writing_is_waited_for(tmp_path, model, tokenizer, monkeypatch):
    load, failures = pymilvus.MilvusClient.load_collection, []

    def half_written(client, name, **options):
        if len(failures) < 2:
            failures.append(name)
            raise pymilvus.MilvusException(1, "Failed to read all data for array (file seems not fully written?)")
        return load(client, name, **options)

    with TraceIndex(str(tmp_path / "index.db")) as index:
        build(index, model, tokenizer)
        monkeypatch.setattr("steerling_hf.trace_store.PAUSE", 0)
        monkeypatch.setattr(pymilvus.MilvusClient, "load_collection", half_written)
        build(index, model, tokenizer)
        assert len(failures) == 2
        assert index.trace(model, tokenizer, DOCUMENTS[0]["text"]).hits
        monkeypatch.setattr("steerling_hf.trace_store.SECONDS_TO_WRITE", 0)
        failures.clear()
        with pytest.raises(ValueError, match="cannot build the index"):
            build(index, model, tokenizer)


@pytest.mark.parametrize("kind", EMBEDDED_KINDS)
def test_the_embedded_engine_really_builds_these_indexes(kind, tmp_path, model, tokenizer):
    path = tmp_path / "index.db"
    with TraceIndex(path) as index:
        build(index, model, tokenizer, make_documents(300), index=kind.lower())
        assert index.info.index == kind
        texts = [document["text"] for document in make_documents(300)]
        found = index.trace(model, tokenizer, texts[:20], k=1)
        assert [trace.hits[0].text for trace in found] == texts[:20]
    assert list(path.rglob(f"*.dense.{kind.lower()}.idx"))


@pytest.mark.parametrize("kind", ["IVF_PQ", "DISKANN", "SCANN", "AUTOINDEX", "NONSENSE"])
def test_other_kinds_of_indexes_are_refused(kind, uri, model, tokenizer):
    # The engine would take them, report them as finished and build nothing: see the next test.
    with TraceIndex(uri) as index:
        with pytest.raises(ValueError, match=f"`index` is '{kind}': the embedded engine .* builds FLAT, HNSW, "):
            build(index, model, tokenizer, index=kind)
        assert index.info is None


def test_the_embedded_engine_takes_an_index_that_it_does_not_build(tmp_path):
    path = tmp_path / "index.db"
    client = pymilvus.MilvusClient(str(path))
    client.create_collection("c", dimension=4, metric_type="COSINE")
    client.release_collection("c")
    client.drop_index("c", "vector")
    params = client.prepare_index_params()
    params.add_index("vector", index_type="DISKANN", metric_type="COSINE")
    client.create_index("c", params)
    assert client.describe_index("c", "vector")["state"] == "Finished"
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(str(path))
    assert not list(path.rglob("*.idx"))


def test_another_models_index_is_refused(uri, model, tokenizer):
    with TraceIndex(uri) as index:
        build(index, model, tokenizer)
        other = make_model()
        with torch.no_grad():
            other.known_head.concept_embedding.weight += 1
        for stranger in (other, make_model(n_embd=64)):
            with pytest.raises(ValueError, match="holds vectors of 32 dimensions from a model with the fingerprint"):
                index.trace(stranger, tokenizer, QUERIES[0])
            with pytest.raises(ValueError, match="build an index with this model"):
                build(index, stranger, tokenizer)
        assert len(index) == 60
        for name, value, known in [("embedding", "known", "composed"), ("index", "HNSW", "FLAT")]:
            with pytest.raises(ValueError, match=f"`{name}` is '{value}', but the index .* was built with '{known}'"):
                build(index, model, tokenizer, **{name: value})
        narrow = trace_vectors(make_model(n_embd=64), tokenizer, QUERIES)
        with pytest.raises(
            ValueError, match="`text` has vectors of 64 dimensions over 50 concepts, the index holds 32"
        ):
            index.trace(model, tokenizer, narrow)


def test_arguments_that_are_refused_before_anything_is_made(tmp_path, model, tokenizer):
    path = tmp_path / "index.db"
    (tmp_path / "notes.pdf").write_bytes(b"")
    index = TraceIndex(path)
    for changes, message in [
        ({"documents": []}, "`documents` has no text in it"),
        ({"documents": ["", " \n"]}, "`documents` has no text in it"),
        ({"chunk_tokens": 257}, "`chunk_tokens` is 257: the model's context holds no more than 256"),
        ({"chunk_tokens": 0}, "`chunk_tokens` is 0: choose 1 or more"),
        ({"batch_size": 0}, "`batch_size` is 0: choose 1 or more"),
        ({"embedding": "logits"}, "`embedding` is 'logits': choose from"),
        ({"shard": (2, 2)}, r"`shard` is \(2, 2\): give \(i, n\) with 0 <= i < n"),
        ({"shard": 3}, "`shard` is 3: give"),
        ({"shard": "01"}, "`shard` is '01': give"),
        ({"shard": (0, 1, 2)}, r"`shard` is \(0, 1, 2\): give"),
        ({"shard": (0.0, 1)}, r"`shard` is \(0.0, 1\): give"),
        ({"chunk_tokens": "8"}, "`chunk_tokens` is '8': give a whole number"),
        ({"chunk_tokens": 8.5}, "`chunk_tokens` is 8.5: give a whole number"),
        ({"batch_size": True}, "`batch_size` is True: give a whole number"),
        ({"batch_size": None}, "`batch_size` is None: give a whole number"),
        ({"index": None}, "`index` is None: give a string"),
        ({"text": 5}, "`text` is 5: give a string"),
        ({"source": ""}, "`source` is empty: give a text"),
        ({"documents": b"rose"}, "`documents` is a bytes: give a dataset"),
        ({"documents": None}, "`documents` is a NoneType"),
        ({"documents": str(tmp_path / "notes.pdf")}, "give a file that ends in .jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(index, model, tokenizer, **{"documents": DOCUMENTS, **changes})
    with pytest.raises(ValueError, match="no concept heads"):
        build(index, make_model(interpretable=False), tokenizer)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        build(index, model, tokenizer, documents=str(tmp_path / "none.jsonl"))
    assert not path.exists()


def test_queries_that_are_refused(tmp_path, model, tokenizer):
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        for changes, message in [
            ({"k": 0}, "`k` is 0: choose 1 or more"),
            ({"k": "5"}, "`k` is '5': give a whole number"),
            ({"k": 2.0}, "`k` is 2.0: give a whole number"),
            ({"by": None}, "`by` is None: give a string"),
            ({"by": ""}, "`by` is empty: give a text"),
            ({"text": None}, "`text` is None: give a string or a list of strings"),
            ({"text": b"rain"}, "`text` is b'rain': give a string"),
            ({"text": ["rain", 5]}, "give a string or a list of strings"),
            ({"k": 5000}, "`k` is 5000: an index returns no more than 4096"),
            ({"kind": "bm25"}, "`kind` is 'bm25': choose from 'dense', 'sparse', 'hybrid'"),
            ({"text": ""}, "has no tokens"),
            ({"text": "rain " * 400}, "has .* tokens .*context holds 256: split the text"),
            ({"text": 5}, "give a string or a list of strings"),
            ({"where": "topic ==== 1"}, "cannot search with `where` 'topic ==== 1'"),
            ({"where": {"topic": None}}, "`where` has None for 'topic'"),
            (
                {"where": {"topic": np.array([1, 2])}},
                r"`where` has array\(\[1, 2\]\) for 'topic': give a string, a number",
            ),
            ({"where": ["topic"]}, r"`where` is \['topic'\]: give values by field"),
            ({"where": {"topic": []}}, r"`where` has \[\] for 'topic'"),
        ]:
            with pytest.raises(ValueError, match=message):
                index.trace(model, tokenizer, **{"text": QUERIES[0], **changes})
        for batch_size, message in [
            (0, "choose 1 or more"),
            ("5", "give a whole number"),
            (16_385, "no more than 16384"),
        ]:
            with pytest.raises(ValueError, match=message):
                index.rows(batch_size)


def test_expressions():
    assert expression(None) == ""
    assert expression("a > 1") == "a > 1"
    assert expression({"source": "x", "y": [1, "b"]}) == (
        'source == "x" and (metadata["y"] == 1 or metadata["y"] == "b")'
    )
    assert expression({'a"b': True}) == 'metadata["a\\"b"] == true'


def test_documents_longer_than_the_context_are_cut(tmp_path, model, tokenizer):
    long = " ".join(TEXTS) * 3
    with TraceIndex(tmp_path / "index.db") as index:
        report = build(index, model, tokenizer, [long], chunk_tokens=256)
        assert report.added == report.chunks > 3
        found = index.trace(model, tokenizer, QUERIES[0], k=100).hits
        assert all(text in "".join(hit.text for hit in found) for text in WORDS)


def test_files_that_are_no_index(tmp_path, model, tokenizer):
    (tmp_path / "file.db").write_text("junk")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "folder.db" / "notes.txt").write_text("mine")
    for name, message in [
        ("file.db", "a file that is no index"),
        ("folder.db", "a folder that holds no index"),
        ("index.sqlite", "give http://host:port, https://host:port or a path ending in .db"),
    ]:
        with pytest.raises(ValueError, match=message):
            TraceIndex(tmp_path / name)
    missing = TraceIndex(tmp_path / "missing.db")
    with pytest.raises(FileNotFoundError, match="there is no index: build one first"):
        missing.trace(model, tokenizer, QUERIES[0])
    assert not (tmp_path / "missing.db").exists()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        build(TraceIndex(tmp_path / "none" / "index.db"), model, tokenizer)


@pytest.mark.parametrize("damaged", ["manifest.json*", "schema.json", "*.parquet"])
def test_a_damaged_index(damaged, tmp_path, model, tokenizer):
    path = tmp_path / "index.db"
    with TraceIndex(path) as index:
        build(index, model, tokenizer)
    files = list(path.rglob(damaged))
    assert files
    for file in files:
        file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="index.db"), TraceIndex(path) as index:
        index.trace(model, tokenizer, QUERIES[0])


def test_a_collection_that_is_no_index(server, model, tokenizer):
    pymilvus.MilvusClient(server).create_collection("photos", dimension=4)
    with pytest.raises(ValueError, match="`collection` is 'photos', which .* is not an index of documents"):
        build(TraceIndex(server, collection="photos"), model, tokenizer)


def test_an_index_that_another_process_has_open(tmp_path, model, tokenizer):
    path = tmp_path / "index.db"
    with TraceIndex(path) as index:
        build(index, model, tokenizer)
        code = f"from steerling_hf.trace_engine import TraceEngine; TraceEngine({str(path)!r}, None, 5, False)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert "another process has it open" in other.stderr.splitlines()[-1]


def test_servers_that_do_not_answer():
    with pytest.raises(ConnectionError, match="`uri` is 'http://127.0.0.1:9', where no Milvus server answers"):
        TraceIndex("http://127.0.0.1:9", timeout=1)
    with pytest.raises(ValueError, match="`uri` is 'ftp://host': give http://host:port"):
        TraceIndex("ftp://host")


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install 'steerling-hf\[trace\]'"):
        TraceIndex(tmp_path / "index.db")


def test_progress_only_where_it_is_wanted(tmp_path, model, tokenizer, capsys):
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        assert capsys.readouterr().err == ""
        index.build(model, tokenizer, DOCUMENTS)
        assert "indexing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"format": 2, "vectors": "of another kind"},
            "has the format 2, and this version of steerling-hf reads 1: update",
        ),
        ({"format": 1, "dimension": "32"}, "does not say whose vectors it holds .* build it anew"),
        ({"fingerprint": 1, "dimension": 32, "concepts": 50, "embedding": "x", "index": "FLAT"}, "does not say whose"),
        ([], "does not say whose vectors it holds"),
        (None, "does not say whose vectors it holds"),
    ],
)
def test_an_index_of_another_format(written, message, server, model, tokenizer, monkeypatch):
    with TraceIndex(server) as index:
        build(index, model, tokenizer)
    described = pymilvus.MilvusClient.describe_collection

    def as_written(client, name, **options):
        return {**described(client, name, **options), "properties": {PROPERTY: json.dumps(written)}}

    monkeypatch.setattr(pymilvus.MilvusClient, "describe_collection", as_written)
    with TraceIndex(server) as index:
        for ask in (len, lambda index: index.trace(model, tokenizer, QUERIES[0])):
            with pytest.raises(ValueError, match=message):
                ask(index)


def test_what_is_written_of_an_index_is_read_with_its_format_or_without(tmp_path, model, tokenizer):
    with TraceIndex(tmp_path / "index.db") as index:
        build(index, model, tokenizer)
        info = index.info
    for extra in ({}, {"format": 1}):
        assert _info_of(json.dumps({**extra, **vars(info)}), "here") == info


def test_keys_that_cannot_be_opened_are_named(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr("steerling_hf.trace_index.WRITTEN_AT_ONCE", 7)
    monkeypatch.setattr("steerling_hf.trace_store.CHUNKS_OF_A_PART", 20)
    path = tmp_path / "index.db"
    path.mkdir()
    (path / "collections").mkdir()
    with TraceIndex(path) as index:
        build(index, model, tokenizer)
        (keys,) = path.glob("*.keys")
        keys.unlink()
        keys.mkdir()
        with pytest.raises(ValueError, match=r"documents.keys' cannot be read .*: delete it"):
            build(index, model, tokenizer)
