"""Runs the reference package on a case: the only module here, with its callers, that needs `steerling` installed."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cases import Case, Generation, make_prompt, make_weights
from folders import nested_config
from steerling.attribution import concept_attribution
from steerling.attribution.input_attribution import FaithfulOutputToInputAttributor
from steerling.configs.causal_diffusion import CausalDiffusionConfig
from steerling.configs.concept import ConceptConfig
from steerling.configs.generation import GenerationConfig
from steerling.configs.steering import SteeringConfig
from steerling.inference.causal_diffusion import SteerlingGenerator
from steerling.models.causal_diffusion import CausalDiffusionLM
from steerling.models.interpretable.interpretable_causal_diffusion import InterpretableCausalDiffusionLM


def reference_model(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The reference's own model on the CPU in float32, holding exactly these weights."""
    nested = nested_config(config)
    architecture = CausalDiffusionConfig(
        **{k: v for k, v in nested.items() if k in CausalDiffusionConfig.model_fields}
    )
    if config["interpretable"]:
        concepts = ConceptConfig(**nested["concept"])
        model: torch.nn.Module = InterpretableCausalDiffusionLM(architecture, concepts, config["vocab_size"])
    else:
        model = CausalDiffusionLM(architecture, config["vocab_size"])
    model.load_state_dict(weights, strict=True)
    return model.eval()


def reference_for(case: Case) -> torch.nn.Module:
    """The reference's model of a case."""
    return reference_model(case.config, make_weights(case.config, case.seed, case.weight_gain))


@torch.no_grad()
def reference_outputs(model: torch.nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that is compared, by name, for ids (batch, length); what a variant lacks is absent.

    `known_gap` and `unknown_gap` (batch, length) are the smallest gaps between neighbours in the rankings that decide
    the indices, as differences of logits, or of 4 x sigmoid where the reference ranks those.
    """
    if not isinstance(model, InterpretableCausalDiffusionLM):
        return {"logits": model(input_ids), "hidden": model(input_ids, return_hidden=True)}
    logits, out = model(input_ids)
    outputs = {"logits": logits, "hidden": out.hidden, "known": out.known_features, "composed": out.composed}
    optional = {
        "unknown": out.unk_hat,
        "known_indices": out.known_topk_indices,
        "unknown_indices": out.unknown_topk_indices,
    }
    outputs.update({name: value for name, value in optional.items() if value is not None})
    for head, chosen in (("known", out.known_topk_logits), ("unknown", out.unknown_topk_logits)):
        if chosen is not None:
            outputs[f"{head}_weights"] = chosen.sigmoid()
    return outputs | _rank_gaps(model, out)


def _rank_gaps(model: torch.nn.Module, out: Any) -> dict[str, torch.Tensor]:
    """`known_gap` and `unknown_gap` of `reference_outputs`, of those heads that rank."""
    return {
        f"{head}_gap": _rank_gap(getattr(model, f"{head}_head"), logits, chosen.shape[-1])
        for head, logits, chosen in (
            ("known", out.known_logits, out.known_topk_logits),
            ("unknown", out.unknown_logits, out.unknown_topk_logits),
        )
        if chosen is not None
    }


def _rank_gap(head: torch.nn.Module, logits: torch.Tensor, reported: int) -> torch.Tensor:
    """See `reference_outputs`; `logits` (batch, length, concepts) are those of all concepts."""
    deciding = max(reported, head.topk_features or 0) + 1
    ranked = logits.double().sort(-1, descending=True).values[..., :deciding]
    if not head.topk_on_logits:
        ranked = 4 * ranked.sigmoid()
    return (ranked[..., :-1] - ranked[..., 1:]).amin(-1)


@dataclass
class Trace:
    """What one greedy generation of the reference did, step by step.

    sequence: the final canvas. step_map: for each generated position, the step that committed it (-1: none did).
    margin: the smallest relative gap that any decision hung on, of the confidences at the edge of the committed set
    or of the two best probabilities of a committed token. Below about 1e-5 rounding could decide.
    """

    sequence: list[int]
    step_map: list[int]
    margin: float


def reference_steering(operation: dict[str, Any]) -> SteeringConfig:
    """The reference's form of an operation; what the operation leaves unset is left to the reference's default."""
    asked = dict(operation)
    kind, cutoff = asked.pop("operation"), asked.get("cutoff")
    if kind == "SuppressTokens":
        return SteeringConfig(relu_logit_mask=dict.fromkeys(asked["concepts"], asked["strength"]))
    names = {
        "concepts": "concept_ids",
        "concept": "concept_id",
        "group": "group_concept_ids",
        "strength": "mai_lm_target",
        "normalized": "normalize_mai_lm_target",
        "layers": "inject_layer",
        "cutoff": "cutoff_tokens",
    }
    settings = {names[name]: value for name, value in asked.items()}
    if kind == "Inject":
        return SteeringConfig(inject_alpha_schedule="fixed" if cutoff is None else "hard_cutoff", **settings)
    return {"Amplify": SteeringConfig.injection, "Suppress": SteeringConfig.injection_relu}[kind](**settings)


def _runner(model: torch.nn.Module, config: dict[str, Any], prompt: torch.Tensor | None = None) -> SteerlingGenerator:
    """The reference's generator for a model, with ids instead of a tokenizer: any text is the prompt (1, length)."""
    ids = SimpleNamespace(
        mask_token_id=config["mask_token_id"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
        eot_id=config.get("eot_id"),
        decode=lambda tokens: "",
        encode=lambda text, add_special_tokens: prompt[0].tolist(),
    )
    interpretable = isinstance(model, InterpretableCausalDiffusionLM)
    return SteerlingGenerator(model, ids, model.config, is_interpretable=interpretable, device="cpu")


@torch.no_grad()
def reference_steered_outputs(
    model: torch.nn.Module, config: dict[str, Any], operation: dict[str, Any], input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    `logits`, and the gaps of `reference_outputs`, under an operation that acts at masked positions: its generator's
    injection, and its generator's suppression, which that one takes off behind the model.
    """
    runner, steering = _runner(model, config), reference_steering(operation)
    injection = {}
    if steering.has_injection:
        direction, alpha, layer = runner._prepare_steering(steering)
        injection = {
            "position_injection": runner._position_injection(input_ids, direction),
            "steering_inject_layer": layer,
            "steering_inject_alpha": alpha,
        }
    logits, out = model(input_ids, **injection)
    if steering.has_logit_mask:
        masked = (input_ids == config["mask_token_id"])[..., None]
        logits = logits - masked * runner._build_relu_mask(steering.relu_logit_mask)
    return {"logits": logits} | _rank_gaps(model, out)


def _greedy(generation: Generation) -> GenerationConfig:
    """What the reference's generator is asked for."""
    return GenerationConfig(
        max_new_tokens=generation.new_tokens,
        steps=generation.steps,
        repetition_penalty=generation.repetition_penalty,
        cfg_scale=generation.cfg_scale,
        use_entropy_sampling=False,
        top_p=0.0,
    )


def reference_generation(
    model: torch.nn.Module, config: dict[str, Any], generation: Generation, operation: dict[str, Any] | None = None
) -> Trace:
    """Greedy generation by the reference's own loop, observed through the model calls that it makes."""
    runner = _runner(model, config)
    steering = None if operation is None else reference_steering(operation)
    suppression = 0.0
    if steering is not None and steering.has_logit_mask:
        suppression = runner._build_relu_mask(steering.relu_logit_mask).detach()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = runner._forward

    def watched(input_ids, *args, **kwargs):
        result = forward(input_ids, *args, **kwargs)
        calls.append((input_ids[0].clone(), result[0] if isinstance(result, tuple) else result))
        return result

    runner._forward = watched
    prompt = make_prompt(generation)
    sequence = runner.generate_full(prompt, _greedy(generation), steering=steering).tokens
    start, block = prompt.shape[1], config["diff_block_size"]
    step_map, margin = torch.full((generation.new_tokens,), -1), float("inf")
    afters = [after for after, _ in calls[1:]] + [sequence]
    for step, ((before, logits), after) in enumerate(zip(calls, afters)):
        committed = before[start:] != after[start:]
        step_map[committed & (step_map < 0)] = step
        if committed.any():
            margin = min(margin, _margin(before, after, logits, suppression, start, block, config, generation))
    return Trace(sequence.tolist(), step_map.tolist(), margin)


def _margin(before, after, logits, suppression, start, block, config, generation) -> float:
    """The smallest relative gap behind one step's decisions (see Trace)."""
    masked = (before == config["mask_token_id"]).nonzero().squeeze(1)
    masked = masked[masked >= start]
    masked = masked[(masked - start) // block == (masked[0] - start) // block]
    scores = logits[0]
    if generation.cfg_scale:  # the second row is the one whose prompt is masked
        scores = logits[1] + (generation.cfg_scale + 1) * (logits[0] - logits[1])
    rows = (scores[masked] - suppression).double()
    present = before.unique()
    values = rows[:, present]
    rows[:, present] = torch.where(
        values > 0, values / generation.repetition_penalty, values * generation.repetition_penalty
    )
    rows[:, [config["eos_token_id"], config["mask_token_id"], config["pad_token_id"]]] = float("-inf")
    best = rows.softmax(-1).topk(2, dim=-1).values
    committed = before[masked] != after[masked]
    gaps = [((best[:, 0] - best[:, 1]) / best[:, 0])[committed].min()]
    if not committed.all():
        weakest, strongest = best[committed, 0].min(), best[~committed, 0].max()
        gaps.append((weakest - strongest) / weakest)
    return float(min(gaps))


def reference_attributions(
    model: torch.nn.Module, config: dict[str, Any], generation: Generation, chunks: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """
    What the reference's concept attributor says of one greedy generation.

    `tokens`, `logits` and `residual` (new tokens,), and `known_indices`, `known_weights`, `known_contributions` and those
    of the unknown head (new tokens, k). Of each chunk START_STOP, `chunk_START_STOP_known` and `_unknown` (concepts,), and
    `_residual` (1,), in which 1 is the whole of the logits. `known_gap` and `unknown_gap` (new tokens,) are those of
    `reference_outputs`, in the pass that decided each token.
    """
    prompt = make_prompt(generation)
    runner, start = _runner(model, config, prompt), prompt.shape[1]
    gaps: dict[str, torch.Tensor] = {}

    def watched(info: Any) -> None:
        hidden = info.outputs.hidden[:, info.committed_positions]
        for name, ranked, reported in (
            ("known", model.known_head, config["topk_known"]),
            ("unknown", model.unknown_head, config["unknown_topk"]),
        ):
            if ranked is not None:
                logits = ranked(hidden, return_logits=True).logits
                gap = gaps.setdefault(f"{name}_gap", torch.full((generation.new_tokens,), float("inf")).double())
                gap[info.committed_positions - start] = _rank_gap(ranked, logits, reported)[0]

    with _every_unknown_head(model), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never committed")  # the prompt
        attributor = concept_attribution.FaithfulConceptAttributor(runner, concepts_path="none")
        attributor.attribute("", _greedy(generation))
    runner.generate_full(prompt, _greedy(generation), step_callback=watched)
    found = attributor.last_attribution
    kept = {"tokens": found.target_token_ids, "logits": found.target_logits, "residual": found.epsilon_contribution}
    names = {"known": "known", "unk": "unknown"} if model.unknown_head is not None else {"known": "known"}
    for theirs, ours in names.items():
        for part in ("indices", "weights", "contributions"):
            kept[f"{ours}_{part}"] = getattr(found, f"{theirs}_{part}")
    kept = {name: tensor[0, start:] for name, tensor in kept.items()}
    for first, last in chunks:
        kept |= {
            f"chunk_{first}_{last}_{name}": tensor
            for name, tensor in _chunk(found, first, last, model, config).items()
        }
    return kept | gaps


def _chunk(
    found: Any, start: int, stop: int, model: torch.nn.Module, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The reference's numbers of a chunk, by concept."""
    labels = SimpleNamespace(label=lambda concept, kind: str(concept))
    entries, percentage = concept_attribution.chunk_attribution(found, start, stop, concept_labels=labels)
    sizes = {"known": config["n_concepts"], "unknown": config["n_unknown_concepts"]}
    if model.unknown_head is None:
        del sizes["unknown"]
    shares = {name: torch.zeros(size) for name, size in sizes.items()}
    for entry in entries:
        name = "known" if entry["type"] == "known" else "unknown"
        if name in shares:
            shares[name][int(entry["label"])] = entry["contribution"]
    return shares | {"residual": torch.tensor([percentage / 100])}


@contextmanager
def _every_unknown_head(model: torch.nn.Module) -> Iterator[None]:
    """
    The attributor's own ranking of unknown concepts refuses all heads but factorised linear ones; the model's takes those
    that it refuses.
    """
    own = concept_attribution._compute_unknown_topk

    def ranked(head: Any, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        refused = head is not None and (not head.factorize or head.use_attention)
        return model._compute_unknown_topk(hidden, k) if refused else own(head, hidden, k=k)

    with patch.object(concept_attribution, "_compute_unknown_topk", ranked):
        yield


def reference_input_attributions(
    model: torch.nn.Module,
    config: dict[str, Any],
    generation: Generation,
    chunks: Sequence[tuple[int, int]],
    points: int,
) -> dict[str, torch.Tensor]:
    """
    What the reference's input attributor says of one greedy generation: `inputs` (new tokens, T), the scores of all
    positions for each new one by so many points of the right Riemann sum; `inputs_of_prompt` (T,), those of the prompt for
    all together; and of each chunk START_STOP `inputs_of_answer_START_STOP` (T,), those of the new positions for it.
    """
    prompt = make_prompt(generation)
    attributor = FaithfulOutputToInputAttributor.from_generator(_runner(model, config, prompt))
    found = attributor.attribute(prompt[0].tolist(), _greedy(generation), n_steps=points)
    start, length = prompt.shape[1], prompt.shape[1] + generation.new_tokens

    def spread(ranking: list[dict[str, Any]]) -> torch.Tensor:
        scores = torch.zeros(length)
        for entry in ranking:
            scores[entry["input_position"]] = entry["score"]
        return scores

    kept = {"inputs": torch.zeros(generation.new_tokens, length), "inputs_of_prompt": spread(found.aggregate())}
    kept["inputs"][found.target_positions - start] = found.attributions.float()
    for first, last in chunks:
        kept[f"inputs_of_answer_{first}_{last}"] = spread(found.aggregate_chunk(first, last))
    return kept
