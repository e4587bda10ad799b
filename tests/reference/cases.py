"""The tiny configurations that stand for every variant of the released checkpoints, and what to run on them.

Shared by the recorder (`record.py`, which runs the reference), by the live comparison (`live.py`) and by the tests. It
imports neither the reference nor steerling_hf. Weights are a pure function of (seed, parameter name, shape), so a
recording holds outputs only.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Shape = tuple[int, ...]

VOCABULARY = 160
ORDINARY_TOKENS = 150  # ids below this are text; the special tokens sit behind them
TOKEN_IDS = {
    "eos_token_id": 150,
    "pad_token_id": 151,
    "bos_token_id": 152,
    "endofchunk_token_id": 153,
    "mask_token_id": 154,
}
INSTRUCT_TOKEN_IDS = {"start_header_id": 155, "end_header_id": 156, "eot_id": 157}

# The released architecture at toy size, in the flat form that the Hub repositories use.
BASE: dict[str, Any] = {
    "interpretable": True,
    "vocab_size": VOCABULARY,
    "n_layers": 2,
    "n_head": 4,
    "n_embd": 48,
    "n_kv_heads": 2,
    "block_size": 512,
    "diff_block_size": 16,
    "use_rms_norm": True,
    "norm_eps": 1e-5,
    "norm_order": "post",
    "use_qk_norm": True,
    "use_rope": True,
    "rope_base": 500000.0,
    "rope_full_precision": True,
    "clip_qkv": 10.0,
    "mlp_type": "swiglu",
    "activation": "gelu",
    "mlp_ratio": 2,
    "intermediate_size": None,
    "use_bias": False,
    "weight_sharing": True,
    "n_concepts": 41,
    "n_unknown_concepts": 53,
    "concept_dim": 48,
    "use_attention_known": False,
    "use_attention_unknown": False,
    "topk_known": 5,
    "topk_known_features": 5,
    "unknown_topk": 7,
    "use_unknown": True,
    "apply_topk_to_unknown": True,
    "topk_on_logits": False,
    "factorize_unknown": True,
    "factorize_rank": 16,
    "use_epsilon_correction": True,
    "concept_block_size": 4096,
    "pad_multiple": 16,
    "store_unknown_weights": False,
    "inject_layer": 1,
    "inject_alpha": 1.0,
    **TOKEN_IDS,
}


@dataclass(frozen=True)
class Case:
    """One configuration: what differs from BASE, and the size of the input.

    `weight_gain` widens the linear layers' weights; `seed` draws weights and input.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch: int = 2
    length: int = 70
    weight_gain: float = 1.6

    @property
    def config(self) -> dict[str, Any]:
        """The complete configuration in the flat form."""
        unknown_keys = set(self.changes) - set(BASE) - set(INSTRUCT_TOKEN_IDS)
        assert not unknown_keys, f"case {self.name} changes keys that no configuration has: {sorted(unknown_keys)}"
        return {**BASE, **self.changes}


# Most variants drop the epsilon correction: with it, composed equals hidden and the heads never reach the logits.
PLAIN = {"use_epsilon_correction": False}

CASES = [
    Case("released", {"n_layers": 3, "diff_block_size": 64, "block_size": 1024}, seed=44, length=150),
    Case("released_without_epsilon", {"n_layers": 3, "diff_block_size": 64, **PLAIN}, seed=44, length=150),
    Case("instruct", {**INSTRUCT_TOKEN_IDS, "diff_block_size": 8}, length=40),
    Case("clipped_one_kv_head", {"clip_qkv": 0.9, "n_kv_heads": 1, **PLAIN}, seed=1),
    Case("dense_unknown", {"factorize_unknown": False, "diff_block_size": 8, **PLAIN}, seed=5),
    Case("chunks_smaller_than_topk", {"concept_block_size": 3, "pad_multiple": 32, **PLAIN}, seed=14),
    Case("chunks_dense", {"concept_block_size": 10, "factorize_unknown": False, **PLAIN}, seed=4),
    Case("attention_known", {"use_attention_known": True, **PLAIN}, seed=6),
    Case("attention_unknown_dense", {"use_attention_unknown": True, "factorize_unknown": False, **PLAIN}, seed=5),
    Case("attention_unknown_factorised", {"use_attention_unknown": True, "concept_block_size": 8, **PLAIN}, seed=4),
    Case(
        "attention_both_topk_on_logits",
        {"use_attention_known": True, "use_attention_unknown": True, "topk_on_logits": True, **PLAIN},
    ),
    Case("topk_on_logits", {"topk_on_logits": True, "factorize_unknown": False, **PLAIN}, seed=2),
    Case("all_unknown_factorised", {"apply_topk_to_unknown": False, "concept_block_size": 10, **PLAIN}, seed=30),
    Case("all_unknown_dense", {"apply_topk_to_unknown": False, "factorize_unknown": False, **PLAIN}, seed=2),
    Case(
        "all_unknown_attention",
        {"apply_topk_to_unknown": False, "use_attention_unknown": True, "concept_block_size": 20, **PLAIN},
        seed=43,
    ),
    Case(
        "all_unknown_attention_dense",
        {"apply_topk_to_unknown": False, "use_attention_unknown": True, "factorize_unknown": False, **PLAIN},
        seed=27,
    ),
    Case("no_topk_at_all", {"topk_known": None, "topk_known_features": None, "unknown_topk": None, **PLAIN}, seed=30),
    Case("more_features_than_reported", {"topk_known": 4, "topk_known_features": 9, **PLAIN}, seed=16),
    Case("fewer_features_than_reported", {"topk_known": 9, "topk_known_features": 4, **PLAIN}, seed=6),
    Case("features_follow_topk", {"topk_known": 6, "topk_known_features": None, **PLAIN}, seed=6),
    Case("topk_above_concepts", {"topk_known": 64, "topk_known_features": 64, "unknown_topk": 64, **PLAIN}, seed=259),
    Case("unknown_off", {"use_unknown": False, "n_unknown_concepts": None}, seed=2),
    Case("unknown_off_without_epsilon", {"use_unknown": False, **PLAIN}, seed=2),
    Case(
        "gpt_like",
        {
            "use_rms_norm": False,
            "use_bias": True,
            "mlp_type": "standard",
            "activation": "gelu",
            "use_qk_norm": False,
            "use_rope": False,
            "norm_order": "pre",
            "n_kv_heads": None,
            "weight_sharing": False,
            "clip_qkv": None,
            **PLAIN,
        },
        seed=3,
    ),
    Case(
        "relu_layer_norm",
        {
            "use_rms_norm": False,
            "norm_eps": 0.1,  # the reference's LayerNorm keeps 1e-5 whatever norm_eps says
            "mlp_type": "standard",
            "activation": "relu",
            "intermediate_size": 70,
            **PLAIN,
        },
        seed=21,
    ),
    Case(
        "silu_pre_norm",
        {
            "mlp_type": "standard",
            "activation": "silu",
            "norm_order": "pre",
            "norm_eps": 0.05,
            "use_bias": True,
            "weight_sharing": False,
            "rope_base": 10000.0,
            "rope_full_precision": False,
            **PLAIN,
        },
        seed=3,
    ),
    Case(
        "swiglu_biased", {"use_bias": True, "intermediate_size": 40, "n_embd": 32, "concept_dim": 32, **PLAIN}, seed=2
    ),
    Case("bare_backbone", {"interpretable": False, "diff_block_size": 64}),
    Case("bare_backbone_untied", {"interpretable": False, "weight_sharing": False, "use_rms_norm": False}),
]


def case_named(name: str) -> Case:
    """The recorded case of that name."""
    return next(case for case in CASES if case.name == name)


@dataclass(frozen=True)
class Generation:
    """One greedy generation: prompt_length random ids, then new_tokens masks filled in `steps` steps."""

    case: str
    prompt_length: int
    new_tokens: int
    steps: int
    repetition_penalty: float = 1.0
    cfg_scale: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """A readable key, unique among the recorded generations."""
        guided = f"-cfg{self.cfg_scale:g}" if self.cfg_scale else ""
        schedule = f"{self.prompt_length}+{self.new_tokens}-{self.steps}steps"
        return f"{self.case}-{schedule}-rp{self.repetition_penalty:g}{guided}"

    @property
    def settings(self) -> dict[str, Any]:
        """What our generate() is asked for, by the names of compare.our_generation."""
        return {
            "max_new_tokens": self.new_tokens,
            "steps": self.steps,
            "repetition_penalty": self.repetition_penalty,
            "cfg_scale": self.cfg_scale,
        }


def _both_penalties(
    case: str, prompt_length: int, new_tokens: int, steps: int, seeds: tuple[int, int]
) -> list[Generation]:
    """One generation per repetition penalty, each from a prompt on which no decision is close."""
    return [
        Generation(case, prompt_length, new_tokens, steps, penalty, seed=seed)
        for penalty, seed in zip((1.0, 1.1), seeds)
    ]


# Generation blocks of 64 count from the prompt's end: on the attention grid after a multiple of 64, off it otherwise.
GENERATIONS = [
    # One token a step, from prompts of one token, of about an attention block, and of many.
    *_both_penalties("released", 1, 128, 128, (1, 1)),
    *_both_penalties("released", 63, 128, 128, (2, 3)),
    *_both_penalties("released", 64, 128, 128, (1, 2)),
    *_both_penalties("released", 65, 128, 128, (1, 1)),
    *_both_penalties("released", 500, 128, 128, (3, 2)),
    *_both_penalties("released", 1, 64, 64, (3, 6)),
    *_both_penalties("released", 29, 128, 128, (1, 10)),
    *_both_penalties("released", 64, 64, 16, (3, 10)),
    *_both_penalties("released", 65, 128, 32, (8, 3)),
    *_both_penalties("released", 128, 192, 96, (1, 1)),
    *_both_penalties("released", 100, 64, 7, (9, 1)),  # 64 masks in 7 steps: an uneven schedule
    *_both_penalties("released", 200, 192, 3, (9, 7)),  # a whole block in one step
    *_both_penalties("released", 33, 64, 100, (8, 8)),  # more steps than tokens: the last ones commit nothing
    *_both_penalties("released_without_epsilon", 50, 128, 64, (1, 3)),
    *_both_penalties("dense_unknown", 21, 40, 20, (9, 2)),  # generation blocks of 8
    *_both_penalties("bare_backbone", 64, 64, 32, (2, 6)),
    Generation("released", 40, 64, 32, 1.0, cfg_scale=1.0, seed=2),
    Generation("released", 40, 64, 32, 1.1, cfg_scale=0.5, seed=5),
    # An instruct checkpoint stops at <|eot_id|>, here in the middle of a block and with masks left before it.
    Generation("instruct", 12, 64, 32, seed=95),
    Generation("instruct", 24, 64, 64, 1.1, seed=249),
]


# What steers a model, written as in recipes (`Operation.to_dict`). Known concepts only: the reference injects no others.
# Layers are stated where a default would mean every layer of so shallow a model.
OPERATIONS: dict[str, dict[str, Any]] = {
    "amplify": {"operation": "Amplify", "concepts": 3, "layers": 2, "cutoff": 20},
    "amplify_two": {"operation": "Amplify", "concepts": [3, 17], "strength": 3.0, "layers": 2, "cutoff": 20},
    "amplify_defaults": {"operation": "Amplify", "concepts": 3},
    "suppress": {"operation": "Suppress", "concept": 5},
    "suppress_group": {"operation": "Suppress", "concept": 5, "group": [11, 5, 30], "layers": 2},
    "suppress_tokens": {"operation": "SuppressTokens", "concepts": [5, 8], "strength": 1.5},
    "inject": {"operation": "Inject", "concepts": [8], "strength": 2.0, "layers": 2},
    "inject_raw": {"operation": "Inject", "concepts": [8, 21], "strength": 1.5, "normalized": False, "layers": 0},
    "inject_away": {"operation": "Inject", "concepts": [8, 21], "strength": -1.5, "normalized": False},
}

# The layers that Amplify has by default are the reference's at the released depth only.
EVERYWHERE = [name for name in OPERATIONS if name != "amplify_defaults"]

# As unlike the released models as can be, positions excepted: masks in a block would all be alike without RoPE.
LAYER_NORM = Case(
    "layer_norm_gelu_biased",
    {
        "n_layers": 4,
        "use_rms_norm": False,
        "mlp_type": "standard",
        "use_bias": True,
        "use_qk_norm": False,
        "norm_order": "pre",
        "n_kv_heads": None,
        "weight_sharing": False,
        "clip_qkv": None,
        **PLAIN,
    },
    seed=3,
)
# Of the released depth, at which presets can be compared as they come.
DEEP = Case("released_depth", {"n_layers": 32, "n_embd": 32, "concept_dim": 32}, seed=1)

STEERED_CASES = {
    case.name: case
    for case in (
        case_named("released"),
        case_named("released_without_epsilon"),
        case_named("attention_both_topk_on_logits"),
        LAYER_NORM,
        DEEP,
    )
}

STEERED_FORWARDS = [
    (case, operation)
    for case in STEERED_CASES.values()
    for operation in (
        ("amplify_defaults", "suppress")
        if case is DEEP
        else ("amplify_two", "suppress_group", "suppress_tokens", "inject_raw")
    )
]


@dataclass(frozen=True)
class SteeredGeneration(Generation):
    """A greedy generation under one of OPERATIONS, on one of STEERED_CASES."""

    operation: str = ""

    @property
    def name(self) -> str:
        """A readable key, unique among the recorded generations."""
        return f"{super().name}-{self.operation}"


def _generations(
    case: str, prompt_length: int, new_tokens: int, steps: int, seeds: dict[str, int], cfg_scale: float = 0.0
) -> list[SteeredGeneration]:
    """One generation per operation, each from a prompt on which no decision is close."""
    return [
        SteeredGeneration(case, prompt_length, new_tokens, steps, 1.1, cfg_scale, seed, operation)
        for operation, seed in seeds.items()
    ]


STEERED_GENERATIONS = [
    *_generations(
        "released", 40, 64, 64, {"amplify": 1, "suppress": 1, "suppress_group": 1, "inject": 1, "inject_raw": 1}
    ),
    *_generations("released", 65, 128, 64, {"amplify_two": 2, "suppress_tokens": 1, "inject_away": 1}),
    *_generations("released_without_epsilon", 50, 64, 32, dict.fromkeys(EVERYWHERE, 1) | {"suppress_tokens": 2}),
    # Blocks of 16: the cutoff after 20 tokens falls into the second one.
    *_generations(
        "attention_both_topk_on_logits",
        21,
        64,
        64,
        dict.fromkeys(EVERYWHERE, 1) | {"suppress": 3, "suppress_tokens": 2, "inject_raw": 2, "inject_away": 4},
    ),
    *_generations("layer_norm_gelu_biased", 29, 64, 64, dict.fromkeys(EVERYWHERE, 1) | {"inject": 2}),
    *_generations("released_depth", 13, 48, 24, {"amplify_defaults": 1, "suppress": 1}),
    # Guided, where the masked prompt is injected too, and is cached with its blocks of 16.
    *_generations("released", 40, 64, 32, {"inject": 2, "amplify_two": 1, "suppress": 1}, cfg_scale=1.0),
    *_generations(
        "layer_norm_gelu_biased", 40, 64, 32, {"inject_raw": 1, "amplify": 1, "suppress_group": 1}, cfg_scale=0.5
    ),
]


# With the epsilon correction, as input attribution needs it: the reference's looks past the heads.
ATTRIBUTED_CASES = {
    case.name: case
    for case in (
        case_named("released"),
        case_named("released_without_epsilon"),
        case_named("unknown_off"),
        Case("dense_unknown_attention_known", {"factorize_unknown": False, "use_attention_known": True}, seed=2),
        Case("attention_unknown", {"use_attention_unknown": True, "concept_block_size": 8}, seed=1),
    )
}

ATTRIBUTED_GENERATIONS = [
    Generation("released", 29, 64, 64, 1.1, seed=3),
    Generation("released_without_epsilon", 29, 64, 32, seed=1),
    Generation("unknown_off", 29, 64, 32, seed=1),
    Generation("dense_unknown_attention_known", 29, 64, 64, seed=2),
    Generation("attention_unknown", 29, 64, 32, 1.1, seed=1),
]
ATTRIBUTED_CHUNKS = [(29, 45), (50, 93)]  # positions, the last one not included
ATTRIBUTED_POINTS = 4  # of the right Riemann sum


def padded(count: int, multiple: int) -> int:
    """Rows that a concept table of `count` concepts has on disk."""
    return math.ceil(count / multiple) * multiple


def parameter_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Names and shapes of a checkpoint, as REFERENCE.md lists them; a tied head appears under both its names."""
    width, vocabulary = config["n_embd"], config["vocab_size"]
    head = width // config["n_head"]
    kv_heads = config["n_head"] if config["n_kv_heads"] is None else config["n_kv_heads"]
    inner = config["intermediate_size"] or config["mlp_ratio"] * width
    layer_norm = not config["use_rms_norm"]  # LayerNorm has a bias whatever use_bias says

    shapes: dict[str, Shape] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = (size,)
        if layer_norm:
            shapes[f"{name}.bias"] = (size,)

    prefix = "transformer." if config["interpretable"] else ""
    linear(f"{prefix}tok_emb", vocabulary, width)
    for layer in range(config["n_layers"]):
        block = f"{prefix}blocks.{layer}"
        norm(f"{block}.ln_1", width)
        norm(f"{block}.ln_2", width)
        linear(f"{block}.attn.c_attn", width + 2 * kv_heads * head, width, config["use_bias"])
        linear(f"{block}.attn.c_proj", width, width, config["use_bias"])
        if config["use_qk_norm"]:
            norm(f"{block}.attn.q_norm", head)
            norm(f"{block}.attn.k_norm", head)
        linear(f"{block}.mlp.c_fc", inner * (2 if config["mlp_type"] == "swiglu" else 1), width, config["use_bias"])
        linear(f"{block}.mlp.c_proj", width, inner, config["use_bias"])
    norm(f"{prefix}ln_f", width)
    linear(f"{prefix}lm_head", vocabulary, width)
    if not config["interpretable"]:
        return shapes

    def concept_head(name: str, count: int, attention: bool, rank: int | None) -> None:
        rows = padded(count, config["pad_multiple"])
        if rank is None:
            linear(f"{name}.concept_embedding", rows, width)
        else:
            linear(f"{name}.embedding_coef", rows, rank)
            linear(f"{name}.embedding_basis", width, rank)
        if attention:
            linear(f"{name}.concept_query_projection", width, width)
        elif rank is None:
            linear(f"{name}.concept_predictor", rows, width)
        else:
            linear(f"{name}.predictor_down", rank, width)
            linear(f"{name}.predictor_up", rows, rank)

    concept_head("known_head", config["n_concepts"], config["use_attention_known"], None)
    if config["use_unknown"]:
        rank = config["factorize_rank"] if config["factorize_unknown"] else None
        concept_head("unknown_head", config["n_unknown_concepts"], config["use_attention_unknown"], rank)
    return shapes


def _uniform(name: str, shape: Shape, seed: int) -> np.ndarray:
    """Numbers of mean 0 and deviation 1 that are the same on every machine.

    The legacy Mersenne Twister's stream is frozen by numpy's promise, and a scaled uniform needs no libm.
    """
    digest = hashlib.sha256(f"{seed}:{name}:{'x'.join(map(str, shape))}".encode()).digest()
    stream = np.random.RandomState(int.from_bytes(digest[:4], "little"))
    return (stream.random_sample(shape) - 0.5) * (12.0**0.5)


def make_weights(config: dict[str, Any], seed: int, weight_gain: float = 1.6) -> dict[str, torch.Tensor]:
    """A whole checkpoint in float32 by name, wide enough that positions, concepts and variants differ clearly.

    Both names of a tied head hold the same tensor. Padded rows of the concept tables hold large junk, so a model
    that let them take part would be caught.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        values = _uniform(name, shape, seed)
        if len(shape) == 1:
            values = 0.3 * values + (1.0 if name.endswith(".weight") else 0.0)
            if "q_norm" in name:
                values *= 3.0  # sharp attention: masks at different positions then want different tokens
        elif "tok_emb" in name or "lm_head" in name:
            values *= 2.0 / shape[1] ** 0.5
        elif "concept_embedding" in name or "embedding_coef" in name:
            values *= 0.5
        elif "predictor" in name:
            values *= 1.0 / shape[1] ** 0.5  # modest logits, so that no sigmoid saturates and no ranks tie
        else:
            values *= weight_gain / shape[1] ** 0.5
        for head, count in (("known_head.", "n_concepts"), ("unknown_head.", "n_unknown_concepts")):
            if name.startswith(head) and any(table in name for table in ("embedding.", "coef", "predictor.", "_up")):
                values[config[count] :] *= 8.0
        weights[name] = torch.from_numpy(values.astype(np.float32))
    if config["weight_sharing"]:
        prefix = "transformer." if config["interpretable"] else ""
        weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}tok_emb.weight"]
    return weights


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """A digest of names and bytes: tells a changed recipe for weights or input from a changed model."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_input(case: Case) -> torch.Tensor:
    """Ids (batch, length): random text, a third of it masked, and one token at every ninth place."""
    stream = np.random.RandomState(1000 + case.seed)
    ids = stream.randint(0, ORDINARY_TOKENS, size=(case.batch, case.length))
    ids[stream.random_sample(ids.shape) < 0.33] = TOKEN_IDS["mask_token_id"]
    ids[:, 2::9] = 7
    return torch.from_numpy(ids.astype(np.int64))


def make_prompt(generation: Generation) -> torch.Tensor:
    """Ids (1, prompt_length) of random text."""
    stream = np.random.RandomState(2000 + 17 * generation.prompt_length + generation.seed)
    ids = stream.randint(0, ORDINARY_TOKENS, size=(1, generation.prompt_length))
    return torch.from_numpy(ids.astype(np.int64))


def recorded_positions(case: Case) -> torch.Tensor:
    """The positions whose outputs a recording keeps: both ends, and both sides of attention-block edges."""
    block, last = case.config["diff_block_size"], case.length - 1
    wanted = {0, 1, last, last - 1, case.length // 2}
    for edge in (block, block * ((last - 1) // block)):
        wanted |= {edge - 1, edge}
    return torch.tensor(sorted(position for position in wanted if 0 <= position <= last))
