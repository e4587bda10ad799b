"""What a step of unmasking decides: which positions (rules of commitment), how many (the schedule), and with which tokens."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor


class UndecidableError(ValueError):
    """
    Logits of a position say nothing: none of them is finite, or one is infinite or not a number.

    Args:
        index: Which of the positions.
    """

    def __init__(self, index: int):
        super().__init__(f"The logits of position {index} say nothing: one is inf or NaN, or all are -inf.")
        self.index = index


class UnmaskingRule(ABC):
    """
    Chooses the positions that a step decides. Any callable of the same signature will do in its place.

    A rule of fixed pace decides what the schedule says. An adaptive one decides more where the model is sure, so that
    fewer steps are needed; by itself it has a schedule of one position a step, and `steps` makes it decide faster.
    """

    @abstractmethod
    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """
        Choose among a row's masked positions of the current block.

        Args:
            logits: (n, V) float32 logits of these positions, from left to right, after all processors but those that
                only shape the sampling.
            count: How many positions the schedule gives to this step, 1 to n.

        Returns:
            (k,) distinct indices into the n positions, 1 <= k <= n; tokens are drawn in this order.
        """


# How far logits that are equal may come apart in float32, where products sum up in an order that depends on how many rows are
# computed together: measured at 1e-6, and more in wide models whose logits are large. Real gaps, 0.01 and more, are far above.
LOGIT_ROUNDING = 2.0**-13
# The same for probabilities, margins and entropies (nats) where no logit counts any more, such as two probabilities near 1.
SCORE_ROUNDING = 2.0**-21


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """(n,) probability of the most probable token under (n, V) logits."""
    return logits.softmax(dim=-1).amax(dim=-1)


def ranked(scores: torch.Tensor, slack: torch.Tensor, best: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rank positions so that rounding decides nothing: of positions whose scores tie but for rounding, the first comes first.

    Rows of masks alone, and steering that outweighs the text, make all positions alike; which of them scores highest then depends
    on how many rows are computed together. So the best position and all within its slack are equals, then the best of the
    rest and all within its slack, and so on. A limit between equals and others remains, but no scores pile up there.

    Args:
        scores: (n,) scores, from left to right.
        slack: (n,) how far the score of an equal may be away.
        best: 1.0 if the highest score is the best, -1.0 if the lowest is.

    Returns:
        (n,) scores from the best to the worst, equals with that of the best of them, and the (n,) indices of the positions;
        both on the CPU, where a step needs the indices anyway.

    Raises:
        UndecidableError: A score is not a number.
    """
    both = torch.stack((scores * best, slack)).cpu()
    refuse_nan(both[0])
    order = both[0].sort(descending=True, stable=True).indices
    levels: list[float] = []
    groups: list[list[int]] = []
    limit = math.inf
    for (score, reach), index in zip(both[:, order].T.tolist(), order.tolist()):
        if score < limit:
            groups.append([])
            level, limit = score, score - reach
        groups[-1].append(index)
        levels.append(level)
    places = [index for group in groups for index in sorted(group)]
    return torch.tensor(levels, dtype=scores.dtype, device="cpu") * best, torch.tensor(places, device="cpu")


def refuse_nan(scores: torch.Tensor) -> None:
    """Raise an `UndecidableError` for the first of (n,) scores that is not a number, as those of useless logits are."""
    useless = scores.isnan()
    if useless.any():
        raise UndecidableError(int(useless.nonzero()[0]))


def ranked_by_confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`ranked` probabilities of the most probable tokens under (n, V) logits."""
    sure = confidence(logits)
    return ranked(sure, LOGIT_ROUNDING * sure * (1 - sure) + SCORE_ROUNDING * sure)


def ranked_by_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`ranked` entropies under (n, V) logits, the least first."""
    unsure = entropy(logits)
    return ranked(unsure, LOGIT_ROUNDING * unsure + SCORE_ROUNDING, best=-1.0)


def most_probable(logits: torch.Tensor) -> torch.Tensor:
    """(n,) most probable tokens under (n, V) logits; of those that tie but for rounding, that of the lowest id."""
    best = logits.amax(dim=-1, keepdim=True)
    return (logits >= best - LOGIT_ROUNDING).byte().argmax(dim=-1)


class ConfidenceRule(UnmaskingRule):
    """The positions whose best token is the most probable (Chang et al. 2022, arXiv:2202.04200), as scheduled."""

    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` most confident positions."""
        return ranked_by_confidence(logits)[1][:count]


class MarginRule(UnmaskingRule):
    """The positions whose two best tokens differ most in probability (Kim et al. 2025, arXiv:2502.06768), as scheduled."""

    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` positions of the largest margin."""
        best = logits.topk(2, dim=-1).values.sub(logits.logsumexp(dim=-1, keepdim=True)).exp()
        margin, both = best[:, 0] - best[:, 1], best.sum(dim=-1)
        # Of two certain tokens no logit can change the margin, of two equal ones it changes most.
        slack = LOGIT_ROUNDING * (both - margin.square()) + SCORE_ROUNDING * both
        return ranked(margin, slack)[1][:count]


class EntropyRule(UnmaskingRule):
    """The positions whose distributions have the least entropy (Dream, Ye et al. 2025, arXiv:2508.15487), as scheduled."""

    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` positions of least entropy."""
        return ranked_by_entropy(logits)[1][:count]


class ThresholdRule(UnmaskingRule):
    """
    All positions whose best token has a probability of at least `threshold`: confidence-aware parallel decoding of
    Fast-dLLM (Wu et al. 2025, arXiv:2505.22618).

    Args:
        threshold: A probability, above 0.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold

    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The positions above the threshold, and no fewer than the `count` most confident."""
        sorted_confidence, order = ranked_by_confidence(logits)
        return order[: max(count, int((sorted_confidence >= self.threshold).sum()))]


class FactorRule(UnmaskingRule):
    """
    The k most confident positions, with the largest k for which `(k + 1) * (1 - c_k) < factor`, where c_k is the k-th
    highest confidence: the more positions at once, the surer each must be (Fast-dLLM, arXiv:2505.22618, section 3.3).

    Args:
        factor: Above 0; larger is faster.
    """

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The k positions of the formula, and no fewer than the `count` most confident."""
        sorted_confidence, order = ranked_by_confidence(logits)
        rank = torch.arange(2, len(order) + 2, device=order.device)
        # Both factors rise with k, so the condition holds up to one k.
        return order[: max(count, int((rank * (1 - sorted_confidence) < self.factor).sum()))]


class EntropyBoundRule(UnmaskingRule):
    """
    The k positions of least entropy, with the largest k for which `sum(H_1..H_k) - H_k <= entropy_bound`: what they can
    tell about each other, at most, in nats (EB-Sampler, Ben-Hamu et al. 2025, arXiv:2505.24857, equation 7).

    Args:
        entropy_bound: In nats, 0 or more; larger is faster.
    """

    def __init__(self, entropy_bound: float):
        self.entropy_bound = entropy_bound

    def __call__(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The k positions of the formula, and no fewer than the `count` of least entropy."""
        sorted_entropy, order = ranked_by_entropy(logits)
        # Of sorted entropies the last is the largest, and the sum without it never falls.
        mutual = sorted_entropy.cumsum(0) - sorted_entropy
        return order[: max(count, int((mutual <= self.entropy_bound).sum()))]


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    (n,) entropies in nats under (n, V) logits: with m the largest of them, `sum_v p_v * (m - l_v) - ln p_m`, which needs no
    logarithm of every probability.
    """
    probabilities = logits.softmax(dim=-1)
    # What is ruled out lies infinitely far below, with probability 0.
    below = logits.amax(dim=-1, keepdim=True).sub(logits).clamp_(max=torch.finfo(logits.dtype).max)
    largest = probabilities.amax(dim=-1).log()
    # No product of matrices: autocast would compute that in half precision, where the clamp is infinite.
    return below.mul_(probabilities).sum(dim=-1) - largest


# Name of a rule: its class, and the key of the generation configuration that it takes.
UNMASKING_RULES: dict[str, tuple[Callable[..., UnmaskingRule], str | None]] = {
    "confidence": (ConfidenceRule, None),
    "margin": (MarginRule, None),
    "entropy": (EntropyRule, None),
    "threshold": (ThresholdRule, "threshold"),
    "factor": (FactorRule, "factor"),
    "entropy_bound": (EntropyBoundRule, "entropy_bound"),
}


def make_rule(generation_config) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The rule that a generation configuration names, or the user's own, whose choices are checked."""
    own = generation_config.unmasking
    if callable(own):

        def checked(logits: torch.Tensor, count: int) -> torch.Tensor:
            best = logits.amax(dim=-1).cpu()
            refuse_nan(best - best)  # which is NaN for inf as well
            answer = own(logits, count)
            try:
                chosen = torch.as_tensor(answer, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                chosen = torch.empty(0, dtype=torch.float32, device="cpu")
            whole = chosen.dtype == torch.long and chosen.dim() == 1 and 0 < len(chosen.unique()) == len(chosen)
            if not whole or chosen.min() < 0 or chosen.max() >= len(logits):
                raise ValueError(
                    f"`unmasking` chose {answer!r} of {len(logits)} positions: a rule returns one or more distinct indices "
                    f"from 0 to {len(logits) - 1}."
                )
            return chosen

        return checked
    rule, key = UNMASKING_RULES[generation_config.unmasking]
    return rule(getattr(generation_config, key)) if key else rule()


def share_steps(sizes: Sequence[int], steps: int) -> list[list[int]]:
    """
    How many tokens each step decides, per generation block.

    By the end of a block, its share of `steps` is spent, rounded down: `steps * (tokens so far) // (all tokens)`; but each
    block has at least one step, and at most one a token. The steps of a block decide equal numbers of tokens, the first
    ones one more each for the rest. Where all blocks are equal, and `steps` is a multiple of their number, that is the
    reference's schedule.

    Args:
        sizes: Positions to decide in each block, 1 or more.
        steps: Forward passes in all.
    """
    schedule = []
    total, start = sum(sizes), 0
    for size in sizes:
        stop = start + size
        share = steps * stop // total - steps * start // total
        share = max(1, min(share, size))
        each, left_over = divmod(size, share)
        schedule.append([each + 1] * left_over + [each] * (share - left_over))
        start = stop
    return schedule


class EntropyTemperatureLogitsWarper(LogitsProcessor):
    """
    Divides logits by a temperature that grows with the entropy H of each position's distribution p, as the reference
    sampler of the released checkpoints does (package `steerling` 0.2.0):

        T = 0.3 + 0.4 * min(1, H / ln K),  K = max(2, 1 + number of sorted cumulative probabilities <= top_p)

    so that sure positions are drawn almost greedily. The nucleus itself is left to `TopPLogitsWarper`.

    Args:
        top_p: Mass of the nucleus whose size is K, 0..1.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, V) over their temperatures."""
        probabilities = scores.softmax(dim=-1)
        spread = torch.special.entr(probabilities).sum(dim=-1)
        mass = probabilities.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        nucleus = (1 + (mass <= self.top_p).sum(dim=-1)).clamp(min=2)
        temperature = 0.3 + 0.4 * (spread / nucleus.to(spread).log()).clamp(max=1.0)
        return scores / temperature[:, None]


class TokenSampler:
    """
    Turns logits into tokens: the most probable ones, or draws from each row's own generator.

    Args:
        warpers: What shapes the distributions before a draw.
        generators: One per row, or `None` for the most probable token.
    """

    def __init__(self, warpers: Callable, generators: list[torch.Generator] | None):
        self.warpers = warpers
        self.generators = generators

    def draw(self, row: int, canvas: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(k,) tokens of row number `row`, whose canvas is (T,), from their (k, V) logits."""
        if self.generators is None:
            return most_probable(logits)
        probabilities = self.warpers(canvas.to(logits.device).expand(len(logits), -1), logits).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generators[row])[:, 0]


def completions(
    sequence: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
) -> list[tuple[int, torch.Tensor]]:
    """
    Where a token would complete a sequence.

    Args:
        sequence: (k,) token ids.
        tokens: (T,) canvas.
        positions: (n,) positions of it.

    Returns:
        Each token of the sequence, once, with (n,) truth values: at which positions it would.
    """
    found: dict[int, torch.Tensor] = {}
    for place, token in enumerate(sequence.tolist()):
        starts = positions - place
        columns = starts[:, None] + torch.arange(len(sequence), device="cpu")
        inside = (starts >= 0) & (columns[:, -1] < len(tokens))
        present = tokens[columns.clamp(0, len(tokens) - 1)] == sequence
        present[:, place] = True
        completed = inside & present.all(dim=-1)
        found[token] = found[token] | completed if token in found else completed
    return list(found.items())


class ForbiddenPhrases:
    """
    Keeps phrases of several tokens out of a text whose positions are decided in any order: the last of a phrase's
    positions to be decided may not complete it.

    Args:
        phrases: Token ids of each phrase, two or more.
    """

    def __init__(self, phrases: Sequence[Sequence[int]]):
        self.phrases = [torch.tensor(phrase, device="cpu") for phrase in phrases]

    def forbid(self, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor) -> None:
        """Rule out, in (n, V) logits of n positions, what would complete a phrase on the (T,) canvas."""
        for phrase in self.phrases:
            for token, completed in completions(phrase, tokens, positions):
                logits[completed.to(logits.device), token] = -torch.inf

    def compatible(self, tokens: torch.Tensor, positions: torch.Tensor, drawn: torch.Tensor) -> int:
        """How many of the tokens drawn for a step can be written before one completes a phrase together with others."""
        tokens = tokens.clone()
        for number, (position, token) in enumerate(zip(positions.tolist(), drawn.tolist())):
            tokens[position] = token
            completed = any(
                (
                    tokens[max(0, position - len(phrase) + 1) : position + len(phrase)].unfold(0, len(phrase), 1)
                    == phrase
                )
                .all(dim=-1)
                .any()
                for phrase in self.phrases
                if len(phrase) <= len(tokens[max(0, position - len(phrase) + 1) : position + len(phrase)])
            )
            if number and completed:
                return number
        return len(positions)


__all__ = [
    "UNMASKING_RULES",
    "ConfidenceRule",
    "EntropyBoundRule",
    "EntropyRule",
    "EntropyTemperatureLogitsWarper",
    "FactorRule",
    "ForbiddenPhrases",
    "MarginRule",
    "ThresholdRule",
    "TokenSampler",
    "UndecidableError",
    "UnmaskingRule",
    "completions",
    "make_rule",
    "share_steps",
]
