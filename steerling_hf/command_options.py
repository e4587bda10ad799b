"""Options that several commands share."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"it is {text[:40]}: choose {least} or more")
        return number

    return read


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option `--model`."""
    parser.add_argument("--model", default="steerling-nano", help="a checkpoint folder or name (default: %(default)s)")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """A text, the model that goes on from it or answers it, and how long."""
    parser.add_argument("text", metavar="TEXT")
    add_model(parser)
    parser.add_argument("--chat", action="store_true", help="TEXT is a user's message")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N", help="(default: %(default)s)")
