"""The command line: what works prints and exits with 0, what fails is one line and exits with 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from steerling_hf.cli import main

COMMAND = Path(sys.executable).with_name("steerling-hf")


@pytest.mark.parametrize("command", [[str(COMMAND)], [sys.executable, "-m", "steerling_hf"]])
def test_both_ways_to_call_it(command):
    result = subprocess.run([*command, "export", "--help"], capture_output=True, text=True, check=True)
    assert "--check" in result.stdout


def test_export_and_generate(tmp_path, exported_folder, capsys):
    target = tmp_path / "out"
    assert main(["export", str(exported_folder), str(target), "--copy", "--check", "--repo-id", "owner/name"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {target}\n" in printed
    assert "checked" in printed
    assert not (target / "model.safetensors").samefile(exported_folder / "model.safetensors")

    arguments = ["generate", "The gardener", "--model", str(target), "--max-new-tokens", "8", "--steps", "4"]
    texts = []
    for more in (["--greedy"], ["--seed", "1"], ["--seed", "1"], ["--chat", "--seed", "2"]):
        assert main([*arguments, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The gardener")
    assert texts[1] == texts[2] != texts[0]
    assert "The gardener" in texts[3]


def test_export_without_weights_says_so(tmp_path, capsys):
    assert main(["export", "steerling-8b", str(tmp_path / "out")]) == 0
    assert "no weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "OUT"], "error: `source` is 'nowhere', which is no folder"),
        (["export", "steerling-8b", "."], "error: `folder` is "),
        (["generate", "Hello", "--model", "nowhere"], "error: "),
        (["generate", "Hello", "--model", "FOLDER", "--max-new-tokens", "0"], "error: `max_new_tokens`"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, exported_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(exported_folder) if argument == "FOLDER" else argument for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["export", "one"], ["export", "a", "b", "--link", "--copy"]])
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: steerling-hf" in capsys.readouterr().err
