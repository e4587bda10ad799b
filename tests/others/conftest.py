"""Holds the tests against not_applicable.toml: what is named there has to fail, and nothing else may."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("not_applicable.toml")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = tomllib.loads(LIST.read_text())
    for item in items:
        name = item.nodeid.split("::", 1)[1].replace("[", "(").replace("]", ")")
        for pattern, reason in reasons.get(item.path.stem, {}).items():
            if fnmatchcase(name, pattern):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
