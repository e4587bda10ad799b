"""The commands `steerling-hf trace build|query`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from . import loading
from .catalog import ConceptCatalog
from .command_options import add_model
from .concept_labels import RELEASED_LABELS
from .embeddings import KINDS as EMBEDDINGS
from .outlines import printable
from .trace_documents import ENDINGS, read_documents
from .trace_engine import EMBEDDED_KINDS
from .trace_filter import expression
from .trace_index import SEARCHES, TraceIndex
from .trace_results import Trace

TOKEN = "MILVUS_TOKEN"
CONDITION = re.compile(r"([\w.-]+)=([^=].*)", re.DOTALL)
SHOWN_CONCEPTS = 4
SHOWN_SOURCES = 10


def add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `trace` and those below it."""
    trace = commands.add_parser("trace", help="index training documents, and find those that a text is like")
    below = trace.add_subparsers(required=True, metavar="COMMAND")

    building = below.add_parser(
        "build", help="index documents; what was killed goes on where it stopped when it is started again"
    )
    building.add_argument(
        "documents", nargs="+", metavar="PATH", help=f"a file that ends in {', '.join(ENDINGS)}, or a folder of them"
    )
    _add_place(building)
    building.add_argument(
        "--text", default="text", metavar="FIELD", help="the records' field with the text (default: %(default)s)"
    )
    building.add_argument(
        "--source", default="source", metavar="FIELD", help="the field with the source (default: %(default)s)"
    )
    building.add_argument(
        "--chunk-tokens", type=int, default=128, metavar="N", help="most tokens of a chunk (default: %(default)s)"
    )
    building.add_argument(
        "--embedding",
        choices=EMBEDDINGS,
        default="composed",
        help="states of the dense vectors (default: %(default)s)",
    )
    building.add_argument(
        "--index-kind",
        default="FLAT",
        metavar="KIND",
        help=f"{', '.join(EMBEDDED_KINDS)}; on a cluster any that it has (default: %(default)s, which is exact)",
    )
    building.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="texts in the model at once (default: %(default)s)"
    )
    building.add_argument("--json", action="store_true", help="print one JSON object")
    building.set_defaults(run=_build)

    querying = below.add_parser("query", help="the documents that a text is like: similarity, not causal influence")
    asked = querying.add_mutually_exclusive_group(required=True)
    asked.add_argument("query", nargs="?", metavar="TEXT")
    asked.add_argument("--file", metavar="FILE", help="a file with the text")
    _add_place(querying)
    querying.add_argument("-k", type=int, default=10, metavar="N", help="at most so many hits (default: %(default)s)")
    querying.add_argument(
        "--kind",
        choices=SEARCHES,
        default="dense",
        help="compare embeddings, concepts, or the mean of both (default: %(default)s)",
    )
    querying.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="FIELD=VALUE, twice for either of two values, or an expression of Milvus such as 'metadata[\"year\"] > 2020'",
    )
    querying.add_argument(
        "--by", default="source", metavar="FIELD", help="group the hits by this field (default: %(default)s)"
    )
    querying.add_argument(
        "--labels",
        metavar="SOURCE",
        help=f"where names of concepts come from: see `concepts`, such as {RELEASED_LABELS} (default: the model's)",
    )
    querying.add_argument("--json", action="store_true", help="print one JSON object")
    querying.set_defaults(run=_query)


def _add_place(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--index", required=True, metavar="URI", help="a path ending in .db, or http://host:19530, a Milvus server"
    )
    parser.add_argument(
        "--token",
        help=f"the server's token, or user:password (default: {TOKEN} of the environment, where `ps` does not show it)",
    )
    parser.add_argument("--collection", default="steerling_documents", metavar="NAME", help="(default: %(default)s)")


def _build(options: argparse.Namespace) -> None:
    # A list, so that a path that is wrong is an error before anything is read.
    documents = [read_documents(path, options.text, options.source) for path in options.documents]
    with open_index(options) as index:
        model, tokenizer = loading.load(options.model)
        report = index.build(
            model,
            tokenizer,
            chain.from_iterable(documents),
            chunk_tokens=options.chunk_tokens,
            embedding=options.embedding,
            index=options.index_kind,
            batch_size=options.batch_size,
            progress=sys.stderr.isatty(),
        )
        total = len(index)
    if options.json:
        print(json.dumps({**asdict(report), "total": total, "index": index.uri}))
    else:
        print(
            f"{report.documents} documents, {report.chunks} chunks, {report.added} of them new: "
            f"{total} chunks in {index.uri}"
        )


def _query(options: argparse.Namespace) -> None:
    text = _text_of(options.file) if options.file else options.query
    where = _where(options.where)
    with open_index(options) as index:
        if index.info is None:
            raise FileNotFoundError(f"There is no index at {index.uri!r}: build one with `steerling-hf trace build`.")
        model, tokenizer = loading.load(options.model)
        catalog = (
            ConceptCatalog.from_pretrained(options.labels).fit(model.config)
            if options.labels
            else loading.catalog_of(model)
        )
        trace = index.trace(
            model, tokenizer, text, options.k, options.kind, where=where, by=options.by, catalog=catalog
        )
    print(json.dumps(trace.to_dict()) if options.json else "\n".join(_lines(trace, options.by)))


def open_index(options: argparse.Namespace) -> TraceIndex:
    """The index that the options of a command name."""
    return TraceIndex(options.index, token=options.token or os.environ.get(TOKEN), collection=options.collection)


def _text_of(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`--file` is {path!r}, which is no file: give one with the text.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--file` is {path!r}, which is not in UTF-8 ({error}): convert it first.") from error


def _where(conditions: list[str]) -> str:
    """All conditions as one expression; values of the same field are alternatives."""
    values: dict[str, list[Any]] = {}
    expressions = []
    for condition in conditions:
        if match := CONDITION.fullmatch(condition):
            name, value = match.groups()
            texts = name in ("source", "text") and not value.startswith('"')
            values.setdefault(name, []).append(value if texts else _value(value))
        else:
            expressions.append(f"({condition})")
    return " and ".join(filter(None, [expression(values), *expressions]))


def _value(text: str) -> str | int | float | bool:
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def _lines(trace: Trace, by: str) -> list[str]:
    lines = []
    for number, hit in enumerate(trace.hits, start=1):
        shared = [
            f"{printable(one.name or f'concept {one.id}')} {one.part:.3f}" for one in hit.concepts[:SHOWN_CONCEPTS]
        ]
        lines += [
            f"{number:4}  {hit.score:.3f}  {printable(hit.source)}",
            f"      {printable(hit.text)}",
            f"      shared concepts: {', '.join(shared) or 'none'}",
        ]
    if not trace.hits:
        lines.append("No document fits the conditions.")
    for share in trace.sources[:SHOWN_SOURCES]:
        lines.append(
            f"{share.share:5.0%}  {by} {printable(str(share.source))}: {share.hits} hit{'s' * (share.hits > 1)}, best {share.score:.3f}"
        )
    if len(trace.sources) > SHOWN_SOURCES:
        lines.append(f"       and {len(trace.sources) - SHOWN_SOURCES} more")
    return [*lines, trace.meaning]
