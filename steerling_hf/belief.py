"""How far an attribution can be believed: what becomes of a token when the inputs or concepts that it names are taken away."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_model, check_number, check_positive, check_trace, check_whole, short
from .input_attribution import InputAttributions
from .modeling.steering_steerling import SetConcepts
from .modeling.trace_steerling import SteerlingTrace
from .replay import Replay, replay

FRACTIONS = (0.1, 0.2, 0.5)
ROWS = 16


@dataclass(frozen=True)
class Belief:
    """
    Means over targets (and over the fractions of the inputs) of what masking does to a token's probability.

    Masked tokens are nothing unusual to this model, so these are measured within what it was trained on.

    Args:
        comprehensiveness: Fall of the probability when the inputs with the highest scores are masked; high is good.
        sufficiency: Fall when all but those are masked; low is good.
        random_comprehensiveness, random_sufficiency: The same for inputs in random order.
        soft_comprehensiveness, soft_sufficiency: The same where each element of an input's embedding is replaced by the
            mask's with a probability that follows its score, or the rest of it.
    """

    comprehensiveness: float
    sufficiency: float
    random_comprehensiveness: float
    random_sufficiency: float
    soft_comprehensiveness: float
    soft_sufficiency: float


def measure_belief(
    model: Any,
    trace: SteerlingTrace,
    attributions: InputAttributions,
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 3,
    seed: int = 0,
) -> Belief:
    """
    Comprehensiveness and sufficiency (DeYoung et al. 2020, arXiv:1911.03429) and their soft variants (Zhao and Aletras 2023,
    arXiv:2305.10496) of input attributions for tokens.

    Args:
        model: What wrote the trace.
        trace: How.
        attributions: Of tokens of the trace, not of concepts.
        fractions: Shares of the inputs (tokens that were visible and not masked) to mask or to keep, at least one token.
        draws: Random orders, and random replacements, for each target.
        seed: Of these.

    Raises:
        ValueError: A fraction is not between 0 and 1, or there is no target.
    """
    check_model(model)
    check_trace(trace)
    if not isinstance(attributions, InputAttributions):
        raise ValueError(
            f"`attributions` is of the type {type(attributions).__name__}: give what attribute_inputs found."
        )
    given: Any = fractions
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"`fractions` is {short(fractions)}: give a list of shares between 0 and 1.")
    for fraction in fractions:
        check_number("fractions", fraction)
    check_positive("draws", draws)
    check_whole("seed", seed, 0, 2**63 - 1)
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"`fractions` is {list(fractions)!r}: give shares between 0 and 1.")
    if not len(attributions.positions):
        raise ValueError("`attributions` has no target, so there is nothing to measure.")
    generator = torch.Generator("cpu").manual_seed(seed)
    falls: dict[str, list[float]] = {name: [] for name in Belief.__dataclass_fields__}
    with replay(model, trace, attributions.positions.tolist()) as replaying, torch.no_grad():
        for target, scores in enumerate(attributions.scores):
            tokens = replaying.tokens([target])[0].cpu()
            inputs = (tokens != replaying.mask).nonzero()[:, 0]
            if not len(inputs):
                continue
            order = inputs[scores[inputs].argsort(descending=True, stable=True)]
            shuffled = [order[torch.randperm(len(order), generator=generator, device="cpu")] for _ in range(draws)]
            masked, names = [tokens], ["before"]
            for fraction in fractions:
                count = max(1, round(fraction * len(inputs)))
                for ranking, prefix in ((order, ""), *((other, "random_") for other in shuffled)):
                    masked += [
                        _masked(tokens, ranking[:count], replaying),
                        _masked(tokens, ranking[count:], replaying),
                    ]
                    names += [f"{prefix}comprehensiveness", f"{prefix}sufficiency"]
            embeddings = [replaying.embed(torch.stack(masked).to(replaying.device)).float()]
            strength = scores[: len(tokens)].clamp(min=0)
            strength = strength / strength.max().clamp(min=1e-12)
            for _ in range(draws):
                embeddings += [
                    _softened(embeddings[0][:1], replaying, kept, generator) for kept in (1 - strength, strength)
                ]
                names += ["soft_comprehensiveness", "soft_sufficiency"]
            probabilities = _probabilities(
                replaying, target, torch.cat(embeddings), int(trace.tokens[attributions.positions[target]])
            )
            for name, probability in zip(names[1:], probabilities[1:]):
                falls[name].append(probabilities[0] - probability)
    return Belief(**{name: sum(values) / len(values) if values else math.nan for name, values in falls.items()})


def ablate_concepts(
    model: Any, trace: SteerlingTrace, positions: Sequence[int], concepts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits of decided tokens, and what they would have been with the weight of one concept at 0.

    The fall of the logit should be the concept's contribution. It is the decision at that step alone that is repeated.

    Args:
        model: What wrote the trace.
        trace: How.
        positions: (n,) decided positions.
        concepts: (n,) concept that is taken from each.

    Returns:
        (n,) and (n,) logits, float32.
    """
    if len(concepts) != len(positions):
        raise ValueError(f"`concepts` has {len(concepts)} entries for {len(positions)} positions: give one each.")
    before, after = torch.zeros(2, len(positions), dtype=torch.float32, device="cpu")
    with replay(model, trace, positions) as replaying, torch.no_grad():
        for target, position in enumerate(positions):
            token = trace.tokens[position]
            embeddings = replaying.embed(replaying.tokens([target]))
            before[target] = replaying.logits([target], embeddings)[0, token]
            with model.steer(SetConcepts([concepts[target]], value=0.0)):
                after[target] = replaying.logits([target], embeddings)[0, token]
    return before, after


def _masked(tokens: torch.Tensor, positions: torch.Tensor, replaying: Replay) -> torch.Tensor:
    return tokens.index_fill(0, positions, replaying.mask)


def _softened(
    embeddings: torch.Tensor, replaying: Replay, kept: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Embeddings (1, W, D) of which each element stays with the probability `kept` (W,) of its token."""
    stays = torch.rand(embeddings.shape[1:], generator=generator, dtype=torch.float32, device="cpu") < kept[:, None]
    mask = replaying.embed(torch.tensor(replaying.mask, device=embeddings.device)).to(embeddings)
    return torch.where(stays.to(embeddings.device), embeddings, mask)


def _probabilities(replaying: Replay, target: int, embeddings: torch.Tensor, token: int) -> list[float]:
    found: list[float] = []
    for part in embeddings.split(ROWS):
        found += replaying.logits([target] * len(part), part).softmax(dim=-1)[:, token].tolist()
    return found
