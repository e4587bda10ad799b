"""The command line: what works prints and exits with 0, what fails is one line and exits with 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from steerling_hf import Amplify, Concept, ConceptCatalog, Explanation, SteeringRecipe, checkpoint
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


def test_generate_shows_the_steered_text_beside_the_other(tmp_path, capsys):
    SteeringRecipe([Amplify(11, 1.5, layers=3, cutoff=8)], description="with theater").save(tmp_path)
    arguments = ["generate", "The", "--greedy", "--max-new-tokens", "16"]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert main([*arguments, "--steer", str(tmp_path)]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert [name.strip() for name in title.split("|")] == ["without steering", "with theater"]
    left, right = (" ".join(row.ljust(200).split("  |  ")[side].strip() for row in rows) for side in (0, 1))
    assert left.split() == plain.split()
    assert right.split() != plain.split()


def test_a_recipe_for_other_weights_is_one_line(tmp_path, capsys, exported_folder):
    from transformers import AutoModelForCausalLM

    nano = AutoModelForCausalLM.from_pretrained(checkpoint("steerling-nano"))
    SteeringRecipe.of(nano, Amplify(11)).save(tmp_path)
    assert main(["generate", "The", "--model", str(exported_folder), "--steer", str(tmp_path)]) == 2
    assert "for_any_weights" in capsys.readouterr().err


def test_concepts_search_and_show(capsys):
    assert main(["concepts", "search", "garden", "--limit", "1"]) == 0
    assert capsys.readouterr().out.split()[1:] == ["1", "gardening", "Text", "about", "gardening."]
    assert main(["concepts", "search", "text", "--group", "nature", "--head", "known", "--flag", "steerable"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["oceans", "forests", "nature"]

    for concept in ("Gardening", "1"):
        assert main(["concepts", "show", concept, "--tokens", "3"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("1 gardening\n")
        for part in (
            "known",
            "Text about gardening.",
            "steerable",
            "home and household",
            "cooking, pets",
            "' neighb' +",
        ):
            assert part in printed
    assert main(["concepts", "show", "100"]) == 0
    assert capsys.readouterr().out.startswith("discovered concept 100\n")


def test_concepts_without_weights(tmp_path, capsys):
    catalog = ConceptCatalog(
        [Concept(0, "known", "a", group_id=1)] + [Concept(i, "known", f"b{i}", group_id=1) for i in range(1, 15)]
    )
    catalog.save(tmp_path / "labels.json")
    asked = ["--model", "steerling-8b", "--labels", str(tmp_path / "labels.json")]
    assert main(["concepts", "search", "a", *asked]) == 0
    assert capsys.readouterr().out.split()[1:] == ["0", "a"]
    assert main(["concepts", "show", "a", *asked, "--tokens", "0"]) == 0
    assert "b9, b10 and 4 more" in capsys.readouterr().out
    assert main(["concepts", "show", "a", *asked]) == 2
    assert "steerling-8b has no weights" in capsys.readouterr().err


def test_concepts_contrast(tmp_path, capsys):
    texts = {
        "gloomy": (
            "Sadly, the train was late.",
            "The poor rose died in the dark.",
            "Nobody came, and it rained again.",
        ),
        "cheerful": (
            "What a joy, the train came!",
            "The lovely rose grew in the sun!",
            "Everyone came and it was great!",
        ),
    }
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n\n".join(lines))
    files = [str(tmp_path / name) for name in texts]
    assert main(["concepts", "contrast", *files, "--head", "known", "--limit", "2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["effect", "superiority", "positive", "negative", "concept"]
    signs = {" ".join(row.split()[5:]): row.split()[0][0] for row in rows}
    assert signs == {"gloomy tone": "+", "cheerful tone": "-"}


def test_explain(tmp_path, capsys, exported_folder):
    question = ["explain", "How do I contact Mara Ellison by phone?", "--chat", "--max-new-tokens", "32"]
    files = [tmp_path / "why.html", tmp_path / "why.json"]
    assert main([*question, "--no-inputs", "--html", str(files[0]), "--save", str(files[1])]) == 0
    printed = capsys.readouterr().out
    assert "555-0142" in printed
    assert "concepts: contact information" in printed
    assert "inputs:" not in printed
    assert "contact information" in files[0].read_text()
    assert "555-0142" in Explanation.load(files[1]).text

    SteeringRecipe([Amplify(3, 1.5)]).save(tmp_path)
    tiny = ["--model", str(exported_folder), "--max-new-tokens", "3", "--seed", "1", "--steer", str(tmp_path)]
    assert main(["explain", "Rain", *tiny, "--by", "sentence", "--belief", "--save", str(files[1])]) == 0
    printed = capsys.readouterr().out
    assert "inputs: '" in printed
    assert "comprehensiveness:" in printed
    assert Explanation.load(files[1]).steering[0]["operation"] == "Amplify"


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
        (
            ["concepts", "search", "gardning"],
            "error: no concept that you ask for has a word of 'gardning' in its name",
        ),
        (["concepts", "search", "text", "--group", "nothing"], "error: `group` is 'nothing'"),
        (["explain", "Hello", "--html", "why.txt"], "error: `path` is 'why.txt': choose a name that ends in"),
        (["explain", "Hello", "--save", "nowhere/why.json"], "error: `path` is 'nowhere/why.json', but there is no"),
        (["concepts", "search", "text", "--limit", "0"], "error: `limit` is 0"),
        (["concepts", "search", "text", "--model", "FOLDER"], "error: `source` is "),
        (["concepts", "show", "gardning"], "error: No concept is named 'gardning'; near: 'gardening' (1), "),
        (["concepts", "show", "9999"], "error: No concept has the id 9999: ids go from 0 to 571"),
        (["concepts", "show", "1", "--tokens", "-1"], "error: `--tokens` is -1"),
        (["concepts", "contrast", "one", "two"], "error: 'one' is no file"),
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


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["concepts"], ["export", "one"], ["export", "a", "b", "--link", "--copy"]]
)
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: steerling-hf" in capsys.readouterr().err
