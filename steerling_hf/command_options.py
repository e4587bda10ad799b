"""Options that several commands share."""

import argparse


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option `--model`."""
    parser.add_argument("--model", default="steerling-nano", help="a checkpoint folder or name (default: %(default)s)")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """A text, the model that goes on from it or answers it, and how long."""
    parser.add_argument("text", metavar="TEXT")
    add_model(parser)
    parser.add_argument("--chat", action="store_true", help="TEXT is a user's message")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
