"""Runs our model and the reference side by side, on the recorded cases and on weights drawn anew, and prints a table.

    python tests/reference/live.py [--draws 3] [--seed 0]

Needs the package `steerling` 0.2.0 (README.md beside this file). Ours is loaded from a folder by the Auto classes, in
turn from the flat and the nested form; the reference is built by its own constructors from the same numbers. Exits
with status 1 if an output differs by more than 1e-5 of its maximum, if a top-k index differs, or if a generation
differs, except where rounding decides: top-k neighbours closer than 1e-5, or a generation that hung on less than 1e-5
(see Trace in oracle.py). The table counts such positions and marks such generations.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from cases import (
    ATTRIBUTED_CASES,
    ATTRIBUTED_GENERATIONS,
    ATTRIBUTED_POINTS,
    CASES,
    GENERATIONS,
    OPERATIONS,
    STEERED_CASES,
    STEERED_FORWARDS,
    STEERED_GENERATIONS,
    Case,
    Generation,
    case_named,
    make_input,
    make_prompt,
    make_weights,
)
from compare import (
    TOLERANCE,
    differences,
    generation_disagreement,
    our_generation,
    our_output,
    our_outputs,
    our_steered_logits,
    relative_difference,
)
from folders import write_folder
from oracle import (
    reference_attributions,
    reference_for,
    reference_generation,
    reference_input_attributions,
    reference_outputs,
    reference_steered_outputs,
)
from steerling_hf.modeling.steering_steerling import operation_from_dict
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from steerling_hf.input_attribution import attribute_inputs  # the package registers the Auto classes

TOO_CLOSE = 1e-5
STORAGE = (
    {"form": "flat", "shards": 1, "tied": "both"},
    {"form": "nested", "shards": 3, "tied": "lm_head"},
    {"form": "flat", "shards": 2, "tied": "tok_emb"},
    {"form": "nested", "shards": 1, "tied": "both"},
)
COLUMNS = (
    "logits",
    "logits_with_concepts",
    "hidden",
    "known",
    "unknown",
    "composed",
    "known_weights",
    "unknown_weights",
)


def our_model(case: Case, turn: int) -> torch.nn.Module:
    """Our model of a case, loaded from a folder of the form whose turn it is."""
    weights = make_weights(case.config, case.seed, case.weight_gain)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), case.config, weights, **STORAGE[turn % len(STORAGE)])
        return AutoModelForCausalLM.from_pretrained(folder)


def compare_case(case: Case, turn: int) -> tuple[str, bool]:
    """A row of the table, and whether the case agrees."""
    ids = make_input(case)
    theirs = reference_outputs(reference_for(case), ids)
    ours = our_outputs(our_model(case, turn), ids)
    clear = torch.ones_like(ids, dtype=torch.bool)
    for name in theirs.keys() & {"known_gap", "unknown_gap"}:
        clear &= theirs[name] > TOO_CLOSE
    ours, theirs = ({name: tensor[clear] for name, tensor in outputs.items()} for outputs in (ours, theirs))
    found = differences(ours, theirs)
    wrong = sum(
        int((ours[name] != theirs[name]).any(-1).sum())
        for name in theirs.keys() & {"known_indices", "unknown_indices"}
    )
    agrees = wrong == 0 and all(difference < TOLERANCE for difference in found.values())
    numbers = " ".join(f"{found[name]:10.1e}" if name in found else " " * 10 for name in COLUMNS)
    indices = f"{'equal' if wrong == 0 else f'{wrong} WRONG':>9} {int((~clear).sum()):6}"
    row = f"{case.name:30} {case.seed:5} {STORAGE[turn % len(STORAGE)]['form']:7} {numbers} {indices}"
    return f"{row}   {'ok' if agrees else 'DISAGREES'}", agrees


def compare_steered(case: Case, name: str, turn: int) -> tuple[str, bool]:
    """A row of the table of steered logits, and whether they agree."""
    ids, operation = make_input(case), OPERATIONS[name]
    theirs = reference_steered_outputs(reference_for(case), case.config, operation, ids)
    clear = torch.ones_like(ids, dtype=torch.bool)
    if not case.config["use_epsilon_correction"]:  # with it, no rank reaches the logits
        for gap in theirs.keys() & {"known_gap", "unknown_gap"}:
            clear &= theirs[gap] > TOO_CLOSE
    ours = our_steered_logits(our_model(case, turn), operation, ids)
    difference = relative_difference(ours[clear], theirs["logits"][clear])
    agrees = difference < TOLERANCE
    row = f"{case.name:30} {name:20} {case.seed:5} {difference:10.1e} {int((~clear).sum()):6}"
    return f"{row}   {'ok' if agrees else 'DISAGREES'}", agrees


def compare_generation(generation: Generation, case: Case, turn: int) -> tuple[str, bool]:
    """A row of the table, and whether tokens and the steps that decided them agree."""
    operation = OPERATIONS.get(getattr(generation, "operation", ""))
    trace = reference_generation(reference_for(case), case.config, generation, operation)
    settings = {} if operation is None else {"steering": operation_from_dict(operation)}
    ours = our_generation(our_model(case, turn), make_prompt(generation), **generation.settings, **settings)
    theirs = trace.sequence[generation.prompt_length :], trace.step_map
    disagreement = generation_disagreement(ours, theirs, case.config)
    agrees = not disagreement or trace.margin < TOO_CLOSE
    verdict = "equal" if not disagreement else f"{'too close: ' if agrees else 'DIFFERENT: '}{disagreement}"
    return f"{generation.name:72} {case.seed:7} {generation.seed:7} {trace.margin:9.1e}   {verdict}", agrees


def compare_attributed(generation: Generation, case: Case, turn: int) -> tuple[str, bool]:
    """A row of the table of attributions, and whether they agree wherever the generations do."""
    reference, config, start = reference_for(case), case.config, generation.prompt_length
    model = our_model(case, turn)
    output = our_output(model, make_prompt(generation), **generation.settings, output_attributions=True)
    theirs = reference_attributions(reference, config, generation, [])
    name = f"{generation.name:60} {case.seed:7} {generation.seed:7}"
    if output.sequences[0, start:].tolist() != theirs["tokens"].tolist():
        margin = reference_generation(reference, config, generation).margin
        return f"{name} other tokens, margin {margin:.1e}", margin < TOO_CLOSE
    clear = torch.ones(generation.new_tokens, dtype=torch.bool)
    for gap in theirs.keys() & {"known_gap", "unknown_gap"}:
        clear &= theirs[gap] > TOO_CLOSE
    largest = theirs["logits"].abs().max()
    concepts = max(
        float((values[0, start:][clear] - theirs[part][clear]).abs().max() / largest)
        for part, values in output.attributions.items()
        if not part.endswith("_indices")
    )
    inputs = 0.0
    if config["use_epsilon_correction"]:  # the reference's goes past the heads
        theirs = reference_input_attributions(reference, config, generation, [], ATTRIBUTED_POINTS)
        ours = attribute_inputs(model, output.traces[0], method="riemann_right", n_steps=ATTRIBUTED_POINTS)
        inputs = relative_difference(ours.scores, theirs["inputs"])
    agrees = max(concepts, inputs) < TOLERANCE
    row = f"{name} {concepts:10.1e} {inputs:10.1e} {int((~clear).sum()):6}"
    return f"{row}   {'ok' if agrees else 'DISAGREES'}", agrees


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draws", type=int, default=3, help="new weights and inputs per case, besides the recorded ones"
    )
    parser.add_argument("--seed", type=int, default=0, help="changes the new draws")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    offsets = [0] + [1000 * (arguments.seed + 1) + draw for draw in range(arguments.draws)]
    failures = 0

    print("outputs: max |ours - reference| / max |reference| in float32")
    print("indices: of the top-k concepts; close: positions left out, where two concepts rank too close")
    heads = " ".join(f"{name.replace('logits_with_concepts', 'with_heads')[:10]:>10}" for name in COLUMNS)
    print(f"{'case':30} {'seed':>5} {'form':7} {heads} {'indices':>9} {'close':>6}")
    for case in CASES:
        for turn, offset in enumerate(offsets):
            row, agrees = compare_case(dataclasses.replace(case, seed=case.seed + offset), turn)
            print(row, flush=True)
            failures += not agrees

    print("\nsteered logits: max |ours - reference| / max |reference|")
    print(f"{'case':30} {'operation':20} {'seed':>5} {'logits':>10} {'close':>6}")
    for case, name in STEERED_FORWARDS:
        for turn, offset in enumerate(offsets):
            row, agrees = compare_steered(dataclasses.replace(case, seed=case.seed + offset), name, turn)
            print(row, flush=True)
            failures += not agrees

    print("\ngreedy generation: tokens and their order; the smallest relative gap that a decision hung on")
    print(f"{'generation':72} {'weights':>7} {'prompt':>7} {'margin':>9}")
    for generation in [*GENERATIONS, *STEERED_GENERATIONS]:
        for turn, offset in enumerate(offsets):
            case = STEERED_CASES.get(generation.case) or case_named(generation.case)
            case = dataclasses.replace(case, seed=case.seed + offset)
            prompted = dataclasses.replace(generation, seed=generation.seed + offset)
            row, agrees = compare_generation(prompted, case, turn)
            print(row, flush=True)
            failures += not agrees

    print("\nattribution: contributions, and inputs of right Riemann sums; max |ours - reference| / max |reference|")
    print(f"{'generation':60} {'weights':>7} {'prompt':>7} {'concepts':>10} {'inputs':>10} {'close':>6}")
    for generation in ATTRIBUTED_GENERATIONS:
        for turn, offset in enumerate(offsets):
            case = ATTRIBUTED_CASES[generation.case]
            case = dataclasses.replace(case, seed=case.seed + offset)
            prompted = dataclasses.replace(generation, seed=generation.seed + offset)
            row, agrees = compare_attributed(prompted, case, turn)
            print(row, flush=True)
            failures += not agrees

    compared = (CASES, STEERED_FORWARDS, GENERATIONS, STEERED_GENERATIONS, ATTRIBUTED_GENERATIONS)
    total = sum(map(len, compared)) * len(offsets)
    print(f"\n{total - failures} of {total} comparisons agree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
