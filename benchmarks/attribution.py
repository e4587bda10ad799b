"""
What explanations cost: attribution to concepts beside plain generation, and to inputs beside the reference, in one run.

    python benchmarks/attribution.py [--json]

The model is that of generation.py: 8 layers, width 512, full heads, full vocabulary, a prompt of 29 tokens, float32.

concept_overhead   seconds of generate() with output_attributions=True over those without, less 1; the median of runs that
                   take turns
input_speedup      seconds a token of the reference over ours to attribute all tokens of a 256-token answer to its inputs, by
                   right Riemann with equally many points; the reference, which does one token after the other, is timed on
                   a sample of evenly spaced ones
budget_respected   whether the peak of the process's resident memory stays within `memory_budget` above what it was before,
                   in a process of its own; budget_mb and peak_mb are the figures (Linux only)

The reference is needed for the speedup: `make bench` installs it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation import load_reference, make_model, make_prompt
from memory import MB, PEAK_RESET, resident
from timing import seconds
from tqdm import tqdm

from steerling_hf.input_attribution import attribute_inputs

BUDGET_MB = 600


def write(model, new_tokens: int):
    """The trace of an answer."""
    output = model.generate(make_prompt(), max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    return output.traces[0]


def concept_overhead(model, new_tokens: int, repeat: int) -> float:
    ratios = []
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
    for number in tqdm(range(repeat + 1), desc="concepts"):
        plain, attributed = (
            seconds(partial(model.generate, make_prompt(), output_attributions=asked, **settings))
            for asked in (False, True)
        )
        if number:  # the first round warms up
            ratios.append(attributed / plain)
    return statistics.median(ratios) - 1


def reference_seconds(model, trace, positions: list[int], n_steps: int) -> float | None:
    """Seconds of the reference for these positions; `None` where it is not installed."""
    backbone = load_reference(model)
    if backbone is None:
        return None
    from types import SimpleNamespace

    from steerling.attribution.input_attribution import FaithfulOutputToInputAttributor
    from steerling.attribution.trace import CommitRecord, DiffusionTrace

    runner = SimpleNamespace(
        model=backbone, device=torch.device("cpu"), is_interpretable=True, mask_token_id=trace.mask_token
    )
    order = sorted(trace.decided.tolist(), key=lambda position: int(trace.step_map[position]))
    groups = [
        CommitRecord(number, number, torch.tensor([position]), trace.tokens[[position]], torch.zeros(1))
        for number, position in enumerate(order)
    ]
    length = len(trace.tokens)
    recorded = DiffusionTrace(
        trace.tokens[: trace.prompt_length], trace.prompt_length, length, trace.mask_token, None, runner.device, groups
    )
    # The schedule is needed whole to see the canvas at a step; only the sample is attributed.
    object.__setattr__(recorded, "groups", [group for group in groups if int(group.positions) in positions])
    attributor = FaithfulOutputToInputAttributor.from_generator(runner)
    return seconds(lambda: attributor.attribute_from_trace(recorded, n_steps=n_steps))


def measure_peak(new_tokens: int, n_steps: int) -> dict[str, float]:
    """Peak of resident memory above the start of attribute_inputs, in this process."""
    model = make_model()
    trace = write(model, new_tokens)
    if PEAK_RESET.exists():
        PEAK_RESET.write_text("5")
    before = resident("VmRSS")
    attribute_inputs(model, trace, trace.decided.tolist()[-4:], n_steps=n_steps, memory_budget=BUDGET_MB * MB)
    return {"budget_mb": BUDGET_MB, "peak_mb": resident("VmHWM") - before}


def measure(new_tokens: int, sample: int, n_steps: int, repeat: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--here", "--new-tokens", str(new_tokens), "--n-steps", "32"]
    peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    model = make_model()
    result: dict[str, Any] = {"concept_overhead": concept_overhead(model, 64, repeat)}
    trace = write(model, new_tokens)
    decided = trace.decided.tolist()
    ours = partial(attribute_inputs, model, trace, n_steps=n_steps, method="riemann_right")
    ours(decided[:1])
    result["input_seconds"] = seconds(partial(ours, decided, progress=True)) / len(decided)
    positions = decided[:: max(1, len(decided) // sample)][:sample]
    theirs = reference_seconds(model, trace, positions, n_steps)
    if theirs is not None:
        result["reference_seconds"] = theirs / len(positions)
        result["input_speedup"] = result["reference_seconds"] / result["input_seconds"]
    return {**result, "budget_respected": peak["peak_mb"] <= peak["budget_mb"], **peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--sample", type=int, default=8, help="tokens that the reference attributes to inputs")
    parser.add_argument("--n-steps", type=int, default=8, help="points of the integral")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs for the concepts")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.new_tokens, options.sample, options.n_steps, options.repeat) < 1:
        parser.error("--new-tokens, --sample, --n-steps and --repeat take numbers of 1 or more")
    if options.here:
        print(json.dumps(measure_peak(options.new_tokens, options.n_steps)))
        return
    result = measure(options.new_tokens, options.sample, options.n_steps, options.repeat)
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    print(
        json.dumps(rounded, indent=1)
        if options.json
        else "\n".join(f"{key:20} {value}" for key, value in rounded.items())
    )


if __name__ == "__main__":
    main()
