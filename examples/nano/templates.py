"""Sentence templates: one class that both writes and reads.

A template is text with `{slot}` holes. `expand` fills the holes from a lexicon; `match` finds every way in which a
text could have been produced by it. Because both walk the same parts and the same fillers, what is written can be read
back, and nothing else is accepted.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Lexicon = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Template:
    """Text with `{slot}` holes, and the names of the concepts that the text expresses by its form.

    Args:
        text: the pattern, e.g. "the {agent} slept {place}".
        concepts: names of the concepts that every expansion carries.
        framed: whether an opener or a closer may be put around it (long patterns stand alone).
    """

    text: str
    concepts: tuple[str, ...] = ()
    framed: bool = True
    parts: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self):
        # re.split with one group alternates literal, slot, literal, slot, ..., literal
        object.__setattr__(self, "parts", tuple(re.split(r"\{(\w+)\}", self.text)))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the holes, in order."""
        return self.parts[1::2]

    def expand(self, rng: random.Random, lexicon: Lexicon) -> str:
        """Fill each hole with a filler drawn evenly from the lexicon."""
        return "".join(rng.choice(lexicon[p]) if i % 2 else p for i, p in enumerate(self.parts))

    def match(self, text: str, lexicon: Lexicon) -> Iterator[dict[str, str]]:
        """Yield the fillers of every derivation of the whole `text` (none: the text is not of this template)."""
        yield from self._match(text, 0, 0, lexicon, {})

    def _match(self, text: str, at: int, part: int, lexicon: Lexicon, found: dict) -> Iterator[dict[str, str]]:
        literal = self.parts[part]
        if not text.startswith(literal, at):
            return
        at += len(literal)
        if part + 1 == len(self.parts):
            if at == len(text):
                yield dict(found)
            return
        slot = self.parts[part + 1]
        for filler in lexicon[slot]:
            if text.startswith(filler, at):
                yield from self._match(text, at + len(filler), part + 2, lexicon, {**found, slot: filler})
