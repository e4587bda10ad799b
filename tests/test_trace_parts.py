"""An index on a file is made of parts, so that a build has a bounded number of chunks in memory."""

import random
import shutil

import pytest
from conftest import make_model

from steerling_hf.trace_index import TraceIndex
from steerling_hf.trace_store import TraceStore

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

PART = 20
WORDS = ["gardener", "rose", "bank", "lawyer", "pilot", "sailor", "joy", "rain", "sea", "winter", "blue", "stone"]


def make_documents(count):
    rng = random.Random(0)
    return [
        {"text": f"Number {i}: the " + " ".join(rng.choices(WORDS, k=8)) + ".", "source": f"file {i % 3}"}
        for i in range(count)
    ]


DOCUMENTS = make_documents(90)
TEXTS = [document["text"] for document in DOCUMENTS]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index.db"


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr("steerling_hf.trace_index.WRITTEN_AT_ONCE", 7)
    monkeypatch.setattr("steerling_hf.trace_store.CHUNKS_OF_A_PART", PART)


def build(path, model, tokenizer, documents=DOCUMENTS, index="FLAT"):
    with TraceIndex(path) as trace_index:
        return trace_index.build(model, tokenizer, documents, index=index, progress=False).added


def parts(path):
    return sorted(folder.name for folder in (path / "collections").iterdir())


def chunks_in_memory(path):
    """Of all collections that the engine has open, which is all that it keeps in memory."""
    from milvus_lite.server_manager import server_manager_instance

    _, database, _ = server_manager_instance._servers[str(path)]
    return sum(collection.num_entities for collection in database._collections.values())


@pytest.mark.parametrize("index", ["FLAT", "HNSW"])
def test_a_build_has_one_part_in_memory(index, path, model, tokenizer, in_parts, monkeypatch):
    write, most = TraceStore.write, []

    def write_and_count(store, rows):
        write(store, rows)
        most.append(chunks_in_memory(path))

    monkeypatch.setattr(TraceStore, "write", write_and_count)
    assert build(path, model, tokenizer, DOCUMENTS[:70], index) == 70
    assert build(path, model, tokenizer, DOCUMENTS, index) == 20
    assert PART - 7 < max(most) <= PART
    assert len(list(path.rglob(f"*.dense.{index.lower()}.idx"))) >= len(parts(path)) >= 5


def test_parts_are_searched_as_one(path, tmp_path, model, tokenizer, in_parts, monkeypatch):
    assert build(path, model, tokenizer) == 90
    monkeypatch.undo()
    assert build(tmp_path / "whole.db", model, tokenizer) == 90
    assert len(parts(path)) > 1 == len(parts(tmp_path / "whole.db"))
    with TraceIndex(path) as index, TraceIndex(tmp_path / "whole.db") as whole:
        assert len(index) == len(whole) == 90
        assert index.info == whole.info
        for options in (
            {"kind": "dense"},
            {"kind": "sparse"},
            {"kind": "hybrid"},
            {"where": {"source": "file 1"}},
            {"k": 90},
        ):
            for found, expected in zip(
                index.trace(model, tokenizer, TEXTS[::30], **options),
                whole.trace(model, tokenizer, TEXTS[::30], **options),
            ):
                assert [hit.text for hit in found.hits] == [hit.text for hit in expected.hits]
        assert sorted(row["text"] for page in index.rows(batch_size=8) for row in page) == sorted(TEXTS)
        # What a search has read into memory does not keep a build from going on.
        assert index.build(model, tokenizer, [*DOCUMENTS, "One more."], progress=False).added == 1
        assert len(index) == 91


def test_what_is_in_a_full_part_is_not_embedded_again(path, model, tokenizer, in_parts, monkeypatch):
    assert build(path, model, tokenizer) == 90
    monkeypatch.setattr(model.transformer, "forward", None)
    assert build(path, model, tokenizer) == 0
    (keys,) = path.glob("*.keys")
    keys.unlink()
    assert build(path, model, tokenizer) == 0
    keys.write_bytes(b"junk" * 1000)
    with pytest.raises(ValueError, match=r"documents.keys' cannot be read .*: delete it, a build makes it anew"):
        build(path, model, tokenizer)


def test_an_index_that_was_made_as_one_collection_goes_on_in_parts(path, model, tokenizer, request):
    assert build(path, model, tokenizer, DOCUMENTS[:50]) == 50
    request.getfixturevalue("in_parts")
    assert build(path, model, tokenizer) == 40
    assert len(parts(path)) == 3
    assert build(path, model, tokenizer) == 0


@pytest.mark.parametrize("step", ["finish", "_note_keys", "_forget", "create", "_make_ready"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_parts_and_resumed(step, when, path, model, tokenizer, in_parts, monkeypatch):
    begin, real = TraceStore._begin_part, getattr(TraceStore, step)

    class KilledError(Exception):
        pass

    def killed(store, *arguments):
        if when == "after":
            real(store, *arguments)
        raise KilledError

    def begin_and_be_killed(store):
        with monkeypatch.context() as patch:
            patch.setattr(TraceStore, step, killed)
            begin(store)

    with monkeypatch.context() as patch:
        patch.setattr(TraceStore, "_begin_part", begin_and_be_killed)
        with pytest.raises(KilledError):
            build(path, model, tokenizer)
    assert 0 < build(path, model, tokenizer) < 90
    with TraceIndex(path) as index:
        assert sorted(row["text"] for page in index.rows() for row in page) == sorted(TEXTS)


def test_the_engines_server_on_the_same_folder(path, model, tokenizer, in_parts):
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    assert build(path, model, tokenizer, DOCUMENTS[:70]) == 70
    running, database, port = start_server_in_thread(str(path))
    try:
        with TraceIndex(f"http://127.0.0.1:{port}") as index:
            assert len(index) == 70
            assert index.build(model, tokenizer, DOCUMENTS, progress=False).added == 20
            found = index.trace(model, tokenizer, TEXTS, k=1)
            assert [trace.hits[0].text for trace in found] == TEXTS
    finally:
        running.stop(grace=0)
        database.close()
    assert build(path, model, tokenizer) == 0


def test_keys_of_an_index_that_was_deleted_are_forgotten(path, model, tokenizer, in_parts):
    assert build(path, model, tokenizer) == len(TEXTS)
    shutil.rmtree(path / "collections")
    (path / "collections").mkdir()
    assert build(path, model, tokenizer) == len(TEXTS)
    with TraceIndex(path) as index:
        assert len(index) == len(TEXTS)
