"""Runs Python in a fresh interpreter, with nothing taken from or left in the user's caches of remote code."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_isolated(code: str, arguments: Sequence[str] = (), timeout: float | None = None) -> str:
    """
    Run `code` in a fresh interpreter, offline, in an empty directory and with an empty cache of remote code.

    Args:
        code: Python source.
        arguments: What the code finds in `sys.argv[1:]`.
        timeout: Seconds.

    Returns:
        What it printed.

    Raises:
        RuntimeError: It failed; the message holds the end of what it wrote on standard error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, **OFFLINE, "HF_MODULES_CACHE": scratch}
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            cwd=scratch,
            timeout=timeout,
        )
    if result.returncode != 0:
        raise RuntimeError(f"exit code {result.returncode}:\n{result.stderr.strip()[-4000:]}")
    return result.stdout
