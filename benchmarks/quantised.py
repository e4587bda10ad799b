"""
What quantised weights save and cost: each method beside bfloat16.

    python benchmarks/quantised.py [--size nano|1b] [--methods ...] [--json]

The model is steerling-nano, or one of a billion random weights that is written to a temporary folder (2 GB) and loaded from
there. Each method runs in a process of its own, on the CPU.

converted  share of the weights of the backbone's linear layers (the vocabulary projection is left out by all) that are quantised
same top-k whether the concept heads name the same concepts, in the same order, of the hidden states that bfloat16 has
error      of the logits of a text with masks, relative to those of bfloat16 (root of summed squares)
resident   memory of the process that the loaded model takes, after one pass (Linux only), in MB
s/token    seconds a token of an answer, one token a step, and as a multiple of bfloat16's
"""

import argparse
import importlib
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import resident
from steerling_hf.modeling.quantized_steerling import is_quantized
from timing import seconds
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM, checkpoint

BILLION: dict[str, Any] = {
    "n_layers": 12,
    "n_embd": 2048,
    "concept_dim": 2048,
    "n_head": 16,
    "n_concepts": 8192,
    "n_unknown_concepts": 16384,
    "intermediate_size": 8192,
    "block_size": 1024,
}
LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao.quantization", "quanto": "optimum.quanto"}
LENGTH = 48
LINEAR = ("c_attn", "c_proj", "c_fc")


def torchao(name: str, **settings: Any) -> TorchAoConfig:
    import torchao.quantization as library

    return TorchAoConfig(getattr(library, name)(**settings))


def torchao_int4() -> TorchAoConfig:
    from torchao.quantization import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


METHODS = {
    "bfloat16": lambda: None,
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes fp4": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8, states too": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": torchao_int4,
    "quanto int8": lambda: QuantoConfig(weights="int8"),
}


def write_billion(folder: Path) -> None:
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = SteerlingForDiffusionLM(SteerlingConfig(eot_id=None, **BILLION))
    finally:
        torch.set_default_dtype(previous)
    model.save_pretrained(folder)


def converted(model: Any) -> float:
    layers = [module for name, module in model.transformer.blocks.named_modules() if name.endswith(LINEAR)]
    sizes = {layer: layer.in_features * layer.out_features for layer in layers}
    return sum(size for layer, size in sizes.items() if is_quantized(layer.weight)) / sum(sizes.values())


@torch.no_grad()
def measure_here(method: str, folder: str, reference: Path, new_tokens: int) -> dict[str, Any]:
    """One method, in this process; bfloat16 writes what the others are compared with."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every product that float16 is used
    library = LIBRARIES.get(method.split()[0])
    if library is not None:
        importlib.import_module(library)  # which is no part of the model
    quantization = METHODS[method]()
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    tokens = torch.randint(0, 1000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    prompt = tokens[:, : LENGTH // 2].clone()
    tokens[:, LENGTH // 2 :: 2] = model.config.mask_token_id
    states = model.transformer(tokens).last_hidden_state
    logits = model.compute_logits(states).float()
    taken = resident("VmRSS") - before
    if method == "bfloat16":
        torch.save((states, logits, [head(states).indices for head in model.concept_heads()]), reference)
    own_states, own_logits, own_concepts = torch.load(reference)
    decided = []

    def answer() -> None:
        output = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
        decided.append(int((output.step_map >= 0).sum()))  # nano's answers may end early

    answer()  # warms up
    return {
        "method": method,
        "converted": converted(model),
        "same_top_k": all(
            torch.equal(head(own_states).indices, concepts)
            for head, concepts in zip(model.concept_heads(), own_concepts)
        ),
        "logits_error": ((logits - own_logits).norm() / own_logits.norm()).item(),
        "resident_mb": taken,
        "seconds_a_token": seconds(answer) / decided[-1],
    }


def measure(size: str, methods: list[str], new_tokens: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint() if size == "nano" else Path(scratch) / "billion"
        if size == "1b":
            write_billion(folder)
        for method in tqdm(["bfloat16", *(method for method in methods if method != "bfloat16")]):
            command = [sys.executable, __file__, "--here", method, str(folder), f"{scratch}/reference"]
            command += ["--new-tokens", str(new_tokens)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    for row in rows:
        row["beside_bfloat16"] = row["seconds_a_token"] / rows[0]["seconds_a_token"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("nano", "1b"), default="nano")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--new-tokens", type=int, help="of the answer that is timed (default: 64, of 1b 4)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    new_tokens = options.new_tokens or {"nano": 64, "1b": 4}[options.size]
    if options.here:
        method, folder, reference = options.here
        print(json.dumps(measure_here(method, folder, Path(reference), new_tokens)))
        return
    rows = measure(options.size, options.methods, new_tokens)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{'':26} {'converted':>9} {'same top-k':>10} {'error':>8} {'resident':>9} {'s/token':>8} {'beside bf16':>11}"
    )
    for row in rows:
        print(
            f"{row['method']:26} {row['converted']:>9.2f} {row['same_top_k']!s:>10} {row['logits_error']:>8.4f} "
            f"{row['resident_mb']:>9.0f} {row['seconds_a_token']:>8.4f} {row['beside_bfloat16']:>11.2f}"
        )


if __name__ == "__main__":
    main()
