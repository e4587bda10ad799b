"""
Speed of generate(): ours, the reference package and the limit, side by side in one run.

    python benchmarks/generation.py [--json] [--plot docs/generation.svg]

A model of 8 layers and width 512 with the full concept heads and the full vocabulary, random weights, continues a prompt
of 29 tokens, one token a step, in float32. Ours is timed over whole answers. The reference computes the same canvas at
every step, so a sample of its steps is timed and the median counts for all. The limit is the time of the bare matrix
products that a step cannot do without: those of the weights with the positions of its window, and of the vocabulary
with its masked rows. generate() packs weights for oneDNN (see modeling/packing_steerling.py), whose products may be faster
than torch's own; both limits are measured.

speedup_N     seconds a token of the reference over ours, for N new tokens
aligned_N     the same with align_blocks=True
growth        seconds a token at the longest answer over those at the shortest
over_limit    seconds a step over its limit by torch's own products, the largest of all runs
over_packed   the same by products with packed weights

The reference is needed for the speedups: `make bench` installs it.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from steerling_hf.modeling.packing_steerling import multiply, packed_weights
from timing import median_seconds, seconds
from tqdm import tqdm

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM
from steerling_hf.plots import line_plot

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 29
WARM_UP = 2


def make_model() -> SteerlingForDiffusionLM:
    torch.manual_seed(0)
    config = SteerlingConfig(n_layers=8, n_embd=512, concept_dim=512, n_head=8, n_kv_heads=4, eot_id=None)
    return SteerlingForDiffusionLM(config).eval()


def make_prompt() -> torch.Tensor:
    return torch.randint(0, 100_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))


class Passes:
    """Notes the window and the masked rows of every forward pass of a model, and when its vocabulary was projected."""

    def __init__(self, model: SteerlingForDiffusionLM):
        self.windows: list[int] = []
        self.projected: list[int] = []
        self.handles = [
            model.transformer.tok_emb.register_forward_hook(lambda _m, args, _o: self.windows.append(args[0].numel())),
            model.transformer.lm_head.register_forward_hook(
                lambda _m, args, _o: self.projected.append(args[0].shape[0])
            ),
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def time_ours(model: SteerlingForDiffusionLM, new_tokens: int, aligned: bool) -> tuple[float, Passes]:
    """Seconds of a whole answer, and its passes."""
    passes = Passes(model)
    settings = {"max_new_tokens": new_tokens, "align_blocks": aligned, "do_sample": False}
    taken = seconds(lambda: model.generate(make_prompt(), **settings))
    passes.close()
    assert len(passes.windows) >= new_tokens
    return taken, passes


def load_reference(model: SteerlingForDiffusionLM) -> Any:
    """The reference's generator with our weights, or `None` where the package is not installed."""
    if find_spec("steerling") is None:
        return None
    sys.path.append(str(ROOT / "tests" / "reference"))
    from oracle import reference_model

    config = model.config.to_dict()
    return reference_model(config, dict(model.state_dict()))


class EnoughError(Exception):
    """Ends the reference's generation after the sampled steps."""


def time_reference(reference: Any, config: SteerlingConfig, new_tokens: int, sample: int) -> float:
    """Median seconds of a step of the reference."""
    from types import SimpleNamespace

    from steerling.configs.generation import GenerationConfig
    from steerling.inference.causal_diffusion import SteerlingGenerator

    names = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_id")
    tokenizer = SimpleNamespace(decode=lambda tokens: "", **{name: getattr(config, name) for name in names})
    runner = SteerlingGenerator(reference, tokenizer, reference.config, is_interpretable=True, device="cpu")
    forward, starts = runner._forward, []

    def watched(*args, **kwargs):
        starts.append(time.perf_counter())
        if len(starts) == sample + WARM_UP + 1:
            raise EnoughError
        return forward(*args, **kwargs)

    runner._forward = watched
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        steps=new_tokens,
        repetition_penalty=1.0,
        use_entropy_sampling=False,
        top_p=0.0,
    )
    with contextlib.suppress(EnoughError):
        runner.generate_full(make_prompt(), settings)
    return statistics.median(b - a for a, b in zip(starts[WARM_UP:], starts[WARM_UP + 1 :]))


class Limit:
    """Seconds of the bare matrix products of a pass, measured once for each size; with packed weights if asked."""

    def __init__(self, model: SteerlingForDiffusionLM, packed: bool):
        self.transformer, self.packed = model.transformer, packed
        self.weights = [
            weight
            for block in model.transformer.blocks
            for weight in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        ]
        self.window_seconds: dict[int, float] = {}
        self.vocabulary_seconds: dict[int, float] = {}

    @torch.no_grad()
    def products(self, linears: list[torch.nn.Linear], rows: int) -> float:
        """Seconds with so many rows."""
        inputs = {linear.in_features: torch.randn(rows, linear.in_features) for linear in linears}
        if self.packed:
            return median_seconds(lambda: [multiply(linear, inputs[linear.in_features]) for linear in linears])
        return median_seconds(lambda: [inputs[linear.in_features] @ linear.weight.T for linear in linears])

    def window(self, positions: int) -> float:
        if positions not in self.window_seconds:
            self.window_seconds[positions] = self.products(self.weights, positions)
        return self.window_seconds[positions]

    def vocabulary(self, rows: int) -> float:
        rows = -(-rows // 4) * 4  # measured in steps of 4 rows
        if rows not in self.vocabulary_seconds:
            self.vocabulary_seconds[rows] = self.products([self.transformer.lm_head], rows)
        return self.vocabulary_seconds[rows]

    def of(self, passes: Passes) -> float:
        """Seconds of all passes."""
        with packed_weights(self.transformer, [], passes=len(passes.windows)):
            return sum(map(self.window, passes.windows)) + sum(map(self.vocabulary, passes.projected))


def measure(lengths: list[int], sample: int) -> dict[str, Any]:
    model, result = make_model(), {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": []}
    reference, limits = load_reference(model), {"limit": Limit(model, False), "packed": Limit(model, True)}
    if reference is None:
        print("the reference package is not installed: no speedups (see `make bench`)", file=sys.stderr)
    time_ours(model, 64, False)
    for new_tokens in tqdm(lengths, desc="new tokens"):
        row: dict[str, Any] = {"new_tokens": new_tokens}
        if reference is not None:
            row["reference"] = time_reference(reference, model.config, new_tokens, sample)
        for name, aligned in (("ours", False), ("aligned", True)):
            taken, passes = time_ours(model, new_tokens, aligned)
            row[name] = taken / new_tokens
            for kind, limit in limits.items():
                row[f"{name}_{kind}"] = limit.of(passes) / new_tokens
            if reference is not None:
                key = "speedup" if name == "ours" else "aligned"
                result[f"{key}_{new_tokens}"] = row["reference"] / row[name]
        result["rows"].append(row)
    rows = result["rows"]
    result["growth"] = rows[-1]["ours"] / rows[0]["ours"]
    for kind in limits:
        over = max(row[name] / row[f"{name}_{kind}"] for row in rows for name in ("ours", "aligned"))
        result[f"over_{kind}"] = over
    return result


def print_table(result: dict[str, Any]) -> None:
    print(f"seconds a token, {result['threads']} threads, torch {result['torch']}")
    print(f"{'new tokens':>10} {'reference':>10} {'ours':>8} {'limit':>8} {'aligned':>8} {'limit':>8} {'speedup':>16}")
    for row in result["rows"]:
        speedups = [row.get("reference", 0) / row[name] for name in ("ours", "aligned")]
        print(
            f"{row['new_tokens']:>10} {row.get('reference', float('nan')):>10.3f} {row['ours']:>8.4f} "
            f"{row['ours_limit']:>8.4f} {row['aligned']:>8.4f} {row['aligned_limit']:>8.4f} "
            f"{speedups[0]:>7.1f} {speedups[1]:>8.1f}"
        )
    print(
        f"growth {result['growth']:.3f}   over the limit {result['over_limit']:.3f}, "
        f"with packed products {result['over_packed']:.3f}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    lines = {
        "reference": [(row["new_tokens"], row["reference"]) for row in rows if "reference" in row],
        "ours": [(row["new_tokens"], row["ours"]) for row in rows],
        "ours, align_blocks": [(row["new_tokens"], row["aligned"]) for row in rows],
        "limit of ours": [(row["new_tokens"], row["ours_limit"]) for row in rows],
    }
    path.write_text(
        line_plot(
            {name: points for name, points in lines.items() if points},
            title="Seconds a token against the length of the answer (8 layers, width 512, 2 cores)",
            x="new tokens",
            y="seconds a token",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="new tokens")
    parser.add_argument("--sample", type=int, default=5, help="steps of the reference that are timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as SVG")
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="a --json output, to draw without measuring"
    )
    options = parser.parse_args()
    if min(options.lengths) < 1 or any(length % 64 for length in options.lengths):
        parser.error("--lengths takes multiples of 64, which the reference asks for")
    if options.sample < 1:
        parser.error(f"--sample is {options.sample}; give at least 1")
    result = json.loads(options.source.read_text()) if options.source else measure(options.lengths, options.sample)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
