"""
Batches of unequal rows against the same rows one by one.

    python benchmarks/ragged.py [--json]

together_over_singles   seconds of 8 prompts of 1 to 400 tokens in one batch, over the sum of their single runs
stopped_over_single     seconds of a batch in which 7 of 8 rows stop within their first block, over the eighth row alone
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM

LENGTHS = (1, 7, 29, 64, 100, 190, 257, 400)
NEW_TOKENS = 128
END = 5


def make_model() -> SteerlingForDiffusionLM:
    torch.manual_seed(0)
    sizes = {"n_layers": 8, "n_embd": 512, "concept_dim": 512, "n_head": 8, "n_kv_heads": 4, "vocab_size": 20_000}
    special = dict(zip(("pad", "bos", "eos", "mask", "endofchunk"), range(19_990, 19_995)))
    ids = {f"{name}_token_id": token for name, token in special.items()}
    return SteerlingForDiffusionLM(SteerlingConfig(n_concepts=1000, n_unknown_concepts=1000, **sizes, **ids)).eval()


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 19_000, (1, length), generator=generator) for length in LENGTHS]


def padded(rows: list[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.arange(longest) >= torch.tensor([longest - row.shape[1] for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


class EndEarly:
    """Ends all rows but the last one within their first steps: their end token becomes the best at every position."""

    def __init__(self, last: torch.Tensor):
        self.last = last

    def __call__(self, canvases: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        own = (canvases[:, : self.last.shape[1]] == self.last).all(dim=1)
        scores[~own, END] = 1000.0
        scores[own, END] = -1000.0
        return scores


def seconds(work: Callable[[], object], repeat: int) -> float:
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def measure(repeat: int) -> dict[str, float]:
    model, rows = make_model(), prompts()
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(rows[0], max_new_tokens=8, do_sample=False)
    batch = padded(rows, model.config.pad_token_id)
    with tqdm(total=4) as progress:
        singles = sum(seconds(lambda row=row: model.generate(row, **settings), repeat) for row in rows)
        progress.update()
        together = seconds(lambda: model.generate(**batch, **settings), repeat)
        progress.update()
        stopping = {**settings, "eos_token_id": END, "logits_processor": [EndEarly(rows[-1])]}
        alone = seconds(lambda: model.generate(rows[-1], **stopping), repeat)
        progress.update()
        stopped = seconds(lambda: model.generate(**batch, **stopping), repeat)
        progress.update()
    return {
        "singles_s": singles,
        "together_s": together,
        "together_over_singles": together / singles,
        "single_s": alone,
        "stopped_s": stopped,
        "stopped_over_single": stopped / alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each figure")
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error(f"--repeat is {options.repeat}; give at least 1")
    result = measure(options.repeat)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"8 prompts of 1 to 400 tokens, {NEW_TOKENS} new tokens each, {torch.get_num_threads()} threads")
    print(
        f"one by one {result['singles_s']:.1f} s, together {result['together_s']:.1f} s: {result['together_over_singles']:.2f}"
    )
    print(
        f"one row {result['single_s']:.1f} s, with 7 that stop {result['stopped_s']:.1f} s: {result['stopped_over_single']:.2f}"
    )


if __name__ == "__main__":
    main()
