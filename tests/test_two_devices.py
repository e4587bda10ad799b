"""Runs two_devices.py in a process of its own: all of it would take the devices that it makes up for accelerators."""

import subprocess
import sys
from pathlib import Path


def test_on_two_devices_the_model_answers_as_on_one():
    cases = Path(__file__).with_name("two_devices.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cases], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
