"""Reading a corpus and cutting it into chunks."""

import json
import re
import tracemalloc

import pytest

from steerling_hf.trace_documents import TEXT_BLOCK, TraceDocument, chunks_of, read_documents

RECORDS = [
    {"text": "The rose was red.", "source": "garden.txt", "topic": "gardening", "year": 2020},
    {"text": "The bank closed.", "source": "city.txt", "topic": "law", "year": 2021},
]
EXPECTED = [
    TraceDocument("The rose was red.", "garden.txt", {"topic": "gardening", "year": 2020}),
    TraceDocument("The bank closed.", "city.txt", {"topic": "law", "year": 2021}),
]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_same_documents_from_every_kind_of_corpus(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = write_jsonl(tmp_path / "rows.jsonl", RECORDS)
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), table)
    for corpus in (RECORDS, EXPECTED, iter(RECORDS), rows, str(rows), table, [rows]):
        assert list(read_documents(corpus)) == EXPECTED
    assert list(read_documents(tmp_path)) == 2 * EXPECTED


def test_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    assert list(read_documents(dataset)) == EXPECTED
    assert list(read_documents(dataset.to_iterable_dataset())) == EXPECTED


def test_other_names_of_fields_and_records_without_a_source(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"body": "Rain.", "from": 7}, {"body": "Snow."}])
    found = list(read_documents(file, text="body", source="from"))
    assert found == [TraceDocument("Rain.", "7"), TraceDocument("Snow.", "a.jsonl:2")]
    assert [document.source for document in read_documents(["Rain.", {"text": "Snow."}])] == [
        "document 0",
        "document 1",
    ]


def test_a_text_file_is_one_source_and_is_read_in_blocks(tmp_path):
    file = tmp_path / "long.txt"
    lines = "".join(f"Line {i} of a long file.\n" for i in range(20_000))
    file.write_text(lines)
    found = list(read_documents(file))
    assert {document.source for document in found} == {"long.txt"}
    assert "".join(document.text for document in found) == lines
    assert all(document.text.endswith("\n") and len(document.text) < 2 * TEXT_BLOCK for document in found)


@pytest.mark.parametrize("ending", ["jsonl", "txt", "parquet"])
def test_memory_does_not_grow_with_the_file(ending, tmp_path):
    def peak(rows):
        file = tmp_path / f"{rows}.{ending}"
        records = ({"text": f"Text {i} " + "of a document. " * 20} for i in range(rows))
        if ending == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(list(records)), file, row_group_size=500)
        else:
            write_jsonl(file, records)
        tracemalloc.start()
        assert sum(1 for _ in read_documents(file)) > 1
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(1000)
    assert peak(20_000) < peak(2_000) * 1.2 + 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text"\n', "bad.jsonl, line 2 is not JSON .*correct it or leave it out"),
        ('{"body": "a"}\n', "bad.jsonl, line 1 has None as 'text'.*name the text's field"),
        ("[1]\n", "bad.jsonl, line 1 is a list: give a record with the field 'text'"),
        (b"\xff\xfe", "bad.jsonl is not in UTF-8"),
    ],
)
def test_damaged_records(content, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(read_documents(file))


def test_lone_surrogates_become_replacement_characters(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "a \\ud83d", "source": "\\ude00", "n": 1}\n', encoding="utf-8")
    [document] = read_documents(file)
    assert (document.text, document.source, document.metadata) == ("a \ufffd", "\ufffd", {"n": 1})
    [document] = read_documents(["\ud83d\ude00 \ud83d"])
    assert document.text == "\U0001f600 \ufffd"
    file.write_text('{"text": "a", "n": "\\ud83d"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has metadata that is not JSON .*surrogates"):
        list(read_documents(file))


def test_damaged_corpora(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    for path, error, message in [
        ("nothing.jsonl", FileNotFoundError, "there is no such file"),
        ("folder", FileNotFoundError, "no file in it ends in .jsonl, .parquet, .txt"),
        ("notes.doc", ValueError, "give a file that ends in .jsonl, .parquet, .txt"),
    ]:
        with pytest.raises(error, match=message):
            read_documents(tmp_path / path)  # before anything is read
    with pytest.raises(ValueError, match="bad.parquet cannot be read as parquet"):
        list(read_documents(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="`documents` is a dict"):
        read_documents({"text": "a"})
    with pytest.raises(ValueError, match="document 1 has 5 as 'text'"):
        list(read_documents([{"text": "a"}, {"text": 5}]))
    with pytest.raises(ValueError, match="document 0 has metadata that is not JSON"):
        list(read_documents([{"text": "a", "tensor": object()}]))
    with pytest.raises(ValueError, match="document 0 has a source of 5000 bytes"):
        list(read_documents([{"text": "a", "source": "s" * 5000}]))
    with pytest.raises(ValueError, match="document 0 has metadata of .* bytes"):
        list(read_documents([{"text": "a", "more": "s" * 70_000}]))


LONG = " ".join(f"Sentence number {i} is about gardens, banks and the sea." for i in range(60))


@pytest.mark.parametrize("limit", [8, 20, 64, 256])
def test_chunks_are_short_enough_and_lose_nothing(limit, tokenizer):
    odd = (
        "No end marks " * 40
        + "\u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f680 \u6f22\u5b57 " * 30
        + "x" * 300
    )
    for text in (LONG, odd, "  Rain.  "):
        chunks = list(chunks_of(text, tokenizer, limit))
        # A chunk that is read alone may have a token more than inside its text.
        assert max(len(tokenizer(chunk)["input_ids"]) for chunk in chunks) <= limit + 1
        assert re.sub(r"\s", "", "".join(chunks)) == re.sub(r"\s", "", text)
    whole = list(chunks_of(LONG, tokenizer, 64))
    assert all(chunk.endswith(".") for chunk in whole)
    assert len(whole) < 30


def test_control_tokens_end_chunks_and_are_left_out(tokenizer):
    chat = (
        "<|start_header_id|>user<|end_header_id|>\n\nWhere is the sea?<|endofchunk|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBehind the dunes.<|endofchunk|> A mile off.<|endofchunk|>"
    )
    assert list(chunks_of(chat, tokenizer, 64)) == ["Where is the sea?", "Behind the dunes.", "A mile off."]
    assert list(chunks_of("", tokenizer, 64)) == []
    assert list(chunks_of(" \n<|endofchunk|> ", tokenizer, 64)) == []


def test_files_in_a_folder_are_named_by_their_paths_in_it(tmp_path):
    for folder in ("books", "wiki"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.txt").write_text("The rose was red.")
        write_jsonl(tmp_path / folder / "part.jsonl", [{"text": "The bank closed."}])
    expected = ["books/part.jsonl:1", "books/part.txt", "wiki/part.jsonl:1", "wiki/part.txt"]
    assert [document.source for document in read_documents(tmp_path)] == expected
    assert [document.source for document in read_documents([tmp_path])] == expected
    assert [document.source for document in read_documents(tmp_path / "wiki")] == ["part.jsonl:1", "part.txt"]
    assert [document.source for document in read_documents(tmp_path / "wiki" / "part.txt")] == ["part.txt"]


@pytest.mark.parametrize("metadata", [{"hash": 2**64}, {"deep": [{"hash": -(2**63) - 1}]}, {"tags": {1: "a"}}])
def test_metadata_that_an_index_cannot_pack(metadata):
    with pytest.raises(ValueError, match="document 0 has metadata that is not JSON.*convert or drop it"):
        list(read_documents([{"text": "Rain.", **metadata}]))


def test_metadata_at_the_limits():
    metadata = {"high": 2**64 - 1, "low": -(2**63), "yes": True, "deep": [{"a": [1.5, None]}]}
    assert [document.metadata for document in read_documents([{"text": "Rain.", **metadata}])] == [metadata]
