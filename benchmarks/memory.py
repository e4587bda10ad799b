"""
Peak memory of generate() against the length of the answer: it grows by the cache and the window only.

    python benchmarks/memory.py [--json]

Each length runs in a process of its own, which reports how far its peak resident memory rose above what it had when
generation began (the model loaded and warmed up). `cache` is the size of the keys and values of that answer, `logits`
what one (length x vocabulary) tensor in float32 would take.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

LENGTHS = (128, 512, 2048)


def peak() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(new_tokens: int) -> dict[str, float]:
    """Measure one answer in this process."""
    import torch
    from generation import PROMPT, make_model, make_prompt

    model = make_model()
    config = model.config
    # One whole generation block, so that what every answer needs is there already.
    model.generate(make_prompt(), max_new_tokens=64, steps=4, do_sample=False)
    before = peak()
    model.generate(make_prompt(), max_new_tokens=new_tokens, steps=max(new_tokens // 8, 1), do_sample=False)
    kv_width = config.n_kv_heads * config.head_dim
    return {
        "new_tokens": new_tokens,
        "risen_mb": peak() - before,
        "cache_mb": 2 * config.n_layers * kv_width * (PROMPT + new_tokens) * 4 / 2**20,
        "logits_mb": (PROMPT + new_tokens) * config.vocab_size * torch.finfo(torch.float32).bits / 8 / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    rows = []
    for new_tokens in LENGTHS:
        command = [sys.executable, str(Path(__file__)), "--child", str(new_tokens)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'new tokens':>10} {'peak rose by':>13} {'cache':>9} {'logits would be':>16}   (MB)")
    for row in rows:
        print(f"{row['new_tokens']:>10} {row['risen_mb']:>13.1f} {row['cache_mb']:>9.1f} {row['logits_mb']:>16.1f}")


if __name__ == "__main__":
    main()
