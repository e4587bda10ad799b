"""
Runs the test suites of transformers and PEFT against Steerling.

    python tests/others/run.py transformers              # whatever does not apply is named in not_applicable.toml
    python tests/others/run.py peft -- -k test_generate  # the rest goes to pytest
    python tests/others/run.py --list                    # what does not apply, and why

The suites come from the source distributions of the installed versions, which pip downloads to build/others. transformers'
lacks tests/generation (GenerationTesterMixin) and tests/exporters: empty classes stand in for them. `make others` makes an
environment with all that is needed.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "others"
CASES = {
    "transformers": ["transformers_models.py", "transformers_tokenizers.py"],
    "peft": ["peft_decoders.py"],
}
# What the distributions leave out of their tests although other tests of theirs import it.
LEFT_OUT = {
    "transformers": {
        "__init__.py": "",
        "exporters/__init__.py": "",
        "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
        "generation/__init__.py": "",
        "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
        "utils/__init__.py": "",
        "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'dtype': 'float16', 'num_labels': 7, "
        "'output_hidden_states': True, 'chunk_size_feed_forward': 5, 'problem_type': 'regression'}\n",
        "fixtures/sample_text.txt": "The gardener watered the new roses.\n\nNobody saw the bird that left the harbor at noon.\n",
    },
    "peft": {"__init__.py": ""},
}


def unpack(library: str) -> Path:
    """The folder that holds the package `tests` of a library, in the version that is installed here."""
    folder = CACHE / f"{library}-{version(library)}"
    if not (folder / "complete").exists():
        archive = download(library)
        with tarfile.open(archive) as source:
            members = [member for member in source if member.name.startswith(f"{folder.name}/tests/")]
            source.extractall(CACHE, members, filter="data")
        for name, text in LEFT_OUT[library].items():
            path = folder / "tests" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folder / "complete").touch()
    return folder


def download(library: str) -> Path:
    """The source distribution of the installed version, from the registry that pip is set up for."""
    CACHE.mkdir(parents=True, exist_ok=True)
    release = f"{library}=={version(library)}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-binary", library, "--dest", str(CACHE), release], check=True)
    return CACHE / f"{library}-{version(library)}.tar.gz"


def run(library: str, pytest_arguments: list[str]) -> int:
    paths = [str(unpack(library)), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Their options and ours do not mix: neither our conftest nor our pytest settings are read.
    apart = ["-c", os.devnull, "--rootdir", str(HERE), "--confcutdir", str(HERE), "-p", "no:cacheprovider"]
    cases = [str(HERE / name) for name in CASES[library]]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--disable-warnings",
        "--tb=short",
        *apart,
        *pytest_arguments,
        *cases,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests of transformers or PEFT against Steerling.")
    parser.add_argument("library", nargs="?", choices=sorted(CASES))
    parser.add_argument("--list", action="store_true", help="show the tests that do not apply, with the reasons")
    parser.add_argument("pytest_arguments", nargs="*", help="after --: arguments of pytest")
    arguments = parser.parse_args()
    if arguments.list:
        for suite, reasons in tomllib.loads((HERE / "not_applicable.toml").read_text()).items():
            for pattern, reason in reasons.items():
                print(f"{suite}  {pattern}\n    {reason}")
        return 0
    if arguments.library is None:
        parser.error("name a library, transformers or peft, or give --list")
    return run(arguments.library, arguments.pytest_arguments)


if __name__ == "__main__":
    sys.exit(main())
