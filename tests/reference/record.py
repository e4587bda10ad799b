"""Runs the reference on every case and writes what it says to outputs/: the recordings that the tests compare with.

    python tests/reference/record.py

Needs the package `steerling` 0.2.0 (see README.md beside this file), which the tests do not. A case on which rounding
could decide an outcome, or whose outputs hardly differ between positions, is refused: choose another seed in cases.py.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from cases import (
    CASES,
    GENERATIONS,
    Case,
    case_named,
    fingerprint,
    make_input,
    make_weights,
    parameter_shapes,
    recorded_positions,
)
from oracle import reference_for, reference_generation, reference_outputs
from safetensors.torch import save_file

OUTPUTS = Path(__file__).parent / "outputs"
# Rounding moves a float32 logit here by about 1e-6 and a probability by about 5e-6 of itself.
SMALLEST_RANK_GAP = 2e-5
SMALLEST_DECISION_GAP = 3e-4
SMALLEST_SPREAD = 2e-3


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


def check_ranks(case: Case, outputs: dict[str, torch.Tensor]) -> float:
    """The smallest gap in any ranking that decides a recorded index."""
    smallest = min((float(gap.min()) for name, gap in outputs.items() if name.endswith("_gap")), default=float("inf"))
    demand(smallest > SMALLEST_RANK_GAP, case.name, f"two concepts rank {smallest:.1e} apart only")
    return smallest


def record_case(case: Case) -> str:
    """Writes one case's outputs; returns the fingerprint of its weights and input."""
    weights, ids = make_weights(case.config, case.seed, case.weight_gain), make_input(case)
    model = reference_for(case)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == parameter_shapes(case.config), f"{case.name}: cases.parameter_shapes disagrees with the reference"
    outputs = reference_outputs(model, ids)
    spread, gap = check_spread(case, outputs["logits"]), check_ranks(case, outputs)
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
    return fingerprint({**weights, "input_ids": ids})


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


def main() -> None:
    OUTPUTS.mkdir(exist_ok=True)
    for stale in OUTPUTS.iterdir():
        stale.unlink()
    torch.set_num_threads(1)
    made_with = {name: version(name) for name in ("steerling", "torch")} | {"machine": platform.machine()}
    fingerprints = {case.name: record_case(case) for case in CASES}
    record = {"made_with": made_with, "fingerprints": fingerprints, "generations": record_generations()}
    (OUTPUTS / "record.json").write_text(_lists_on_one_line(json.dumps(record, indent=1)) + "\n")
    total = sum(path.stat().st_size for path in OUTPUTS.iterdir())
    print(f"{len(CASES)} cases, {len(GENERATIONS)} generations, {total / 1e6:.2f} MB in {OUTPUTS}")


def _lists_on_one_line(text: str) -> str:
    """JSON with each list of numbers on a line of its own instead of a line per number."""
    head, *rest = text.split("[")
    for part in rest:
        numbers, tail = part.split("]", 1)
        head += "[" + " ".join(numbers.split()) + "]" + tail
    return head


if __name__ == "__main__":
    main()
