"""One index, several users: objects on one file, threads, and the loggers of the engine."""

import gc
import logging
import threading
import time

import pytest
from conftest import make_model
from test_trace_parts import DOCUMENTS, TEXTS, in_parts  # noqa: F401

from steerling_hf.trace_engine import _OPEN, _quiet
from steerling_hf.trace_index import TraceIndex
from steerling_hf.trace_store import TraceStore

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

LOGGERS = [logging.getLogger(name) for name in ("pymilvus", "milvus_lite", "grpc")]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "index.db"
    gc.collect()
    assert not _OPEN, "an engine is still open"


def build(index, model, tokenizer, documents=DOCUMENTS):
    return index.build(model, tokenizer, documents, progress=False).added


def may_be_opened_elsewhere(path) -> bool:
    """Whether no engine has the lock of the folder, which is what another process would ask."""
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError

    try:
        MilvusLite(str(path)).close()
    except DataDirLockedError:
        return False
    return True


# Several objects


def test_closing_one_leaves_the_others(path, model, tokenizer):
    first = TraceIndex(path)
    build(first, model, tokenizer, TEXTS[:3])
    with TraceIndex(path) as second, TraceIndex(path) as third:
        assert len(second) == 3
        third.close()
        third.close()
        assert first.trace(model, tokenizer, TEXTS[0]).hits[0].text == TEXTS[0]
    assert len(first) == 3
    assert not may_be_opened_elsewhere(path)
    first.close()
    assert may_be_opened_elsewhere(path)


def test_an_index_that_is_closed_opens_again(path, model, tokenizer):
    with TraceIndex(path) as index:
        build(index, model, tokenizer, TEXTS[:3])
        index.close()
        assert len(index) == 3


def test_an_index_that_is_forgotten_is_closed(path, model, tokenizer):
    build(TraceIndex(path), model, tokenizer, TEXTS[:3])
    gc.collect()
    assert may_be_opened_elsewhere(path)


def test_one_sees_what_another_builds(path, model, tokenizer, in_parts):  # noqa: F811
    with TraceIndex(path) as first, TraceIndex(path) as second, TraceIndex(path, collection="other") as other:
        assert first.info is second.info is None
        build(other, model, tokenizer, TEXTS[:2])
        build(first, model, tokenizer, DOCUMENTS[:30])
        assert len(second) == 30
        # More parts than before, for which the engine was closed and opened.
        assert build(second, model, tokenizer) == 60
        assert len(first) == 90
        assert first.trace(model, tokenizer, TEXTS[80], k=1).hits[0].text == TEXTS[80]
        assert len(other) == 2
        assert build(first, model, tokenizer) == 0


def test_two_names_of_one_folder(tmp_path, path, model, tokenizer, monkeypatch):
    (tmp_path / "link.db").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    with TraceIndex(path) as first:
        build(first, model, tokenizer, TEXTS[:3])
        with TraceIndex(tmp_path / "link.db") as linked, TraceIndex("index.db") as relative:
            monkeypatch.chdir("/")
            assert len(linked) == len(relative) == 3
            assert build(relative, model, tokenizer, TEXTS[:5]) == 2
        assert len(first) == 5


def test_a_relative_path_stays_where_it_was(tmp_path, path, model, tokenizer, in_parts, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with TraceIndex("index.db") as index:
        monkeypatch.chdir("/")
        assert build(index, model, tokenizer) == len(TEXTS)
    assert (path / "collections").is_dir()


def test_an_engine_that_was_stopped_from_outside_is_no_server(path, model, tokenizer):
    from milvus_lite.server_manager import server_manager_instance

    with TraceIndex(path, timeout=1) as index:
        build(index, model, tokenizer, TEXTS[:3])
        server_manager_instance.release_server(str(path))
        with pytest.raises(ConnectionError, match=r"embedded engine has stopped in this process: close\(\) the index"):
            len(index)
        index.close()
        assert len(index) == 3


# Threads


def run_beside(work, *others):
    """Run `others` again and again in threads of their own while `work` runs; what they raised."""
    stop, raised = threading.Event(), []

    def again(other):
        while not stop.is_set():
            try:
                other()
            except BaseException as error:
                raised.append(error)

    threads = [threading.Thread(target=again, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return raised


def test_an_index_answers_while_it_is_built(path, model, tokenizer, in_parts):  # noqa: F811
    with TraceIndex(path) as index:
        build(index, model, tokenizer, DOCUMENTS[:10])
        answers, sizes = [], []
        raised = run_beside(
            lambda: build(index, model, tokenizer),
            lambda: answers.append(index.trace(model, tokenizer, TEXTS[0], k=1).hits[0].text),
            lambda: sizes.append(len(index)),
        )
        assert raised == []
        assert set(answers) == {TEXTS[0]}
        assert sizes == sorted(sizes)
        assert 10 <= sizes[0] <= sizes[-1] <= len(index) == 90
        assert sorted(row["text"] for page in index.rows(8) for row in page) == sorted(TEXTS)


def test_two_threads_build_what_one_would(path, model, tokenizer, in_parts):  # noqa: F811
    with TraceIndex(path) as index:
        threads = [
            threading.Thread(
                target=index.build,
                args=(model, tokenizer, DOCUMENTS),
                kwargs={"shard": (i, 2), "progress": False},
            )
            for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(row["text"] for page in index.rows() for row in page) == sorted(TEXTS)


def test_two_threads_make_one_index(path, model, tokenizer, monkeypatch):
    create, waits = TraceStore.create, iter((0.2, 0.6))

    def slowly(store, info):
        # The second one comes when the first one has made it.
        time.sleep(next(waits))
        create(store, info)

    monkeypatch.setattr(TraceStore, "create", slowly)
    with TraceIndex(path) as index:
        run_beside(
            lambda: build(index, model, tokenizer, TEXTS[:5]), lambda: build(index, model, tokenizer, TEXTS[5:9])
        )
        assert len(index) == 9
    assert len(list((path / "collections").iterdir())) == 1


def test_closing_while_another_asks(path, model, tokenizer):
    with TraceIndex(path) as index:
        build(index, model, tokenizer, TEXTS[:10])

        def close() -> None:
            for _ in range(5):
                time.sleep(0.05)
                index.close()

        raised = run_beside(close, lambda: index.trace(model, tokenizer, TEXTS[0]), lambda: len(index))
        assert raised == []
        assert len(index) == 10


def test_closing_in_the_midst_of_a_build_lets_it_end(path, model, tokenizer, monkeypatch):
    write = TraceStore.write
    index = TraceIndex(path)

    def close_and_write(store, rows):
        index.close()
        write(store, rows)

    monkeypatch.setattr(TraceStore, "write", close_and_write)
    assert build(index, model, tokenizer) == 90
    assert not _OPEN
    monkeypatch.undo()
    with index:
        assert len(index) == 90


def test_rows_of_an_index_that_is_closed_meanwhile(path, model, tokenizer):
    with TraceIndex(path) as index:
        build(index, model, tokenizer, TEXTS[:10])
        rows = index.rows(batch_size=4)
        assert len(next(rows)) == 4
        index.close()
        with pytest.raises(
            RuntimeError, match="was closed, or begun anew by a build, while its rows were read: read them"
        ):
            next(rows)
        assert sum(map(len, index.rows(batch_size=4))) == 10


# Loggers


@pytest.fixture
def levels():
    before = [logger.level for logger in LOGGERS]
    LOGGERS[0].setLevel(logging.INFO)
    yield lambda: [logger.level for logger in LOGGERS]
    for logger, level in zip(LOGGERS, before):
        logger.setLevel(level)


def test_loggers_keep_their_levels_where_threads_overlap(levels):
    before, held = levels(), []
    first, second = _quiet(), _quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    held.append(levels())
    second.__exit__(None, None, None)
    assert held == [[logging.CRITICAL + 1] * 3]
    assert levels() == before


def test_a_level_that_is_set_meanwhile_stays(levels):
    with _quiet():
        LOGGERS[0].setLevel(logging.DEBUG)
    assert levels()[0] == logging.DEBUG


def test_loggers_keep_their_levels_in_threads(levels, path, model, tokenizer):
    before = levels()
    with TraceIndex(path) as index:
        build(index, model, tokenizer, TEXTS[:5])
        run_beside(lambda: [len(index) for _ in range(20)], lambda: len(index), lambda: len(index))
    assert levels() == before
