"""
Batches of unequal rows against the same rows one by one.

    python benchmarks/ragged.py [--json]

The model is that of generation.py, with one token a step. `alone` counts what is computed when every row runs by itself,
`together` in one batch of all rows, whose windows have one width and whose steps are those of the longest row.

together_over_alone   8 prompts of 1 to 400 tokens in one batch, over the sum of their single runs
stopped_over_last     a batch in which 7 of 8 rows end at their first token, over the eighth row by itself; what is over 1
                      are the prompts of the seven, and one step of theirs

Both are ratios of seconds; those of positions, beside them, count the work and are the same on every machine. Each
figure is the median of --repeat rounds, in which everything is measured once.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from generation import Passes, make_model
from timing import seconds
from tqdm import tqdm

from steerling_hf import SteerlingForDiffusionLM

LENGTHS = (1, 7, 29, 64, 100, 190, 257, 400)
END = 5


def make_prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 100_000, (1, length), generator=generator) for length in LENGTHS]


def pad(prompts: list[torch.Tensor], filler: int) -> dict[str, torch.Tensor]:
    missing = [max(LENGTHS) - prompt.shape[1] for prompt in prompts]
    ids = [torch.nn.functional.pad(prompt, (count, 0), value=filler) for prompt, count in zip(prompts, missing)]
    mask = torch.arange(max(LENGTHS)) >= torch.tensor(missing)[:, None]
    return {"input_ids": torch.cat(ids), "attention_mask": mask.long()}


class EndAtOnce:
    """Makes the end token certain at the first new position of every row but the `last`, which never ends."""

    sees_canvas = True

    def __init__(self, last: torch.Tensor):
        self.last = last

    def __call__(self, canvases: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, END] = -torch.inf
        # The masked positions of a row follow each other, and each comes with the row's canvas.
        first = torch.ones(len(canvases), dtype=torch.bool)
        first[1:] = (canvases[1:] != canvases[:-1]).any(dim=1)
        others = (canvases[:, : self.last.shape[1]] != self.last).any(dim=1)
        scores[first & others, END] = 1000.0
        return scores


def measure_once(model: SteerlingForDiffusionLM, settings: dict[str, Any]) -> dict[str, float]:
    prompts = make_prompts()
    batch, last = pad(prompts, model.config.pad_token_id), {"input_ids": prompts[-1]}
    stopping = {**settings, "eos_token_id": END, "logits_processor": [EndAtOnce(prompts[-1])]}
    # 8 answers one by one and 8 together; one alone and one with seven that stop.
    work = {
        "alone": [({"input_ids": prompt}, settings) for prompt in prompts],
        "together": [(batch, settings)],
        "last": [(last, stopping)],
        "stopped": [(batch, stopping)],
    }
    found: dict[str, float] = {}
    for name, calls in work.items():
        passes = Passes(model)
        found[f"{name}_s"] = seconds(lambda calls=calls: [model.generate(**inputs, **how) for inputs, how in calls])
        passes.close()
        found[f"{name}_positions"] = sum(passes.windows)
    return found


def measure(new_tokens: int, repeat: int) -> dict[str, Any]:
    model = make_model()
    settings = {"max_new_tokens": new_tokens, "do_sample": False}
    model.generate(make_prompts()[0], max_new_tokens=16, do_sample=False)
    rounds = [measure_once(model, settings) for _ in tqdm(range(repeat), desc="rounds")]
    result = {"threads": torch.get_num_threads(), "new_tokens": new_tokens}
    result |= {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    for above, below in (("together", "alone"), ("stopped", "last")):
        ratios = [found[f"{above}_s"] / found[f"{below}_s"] for found in rounds]
        result[f"{above}_over_{below}"] = statistics.median(ratios)
        result[f"{above}_over_{below}_positions"] = result[f"{above}_positions"] / result[f"{below}_positions"]
    return result


def print_table(result: dict[str, Any]) -> None:
    print(f"prompts of {LENGTHS} tokens, {result['new_tokens']} new tokens each, {result['threads']} threads")
    print(f"{'':32} {'s':>8} {'positions':>10}")
    names = ("8 rows one by one", "8 rows together", "the last row", "the last row, and 7 that end")
    for name, key in zip(names, ("alone", "together", "last", "stopped")):
        print(f"{name:32} {result[f'{key}_s']:>8.2f} {result[f'{key}_positions']:>10,.0f}")
    for name, key in (("together / one by one", "together_over_alone"), ("with 7 / the last", "stopped_over_last")):
        print(f"{name:32} {result[key]:>8.2f} {result[f'{key}_positions']:>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1, help="rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    if min(options.new_tokens, options.repeat) < 1:
        parser.error("--new-tokens and --repeat take numbers of 1 or more")
    result = measure(options.new_tokens, options.repeat)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
