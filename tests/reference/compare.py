"""Our model's outputs under the names that the recordings use, and the measures of agreement."""

from typing import Any

import torch
from steerling_hf.modeling.generation_steerling import SteerlingGenerateOutput
from steerling_hf.modeling.steering_steerling import operation_from_dict

TOLERANCE = 1e-5  # of max |ours - theirs| / max |theirs|, in float32


@torch.no_grad()
def our_outputs(model: torch.nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of a SteerlingForDiffusionLM for ids (batch, length), named as in the recordings.

    `logits` comes from a plain call, which skips the concept heads where it may; `logits_with_concepts` from a call
    that runs them.
    """
    plain = model(input_ids=input_ids)
    hidden = model.transformer(input_ids=input_ids).last_hidden_state
    outputs = {"logits": plain.logits, "hidden": hidden}
    if not model.config.interpretable:
        return outputs
    full = model(input_ids=input_ids, output_concepts=True)
    concepts = full.concepts
    named = {
        "logits_with_concepts": full.logits,
        "hidden": concepts.hidden,
        "known": concepts.known_features,
        "unknown": concepts.unknown_features,
        "composed": concepts.composed,
        "known_indices": concepts.known_indices,
        "known_weights": concepts.known_weights,
        "unknown_indices": concepts.unknown_indices,
        "unknown_weights": concepts.unknown_weights,
    }
    return outputs | {name: tensor for name, tensor in named.items() if tensor is not None}


@torch.no_grad()
def our_steered_logits(model: torch.nn.Module, operation: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of a SteerlingForDiffusionLM for ids (batch, length) under an operation that is written as in recipes."""
    with model.steer(operation_from_dict(operation)):
        return model(input_ids=input_ids).logits


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    assert ours.shape == theirs.shape, f"shapes differ: ours {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    assert ours.isfinite().all(), "ours is not finite"
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative difference of each compared output that is not an index; the reference decides which there are."""
    pairs = {name: (name, name) for name in ("logits", "hidden", "known", "unknown", "composed") if name in theirs}
    if "composed" in theirs:
        pairs["logits_with_concepts"] = ("logits_with_concepts", "logits")
    for head in ("known", "unknown"):
        if f"{head}_weights" in theirs:
            pairs[f"{head}_weights"] = (f"{head}_weights", f"{head}_weights")
    return {label: relative_difference(ours[our], theirs[their]) for label, (our, their) in pairs.items()}


def our_output(
    model: torch.nn.Module, prompt: torch.Tensor, *, cfg_scale: float = 0.0, **settings
) -> SteerlingGenerateOutput:
    """One greedy generation after a prompt (1, length)."""
    return model.generate(
        prompt, do_sample=False, guidance_scale=1.0 + cfg_scale, return_dict_in_generate=True, **settings
    )


def our_generation(model: torch.nn.Module, prompt: torch.Tensor, **settings) -> tuple[list[int], list[int]]:
    """New tokens of one greedy generation after a prompt (1, length), and the step that decided each."""
    output, start = our_output(model, prompt, **settings), prompt.shape[1]
    return output.sequences[0, start:].tolist(), output.step_map[0, start:].tolist()


def generation_disagreement(ours: tuple[list[int], list[int]], theirs: tuple[list[int], list[int]], config) -> str:
    """What differs between two generations, each (tokens, step of each token); empty if nothing does.

    When the reference meets <|eot_id|> it stops at once: positions before it that were still masked stay so, and what
    follows is filled with eos. Ours completes the former and cuts the latter, so neither is compared.
    """
    (tokens, steps), (their_tokens, their_steps) = ours, theirs
    if config.get("eot_id") in their_tokens:
        length = their_tokens.index(config["eot_id"]) + 1
        their_tokens, their_steps = their_tokens[:length], their_steps[:length]
    if len(tokens) != len(their_tokens):
        return f"{len(tokens)} new tokens, not {len(their_tokens)}"
    decided = [place for place, step in enumerate(their_steps) if step >= 0]
    other_tokens = [place for place in decided if tokens[place] != their_tokens[place]]
    if other_tokens:
        return f"other tokens at {other_tokens} of the new positions"
    other_steps = [place for place in decided if steps[place] != their_steps[place]]
    return f"same tokens, but decided in another order at {other_steps}" if other_steps else ""
