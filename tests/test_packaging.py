"""Wheel and sdist hold what they must and nothing else, and each way of installing gives a package that imports."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("steerling_hf", "modeling", "tokenization", "configs", "hub_card")
FILES = ("pyproject.toml", "README.md", "LICENSE")
USE = """
import steerling_hf
from pathlib import Path
from transformers import AutoConfig, AutoTokenizer
from steerling_hf.card import render_card
config = AutoConfig.from_pretrained(steerling_hf.checkpoint("steerling-8b"))
tokenizer = AutoTokenizer.from_pretrained(steerling_hf.checkpoint("steerling-8b"))
assert tokenizer.decode(tokenizer("Hello world").input_ids) == "Hello world"
assert "# steerling-8b" in render_card(config, "guidelabs/steerling-8b", "steerling-8b")
print(Path(steerling_hf.__file__).parent)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files that a build reads, away from the work tree, so that building leaves nothing in it."""
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, clone / name)
    return clone


@pytest.fixture(scope="module")
def built(clone) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is built from the unpacked sdist, as `python -m build` does."""
    # Without isolation: setuptools comes with the dev extra, so nothing is fetched.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=clone)
    (wheel,), (sdist,) = (clone / "dist").glob("*.whl"), (clone / "dist").glob("*.tar.gz")
    return wheel, sdist


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def data_files() -> set[str]:
    """What must reach the user besides modules, as it lies under steerling_hf/."""
    found = {"py.typed", "tokenization/cl100k_base.tiktoken", "hub_card/card.md.jinja"}
    for pattern in ("configs/steerling-*/*", "hub_card/about/*", "hub_card/snippets/*"):
        found |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file()}
    return found


def test_the_wheel_installs_one_top_level_name(built):
    names = zipfile.ZipFile(built[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"steerling_hf"}
    assert {f"steerling_hf/{name}" for name in data_files()} <= set(names)
    modules = [path for name in SOURCES for path in (ROOT / name).glob("*.py")]
    for path in modules:
        home = "" if path.parent.name == "steerling_hf" else f"{path.parent.name}/"
        assert f"steerling_hf/{home}{path.name}" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_sdist_has_what_a_build_needs(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "modeling/modeling_steerling.py"} <= names
    assert {name.removeprefix("steerling_hf/") for name in data_files()} - {"py.typed"} <= names


def test_the_wheel_imports(built, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path),
        str(built[0]),
        cwd=tmp_path,
    )
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".dist-info")} <= {
        "steerling_hf",
        "bin",
    }
    # PYTHONPATH comes before an editable install of the work tree.
    printed = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert printed.strip() == str(tmp_path / "steerling_hf")


def test_an_editable_install_imports(clone, tmp_path):
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    scheme = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index")
    # Our own dependencies, setuptools among them, but not our own editable install, whose hook a .pth file starts.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--no-build-isolation", "--editable", str(clone), cwd=tmp_path)
    printed = run(str(python), "-c", USE, cwd=tmp_path)
    assert printed.strip() == str(clone / "steerling_hf")
    script = run(str(environment / "bin" / "steerling-hf"), "--help", cwd=tmp_path)
    assert "usage: steerling-hf" in script


def test_ci_runs_what_a_change_must_pass():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "quality" in text
    assert "test" in text


def test_no_source_exists_twice():
    vocabularies = list(ROOT.glob("*/**/*.tiktoken"))
    tracked = [path for path in vocabularies if path.relative_to(ROOT).parts[0] in SOURCES]
    assert [path.relative_to(ROOT).as_posix() for path in tracked] == ["tokenization/cl100k_base.tiktoken"]


def test_our_checkpoints_hold_no_code():
    # Saving takes the code along, which is right for a folder of a user's and wrong for these: the package is their code.
    assert list(ROOT.glob("configs/*/*.py")) == []
    for path in ROOT.glob("configs/*/*config.json"):
        assert "auto_map" not in json.loads(path.read_text()), path
