"""
What steering costs: generate() under operations, over generate() without, in one run.

    python benchmarks/steering.py [--json]

The model is that of generation.py: 8 layers, width 512, full heads, full vocabulary. Runs with and without an operation
take turns, since a machine's speed drifts, and the median ratio of neighbours counts.

injection     Inject, from half the depth on
known         SetConcepts of a known concept, so that the known head runs
discovered    the same of a discovered one
activations   of one of each, so that both heads run
suppression   Suppress: an injection and lower logits
"""

import argparse
import json
import statistics
from functools import partial

from generation import make_model, make_prompt
from timing import seconds
from tqdm import tqdm

from steerling_hf import Inject, SetConcepts, Suppress

OPERATIONS = {
    "injection": Inject(5, 8.0),
    "known": SetConcepts(5, 0.5),
    "discovered": SetConcepts(40_000, 0.5),
    "activations": SetConcepts((5, 40_000), 0.5),
    "suppression": Suppress(5),
}


def measure(new_tokens: int, repeat: int) -> dict[str, float]:
    """Median ratio of each operation, and the seconds a token without any."""
    model, prompt = make_model(), make_prompt()
    plain, ratios = [], {name: [] for name in OPERATIONS}
    # The first round warms up.
    for number in tqdm(range(repeat + 1), desc="rounds"):
        for name, operation in OPERATIONS.items():
            pair = []
            for steering in (None, operation):
                run = partial(model.generate, prompt, max_new_tokens=new_tokens, do_sample=False, steering=steering)
                pair.append(seconds(run))
            if number:
                plain.append(pair[0] / new_tokens)
                ratios[name].append(pair[1] / pair[0])
    return {**{name: statistics.median(found) for name, found in ratios.items()}, "plain": statistics.median(plain)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs of each operation")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    if min(options.new_tokens, options.repeat) < 1:
        parser.error("--new-tokens and --repeat take numbers of 1 or more")
    result = measure(options.new_tokens, options.repeat)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['plain']:.4f} seconds a token without steering; with")
    for name in OPERATIONS:
        print(f"{name:12} {result[name]:.3f} times as long")


if __name__ == "__main__":
    main()
