"""Renders a checkpoint's model card from the template and the snippets in hub_card/."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import jinja2

from . import hub_card
from .checkpoints import checkpoint, checkpoint_names
from .checks import short
from .files import read_artefact, write_whole

_HUB_CARD = Path(hub_card.__file__).parent
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")  # of an owner or a repository of the Hub
LONGEST = 96  # characters of both together, which is the Hub's own bound
REPO_ID = "REPO_ID"  # what the snippets load; the card names the repository here, the tests a folder
EVALUATION_FILE = "evaluation.json"


def check_repo_id(repo_id: Any) -> None:
    """
    Check that a text can name a repository of the Hub. Cards write it into programs.

    Raises:
        ValueError: It is neither "owner/name" nor "name".
    """
    parts = repo_id.split("/") if isinstance(repo_id, str) else []
    good = 1 <= len(parts) <= 2 and all(
        NAME.fullmatch(part) and ".." not in part and "--" not in part for part in parts
    )
    if not good or len(repo_id) > LONGEST or repo_id.endswith(".git"):
        raise ValueError(
            f"`repo_id` is {short(repo_id)}: give 'owner/name', each of letters, digits, '-', '_' and '.', {LONGEST} characters at "
            "most."
        )


def read_evaluation(folder: Path) -> dict[str, float]:
    """
    The measures of a folder's `evaluation.json`, empty if it has none.

    Raises:
        ValueError: The file is no flat object of numbers by names that a table of Markdown can show.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return {}
    values = read_artefact(path, "object of measures", lambda values: dict(values.items()))
    for name, value in values.items():
        if not re.fullmatch(r"[\w .,:()%/+-]{1,80}", name):
            raise ValueError(f"{path}: {short(name)} is no name of a measure; write letters, digits, spaces and _.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}: {name!r} is {short(value)}; write a finite number.")
    return values


def snippets(repo_id: str) -> dict[str, str]:
    """The snippets by name, each a whole Python program that loads `repo_id`."""
    paths = sorted((_HUB_CARD / "snippets").glob("*.py"))
    return {path.stem: path.read_text(encoding="utf-8").strip().replace(REPO_ID, repo_id) for path in paths}


def render_card(
    config: Any, repo_id: str, name: str | None = None, has_chat_template: bool = False, folder: Path | None = None
) -> str:
    """
    The model card, with metadata for the Hub.

    Args:
        config: The checkpoint's `SteerlingConfig`.
        repo_id: What its snippets load, "owner/name" or a folder.
        name: One of `checkpoint_names()` whose description it gets; a fill-in text otherwise.
        has_chat_template: Whether to show how to chat.
        folder: Where an `evaluation.json`, a flat object of measures, may lie that the card shows.

    Raises:
        ValueError: `name` is no checkpoint's, or `evaluation.json` is something else.
    """
    if name is not None and name not in checkpoint_names():
        raise ValueError(f"`name` is {short(name)}: choose from {', '.join(checkpoint_names())}, or None.")
    about = _HUB_CARD / "about" / f"{name}.md"
    if not about.is_file():
        about = _HUB_CARD / "about" / "other.md"
    template = jinja2.Template(
        (_HUB_CARD / "card.md.jinja").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return template.render(
        title=repo_id.rstrip("/").rsplit("/", 1)[-1],
        about=about.read_text(encoding="utf-8").strip(),
        facts=_facts(config),
        evaluation={} if folder is None else read_evaluation(folder),
        snippets=snippets(repo_id),
        has_chat_template=has_chat_template,
        has_concepts=config.interpretable,
    )


def _facts(config: Any) -> dict[str, str]:
    facts = {
        "layers, width": f"{config.n_layers}, {config.n_embd:,}",
        "heads, key/value heads": f"{config.n_head}, {config.n_kv_heads or config.n_head}",
        "context, attention block": f"{config.block_size:,}, {config.diff_block_size} tokens",
        "vocabulary": f"{config.vocab_size:,}",
    }
    if config.interpretable:
        facts["known concepts"] = f"{config.n_concepts:,}"
        if config.n_discovered:
            facts["discovered concepts"] = f"{config.n_discovered:,}"
    return facts


def main() -> None:
    """`python -m steerling_hf.card FOLDER` writes the cards of all checkpoints as FOLDER/NAME.md."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in checkpoint_names():
        source = Path(checkpoint(name))
        config = AutoConfig.from_pretrained(source)
        chats = (source / "chat_template.jinja").is_file()
        text = render_card(config, default_repo_id(name), name, chats, source)
        write_whole(folder / f"{name}.md", text)


def default_repo_id(name: str) -> str:
    """The Hub repository of one of our checkpoints; of others the bare name, in characters that the Hub takes."""
    if name in checkpoint_names():
        return f"guidelabs/{name}" if name.startswith("steerling-8b") else name
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name)[:LONGEST].strip("-")
    return plain or "steerling"


if __name__ == "__main__":
    main()
