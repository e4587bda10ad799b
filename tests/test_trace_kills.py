"""Builds of an index that are killed at random times: nothing is lost, nothing is there twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

from steerling_hf import trace_index, trace_store
from steerling_hf.trace_index import TraceIndex

pytest.importorskip("milvus_lite")

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "tracing.py"


def test_builds_that_are_killed_at_random_times_are_complete_in_the_end():
    arguments = ["kills", "--kills", "3", "--killed-documents", "300", "--json"]
    done = subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["kills"]
    assert found["indexes"] >= 1
    assert len(found.pop("chunks_at_kills")) == 3
    assert found | {"indexes": 1} == {
        "documents": 300,
        "kills": 3,
        "indexes": 1,
        "missing": 0,
        "doubled": 0,
        "changed": 0,
    }


@pytest.mark.parametrize("remains", [(), ("schema.json.tmp",)])
@pytest.mark.parametrize("part", ["steerling_documents", "steerling_documents_part_2"])
def test_what_a_kill_left_of_a_collection_is_cleared_away(part, remains, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(trace_store, "CHUNKS_OF_A_PART", 4)
    monkeypatch.setattr(trace_index, "WRITTEN_AT_ONCE", 4)
    folder = tmp_path / "index.db" / "collections" / part
    folder.mkdir(parents=True)
    for name in remains:
        (folder / name).write_text("{")
    with TraceIndex(tmp_path / "index.db") as index:
        assert (
            index.build(make_model(), tokenizer, [f"The rain of day {i}." for i in range(6)], progress=False).added
            == 6
        )
        assert sum(len(page) for page in index.rows()) == 6


@pytest.mark.parametrize("kind", ["FLAT", "HNSW"])
def test_half_a_file_of_an_index_is_made_anew(kind, tmp_path, tokenizer):
    model, texts = make_model(), [f"The rain of day {i}." for i in range(50)]
    with TraceIndex(tmp_path / "index.db") as index:
        index.build(model, tokenizer, texts, index=kind, progress=False)
    (file,) = (tmp_path / "index.db").rglob(f"*.dense.{kind.lower()}.idx")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with TraceIndex(tmp_path / "index.db") as index:
        assert [trace.hits[0].text for trace in index.trace(model, tokenizer, texts, k=1)] == texts
        assert index.build(model, tokenizer, texts, index=kind, progress=False).added == 0
