"""Renders a checkpoint's model card from the template and the snippets in hub_card/."""

import argparse
import json
from pathlib import Path
from typing import Any

import jinja2

from . import hub_card
from .checkpoints import checkpoint, checkpoint_names

_HUB_CARD = Path(hub_card.__file__).parent
REPO_ID = "REPO_ID"  # what the snippets load; the card names the repository here, the tests a folder
EVALUATION_FILE = "evaluation.json"


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
    """
    about = _HUB_CARD / "about" / f"{name}.md"
    if not about.is_file():
        about = _HUB_CARD / "about" / "other.md"
    evaluation = folder / EVALUATION_FILE if folder is not None else None
    template = jinja2.Template(
        (_HUB_CARD / "card.md.jinja").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return template.render(
        title=repo_id.rstrip("/").rsplit("/", 1)[-1],
        about=about.read_text(encoding="utf-8").strip(),
        facts=_facts(config),
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation and evaluation.is_file() else {},
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
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def default_repo_id(name: str) -> str:
    """The Hub repository of one of our checkpoints, or the bare name of one that is not on the Hub."""
    return f"guidelabs/{name}" if name.startswith("steerling-8b") else name


if __name__ == "__main__":
    main()
