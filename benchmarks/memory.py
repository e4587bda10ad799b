"""
Peak memory of generate() against the length of the answer: it grows by the cache and the window only.

    python benchmarks/memory.py [--json]

The model is that of generation.py. Each length runs in a process of its own, eight tokens a step: memory does not depend
on how many are decided at once, since logits are computed for all masked positions of a generation block in any case.

tensors    peak of the bytes that all tensors made by generate() hold at one time, counted where torch's operators return
           them; the model does not count, the copies of its linear layers that are packed for oneDNN do
resident   how far the peak of the process's resident memory rises above what it is before; this has what operators use
           inside as well, and what the allocator keeps (Linux only)
packed     the packed copies, whatever the length
cache      keys and values at the end of the answer
largest    the largest tensor besides the packed copies, with its shape, beside `all logits`, which a (length x
           vocabulary) tensor in float32 would take
"""

import argparse
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MB = 2**20


class Allocations(TorchDispatchMode):
    """
    Follows the storages of the tensors that operators return, until they are freed.

    Args:
        model: Its own tensors are not counted.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.live = self.peak = self.packed = self.largest = 0
        self.shape: list[int] = []
        # Held, so that no new storage gets the identity of one of them.
        self.own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self.known = {storage._cdata for storage in self.own}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._note(tensor)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.is_mkldnn:  # opaque: such tensors have no storage and share nothing
            owner, key, size = tensor, id(tensor), tensor.numel() * tensor.element_size()
        else:
            owner = tensor.untyped_storage()
            key, size = owner._cdata, owner.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        weakref.finalize(owner, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        if tensor.is_mkldnn:
            self.packed += size
        elif size > self.largest:
            self.largest, self.shape = size, list(tensor.shape)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def resident(name: str) -> float:
    """A figure of this process in MB: "VmRSS", or "VmHWM" for the peak; not a number where there is no such figure."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), float("nan"))


def measure_here(new_tokens: int) -> dict[str, Any]:
    """One answer, in this process."""
    from generation import PROMPT, make_model, make_prompt

    model, prompt = make_model(), make_prompt()
    allocations = Allocations(model)
    if PEAK_RESET.exists():
        PEAK_RESET.write_text("5")  # the peak so far is that of making the model
    before = resident("VmRSS")
    with allocations:
        output = model.generate(
            prompt,
            max_new_tokens=new_tokens,
            steps=max(1, new_tokens // 8),
            do_sample=False,
            return_dict_in_generate=True,
        )
    length = PROMPT + new_tokens
    assert output.sequences.shape == (1, length)
    layers = output.cache.layers
    return {
        "new_tokens": new_tokens,
        "tensors_mb": allocations.peak / MB,
        "resident_mb": resident("VmHWM") - before,
        "packed_mb": allocations.packed / MB,
        "cache_mb": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / MB,
        "largest_mb": allocations.largest / MB,
        "largest_shape": allocations.shape,
        "all_logits_mb": length * model.config.vocab_size * 4 / MB,
    }


def measure(lengths: list[int]) -> dict[str, Any]:
    rows = []
    for new_tokens in tqdm(lengths, desc="new tokens"):
        command = [sys.executable, str(Path(__file__)), "--here", str(new_tokens)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    growth = {key: rows[-1][f"{key}_mb"] - rows[0][f"{key}_mb"] for key in ("tensors", "resident", "cache")}
    return {"rows": rows, **{f"{key}_growth_mb": value for key, value in growth.items()}}


def print_table(result: dict[str, Any]) -> None:
    heads = ("new tokens", "tensors", "resident", "packed", "cache", "largest", "all logits")
    print(" ".join(f"{head:>10}" for head in heads), "   (MB)   shape of the largest")
    for row in result["rows"]:
        keys = (f"{head.replace(' ', '_')}_mb" for head in heads[1:])
        figures = " ".join(f"{row[key]:>10.1f}" for key in keys)
        print(f"{row['new_tokens']:>10} {figures}           {row['largest_shape']}")
    keys = ("tensors", "resident", "cache")
    print(f"{'growth':>10} " + ", ".join(f"{key} {result[f'{key}_growth_mb']:.1f}" for key in keys))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="new tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.here)))
        return
    if min(options.lengths) < 1:
        parser.error("--lengths takes numbers of 1 or more")
    result = measure(options.lengths)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
