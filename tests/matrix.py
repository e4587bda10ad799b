"""
Runs the suite in environments beside the pinned one, `make matrix` has them made, and shows what ran.

    python tests/matrix.py oldest newest -- -k test_generation   # what follows -- goes to pytest
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "accelerate",
    "safetensors",
    "numpy",
    "tiktoken",
)
VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps({"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def versions(python: Path) -> dict[str, str]:
    """Versions of Python and of the libraries in an environment."""
    shown = subprocess.run([python, "-c", VERSIONS, *LIBRARIES], capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


def table(columns: dict[str, dict[str, str]]) -> str:
    """Values by name, a column for each environment."""
    rows = [["", *columns]]
    rows += [[name, *(values[name] for values in columns.values())] for name in next(iter(columns.values()))]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    words = [*sys.argv[1:], "--"]
    names, arguments = words[: words.index("--")], words[words.index("--") + 1 : -1]
    columns = {}
    for name in names:
        python = ROOT / f".venv-{name}" / "bin" / "python"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        ran = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=environment, check=False)
        result = "passed" if ran.returncode == 0 else f"failed ({ran.returncode})"
        columns[name] = versions(python) | {"tests": result}
    print(table(columns))
    return int(any(values["tests"] != "passed" for values in columns.values()))


if __name__ == "__main__":
    sys.exit(main())
