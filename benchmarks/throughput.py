"""
Forward passes and tokens a second of generate() at full size, and the share of what the machine could do at most.

    python benchmarks/throughput.py                      # random weights of the 8.4-billion model, bfloat16, on a GPU
    python benchmarks/throughput.py --size small         # a model that runs anywhere, to try the command

A forward pass must read every weight of the backbone once, and do two operations for each weight and each position of
its windows (the vocabulary only for masked rows): its roofline is the longer of the two times, at the bandwidth and the
arithmetic of --bandwidth and --flops (by default those of an H200 as measured in practice). Each line is an answer of
--new-tokens tokens, one token a step, so tokens a second are forward passes a second times the rows.
"""

import argparse
import json
from typing import Any

import torch
from timing import seconds
from tqdm import tqdm
from transformers import CompileConfig

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM

SIZES: dict[str, dict[str, Any]] = {
    "8b": {},
    "small": {
        "n_layers": 4,
        "n_embd": 256,
        "concept_dim": 256,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_concepts": 1024,
        "n_unknown_concepts": 1024,
        "block_size": 2048,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)},
}


def make_model(size: str, device: torch.device, dtype: torch.dtype) -> SteerlingForDiffusionLM:
    """Random weights, made on the device itself."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return SteerlingForDiffusionLM(SteerlingConfig(eot_id=None, **SIZES[size])).eval()
    finally:
        torch.set_default_dtype(previous)


def roofline(model: SteerlingForDiffusionLM, rows: int, window: int, bandwidth: float, flops: float) -> float:
    """Least seconds of a pass of so many rows and positions, half of a block's vocabulary rows being masked."""
    vocabulary = model.transformer.lm_head.weight
    layers = sum(p.numel() for p in model.transformer.blocks.parameters())
    read = (layers + vocabulary.numel()) * vocabulary.element_size() / bandwidth
    masked = model.config.diff_block_size / 2
    arithmetic = 2 * rows * (layers * window + vocabulary.numel() * masked) / flops
    return max(read, arithmetic)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(model: SteerlingForDiffusionLM, rows: int, new_tokens: int, aligned: bool, settings: dict) -> float:
    """Seconds a forward pass."""
    device = model.device
    prompt = torch.randint(0, 1000, (rows, 29), device=device)
    arguments = {"max_new_tokens": new_tokens, "align_blocks": aligned, "do_sample": False, **settings}

    def answer() -> None:
        model.generate(prompt, **arguments)
        synchronise(device)

    answer()  # compiles, and warms up
    return seconds(answer) / new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="rows")
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    parser.add_argument("--flops", type=float, default=790e12, help="operations a second")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.size == "8b" and device.type == "cpu":
        parser.error("--size 8b needs a GPU with 24 GB or more; try --size small")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(options.size, device, dtype)
    rows = []
    cases = [(way, aligned, batch) for way in options.ways for aligned in (False, True) for batch in options.batch]
    for way, aligned, batch in tqdm(cases):
        settings = dict(WAYS[way])
        if way == "compiled" and device.type == "cpu":
            config = CompileConfig(fullgraph=True, mode="default")
            config._compile_all_devices = True
            settings["compile_config"] = config
        per_pass = measure(model, batch, options.new_tokens, aligned, settings)
        window = model.config.diff_block_size * (1 if aligned else 2)
        least = roofline(model, batch, window, options.bandwidth, options.flops)
        rows.append(
            {
                "way": way,
                "align_blocks": aligned,
                "batch": batch,
                "forwards_a_second": 1 / per_pass,
                "tokens_a_second": batch / per_pass,
                "of_roofline": least / per_pass,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'way':10} {'aligned':>8} {'rows':>5} {'passes/s':>9} {'tokens/s':>9} {'of roofline':>12}")
    for row in rows:
        print(
            f"{row['way']:10} {row['align_blocks']!s:>8} {row['batch']:>5} {row['forwards_a_second']:>9.1f} "
            f"{row['tokens_a_second']:>9.1f} {row['of_roofline']:>12.1%}"
        )


if __name__ == "__main__":
    main()
