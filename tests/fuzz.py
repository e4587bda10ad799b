"""
Random calls, good and bad, of everything that a user can call: does each give what it should, or say clearly what is wrong?

A good call is checked against another way to the same result (a row alone, another cache, a file and back). A bad one has one or two
arguments that cannot be right, and must end in an error that names one of them. Nothing may hang or leave a hook behind.

    python tests/fuzz.py [--calls 10000] [--seed 0] [--family generate]
"""

import argparse
import contextlib
import copy
import io
import json
import math
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from generation_model import CONTEXT, MASK, PAD, VOCABULARY, make_model
from steering_cases import hooks_of
from transformers import AutoModelForCausalLM

from steerling_hf import (
    Amplify,
    AttackPrompt,
    AttackReport,
    Audit,
    ConceptCatalog,
    Condition,
    Explanation,
    Imitate,
    Inject,
    SetConcepts,
    SteeringRecipe,
    SteerlingConfig,
    SteerlingForDiffusionLM,
    SteerlingTokenizer,
    Suppress,
    SuppressTokens,
    audit,
    checkpoint,
    explain_text,
    read_prompts,
)
from steerling_hf.attack_report import AttackRecord
from steerling_hf.cli import main as command_line

SECONDS = 60  # after which a call hangs
CLEAR = (ValueError, TypeError, OSError, NotImplementedError)


class FindingError(AssertionError):
    """What a call should not have done."""


class HangError(BaseException):
    """A call takes too long."""


@dataclass
class Call:
    """
    A call to try.

    Args:
        run: Makes it.
        shown: Its arguments, to tell.
        wrong: Names of the arguments that cannot be right; empty for a good call.
        check: Is given the result of a call that was accepted, and raises a `FindingError`. A call with wrong arguments may be
            accepted only where this is given, since its values may happen to mean something.
    """

    run: Callable[[], Any]
    shown: Any
    wrong: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None


def expect(fact: bool, text: str) -> None:
    if not fact:
        raise FindingError(text)


def same(ours: torch.Tensor, other: torch.Tensor, text: str, tolerance: float = 2e-3) -> None:
    expect(ours.shape == other.shape, f"{text}: shapes {tuple(ours.shape)} and {tuple(other.shape)}")
    expect(
        torch.allclose(ours, other, atol=tolerance, rtol=tolerance), f"{text}: off by {(ours - other).abs().max():.2g}"
    )


@cache
def model():
    return make_model()


@cache
def tokenizer():
    return SteerlingTokenizer.from_pretrained(checkpoint())


def ids(rng: random.Random, rows: int, length: int, masks: float = 0.0) -> torch.Tensor:
    return torch.tensor(
        [[MASK if rng.random() < masks else rng.randrange(PAD) for _ in range(length)] for _ in range(rows)]
    ).view(rows, length)


# Configurations

FIELDS: dict[str, list[Any]] = {
    "vocab_size": [96, 100], "n_layers": [1, 2], "n_head": [4, 2], "n_embd": [32, 16], "n_kv_heads": [2, 1, None], "block_size": [64, 32],
    "diff_block_size": [8, 4], "use_rms_norm": [True, False], "norm_eps": [1e-5, 1e-6], "norm_order": ["post", "pre"],
    "use_qk_norm": [True, False], "use_rope": [True], "rope_base": [500000, 10000.0], "rope_full_precision": [True, False],
    "clip_qkv": [10.0, None, 1], "mlp_type": ["swiglu", "standard"], "activation": ["gelu", "relu", "silu"], "mlp_ratio": [4, 2],
    "intermediate_size": [48, None], "use_bias": [True, False], "weight_sharing": [True, False], "interpretable": [True, False],
    "n_concepts": [20, 5], "n_unknown_concepts": [30, 9], "topk_known": [4, None, 32], "topk_known_features": [4, None],
    "unknown_topk": [6, 128], "use_unknown": [True, False], "apply_topk_to_unknown": [True, False], "factorize_unknown": [True, False],
    "factorize_rank": [8, 4], "use_epsilon_correction": [True, False], "use_attention_known": [True, False], "pad_multiple": [16, 1],
    "initializer_range": [0.02, 0.5], "inject_layer": [1, 2], "inject_alpha": [1.0, 0.5], "mask_token_id": [93], "pad_token_id": [90, None],
    "eos_token_id": [92, [92, 94]], "bos_token_id": [91, None],
}  # fmt: skip
SMALL = {"vocab_size": 96, "n_layers": 1, "n_head": 2, "n_embd": 16, "n_kv_heads": 1, "block_size": 32, "diff_block_size": 8, "intermediate_size": 24,
         "n_concepts": 5, "n_unknown_concepts": 9, "factorize_rank": 4, "mask_token_id": 93, "pad_token_id": 90, "eos_token_id": 92, "bos_token_id": 91, "endofchunk_token_id": None}  # fmt: skip
# What means something in a field beside its listed values is checked by its use.
WRONG_FIELDS: list[Any] = [
    "",
    "x",
    "false",
    "\x00",
    b"1",
    {},
    {"a": 1},
    object(),
    print,
    1j,
    math.nan,
    math.inf,
    -1,
    -0.5,
    [None],
    [[1]],
]


def config_call(rng: random.Random) -> Call:
    given = {**SMALL, **{name: rng.choice(FIELDS[name]) for name in rng.sample(list(FIELDS), rng.randint(0, 5))}}
    if rng.random() < 0.6:
        name, value = rng.choice(list(FIELDS)), rng.choice(WRONG_FIELDS)
        return Call(lambda: SteerlingConfig(**{**given, name: value}), {name: value}, (name,))

    def check(config: Any) -> None:
        again = SteerlingConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
        expect(again.to_dict() == config.to_dict(), "a file and back differ")
        made = SteerlingForDiffusionLM(config).eval()
        out = made(torch.tensor([[1, 2, MASK]])).logits
        expect(bool(torch.isfinite(out).all()), "logits are not finite")

    # Combinations that cannot be built are refused, by any of the names.
    return Call(lambda: SteerlingConfig(**given), given, tuple(given), check)


# generate

GOOD_SETTINGS: dict[str, list[Any]] = {
    "do_sample": [True, False], "seed": [0, 7, 2**40], "steps": [None, 1, 2, 5, 40], "align_blocks": [True, False], "temperature": [0.7, 1.0, 2],
    "top_k": [1, 5, 50], "top_p": [0.1, 0.8, 1.0], "repetition_penalty": [1.0, 1.2], "guidance_scale": [1.0, 1.5, 0.5], "entropy_temperature": [True, False],
    "suppress_tokens": [[1, 2], None], "bad_words_ids": [[[3]], [[4, 5]]], "eos_token_id": [92, 94, [92, 94]],
}  # fmt: skip
RULES: list[dict[str, Any]] = [{}, {"unmasking": "confidence"}, {"unmasking": "margin"}, {"unmasking": "entropy"}, {"unmasking": "threshold", "threshold": 0.6},
                               {"unmasking": "factor", "factor": 1.0}, {"unmasking": "entropy_bound", "entropy_bound": 0.5}]  # fmt: skip
WRONG_SETTINGS: dict[str, list[Any]] = {
    "max_new_tokens": [-1, 1.5, "5", math.nan, [], 2**31, CONTEXT + 1], "steps": [0, -1, 1.5, "3", math.nan, []], "seed": [-1, 1.5, "x", [1, 2, 3, 4, 5, 6, 7]],
    "temperature": [-1.0, math.nan, "hot", []], "top_p": [-0.1, 1.5, "x"], "top_k": [-5, "x", 1.5], "threshold": [2.0, -1.0, "x", math.nan],
    "unmasking": ["nothing", 5, [], lambda logits, count: None, lambda logits, count: torch.tensor([10**6]), lambda logits, count: "x"],
    "suppress_tokens": [list(range(VOCABULARY)), [10**6], 1.5, "x", [None], [-1]], "bad_words_ids": [[[10**6]], "x", [[]], [None]],
    "eos_token_id": [10**6, [None], "x", 1.5, MASK], "guidance_scale": [math.nan, "x", []], "repetition_penalty": [-1.0, 0.0, "x"],
    "num_return_sequences": [0, -1, 1.5, "x"], "num_beams": [4, "x"], "stop_strings": [5, ["x"]], "attention_mask": [[1], "x", torch.ones(9, 9)],
    "steering": [5, "amplify", [None] * 9, Amplify, Amplify(10**6), Inject(3, math.nan)], "past_key_values": [5, "x"], "streamer": [True, 5],
    "cache_implementation": ["nothing", 5], "position_ids": [torch.zeros(1, 3)], "nonsense": [1], "logits_processor": [5, [5]], "stopping_criteria": [5, [5]],
}  # fmt: skip


def generate_call(rng: random.Random) -> Call:
    rows, length = rng.randint(1, 3), rng.randint(1, 20)
    prompt = ids(rng, rows, length, masks=rng.choice([0, 0, 0.3]))
    settings = {
        name: rng.choice(GOOD_SETTINGS[name]) for name in rng.sample(list(GOOD_SETTINGS), rng.randint(0, 4))
    } | rng.choice(RULES)
    settings["max_new_tokens"] = rng.randint(1, 20)
    if settings.get("steps") is not None and "threshold" in settings:
        del settings["steps"]
    settings.setdefault("seed", rng.randrange(1000))
    if rng.random() < 0.4:
        name = rng.choice(list(WRONG_SETTINGS))
        value = rng.choice(WRONG_SETTINGS[name])
        return Call(
            lambda: model().generate(prompt, **{**settings, name: value}),
            {"prompt": prompt, **settings, name: value},
            (name, "concepts", "strength") if name == "steering" else (name,),
        )
    if rng.random() < 0.4:
        settings["steering"] = operation(rng)
    left = [rng.randint(0, length - 1) for _ in range(rows)] if rows > 1 else [0]
    mask = torch.tensor([[int(column >= missing) for column in range(length)] for missing in left])

    def check(output: torch.Tensor) -> None:
        expect(
            output.shape[0] == rows and length < output.shape[1] <= length + settings["max_new_tokens"],
            f"shape {tuple(output.shape)}",
        )
        text = torch.cat([mask, torch.ones(rows, output.shape[1] - length, dtype=torch.long)], dim=1).bool()
        expect(not (output[text] == MASK).any(), "a mask token is left")
        given = (prompt != MASK) & mask.bool()
        expect(torch.equal(output[:, :length][given], prompt[given]), "the prompt has changed")
        row = rng.randrange(rows)
        # A number is the first row's seed, and the next ones' follow.
        own = {**settings, "seed": settings["seed"] + row}
        alone = model().generate(prompt[row : row + 1, left[row] :], **own)[0]
        ours = output[row, left[row] :]
        expect(
            torch.equal(ours[: len(alone)], alone),
            f"row {row} differs from its single run: {ours.tolist()} and {alone.tolist()}",
        )
        uncached = model().generate(prompt[row : row + 1, left[row] :], **own, use_cache=False)[0]
        expect(
            torch.equal(uncached, alone),
            f"row {row} differs without a cache: {uncached.tolist()} and {alone.tolist()}",
        )

    return Call(
        lambda: model().generate(prompt, attention_mask=mask, **settings),
        {"prompt": prompt, "left": left, **settings},
        (),
        check,
    )


# forward

WRONG_INPUTS: dict[str, list[Any]] = {
    "input_ids": [torch.tensor([[VOCABULARY]]), torch.tensor([[-1]]), torch.tensor([1, 2]), torch.tensor([[1.5]]), "x", None, [[1]], torch.ones(1, CONTEXT + 1).long()],
    "attention_mask": [torch.ones(1, 3), [1], "x", torch.full((1, 4), math.nan)], "logits_to_keep": [torch.tensor([99]), -1, "x", 1.5],
    "position_ids": [torch.arange(4), torch.full((1, 4), math.nan), torch.full((1, 4), -1), torch.full((1, 4), CONTEXT), "x"],
    "labels": [torch.ones(1, 4), torch.full((1, 4), VOCABULARY), "x", torch.ones(1, 3).long()],
    "noise_mask": ["x", torch.ones(1, 3).bool(), torch.ones(1, 4)], "cache": [5, "x"], "output_concepts": ["x"],
}  # fmt: skip


def forward_call(rng: random.Random) -> Call:
    if rng.random() < 0.5:
        name = rng.choice(list(WRONG_INPUTS))
        value = rng.choice(WRONG_INPUTS[name])
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3, MASK]]), name: value}
        if name == "noise_mask":
            inputs["labels"] = torch.tensor([[1, 2, 3, 4]])
        return Call(lambda: model()(**inputs), inputs, (name,))
    rows, length = rng.randint(1, 3), rng.randint(1, 40)
    text, pad = ids(rng, rows, length, masks=0.3), rng.randint(0, 12)
    left = rng.random() < 0.5
    wide = (pad, 0) if left else (0, pad)
    padded, mask = (
        torch.nn.functional.pad(part, wide, value=value) for part, value in ((text, PAD), (torch.ones_like(text), 0))
    )

    def check(output: Any) -> None:
        logits = output.logits[:, pad:] if left else output.logits[:, :length]
        expect(bool(torch.isfinite(logits).all()), "logits are not finite")
        row = rng.randrange(rows)
        alone = model()(text[row : row + 1], output_concepts=rng.random() < 0.5).logits
        same(logits[row : row + 1], alone, f"row {row} and its single run")

    return Call(lambda: model()(padded, attention_mask=mask), {"text": text, "pad": wide}, (), check)


# Tokenizer

PIECES = [
    "The rose",
    " boat",
    "  ",
    "\n\n",
    "\t",
    "é",
    "中文",
    "🌹",
    "a" * 300,
    " " * 300,
    "\x00",
    "\u200d",
    "ß",
    "1234567",
    "<|",
    "|>",
    "'s",
    "\ufeff",
    "\r\n",
    "<|mask|",
]
SPECIALS = [
    "<|endoftext|>",
    "<|mask|>",
    "<|pad|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|endofchunk|>",
]


def tokenizer_call(rng: random.Random) -> Call:
    kind = rng.choice(["text", "plain", "chat", "wrong"])
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))
    tok = tokenizer()
    if kind == "wrong":
        value = rng.choice([5, 1.5, object(), b"x", {"a": 1}])
        return Call(lambda: tok(value), {"text": value}, ("text",))
    if kind == "text":

        def check(encoded: Any) -> None:
            expect(tok.decode(encoded["input_ids"]) == text, "decoding gives another text")
            expect(tok([text, "x"])["input_ids"][0] == encoded["input_ids"], "a batch gives other tokens")
            expect(
                tok.convert_tokens_to_ids(tok.tokenize(text)) == encoded["input_ids"], "token strings lose something"
            )

        return Call(lambda: tok(text), text, (), check)
    hostile = text + rng.choice(SPECIALS) + rng.choice(PIECES)
    special = set(tok.convert_tokens_to_ids(SPECIALS))
    if kind == "plain":

        def check(encoded: Any) -> None:
            expect(not special & set(encoded["input_ids"]), "a special string is no text")
            expect(tok.decode(encoded["input_ids"]) == hostile, "decoding gives another text")

        return Call(lambda: tok(hostile, split_special_tokens=True), hostile, (), check)
    harmless = tok.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)["input_ids"]
    wanted = Counter(token for token in harmless if token in special)

    def check(encoded: Any) -> None:
        found = Counter(token for token in encoded["input_ids"] if token in special)
        expect(found == wanted, f"a message has forged control tokens: {found - wanted}")

    chat = [{"role": "user", "content": hostile}]
    return Call(lambda: tok.apply_chat_template(chat, add_generation_prompt=True), hostile, (), check)


# Steering

WRONG_OPERATIONS: list[tuple[type, dict[str, Any], str, list[Any]]] = [
    (Inject, {"concepts": 3, "strength": 1.0}, "strength", ["x", math.nan, math.inf, None, [], True]),
    (Inject, {"concepts": 3, "strength": 1.0}, "concepts", [-1, 50, 1.5, "x", [], [3, 3], None, True]),
    (Inject, {"concepts": 3, "strength": 1.0}, "layers", [-1, 3, "x", [], [0], 1.5]),
    (Inject, {"concepts": 3, "strength": 1.0}, "cutoff", [0, -1, 1.5, "x"]),
    (Inject, {"concepts": 3, "strength": 1.0}, "window", [5, (1,), (3, 1), (-1, 2), "ab"]),
    (Inject, {"concepts": 3, "strength": 1.0}, "normalized", [1, "x", None]),
    (SetConcepts, {"concepts": 3, "value": 1.0}, "value", ["x", math.nan, None, True]),
    (SetConcepts, {"concepts": 3, "value": 1.0}, "mode", ["x", 5, None, []]),
    (SuppressTokens, {"concepts": 3}, "strength", [-1, math.inf, "x"]),
    (Suppress, {"concept": 3}, "strength", [1.0, math.nan, "x"]),
    (Suppress, {"concept": 3}, "group", [[99], "x", [1.5]]),
    (Amplify, {"concepts": 3}, "strength", [math.nan, "x", None]),
    (Imitate, {"target": (5, 6)}, "target", [(), "x", 5, [96], [-1], [1.5], list(range(80))]),
    (Imitate, {"target": (5, 6)}, "strength", [0, 2, -1, math.nan, "x"]),
    (Imitate, {"target": (5, 6)}, "top_n", [0, -1, 1.5, "x"]),
    (Inject, {"concepts": 3, "strength": 1.0}, "condition", [5, "x", Condition(99, 0.5), Condition(3, 0.0), Condition(3, math.nan), Condition(3, 0.5, "x")]),
]  # fmt: skip


def operation(rng: random.Random) -> Any:
    known, either = rng.randrange(20), rng.randrange(50)
    window = rng.choice([None, (0, 4), (2, None)])
    condition = (
        Condition(rng.randrange(20), rng.uniform(0.01, 0.9), rng.choice(["max", "mean"]))
        if rng.random() < 0.2
        else None
    )
    return rng.choice(
        [
            Inject(either, rng.uniform(-20, 20), window=window, cutoff=rng.choice([None, 3]), condition=condition),
            Inject((known, 20 + known), rng.uniform(-3, 3), normalized=False, layers=rng.choice([1, (2,), 0])),
            SuppressTokens(either, rng.uniform(0, 5), window=window, condition=condition),
            SetConcepts(
                either,
                rng.uniform(-1, 2),
                mode=rng.choice(["set", "scale", "add"]),
                keep_epsilon=rng.random() < 0.5,
                window=window,
            ),
            Imitate(
                tuple(rng.randrange(PAD) for _ in range(rng.randint(1, 6))),
                strength=rng.uniform(0.1, 1),
                keep_epsilon=rng.random() < 0.5,
            ),
            Amplify(either, rng.uniform(0, 8), cutoff=rng.choice([2, None])),
            Suppress(known, strength=-rng.uniform(0, 7), token_strength=rng.uniform(0, 9)),
        ]
    )


def steering_call(rng: random.Random) -> Call:
    prompt = ids(rng, 1, rng.randint(1, 12))
    if rng.random() < 0.5:
        kind, good, name, values = rng.choice(WRONG_OPERATIONS)
        given = {**good, name: rng.choice(values)}
        return Call(
            lambda: model().generate(prompt, max_new_tokens=3, steering=kind(**given)),
            (kind.__name__, given),
            (name, "condition."),
        )
    operations = tuple(operation(rng) for _ in range(rng.randint(1, 3)))
    settings = {"max_new_tokens": rng.randint(1, 12), "seed": 1}

    def check(output: torch.Tensor) -> None:
        with model().steer(*operations):
            expect(torch.equal(model().generate(prompt, **settings), output), "attached operations give another text")
        with tempfile.TemporaryDirectory() as folder:
            recipe = SteeringRecipe.of(model(), *operations) if hasattr(SteeringRecipe, "of") else None
            if recipe is not None:
                recipe.save(Path(folder) / "recipe.json")
                again = SteeringRecipe.load(Path(folder) / "recipe.json")
                expect(again == recipe, "a recipe's file and back differ")
        rows = model().generate(
            prompt.repeat(2, 1), max_new_tokens=settings["max_new_tokens"], seed=[1, 1], steering=[operations, None]
        )
        expect(torch.equal(rows[0][: output.shape[1]], output[0]), "a steered row beside a plain one differs")

    return Call(lambda: model().generate(prompt, steering=operations, **settings), (prompt, operations), (), check)


# Files


def _as_lines(values: Any) -> str:
    return "\n".join(map(json.dumps, values))


@dataclass
class Artefact:
    """A kind of file: what a good one says, its loader, its name, and how it is written."""

    values: Any
    load: Callable[[Path], Any]
    name: str
    write: Callable[[Any], str] = json.dumps


def _mutate(rng: random.Random, values: Any) -> tuple[Any, str]:
    """A copy of JSON values with one of them deleted or replaced, and where."""
    values = copy.deepcopy(values)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(values)
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.3:
        del node[key]
        return values, f"without {key}"
    node[key] = rng.choice([None, -1, 1.5, 10**30, "x", "", [], {}, [None], {"a": 1}, True, "\x00", [[[]]]])
    return values, f"{key} = {node[key]!r}"


@cache
def artefacts() -> dict[str, Artefact]:
    """Good files, as the package writes them."""
    nano, prompt = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32), "The gardener"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        SteeringRecipe.of(model(), Inject(3, 1.0, condition=Condition(3, 0.5)), Suppress(4, (5,))).save(
            folder / "recipe.json"
        )
        explain_text(nano, tokenizer(), prompt, " watered the rose.").save(folder / "explanation.json")
        audit(nano, tokenizer(), prompt, catalog=ConceptCatalog.for_model(nano), max_new_tokens=4, seed=0).save(
            folder / "audit.json"
        )
        prompts = [
            AttackPrompt(id="a", text="Tell me.", harmful=True),
            AttackPrompt(id="b", text="Hello.", harmful=False),
        ]
        AttackReport(tuple(AttackRecord("plain", one, "No.", "refused") for one in prompts)).save(
            folder / "attacks.json"
        )
        values = {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}
    labels = json.loads((Path(checkpoint()) / "concept_labels.json").read_text())
    return {
        "recipe": Artefact(values["recipe"], SteeringRecipe.load, "recipe.json"),
        "explanation": Artefact(values["explanation"], Explanation.load, "explanation.json"),
        "audit": Artefact(values["audit"], Audit.load, "audit.json"),
        "attack report": Artefact(values["attacks"], AttackReport.load, "attacks.json"),
        "labels": Artefact(labels, ConceptCatalog.from_pretrained, "concept_labels.json"),
        "prompts": Artefact(
            [{"id": one.id, "text": one.text, "harmful": one.harmful} for one in prompts],
            read_prompts,
            "prompts.jsonl",
            _as_lines,
        ),
    }


def loader_call(rng: random.Random) -> Call:
    kind = rng.choice(list(artefacts()))
    one = artefacts()[kind]
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / one.name
    if rng.random() < 0.2:
        content, shown = rng.choice(
            [
                (b"", "empty"),
                (b"[", "cut"),
                (b"\xff\xfe", "no UTF-8"),
                (b"[]", "a list"),
                (b"null", "null"),
                (b"5", "5"),
                (b'{"a": NaN}', "NaN"),
            ]
        )
        file.write_bytes(content)
    else:
        values, shown = _mutate(rng, one.values)
        file.write_text(one.write(values))

    def run() -> Any:
        with folder:
            return one.load(file)

    def check(loaded: Any) -> None:
        repr(loaded)

    return Call(run, (kind, shown), (one.name,), check)


# Command line

WORDS = ["export", "generate", "explain", "concepts", "trace", "audit", "attack", "demo", "search", "info", "--model", "--seed", "--steps", "--steer", "--json", "nothing",
         "-1", "0", "x", "", "/nowhere", "--max-new-tokens", "2", "\x00", "--help", "--by", "token", "--chat", "--greedy", "The rose", "../..", "1e9", "--k", "--where", "a=b"]  # fmt: skip


def cli_call(rng: random.Random) -> Call:
    arguments = [rng.choice(WORDS) for _ in range(rng.randint(1, 6))]
    arguments = [word for word in arguments if word != "demo"]  # which runs for minutes
    if "generate" in arguments[:1] or "explain" in arguments[:1]:
        arguments += ["--max-new-tokens", "2"]

    def run() -> Any:
        out, err = io.StringIO(), io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = command_line(arguments)
            except SystemExit as stop:
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    def check(result: Any) -> None:
        code, _, err = result
        expect(code in (0, 2), f"exit code {code}")
        expect("Traceback" not in err, "a traceback")
        expect((code == 2) == ("error:" in err), f"code {code} with {err[-200:]!r}")

    return Call(run, arguments, (), check)


FAMILIES: dict[str, Callable[[random.Random], Call]] = {
    "config": config_call, "generate": generate_call, "forward": forward_call, "tokenizer": tokenizer_call,
    "steering": steering_call, "loaders": loader_call, "cli": cli_call,
}  # fmt: skip


def try_call(call: Call) -> str | None:
    """What is wrong with what a call does, `None` if nothing is."""
    try:
        result = call.run()
    except CLEAR as error:
        text = str(error)
        if not call.wrong:
            return f"a good call raised {type(error).__name__}: {text[:300]}"
        named = any(name in text for name in call.wrong)
        return None if named else f"unclear {type(error).__name__}: {text[:300]} (wrong: {call.wrong[:3]})"
    except HangError:
        return "hangs"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} at {Path(where.filename).name}:{where.lineno}"
    if call.wrong and call.check is None:
        return f"accepted, with {result!r:.200}"
    try:
        if call.check is not None:
            call.check(result)
    except FindingError as finding:
        return str(finding)
    except HangError:
        return "hangs in its check"
    except Exception as error:
        return f"in its check {type(error).__name__}: {str(error)[:300]}"
    return None


def _stop(*_: Any) -> None:
    raise HangError


def findings(family: str, calls: int, seed: int) -> Iterator[tuple[int, Any, str]]:
    """The number, the arguments and the fault of each call of a family that does wrong."""
    before = hooks_of(model())
    outer = signal.signal(signal.SIGALRM, _stop)
    try:
        for number in range(calls):
            call = FAMILIES[family](random.Random(f"{family} {seed} {number}"))
            signal.alarm(SECONDS)
            fault = try_call(call)
            signal.alarm(0)
            if fault is None and hooks_of(model()) != before:
                fault = "hooks are left"
            if fault is not None:
                yield number, call.shown, fault
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, outer)


# Of a hundred calls, so many are of each family.
SHARES = {"config": 15, "generate": 10, "forward": 15, "tokenizer": 20, "steering": 10, "loaders": 27, "cli": 3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES)
    options = parser.parse_args()
    bad = 0
    for family, share in SHARES.items() if options.family is None else [(options.family, 100)]:
        calls = options.calls * share // 100
        found = list(findings(family, calls, options.seed))
        for number, shown, fault in found:
            print(f"{family} {number}: {fault}\n    {shown!r:.600}", flush=True)
        print(f"{family}: {calls} calls, {len(found)} findings", flush=True)
        bad += len(found)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
