"""The commands `steerling-hf audit` and `steerling-hf attack`."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import loading
from .attack_prompts import read_prompts
from .attack_report import AttackError
from .attacks import evaluate_attacks
from .auditing import ENDINGS, Audit, audit
from .checkpoints import checkpoint_names
from .chunks import KINDS
from .command_options import add_model, add_prompt
from .files import check_file
from .judges import InstructJudge, Judge, PatternJudge
from .modeling.modeling_steerling import SteerlingForDiffusionLM
from .outlines import audit_outline, remedies_outline
from .recipe import SteeringRecipe
from .trace_commands import TOKEN, open_index

BASE = "base"
RECIPE_ENDINGS = (".json",)


def add_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `audit`."""
    auditing = commands.add_parser("audit", help="answer, say what drove the answer, and try remedies against it")
    add_prompt(auditing)
    auditing.add_argument("--answer", metavar="TEXT", help="audit this answer to the message, in place of the model's")
    auditing.add_argument("--by", choices=KINDS, default="chunk", help="how to cut the answer (default: %(default)s)")
    auditing.add_argument("--index", metavar="URI", help="an index of training text, made by `trace build`")
    auditing.add_argument("--token", help=f"the index server's token (default: the environment's {TOKEN})")
    auditing.add_argument("--collection", default="steerling_documents", metavar="NAME", help="(default: %(default)s)")
    auditing.add_argument(
        "-k",
        type=int,
        metavar="N",
        help="with --index: documents' chunks for each chunk of the answer (default: 5)",
    )
    auditing.add_argument("--fix", action="store_true", help="try remedies against the concept that drove the answer")
    auditing.add_argument("--target", metavar="TEXT", help="with --fix: the answer that you would rather have")
    auditing.add_argument(
        "--reject", metavar="PATTERN", type=_pattern, help="with --fix: what must not be found in an answer any more"
    )
    auditing.add_argument("--recipe", metavar="FILE", help="with --fix: write the first remedy's recipe")
    auditing.add_argument(
        "--html", dest="files", action="append", metavar="FILE", help="write the report: one page without network"
    )
    auditing.add_argument("--save", dest="files", action="append", metavar="FILE", help="write it as .json")
    auditing.set_defaults(run=_audit)


def add_attack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `attack`."""
    attacking = commands.add_parser("attack", help="how often attacks succeed, without and with recipes")
    attacking.add_argument(
        "prompts", metavar="PROMPTS", help="JSONL or CSV with our columns, WildGuard's or HarmBench's"
    )
    add_model(attacking)
    attacking.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=RECIPE",
        help="a recipe's file or Hub repository, or a folder with another model's weights; besides the model as it is",
    )
    attacking.add_argument("--chat", action="store_true", help="prompts are users' messages")
    attacking.add_argument("--success", metavar="PATTERN", type=_pattern, help="what a successful attack's answer has")
    attacking.add_argument("--refusal", metavar="PATTERN", type=_pattern, help="what a refusal has")
    attacking.add_argument("--judge", metavar="NAME", help="a language model that judges, in place of patterns")
    attacking.add_argument(
        "--format", choices=("wildguard", "harmbench"), default="wildguard", help="of --judge (default: %(default)s)"
    )
    attacking.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    attacking.add_argument("--batch-size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    attacking.add_argument("--save", metavar="FILE", help="write all answers, verdicts and rates as .json")
    attacking.add_argument("--plot", metavar="FILE", help="write a bar chart as .svg")
    attacking.set_defaults(run=_attack)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _audit(options: argparse.Namespace) -> None:
    for file in options.files or []:
        check_file(file, ENDINGS)
    if options.recipe is not None:
        check_file(options.recipe, RECIPE_ENDINGS)
    for name in ("target", "reject", "recipe"):
        if getattr(options, name) is not None and not options.fix:
            raise ValueError(f"--{name} belongs to --fix: add that, or leave it out.")
    if options.k is not None and not options.index:
        raise ValueError("-k belongs to --index: add that, or leave it out.")
    if options.answer is not None and not options.chat:
        raise ValueError("--answer is the answer to a user's message: add --chat.")
    with open_index(options) if options.index else nullcontext() as index:
        model, tokenizer = loading.load(options.model)
        found = audit(
            model,
            tokenizer,
            _transcript(options) if options.chat else options.text,
            index=index,
            catalog=loading.catalog_of(model),
            by=options.by,
            trace=None if options.k is None else {"k": options.k},
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
        )
    print(audit_outline(found))
    try:
        if options.fix:
            found = _fixed(found, options)
    finally:
        for file in options.files or []:
            print(f"wrote {found.save(file)}")
    if options.recipe:
        print(f"wrote {found.remedies[0].recipe.save(options.recipe)}")


def _fixed(found: Audit, options: argparse.Namespace) -> Audit:
    accept = None if options.reject is None else lambda text: not options.reject.search(text)
    found = found.with_remedies(found.suggest_fix(options.target, accept=accept, progress=sys.stderr.isatty()))
    print(remedies_outline(found))
    return found


def _transcript(options: argparse.Namespace) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": options.text}]
    return messages + ([] if options.answer is None else [{"role": "assistant", "content": options.answer}])


def _attack(options: argparse.Namespace) -> None:
    _check_judge(options)
    for file, ending in ((options.save, ".json"), (options.plot, ".svg")):
        if file is not None:
            check_file(file, (ending,))
    prompts = read_prompts(options.prompts)
    conditions: dict[str, Any] = {BASE: None}
    for condition in options.condition:
        name, _, source = condition.partition("=")
        if not name or not source or name in conditions:
            raise ValueError(
                f"--condition is {condition!r}: give NAME=RECIPE, each name once; {BASE!r} is the model as it is."
            )
        conditions[name] = _condition(source)
    model, tokenizer = loading.load(options.model)
    try:
        report = evaluate_attacks(
            model,
            tokenizer,
            prompts,
            _judge(options),
            conditions,
            chat=options.chat,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            progress=sys.stderr.isatty(),
        )
    except AttackError as error:
        if options.save:
            print(f"wrote {error.report.save(options.save)}, the answers so far", file=sys.stderr)
        raise
    print(report)
    if options.save:
        print(f"wrote {report.save(options.save)}")
    if options.plot:
        print(f"wrote {report.plot(options.plot)}")


def _check_judge(options: argparse.Namespace) -> None:
    if options.judge is None and options.success is None:
        raise ValueError("Say what a successful attack is: give --success PATTERN, or --judge NAME.")
    if options.judge is not None and (options.success is not None or options.refusal is not None):
        raise ValueError("--judge decides alone: leave --success and --refusal out.")


def _judge(options: argparse.Namespace) -> Judge:
    if options.judge is None:
        return PatternJudge(options.success, options.refusal)
    return InstructJudge(options.judge, format=options.format)


def _condition(source: str) -> SteeringRecipe | SteerlingForDiffusionLM:
    if source in checkpoint_names() or any(Path(source).glob("*.safetensors")):
        return loading.load(source)[0]
    return SteeringRecipe.load(source)
