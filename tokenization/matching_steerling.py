"""Regular expressions that find tokens in a text."""

import functools
import re
from collections.abc import Iterable
from itertools import groupby


def any_of(tokens: Iterable[str]) -> str:
    """A regular expression that matches any token, of several that begin at one place the longest; without tokens, nothing."""
    return _any_of(frozenset(tokens))


@functools.lru_cache(maxsize=16)
def _any_of(tokens: frozenset[str]) -> str:
    return "(?:" + _alternatives(sorted(tokens), 0) + ")" if tokens else "(?!)"


def _alternatives(tokens: list[str], depth: int) -> str:
    """
    Sorted tokens as alternatives. Those that begin alike share their beginning, so that a text is not compared with each of
    thousands; not without end, since Python's regular expressions nest a hundred times or so.
    """
    if len(tokens) < 8 or depth > 24:
        return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    found = []
    for first, group in groupby(tokens, key=lambda token: token[:1]):
        members = list(group)
        if first:
            length = next((i for i, both in enumerate(zip(members[0], members[-1])) if both[0] != both[1]), None)
            shared = members[0] if length is None else members[0][:length]  # sorted: the first and last differ most
            rest = _alternatives([token[len(shared) :] for token in members], depth + 1)
            found.append(f"{re.escape(shared)}(?:{rest})")
    ends_here = "|" if tokens[0] == "" else ""  # if none of the longer ones goes on
    return "|".join(found) + ends_here
