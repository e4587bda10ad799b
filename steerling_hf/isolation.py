"""Runs Python in a fresh interpreter, with nothing taken from or left in the user's caches of remote code."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECRET = re.compile("TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_isolated(code: str, arguments: Sequence[str] = (), timeout: float | None = None) -> str:
    """
    Run `code` in a fresh interpreter, offline, in an empty directory, with an empty cache of remote code, and without the
    environment's variables that are called tokens, keys or passwords.

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
        # The code that runs is a checkpoint's, and what it prints becomes an error: it gets no passwords to print.
        inherited = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
        environment = {**inherited, **OFFLINE, "HF_MODULES_CACHE": scratch}
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
