"""
Do threads that share a model change each other's texts?

Each of so many threads makes so many calls on steerling-nano with random prompts, lengths, seeds, rules, guidance and steering, given
with the call or attached for it; every answer is compared, token by token, with what the same call gives alone.

    python benchmarks/threads.py [--threads 8] [--calls 50] [--seed 0] [--json]
"""

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerling_hf
from steerling_hf import Amplify, Imitate, Inject, SetConcepts, Suppress, SuppressTokens

OPENINGS = (
    "The gardener",
    "Sadly, the captain raised the",
    "How",
    "Yesterday the cook was",
    "Older people remember the boat in the",
)


def draw_operation(rng: random.Random, config: Any, tokenizer: Any) -> Any:
    known = rng.randrange(config.n_concepts)
    any_concept = rng.randrange(config.n_concepts + config.n_discovered)
    window = rng.choice([None, (0, 8), (4, None)])
    return rng.choice(
        [
            Amplify(known, rng.uniform(1, 8)),
            Suppress(known, strength=-rng.uniform(0.5, 3)),
            Inject(any_concept, rng.uniform(-4, 4), window=window),
            SetConcepts(any_concept, rng.uniform(0, 2), keep_epsilon=rng.random() < 0.7, window=window),
            SuppressTokens(known, rng.uniform(1, 20)),
            Imitate(tokenizer("The boat left the harbor.")["input_ids"], strength=rng.uniform(0.2, 1)),
        ]
    )


def draw_call(rng: random.Random, config: Any, tokenizer: Any) -> dict[str, Any]:
    operations = tuple(draw_operation(rng, config, tokenizer) for _ in range(rng.choice([0, 0, 1, 1, 2])))
    settings: dict[str, Any] = {
        "max_new_tokens": rng.randint(1, 48),
        "seed": rng.randrange(1000),
        "do_sample": rng.random() < 0.6,
    }
    if rng.random() < 0.2:
        settings["guidance_scale"] = rng.uniform(1.1, 2)
    if rng.random() < 0.3:
        settings |= rng.choice(
            [{"unmasking": "margin"}, {"unmasking": "threshold", "threshold": 0.8}, {"align_blocks": True}]
        )
    return {
        "text": rng.choice(OPENINGS),
        "operations": operations,
        "attached": rng.random() < 0.5,
        "settings": settings,
    }


def answer(model: Any, tokenizer: Any, call: dict[str, Any]) -> list[int]:
    inputs = tokenizer(call["text"], return_tensors="pt")
    if call["attached"] and call["operations"]:
        with model.steer(*call["operations"]):
            return model.generate(**inputs, **call["settings"])[0].tolist()
    return model.generate(**inputs, **call["settings"], steering=call["operations"] or None)[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=50, help="calls of each thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    folder = steerling_hf.checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(options.seed)
    calls = [draw_call(rng, model.config, tokenizer) for _ in range(options.threads * options.calls)]
    started = time.perf_counter()
    alone = [answer(model, tokenizer, call) for call in calls]
    alone_s = time.perf_counter() - started

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    started = time.perf_counter()
    with ThreadPoolExecutor(options.threads) as pool:
        futures = [pool.submit(answer, model, tokenizer, call) for call in calls]
        errors = [error for future in futures if (error := future.exception()) is not None]
        differ = [
            number
            for number, (future, expected) in enumerate(zip(futures, alone))
            if future.exception() is None and future.result() != expected
        ]
    together_s = time.perf_counter() - started
    sys.setswitchinterval(interval)
    left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    found = {"calls": len(calls), "differ": len(differ), "errors": len(errors), "hooks_left": left}
    found |= {
        "steered": sum(bool(call["operations"]) for call in calls),
        "alone_s": round(alone_s, 1),
        "together_s": round(together_s, 1),
    }
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:12}{value}")
    for number in differ[:5]:
        print("differs:", calls[number])
    for error in errors[:5]:
        print("error:", repr(error))


if __name__ == "__main__":
    main()
