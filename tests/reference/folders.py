"""Writes a case as a checkpoint folder, in each form in which such checkpoints exist."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# In the nested form these keys sit under `concept`, by these names.
NESTED_KEYS = {
    key: key
    for key in (
        "n_concepts",
        "n_unknown_concepts",
        "concept_dim",
        "use_attention_known",
        "use_attention_unknown",
        "topk_known",
        "topk_known_features",
        "unknown_topk",
        "use_unknown",
        "apply_topk_to_unknown",
        "topk_on_logits",
        "factorize_unknown",
        "factorize_rank",
        "use_epsilon_correction",
        "pad_multiple",
        "store_unknown_weights",
        "inject_layer",
        "inject_alpha",
    )
} | {"concept_block_size": "block_size"}


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as the Hub repositories have it."""
    return {"model_type": "steerling", "architectures": ["SteerlingForDiffusionLM"], **config}


def nested_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as older conversions have it."""
    nested = {key: value for key, value in config.items() if key not in NESTED_KEYS}
    nested["model_type"] = "causal_diffusion"
    nested["architectures"] = ["SteerlingForCausalLM"]
    if config["interpretable"]:
        nested["concept"] = {new: config[key] for key, new in NESTED_KEYS.items()} | {"max_concepts": 16}
    return nested


def write_folder(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    *,
    form: str = "flat",
    shards: int = 1,
    tied: str = "both",
) -> Path:
    """Writes config.json and safetensors; returns the folder.

    form: "flat" or "nested". shards: 1 writes model.safetensors, more write numbered files and an index.
    tied: for a tied head, which of its two tensors are stored: "tok_emb", "lm_head" or "both".
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"flat": flat_config, "nested": nested_config}[form](config)
    (folder / "config.json").write_text(json.dumps(content, indent=2))

    left_out = {"both": (), "tok_emb": ("lm_head",), "lm_head": ("tok_emb",)}[tied] if config["weight_sharing"] else ()
    stored = {name: tensor.clone() for name, tensor in weights.items() if not any(part in name for part in left_out)}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        filename = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in sorted(stored)[shard::shards]}
        save_file(part, folder / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, filename))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder
