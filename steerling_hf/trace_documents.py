"""Documents of a corpus, one after another, and the chunks that an index keeps of them: in constant memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import parquet_library, read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDINGS = (".jsonl", ".parquet", ".txt")
# Characters of a text file that make a document, and bounds of what a Milvus field holds, in bytes.
TEXT_BLOCK = 1 << 16
MAX_SOURCE = 4096
MAX_METADATA = 65_000
# A character has four bytes at most, and the field for text holds 65,535.
MAX_CHUNK = 16_000
# First guess of a chunk's length; if its tokens are longer, more is read.
CHARACTERS_PER_TOKEN = 8

SENTENCE_END = re.compile(r"[.!?\u2026]['\")\]\u2019\u201d]*\s+|[\u3002\uff01\uff1f]\s*|\n+")
WORD_END = re.compile(r"\s+")


@dataclass(frozen=True)
class TraceDocument:
    """
    A training document.

    Args:
        text: All of it.
        source: Where it comes from: hits are grouped by this.
        metadata: What else is known of it, as JSON can hold it; filters can ask for it.
    """

    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_documents(documents: Any, text: str = "text", source: str = "source") -> Iterator[TraceDocument]:
    """
    Read a corpus lazily; no more than one record (of a parquet file: one batch of records) is in memory at a time.

    Args:
        documents: A `datasets.Dataset` or `IterableDataset`; any iterable of records (mappings), texts, `TraceDocument`s or
            `Path`s; or the path, as `str` or `Path`, of a `.jsonl`, `.parquet` or `.txt` file, or of a folder of them. A
            text file is read in blocks of whole lines, so that its length does not matter.
        text, source: Names of these fields in records. All other fields are metadata. A record without a source gets the
            file's name (inside a folder its path there) or "document", and its number.

    Raises:
        FileNotFoundError: There is no such file, or no corpus file in a folder.
        ValueError: A file has another ending or cannot be read, or a record has no text; the message names the place.
    """
    if isinstance(documents, str | Path):
        files = _files(Path(documents))
        return (document for file in files for document in _read_file(file, _name(file, documents), text, source))
    if isinstance(documents, Mapping | bytes | bytearray) or not isinstance(documents, Iterable):
        raise ValueError(
            f"`documents` is a {type(documents).__name__}: give a dataset, a path, or an iterable of records or texts."
        )
    return _read_items(documents, text, source)


def chunks_of(text: str, tokenizer: PreTrainedTokenizerBase, chunk_tokens: int) -> Iterator[str]:
    """
    Cut a text. Control tokens that are written out end chunks, as `<|endofchunk|>` does in training text, and are left out
    together with the headers of turns. What is longer than `chunk_tokens` is cut behind the last sentence, or else word, that
    fits, so that nothing but white space between chunks is lost.

    Args:
        chunk_tokens: Most tokens of a chunk.
    """
    for piece in _control(tokenizer).split(text):
        start = 0
        while start < len(piece):
            stop = _chunk_end(piece, start, tokenizer, chunk_tokens)
            chunk = piece[start:stop].strip()
            if chunk:
                yield chunk
            start = stop


def _control(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    header = r"<\|start_header_id\|>[^<]{0,64}<\|end_header_id\|>"
    return re.compile("|".join([header, *map(re.escape, tokenizer.all_special_tokens)]))


def _chunk_end(text: str, start: int, tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
    size = min(MAX_CHUNK, limit * CHARACTERS_PER_TOKEN)
    while True:
        window = text[start : start + size]
        ids = tokenizer(window, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > limit:
            break
        if start + size >= len(text):
            return len(text)
        if size == MAX_CHUNK:
            return start + _last_break(window)
        size = min(MAX_CHUNK, 2 * size)
    # A token may end inside a character: then fewer tokens are whole characters.
    for count in range(limit, 0, -1):
        piece = str(tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if piece and window.startswith(piece):
            return start + _last_break(piece)
    return start + 1


def _last_break(piece: str) -> int:
    """Where to cut: behind the last sentence or word of the second half, or at the end."""
    for pattern in (SENTENCE_END, WORD_END):
        ends = [match.end() for match in pattern.finditer(piece, len(piece) // 2)]
        if ends:
            return ends[-1]
    return len(piece)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"`documents` is {str(path)!r}: there is no such file or folder.")
    if not path.is_dir():
        if path.suffix not in ENDINGS:
            raise ValueError(f"`documents` is {str(path)!r}: give a file that ends in {', '.join(ENDINGS)}.")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file())
    if not files:
        raise FileNotFoundError(f"`documents` is {str(path)!r}: no file in it ends in {', '.join(ENDINGS)}.")
    return files


def _read_items(items: Iterable[Any], text: str, source: str) -> Iterator[TraceDocument]:
    for number, item in enumerate(items):
        place = f"document {number}"
        if isinstance(item, Path):
            for file in _files(item):
                yield from _read_file(file, _name(file, item), text, source)
        elif isinstance(item, TraceDocument):
            yield _checked(item, place)
        elif isinstance(item, str):
            yield _checked(TraceDocument(item, place), place)
        else:
            yield _of_record(item, text, source, place, place)


def _name(file: Path, asked: str | Path) -> str:
    """What a file's documents name as their source: the path inside the folder that was asked for."""
    return file.name if file == Path(asked) else file.relative_to(asked).as_posix()


def _read_file(file: Path, name: str, text: str, source: str) -> Iterator[TraceDocument]:
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_text}[file.suffix]
    try:
        yield from reader(file, name, text, source)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 ({error}): convert it first.") from error


def _read_jsonl(file: Path, name: str, text: str, source: str) -> Iterator[TraceDocument]:
    for number, record in read_json_lines(file):
        yield _of_record(record, text, source, f"{file}, line {number}", f"{name}:{number}")


def _read_parquet(file: Path, name: str, text: str, source: str) -> Iterator[TraceDocument]:
    pyarrow = parquet_library("Reading parquet", "trace")
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{file} has no column {text!r}: name the one with the text in `text` ({columns}).")
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield _of_record(record, text, source, f"{file}, row {number}", f"{name}:{number}")
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}.") from error


def _read_text(file: Path, name: str, text: str, source: str) -> Iterator[TraceDocument]:
    with file.open(encoding="utf-8") as lines:
        block = ""
        while line := lines.readline(TEXT_BLOCK):
            block += line
            if len(block) >= TEXT_BLOCK:
                yield TraceDocument(block, name)
                block = ""
        if block:
            yield TraceDocument(block, name)


def _of_record(record: Any, text: str, source: str, place: str, default: str) -> TraceDocument:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} is a {type(record).__name__}: give a record with the field {text!r}, or a text.")
    written = record.get(text)
    if not isinstance(written, str):
        raise ValueError(
            f"{place} has {written!r:.80} as {text!r}: give a string, or name the text's field in `text`."
        )
    origin = record.get(source)
    metadata = {name: value for name, value in record.items() if name not in (text, source)}
    return _checked(TraceDocument(written, default if origin is None else str(origin), metadata), place)


def _checked(document: TraceDocument, place: str) -> TraceDocument:
    import orjson  # with which pymilvus packs metadata

    document = replace(document, text=as_unicode(document.text), source=as_unicode(document.source))
    size = len(document.source.encode())
    if size > MAX_SOURCE:
        raise ValueError(f"{place} has a source of {size} bytes: an index keeps {MAX_SOURCE}, so shorten it.")
    try:
        size = len(orjson.dumps(document.metadata))
    except TypeError as error:
        raise ValueError(f"{place} has metadata that is not JSON ({error}): convert or drop it.") from error
    if size > MAX_METADATA:
        raise ValueError(f"{place} has metadata of {size} bytes: an index keeps {MAX_METADATA}, so drop some fields.")
    return document


def as_unicode(text: str) -> str:
    """Lone surrogates, which JSON can hold and UTF-8 cannot, as replacement characters; so does the tokenizer read them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


__all__ = ["TraceDocument", "chunks_of", "read_documents"]
