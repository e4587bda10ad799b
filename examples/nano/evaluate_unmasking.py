"""
Judge how many tokens a forward pass of steerling-nano can decide before its sentences break.

    python examples/nano/evaluate_unmasking.py --json
    python examples/nano/evaluate_unmasking.py --curve [--plot docs/unmasking.svg]

Openings of held-out documents are continued greedily, one token a step and by an adaptive rule of commitment (see
evaluate.py for the openings and for what counts as a sentence). One JSON object goes to stdout, progress to stderr:

tokens_per_forward   decided tokens over forward passes, all continuations together, by the rule
parse_rate           share of complete sentences that the grammar's parser accepts, by the rule
parse_rate_single    the same with one token a step
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from evaluate import BATCH, CONTINUED_BY, PROMPT_LENGTHS, SEED, exact_text, held_out_opening, load
from metrics import Continuation, cut_at_turn, parse_all, parse_share
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
# What --curve tries of each rule, from careful to fast; steps share them out evenly.
CURVE: dict[str, tuple[str, tuple[float, ...]]] = {
    "confidence": ("steps", (72, 36, 24, 18, 12, 9)),
    "threshold": ("threshold", (0.99, 0.95, 0.9, 0.8, 0.6)),
    "factor": ("factor", (0.25, 0.5, 1.0, 2.0)),
    "entropy_bound": ("entropy_bound", (0.01, 0.05, 0.1, 0.3, 0.6)),
}
CHOSEN = ("entropy_bound", 0.1)


def make_openings(tokenizer, samples: int) -> list[tuple[Any, list[int]]]:
    """Held-out documents and their first tokens, of the lengths that evaluate.py takes in turn."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rng = random.Random(SEED + 2)
    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(samples)]
    return [held_out_opening(rng, encode, length) for length in lengths]


def judge(model, tokenizer, openings, name: str, **settings) -> tuple[float, float]:
    """Return tokens a forward pass, and the share of sentences that parse."""
    parses, tokens, forwards = [], 0.0, 0.0
    for at in tqdm(range(0, len(openings), BATCH), desc=name, file=sys.stderr):
        batch = openings[at : at + BATCH]
        inputs = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=CONTINUED_BY, do_sample=False, return_dict_in_generate=True, **settings
        )
        decided = (output.step_map >= 0).sum(dim=1)
        tokens += float(decided.sum())
        forwards += float((decided / output.tokens_per_forward).sum())
        width = inputs["input_ids"].shape[1]
        for (source, ids), row in zip(batch, output.sequences[:, width:].tolist()):
            text, ended = cut_at_turn(exact_text(tokenizer, row))
            parses.append(parse_all(Continuation(source, exact_text(tokenizer, ids), text, ended)))
    return tokens / forwards, parse_share(parses)


def settings_of(rule: str, value: float) -> dict[str, Any]:
    """The arguments of generate() for a rule and the value of its key."""
    key = CURVE[rule][0]
    return {"unmasking": rule, key: int(value) if key == "steps" else value}


def curve(model, tokenizer, openings) -> dict[str, list[dict[str, float]]]:
    """Tokens a forward pass and parse rate of every rule at every value."""
    found: dict[str, list[dict[str, float]]] = {}
    for rule, (key, values) in CURVE.items():
        for value in values:
            per_forward, parsed = judge(model, tokenizer, openings, f"{rule} {value:g}", **settings_of(rule, value))
            point = {key: value, "tokens_per_forward": round(per_forward, 3), "parse_rate": round(parsed, 4)}
            found.setdefault(rule, []).append(point)
    return found


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the parse rate against tokens a forward pass, a line for each rule."""
    sys.path.append(str(ROOT / "benchmarks"))
    from plot import line_plot

    lines = {rule: [(p["tokens_per_forward"], p["parse_rate"]) for p in points] for rule, points in curves.items()}
    title = "steerling-nano: sentences that parse, against tokens a forward pass"
    path.write_text(line_plot(lines, title=title, x="tokens a forward pass", y="parse rate"))


def main() -> None:
    """Run the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    arguments.add_argument("--model", default=str(ROOT / "configs" / "steerling-nano"), metavar="FOLDER")
    arguments.add_argument("--samples", type=int, default=200, metavar="N", help="openings")
    arguments.add_argument("--rule", default=CHOSEN[0], choices=list(CURVE))
    arguments.add_argument("--value", type=float, help="of the rule's key; by default what the README says")
    arguments.add_argument("--curve", action="store_true", help="try every rule at several values")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve as SVG")
    given = arguments.parse_args()
    if given.samples < 1:
        arguments.error(f"--samples is {given.samples}; give 1 or more")
    if given.value is None and given.rule != CHOSEN[0]:
        arguments.error(f"--rule {given.rule} needs a --value")
    model, tokenizer = load(given.model)
    torch.manual_seed(0)
    openings = make_openings(tokenizer, given.samples)
    if given.curve:
        curves = curve(model, tokenizer, openings)
        print(json.dumps(curves, indent=1))
        if given.plot:
            plot(curves, given.plot)
        return
    value = CHOSEN[1] if given.value is None else given.value
    single = judge(model, tokenizer, openings, "one a step")[1]
    per_forward, parsed = judge(model, tokenizer, openings, given.rule, **settings_of(given.rule, value))
    result = {"tokens_per_forward": per_forward, "parse_rate": parsed, "parse_rate_single": single}
    if given.json:
        print(json.dumps({name: round(number, 4) for name, number in result.items()}))
    else:
        print(f"{per_forward:.2f} tokens a forward pass; {parsed:.1%} parse, {single:.1%} with one token a step")


if __name__ == "__main__":
    main()
