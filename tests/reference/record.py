"""Runs the reference on every case and writes what it says to outputs/: the recordings that the tests compare with.

    python tests/reference/record.py [attributed]

With the name of a part only this one is recorded anew, and the others stay as they are. Needs the package `steerling` 0.2.0 (see README.md beside this file), which the tests do not. A case on which rounding
could decide an outcome, or whose outputs hardly differ between positions, is refused: choose another seed in cases.py.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from cases import (
    ATTRIBUTED_CASES,
    ATTRIBUTED_CHUNKS,
    ATTRIBUTED_GENERATIONS,
    ATTRIBUTED_POINTS,
    CASES,
    GENERATIONS,
    OPERATIONS,
    STEERED_CASES,
    STEERED_FORWARDS,
    STEERED_GENERATIONS,
    Case,
    case_named,
    fingerprint,
    make_input,
    make_prompt,
    make_weights,
    parameter_shapes,
    recorded_positions,
)
from compare import relative_difference
from oracle import (
    reference_attributions,
    reference_for,
    reference_generation,
    reference_input_attributions,
    reference_outputs,
    reference_steered_outputs,
)
from safetensors.torch import save_file

OUTPUTS = Path(__file__).parent / "outputs"
STEERED = OUTPUTS / "steered"
ATTRIBUTED = OUTPUTS / "attributed"
# Rounding moves a float32 logit here by about 1e-6 and a probability by about 5e-6 of itself.
SMALLEST_RANK_GAP = 2e-5
SMALLEST_DECISION_GAP = 3e-4
SMALLEST_SPREAD = 2e-3
# An operation has to matter: this much of the largest logit, and this many of the tokens.
SMALLEST_EFFECT = 0.05
FEWEST_CHANGED = 10


def demand(holds: bool, case: str, complaint: str) -> None:
    """Stops the recording of a case that could not serve as evidence."""
    if not holds:
        raise SystemExit(f"{case}: {complaint}; choose another seed in cases.py")


def check_spread(case: Case, logits: torch.Tensor) -> float:
    """The smallest relative distance between the logits of two positions that are not alike by construction."""
    rows, ids = logits[0], make_input(case)[0]
    distances = torch.cdist(rows, rows) / rows.norm(dim=-1).mean()
    if not case.config["use_rope"]:  # then the same token in the same block gives the same output, rightly
        block = torch.arange(len(ids)) // case.config["diff_block_size"]
        alike = (ids[:, None] == ids[None, :]) & (block[:, None] == block[None, :])
        distances = distances.masked_fill(alike, float("inf"))
    spread = float(distances.fill_diagonal_(float("inf")).min())
    demand(spread > SMALLEST_SPREAD, case.name, f"two positions differ by {spread:.1e} only")
    return spread


def check_ranks(name: str, outputs: dict[str, torch.Tensor]) -> float:
    """The smallest gap in any ranking that decides a recorded index."""
    smallest = min((float(gap.min()) for key, gap in outputs.items() if key.endswith("_gap")), default=float("inf"))
    demand(smallest > SMALLEST_RANK_GAP, name, f"two concepts rank {smallest:.1e} apart only")
    return smallest


def fingerprint_of(case: Case) -> str:
    """The fingerprint of a case's weights and input."""
    weights = make_weights(case.config, case.seed, case.weight_gain)
    return fingerprint({**weights, "input_ids": make_input(case)})


def record_case(case: Case) -> str:
    """Writes one case's outputs; returns the fingerprint of its weights and input."""
    model, ids = reference_for(case), make_input(case)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == parameter_shapes(case.config), f"{case.name}: cases.parameter_shapes disagrees with the reference"
    outputs = reference_outputs(model, ids)
    spread, gap = check_spread(case, outputs["logits"]), check_ranks(case.name, outputs)
    kept = {}
    for name, tensor in outputs.items():
        if name.endswith("_gap"):
            continue
        if name.endswith("_indices"):
            kept[name] = tensor.to(torch.int16).contiguous()  # all positions: small, and compared exactly
        else:
            kept[name] = tensor[:, recorded_positions(case)].contiguous()
    save_file(kept, OUTPUTS / f"{case.name}.safetensors")
    print(f"{case.name:32} spread {spread:8.4f}   rank gap {gap:8.1e}   {', '.join(kept)}")
    return fingerprint_of(case)


def record_generations() -> dict[str, dict]:
    """The tokens, and the step that committed each, of every greedy generation."""
    models = {generation.case: reference_for(case_named(generation.case)) for generation in GENERATIONS}
    records = {}
    for generation in GENERATIONS:
        trace = reference_generation(models[generation.case], case_named(generation.case).config, generation)
        demand(trace.margin > SMALLEST_DECISION_GAP, generation.name, f"a decision hung on {trace.margin:.1e}")
        tokens = trace.sequence[generation.prompt_length :]
        print(f"{generation.name:60} margin {trace.margin:.1e}   distinct tokens {len(set(tokens))}")
        assert generation.name not in records, f"{generation.name} is there twice"
        records[generation.name] = {"tokens": tokens, "step_map": trace.step_map, "margin": round(trace.margin, 7)}
    return records


def record_steered_forwards() -> None:
    """Writes the logits of each case under each operation, in one file."""
    kept = {}
    for case, operation in STEERED_FORWARDS:
        model, ids, name = reference_for(case), make_input(case), f"{case.name}-{operation}"
        outputs, plain = (
            {key: tensor[:, recorded_positions(case)] for key, tensor in outputs.items()}
            for outputs in (
                reference_steered_outputs(model, case.config, OPERATIONS[operation], ids),
                reference_outputs(model, ids),
            )
        )
        # With the epsilon correction ranks never reach the logits, which are all that is kept.
        gap = float("inf") if case.config["use_epsilon_correction"] else check_ranks(case.name, outputs)
        effect = relative_difference(outputs["logits"], plain["logits"])
        demand(effect > SMALLEST_EFFECT, name, f"the operation changes logits by {effect:.1e} only")
        kept[name] = outputs["logits"].contiguous()
        print(f"{name:60} effect {effect:8.4f}   rank gap {gap:8.1e}")
    save_file(kept, STEERED / "logits.safetensors")


def record_steered_generations() -> dict[str, dict]:
    """As `record_generations`, of the steered ones; neither the operation nor its cutoff may be without consequence."""
    models = {name: reference_for(case) for name, case in STEERED_CASES.items()}
    records = {}
    for generation in STEERED_GENERATIONS:
        config, operation = STEERED_CASES[generation.case].config, OPERATIONS[generation.operation]
        others = [None]
        if operation["operation"] == "Amplify":
            others.append({**operation, "cutoff": generation.new_tokens})
        trace, *unlike = (
            reference_generation(models[generation.case], config, generation, chosen)
            for chosen in (operation, *others)
        )
        changed = min(sum(a != b for a, b in zip(trace.sequence, other.sequence)) for other in unlike)
        demand(trace.margin > SMALLEST_DECISION_GAP, generation.name, f"a decision hung on {trace.margin:.1e}")
        demand(changed >= FEWEST_CHANGED, generation.name, f"the operation or its end changes {changed} tokens only")
        print(f"{generation.name:72} margin {trace.margin:.1e}   changed tokens {changed}")
        assert generation.name not in records, f"{generation.name} is there twice"
        tokens = trace.sequence[generation.prompt_length :]
        records[generation.name] = {"tokens": tokens, "step_map": trace.step_map, "margin": round(trace.margin, 7)}
    return records


def record_steered(made_with: dict[str, str]) -> None:
    """Writes what the tests of steering compare with."""
    STEERED.mkdir(exist_ok=True)
    record_steered_forwards()
    fingerprints = {name: fingerprint_of(case) for name, case in STEERED_CASES.items()}
    record = {"made_with": made_with, "fingerprints": fingerprints, "generations": record_steered_generations()}
    (STEERED / "record.json").write_text(_lists_on_one_line(json.dumps(record, indent=1)) + "\n")


def record_attributed(made_with: dict[str, str]) -> None:
    """Writes what the tests of attribution compare with: a file for each generation, and one for all."""
    ATTRIBUTED.mkdir(exist_ok=True)
    records, fingerprints = {}, {}
    for generation in ATTRIBUTED_GENERATIONS:
        case = ATTRIBUTED_CASES[generation.case]
        model, config = reference_for(case), case.config
        trace = reference_generation(model, config, generation)
        demand(trace.margin > SMALLEST_DECISION_GAP, generation.name, f"a decision hung on {trace.margin:.1e}")
        found = reference_attributions(model, config, generation, ATTRIBUTED_CHUNKS)
        gap = check_ranks(generation.name, found)
        tokens = trace.sequence[generation.prompt_length :]
        assert found.pop("tokens").tolist() == tokens, f"{generation.name}: its attributor saw another generation"
        if config["use_epsilon_correction"]:
            found |= reference_input_attributions(model, config, generation, ATTRIBUTED_CHUNKS, ATTRIBUTED_POINTS)
        kept = {
            name: (tensor.to(torch.int16) if name.endswith("_indices") else tensor).contiguous()
            for name, tensor in found.items()
            if not name.endswith("_gap")
        }
        save_file(kept, ATTRIBUTED / f"{generation.name}.safetensors")
        records[generation.name] = {"tokens": tokens, "step_map": trace.step_map, "margin": round(trace.margin, 7)}
        weights = make_weights(config, case.seed, case.weight_gain)
        fingerprints[generation.name] = fingerprint({**weights, "prompt": make_prompt(generation)})
        largest = float(found["logits"].abs().max())
        print(f"{generation.name:60} margin {trace.margin:.1e}   rank gap {gap:8.1e}   largest logit {largest:.1f}")
    record = {"made_with": made_with, "fingerprints": fingerprints, "generations": records}
    (ATTRIBUTED / "record.json").write_text(_lists_on_one_line(json.dumps(record, indent=1)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["attributed"], help="what to record anew; by default everything")
    part = parser.parse_args().part
    torch.set_num_threads(1)
    made_with = {name: version(name) for name in ("steerling", "torch")} | {"machine": platform.machine()}
    if part == "attributed":
        _empty(ATTRIBUTED)
        record_attributed(made_with)
        return
    _empty(OUTPUTS)
    fingerprints = {case.name: record_case(case) for case in CASES}
    record = {"made_with": made_with, "fingerprints": fingerprints, "generations": record_generations()}
    (OUTPUTS / "record.json").write_text(_lists_on_one_line(json.dumps(record, indent=1)) + "\n")
    record_steered(made_with)
    record_attributed(made_with)
    total = sum(path.stat().st_size for path in OUTPUTS.rglob("*.*"))
    forwards = len(CASES) + len(STEERED_FORWARDS)
    generations = len(GENERATIONS) + len(STEERED_GENERATIONS) + len(ATTRIBUTED_GENERATIONS)
    print(f"{forwards} forward passes, {generations} generations, {total / 1e6:.2f} MB in {OUTPUTS}")


def _empty(folder: Path) -> None:
    """Takes the files of earlier recordings away."""
    folder.mkdir(exist_ok=True)
    for stale in folder.rglob("*.*"):
        stale.unlink()


def _lists_on_one_line(text: str) -> str:
    """JSON with each list of numbers on a line of its own instead of a line per number."""
    head, *rest = text.split("[")
    for part in rest:
        numbers, tail = part.split("]", 1)
        head += "[" + " ".join(numbers.split()) + "]" + tail
    return head


if __name__ == "__main__":
    main()
