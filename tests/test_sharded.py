"""generate() with weights that FSDP2 has shared out among two processes on a CPU."""

import subprocess
import sys
from pathlib import Path


def test_each_process_writes_its_own_text(tmp_path):
    """Of other lengths, so that one process is done long before the other."""
    script = Path(__file__).with_name("sharded_model.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
            assert "same text" in output
    finally:
        for process in ranks:
            process.kill()
