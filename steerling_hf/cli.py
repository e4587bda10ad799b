"""The command `steerling-hf`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from . import demo, loading
from .audit_commands import add_attack, add_audit
from .checkpoints import checkpoint_names
from .chunks import KINDS
from .command_options import add_prompt
from .concept_commands import add_concepts
from .explaining import explain
from .explanation import check_target
from .exporting import export
from .outlines import explanation_outline
from .recipe import SteeringRecipe
from .side_by_side import side_by_side
from .trace_commands import add_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        arguments: What follows the command's name; by default that of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is one line on standard error.
    """
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)  # so that an interrupted export cleans up after itself
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steerling-hf",
        description="Steerling, the interpretable masked-diffusion language model, in transformers.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    names = ", ".join(checkpoint_names())

    exporting = commands.add_parser("export", help="write a checkpoint as a Hub folder, code included")
    exporting.add_argument("source", metavar="SOURCE", help=f"a folder with released weights, or one of {names}")
    exporting.add_argument("folder", metavar="FOLDER", help="where to write; must not exist yet")
    exporting.add_argument("--weights", metavar="PATH", help="a folder to take the weights from, in place of SOURCE")
    how = exporting.add_mutually_exclusive_group()
    how.add_argument("--link", dest="copy", action="store_false", help="hard-link the weights (default)")
    how.add_argument("--copy", dest="copy", action="store_true", help="copy the weights")
    exporting.add_argument(
        "--check", action="store_true", help="load the result in a fresh interpreter without this package"
    )
    exporting.add_argument("--repo-id", metavar="OWNER/NAME", help="the Hub repository that the card names")
    exporting.set_defaults(run=_export, copy=False)

    generating = commands.add_parser("generate", help="go on from a text, or answer a message")
    add_prompt(generating)
    generating.add_argument("--steps", type=int, metavar="N", help="denoising steps in all (default: one a token)")
    generating.add_argument("--greedy", action="store_true", help="take the most probable token each time")
    generating.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")
    generating.add_argument(
        "--steer", metavar="RECIPE", help="show the text under this recipe too: a file, folder or Hub repository"
    )
    generating.set_defaults(run=_generate)

    add_concepts(commands)
    add_trace(commands)

    explaining = commands.add_parser("explain", help="answer, and say which concepts and inputs made each token")
    add_prompt(explaining)
    explaining.add_argument("--seed", type=int, metavar="N", help="seed of the sampling (default: no sampling)")
    explaining.add_argument("--steer", metavar="RECIPE", help="under this recipe: a file, folder or Hub repository")
    explaining.add_argument(
        "--by", choices=KINDS, default="chunk", help="how to cut the answer (default: %(default)s)"
    )
    explaining.add_argument("--no-inputs", dest="inputs", action="store_false", help="concepts only, which is quick")
    explaining.add_argument("--belief", action="store_true", help="measure how far the inputs' scores can be believed")
    explaining.add_argument(
        "--html",
        dest="files",
        action="append",
        metavar="FILE",
        help="write the report: one page that needs no network",
    )
    explaining.add_argument(
        "--save", dest="files", action="append", metavar="FILE", help="write it as .json or .parquet, to load it again"
    )
    explaining.set_defaults(run=_explain)

    add_audit(commands)
    add_attack(commands)

    showing = commands.add_parser("demo", help="let steerling-nano write, and name the concepts behind each sentence")
    showing.set_defaults(run=_demo)
    return parser


def _export(options: argparse.Namespace) -> None:
    folder = export(
        options.source,
        options.folder,
        weights=options.weights,
        copy=options.copy,
        check=options.check,
        repo_id=options.repo_id,
    )
    has_weights = any(folder.glob("*.safetensors"))
    print(f"wrote {folder}" + ("" if has_weights else " (code and configuration; no weights)"))
    if options.check:
        print("checked: it loads in a fresh interpreter without steerling_hf")


def _generate(options: argparse.Namespace) -> None:
    recipe = SteeringRecipe.load(options.steer) if options.steer else None
    model, tokenizer = loading.load(options.model)
    # A seed asks for sampling, whatever the checkpoint's own settings say.
    sampling = False if options.greedy else options.seed is not None or None
    chosen = {"steps": options.steps, "seed": options.seed, "do_sample": sampling}

    def write(steering: SteeringRecipe | None) -> str:
        ids = loading.write_on(
            model,
            tokenizer,
            options.text,
            chat=options.chat,
            max_new_tokens=options.max_new_tokens,
            steering=steering,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        return tokenizer.decode(ids, skip_special_tokens=True)

    if recipe is None:
        print(write(None))
    else:
        recipe.check(model)
        print(side_by_side({"without steering": write(None), recipe.description or "steered": write(recipe)}))


def _explain(options: argparse.Namespace) -> None:
    for file in options.files or []:
        check_target(file)
    recipe = SteeringRecipe.load(options.steer) if options.steer else None
    model, tokenizer = loading.load(options.model)
    explanation = explain(
        model,
        tokenizer,
        [{"role": "user", "content": options.text}] if options.chat else options.text,
        by=options.by,
        catalog=loading.catalog_of(model),
        inputs=options.inputs,
        belief=options.belief,
        progress=sys.stderr.isatty(),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.seed is not None,
        steering=recipe,
        **({} if options.seed is None else {"seed": options.seed}),
    )
    print(explanation_outline(explanation))
    for file in options.files or []:
        print(f"wrote {explanation.save(file)}")


def _demo(options: argparse.Namespace) -> None:
    demo.main()


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__
