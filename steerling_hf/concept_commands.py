"""The commands `steerling-hf concepts search|show|contrast`."""

import argparse
from pathlib import Path

from . import loading
from .catalog import ConceptCatalog
from .command_options import add_model
from .concept_labels import FLAGS, HEADS, RELEASED_LABELS, Concept

MEMBERS_SHOWN = 10


def add_concepts(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `concepts` and those below it."""
    concepts = commands.add_parser("concepts", help="find concepts, look at one, or ask which tell texts apart")
    below = concepts.add_subparsers(required=True, metavar="COMMAND")

    searching = below.add_parser("search", help="find concepts by words of their names and descriptions")
    searching.add_argument("query", metavar="QUERY")
    _add_source(searching)
    _add_limit(searching)
    _add_head(searching)
    searching.add_argument("--group", metavar="GROUP", help="only concepts of the group of this name or id")
    searching.add_argument("--flag", action="append", default=[], choices=FLAGS, help="only concepts marked so")
    searching.set_defaults(run=_search)

    showing = below.add_parser("show", help="what is known of a concept, and the tokens that it promotes")
    showing.add_argument("concept", metavar="CONCEPT", help="a name or an id")
    _add_source(showing)
    showing.add_argument(
        "--tokens",
        type=int,
        default=10,
        metavar="N",
        help="at most so many tokens; 0 loads no model (default: %(default)s)",
    )
    showing.set_defaults(run=_show)

    contrasting = below.add_parser("contrast", help="rank the concepts that tell two sets of texts apart")
    contrasting.add_argument("positive", metavar="POSITIVE", help="a file with one text a line")
    contrasting.add_argument("negative", metavar="NEGATIVE", help="a file with one text a line")
    _add_source(contrasting)
    _add_limit(contrasting)
    _add_head(contrasting)
    contrasting.set_defaults(run=_contrast)


def _add_source(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--labels",
        metavar="SOURCE",
        help=f"a label file, or a folder or Hub repository that has one, such as {RELEASED_LABELS} (default: the model's)",
    )


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=int, default=10, metavar="N", help="at most so many concepts (default: %(default)s)"
    )


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", choices=HEADS, help="only known, or only discovered (unknown) concepts")


def _search(options: argparse.Namespace) -> None:
    catalog = _labels(options)
    group = _name_or_id(options.group) if options.group else None
    matches = catalog.search(options.query, options.limit, options.head, group, options.flag)
    if not matches:
        near = ", ".join(repr(str(concept)) for concept in catalog.near(options.query))
        raise ValueError(
            f"no concept that you ask for has a word of {options.query!r} in its name or description"
            + (f"; near: {near}." if near else ".")
        )
    for match in matches:
        print(f"{match.score:7.2f}  {_title(match.concept)}  {match.concept.description}".rstrip())


def _show(options: argparse.Namespace) -> None:
    if options.tokens < 0:
        raise ValueError(f"`--tokens` is {options.tokens}: choose 0 or more.")
    catalog, asked = _labels(options), _name_or_id(options.concept)
    # A name or id that labels do not have is an error before weights are loaded, unless a discovered concept has this id.
    concept = catalog[asked] if isinstance(asked, str) or asked in catalog or not options.tokens else None
    tokens = []
    if options.tokens:
        model, tokenizer = loading.load(options.model)
        catalog = catalog.fit(model.config)
        concept = catalog[asked]
        tokens = catalog.top_tokens(model, tokenizer, concept, options.tokens)
    assert concept is not None
    members = [str(catalog[i]) for i in catalog.group(concept)[1:]]
    more = f" and {len(members) - MEMBERS_SHOWN} more" if len(members) > MEMBERS_SHOWN else ""
    lines = {
        "head": concept.head,
        "description": concept.description,
        "flags": ", ".join(concept.flags),
        "group": concept.group_name,
        "with": ", ".join(members[:MEMBERS_SHOWN]) + more,
        "promotes": "  ".join(f"{token.token!r} {token.score:+.2f}" for token in tokens),
    }
    print(_title(concept))
    for name, value in lines.items():
        if value:
            print(f"  {name + ':':12} {value}")


def _contrast(options: argparse.Namespace) -> None:
    positive, negative = _lines(options.positive), _lines(options.negative)
    catalog = _labels(options)
    model, tokenizer = loading.load(options.model)
    found = catalog.contrast(model, tokenizer, positive, negative, options.limit, options.head)
    print(" effect  superiority  positive  negative  concept")
    for row in found:
        print(
            f"{row.effect_size:+7.2f}  {row.superiority:11.2f}  {row.positive:8.2f}  {row.negative:8.2f}  "
            f"{_title(row.concept)}"
        )


def _labels(options: argparse.Namespace) -> ConceptCatalog:
    return ConceptCatalog.from_pretrained(options.labels or options.model)


def _name_or_id(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text


def _title(concept: Concept) -> str:
    return f"{concept.id} {concept}" if concept.name else str(concept)


def _lines(path: str) -> list[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path!r} is no file: give one with a text on each line.")
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is not in UTF-8 ({error}): convert it first.") from error
