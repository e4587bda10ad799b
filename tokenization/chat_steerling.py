"""
Messages that cannot forge a control token: their special strings are marked before a chat template renders them, and read as
text behind it.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from transformers.utils import get_json_schema

from .matching_steerling import any_of

WORD_JOINER = "\u2060"  # invisible, and no special token contains it
PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclasses.dataclass(frozen=True)
class ChatMark:
    """A character that no message, template or token contains. Within a control token, it makes text of it."""

    character: str

    @classmethod
    def unused(cls, texts: Sequence[str]) -> "ChatMark":
        """
        A mark that none of the texts contains.

        Raises:
            ValueError: They contain every private-use character of plane 15.
        """
        used = set().union(*texts)
        free = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
        if free is None:
            raise ValueError(
                "`conversation` has all private-use characters from U+F0000 to U+FFFFD, which leaves none to mark its special "
                "strings by; drop some of them."
            )
        return cls(free)

    def put(self, text: str, control: re.Pattern[str]) -> str:
        """A text with the mark in each control token, behind its first character; before a token of one character."""
        return control.sub(self._marked, text)

    def _marked(self, match: re.Match[str]) -> str:
        # Not around the token: a template that turns a list into text escapes marks, and would bare it.
        place = 1 if len(match[0]) > 1 else 0
        return match[0][:place] + self.character + match[0][place:]

    def read(self, rendered: str, added: Sequence[str]) -> Iterator[tuple[str, int, bool]]:
        """
        What the template made of marked messages, without marks.

        Args:
            rendered: The text with marks.
            added: All added tokens.

        Yields:
            A piece of the text, where it stood in `rendered`, and whether it is text whatever it says. Pieces meet where
            a mark was.
        """
        last = 0
        short = any_of(token for token in added if len(token) == 1)
        for match in re.finditer(f"{self.character}({short})?", rendered):
            yield rendered[last : match.start()], last, False
            if match[1]:
                yield match[1], match.start(1), True
            last = match.end()
        yield rendered[last:], last, False


def strings_of(value: Any) -> Iterator[str]:
    """All strings in nested messages, tools or variables, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_of(key)
            yield from strings_of(item)
    elif isinstance(value, (list, tuple, Set)):
        for item in value:
            yield from strings_of(item)


def rewrite_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Nested messages, tools or variables with each string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {rewrite_strings(key, change): rewrite_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple, Set)):
        return [rewrite_strings(item, change) for item in value]
    return value


def as_plain(value: Any) -> Any:
    """
    Messages, tools or variables as dictionaries, lists and strings, so that none of their text is overlooked: objects of
    dataclasses and pydantic, chats of pipelines, arrays.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (bytes, bytearray)):
        return [as_plain(item) for item in value]
    if hasattr(value, "messages"):  # a pipeline's Chat
        return as_plain(value.messages)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: as_plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    for method in ("model_dump", "tolist"):
        if callable(getattr(value, method, None)) and not isinstance(value, type):
            return as_plain(getattr(value, method)())
    return value


def schemas_of(tools: Any) -> Any:
    """Tools as `as_plain` gives them, functions as their JSON schema."""
    if isinstance(tools, (list, tuple)):
        tools = [
            get_json_schema(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else tool for tool in tools
        ]
    return as_plain(tools)


def check_conversations(conversations: Any) -> None:
    """
    Check that there is one conversation or more, as lists of messages with a role and texts.

    Raises:
        ValueError: There is something else; the message names its place.
    """
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(
            f"`conversation` is {_short(conversations)}; give one message or more, as [{{'role': 'user', 'content': 'Hi'}}]."
        )
    if isinstance(conversations[0], list):
        for number, conversation in enumerate(conversations):
            if not isinstance(conversation, list) or not conversation:
                raise ValueError(
                    f"`conversation[{number}]` is {_short(conversation)}; give a list of one message or more."
                )
            _check_messages(conversation, f"conversation[{number}]")
    else:
        _check_messages(conversations, "conversation")


def _check_messages(messages: list[Any], place: str) -> None:
    for number, message in enumerate(messages):
        here = f"{place}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"`{here}` is {_short(message)}; give a message, as {{'role': 'user', 'content': 'Hi'}}.")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"`{here}['role']` is {_short(message.get('role'))}; give a string, such as 'user'.")
        content = message.get("content")
        if isinstance(content, list):
            for part_number, part in enumerate(content):
                _check_part(part, f"{here}['content'][{part_number}]")
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"`{here}['content']` is {_short(content)}; give a string or a list of parts.")


def _check_part(part: Any, place: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"`{place}` is {_short(part)}; give a part, as {{'type': 'text', 'text': 'Hi'}}.")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"`{place}['text']` is {_short(part.get('text'))}; give a string.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
