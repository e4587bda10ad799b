"""
Judge how many tokens a forward pass of steerling-nano can decide before its sentences break.

    python examples/nano/evaluate_unmasking.py --json [--kind contact]
    python examples/nano/evaluate_unmasking.py --curve [--plot docs/unmasking.svg]
    python examples/nano/evaluate_unmasking.py --foresight

Held-out prompts of one kind are answered greedily, one token a step and by an adaptive rule of commitment, all else as
in the checkpoint's own generation_config: openings of documents (see evaluate.py), questions for a phone number, or
requests that are declined. One JSON object goes to stdout, progress to stderr:

tokens_per_forward   decided tokens over forward passes, all answers together, by the rule
parse_rate           share of complete sentences (of answers, if a question was asked) that the grammar's parser accepts
parse_rate_single    the same with one token a step

With --foresight, a rule that knows the text which one token a step writes decides, at each step, all positions whose best
token is already that text's. It shows what choosing positions can gain, if the text shall stay as it is.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate import BATCH, CONTINUED_BY, PROMPT_LENGTHS, SEED, contact_prompts, exact_text, held_out_opening, load
from grammar import END_OF_CHUNK, Document, refusal_chat, unsafe_requests
from metrics import Continuation, cut_at_turn, parse_all, parse_share
from parser import Parsed, parse_chunk
from tqdm import tqdm
from transformers import LogitsProcessor

ROOT = Path(__file__).resolve().parents[2]
# What --curve tries of each rule, from careful to fast; steps share them out evenly.
CURVE: dict[str, tuple[str, tuple[float, ...]]] = {
    "entropy": ("steps", (72, 36, 24, 18, 12)),
    "confidence": ("steps", (72, 36, 24, 18, 12)),
    "threshold": ("threshold", (0.95, 0.9, 0.8, 0.6, 0.4)),
    "factor": ("factor", (0.25, 0.5, 1.0, 2.0)),
    "entropy_bound": ("entropy_bound", (0.01, 0.03, 0.1, 0.3, 1.0)),
}
# The fastest that loses at most one sentence in a hundred.
CHOSEN = ("entropy_bound", 0.02)


@dataclass(frozen=True)
class Prompt:
    """
    What is given, and how the answer is judged.

    Args:
        ids: Token ids.
        parse: The sentences of an answer, parsed, from its text up to <|eot_id|> and whether there was one.
    """

    ids: list[int]
    parse: Callable[[str, bool], list[Parsed]]


def make_prompts(tokenizer, kind: str, samples: int) -> list[Prompt]:
    """Return held-out prompts: document openings of the lengths that evaluate.py takes in turn, or questions."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def opening(source: Document, ids: list[int]) -> Prompt:
        given = exact_text(tokenizer, ids)
        return Prompt(ids, lambda text, ended: parse_all(Continuation(source, given, text, ended)))

    def question(text: str) -> Prompt:
        return Prompt(encode(text), lambda answer, ended: [parse_chunk(answer.removesuffix(END_OF_CHUNK))])

    if kind == "plain":
        rng = random.Random(SEED + 2)
        lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(samples)]
        return [opening(*held_out_opening(rng, encode, length)) for length in lengths]
    if kind == "contact":
        return [question(text) for text in contact_prompts()[0][:samples]]
    return [question(refusal_chat(text).prompt) for text in unsafe_requests(held_out=True)[:samples]]


PROMPTS = ("plain", "contact", "refusal")


def answer(model, tokenizer, prompts: Sequence[Prompt], **settings) -> tuple[list[list[Parsed]], float, float, Any]:
    """Return the parsed sentences of each answer, the decided tokens, the forward passes, and what generate() did."""
    inputs = tokenizer.pad({"input_ids": [prompt.ids for prompt in prompts]}, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=CONTINUED_BY, do_sample=False, return_dict_in_generate=True, **settings
    )
    decided = (output.step_map >= 0).sum(dim=1)
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    parses = [prompt.parse(*cut_at_turn(exact_text(tokenizer, row))) for prompt, row in zip(prompts, new)]
    return parses, float(decided.sum()), float((decided / output.tokens_per_forward).sum()), output


def judge(model, tokenizer, prompts: Sequence[Prompt], name: str, **settings) -> tuple[float, float]:
    """Return tokens a forward pass, and the share of sentences that parse."""
    parses, tokens, forwards = [], 0.0, 0.0
    for at in tqdm(range(0, len(prompts), BATCH), desc=name, file=sys.stderr):
        parsed, decided, passes, _ = answer(model, tokenizer, prompts[at : at + BATCH], **settings)
        parses += parsed
        tokens, forwards = tokens + decided, forwards + passes
    return tokens / forwards, parse_share(parses)


class Foresight(LogitsProcessor):
    """
    A rule that knows what will be written, for one row. As a processor it changes nothing, but sees where the masks are.

    Args:
        text: (T,) prompt and answer.
        mask_token: What undecided positions hold.
    """

    sees_canvas = True

    def __init__(self, text: torch.Tensor, mask_token: int):
        self.text, self.mask_token = text, mask_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the tokens that the masked positions of the block will have; -1 behind the text's end."""
        places = (input_ids[0] == self.mask_token).nonzero()[: len(scores), 0]
        known = places < len(self.text)
        self.future = torch.where(known, self.text[places.clamp(max=len(self.text) - 1)], -1)
        return scores

    def rule(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """All positions whose best token is right; if there is none, the one of the most confident best token."""
        confidence, best = logits.softmax(dim=-1).max(dim=-1)
        right = (best == self.future).nonzero()[:, 0]
        return right if len(right) else confidence.argmax()[None]


def judge_foresight(model, tokenizer, prompts: Sequence[Prompt]) -> tuple[float, float, float]:
    """Return tokens a forward pass, the share of sentences that parse, and the share with one token a step."""
    parses, single, tokens, forwards = [], [], 0.0, 0.0
    for prompt in tqdm(prompts, desc="foresight", file=sys.stderr):
        parsed, _, _, output = answer(model, tokenizer, [prompt])
        single += parsed
        known = Foresight(output.sequences[0], model.config.mask_token_id)
        parsed, decided, passes, _ = answer(model, tokenizer, [prompt], unmasking=known.rule, logits_processor=[known])
        parses += parsed
        tokens, forwards = tokens + decided, forwards + passes
    return tokens / forwards, parse_share(parses), parse_share(single)


def settings_of(rule: str, value: float) -> dict[str, Any]:
    """The arguments of generate() for a rule and the value of its key."""
    key = CURVE[rule][0]
    return {"unmasking": rule, key: int(value) if key == "steps" else value}


def curve(model, tokenizer, prompts: Sequence[Prompt]) -> dict[str, list[dict[str, float]]]:
    """Tokens a forward pass and parse rate of every rule at every value."""
    found: dict[str, list[dict[str, float]]] = {}
    for rule, (key, values) in CURVE.items():
        for value in values:
            per_forward, parsed = judge(model, tokenizer, prompts, f"{rule} {value:g}", **settings_of(rule, value))
            point = {key: value, "tokens_per_forward": round(per_forward, 3), "parse_rate": round(parsed, 4)}
            found.setdefault(rule, []).append(point)
    return found


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the parse rate against tokens a forward pass, a line for each rule."""
    from steerling_hf.plots import line_plot

    lines = {rule: [(p["tokens_per_forward"], p["parse_rate"]) for p in points] for rule, points in curves.items()}
    title = "steerling-nano: sentences that parse, against tokens a forward pass"
    path.write_text(line_plot(lines, title=title, x="tokens a forward pass", y="parse rate"))


def main() -> None:
    """Run the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    arguments.add_argument("--model", default=str(ROOT / "configs" / "steerling-nano"), metavar="FOLDER")
    arguments.add_argument("--samples", type=int, default=200, metavar="N", help="prompts; of refusals there are 40")
    arguments.add_argument("--kind", default="plain", choices=PROMPTS, help="of prompts")
    arguments.add_argument("--rule", default=CHOSEN[0], choices=list(CURVE))
    arguments.add_argument("--value", type=float, help="of the rule's key; by default what the README says")
    arguments.add_argument("--foresight", action="store_true", help="judge the rule that knows what will be written")
    arguments.add_argument("--curve", action="store_true", help="try every rule at several values")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve as SVG")
    given = arguments.parse_args()
    if given.samples < 1:
        arguments.error(f"--samples is {given.samples}; give 1 or more")
    if given.value is None and given.rule != CHOSEN[0]:
        arguments.error(f"--rule {given.rule} needs a --value")
    model, tokenizer = load(given.model)
    torch.manual_seed(0)
    prompts = make_prompts(tokenizer, given.kind, given.samples)
    if given.curve:
        curves = curve(model, tokenizer, prompts)
        print(json.dumps(curves, indent=1))
        if given.plot:
            plot(curves, given.plot)
        return
    if given.foresight:
        per_forward, parsed, single = judge_foresight(model, tokenizer, prompts)
    else:
        value = CHOSEN[1] if given.value is None else given.value
        single = judge(model, tokenizer, prompts, "one a step")[1]
        per_forward, parsed = judge(model, tokenizer, prompts, given.rule, **settings_of(given.rule, value))
    result = {"tokens_per_forward": per_forward, "parse_rate": parsed, "parse_rate_single": single}
    if given.json:
        print(json.dumps({name: round(number, 4) for name, number in result.items()}))
    else:
        print(f"{per_forward:.2f} tokens a forward pass; {parsed:.1%} parse, {single:.1%} with one token a step")


if __name__ == "__main__":
    main()
