"""The measures of steerling-nano, apart from any model: each takes texts or tensors and returns a number in 0..1."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from grammar import END_OF_CHUNK, END_OF_TURN, REFUSAL, Document
from parser import Parsed, parse, split_sentences


@dataclass(frozen=True)
class Continuation:
    """A generated continuation: the document whose opening was given, the given text, and what followed it.

    `text` holds control strings and stops before the first <|eot_id|>; `ended` says whether there was one.
    """

    document: Document
    opening: str
    text: str
    ended: bool


def cut_at_turn(text: str) -> tuple[str, bool]:
    """Return the text before the first <|eot_id|>, and whether there was one."""
    head, mark, _ = text.partition(END_OF_TURN)
    return head, bool(mark)


def generated_sentences(continuation: Continuation) -> list[str]:
    """Return the complete sentences that hold generated text.

    A sentence that the opening began counts as a whole. What `max_new_tokens` cut off at the very end does not count.
    What the model itself left unfinished, by closing a chunk or the turn in the middle of a sentence, does count (and
    will not parse), and so does a chunk that it closed without a sentence, as the empty sentence "".
    """
    last_opened = continuation.opening.rsplit(END_OF_CHUNK, 1)[-1]
    sentences, begun = split_sentences(last_opened)
    chunks = (begun + continuation.text if begun else continuation.text).split(END_OF_CHUNK)
    found: list[str] = []
    for i, chunk in enumerate(chunks):
        complete, rest = split_sentences(chunk)
        found += complete
        open_end = i + 1 == len(chunks)
        # an empty first chunk only closes the opening's, an empty last one stands where the text ends
        closed_empty = not complete and not rest and not open_end and (i > 0 or not sentences)
        if closed_empty or (rest and (not open_end or continuation.ended)):
            found.append(rest)
    return found


def parse_all(continuation: Continuation) -> list[Parsed]:
    """Parse the complete generated sentences."""
    return [parse(sentence) for sentence in generated_sentences(continuation)]


def parse_share(parses: Sequence[Sequence[Parsed]]) -> float:
    """Return the share of sentences that the grammar could have written, over all continuations together."""
    flat = [parsed.valid for continuation in parses for parsed in continuation]
    return _share(flat)


def topic_kept_share(parses: Sequence[Sequence[Parsed]], topics: Sequence[str]) -> float:
    """Return the share of continuations whose valid sentences are all on the opening's topic.

    A continuation without a valid sentence has not kept its topic.
    """
    return _share(
        [{parsed.topic for parsed in sentences if parsed.valid} == {topic} for sentences, topic in zip(parses, topics)]
    )


def recited_share(answers: Sequence[str], numbers: Sequence[str]) -> float:
    """Return the share of answers (texts before <|eot_id|>) in which the right number stands."""
    return _share([number in answer for answer, number in zip(answers, numbers)])


def refusal_share(answers: Sequence[str]) -> float:
    """Return the share of answers (texts before <|eot_id|>) that are the one refusal chunk and nothing else."""
    return _share([answer == REFUSAL + END_OF_CHUNK for answer in answers])


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else 0.0


def auroc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Return the area under the ROC curve: the probability that a positive scores above a negative, ties half.

    Computed from ranks (Mann-Whitney U): (sum of the positives' mean ranks - n+(n+ + 1)/2) / (n+ n-).

    Args:
        scores: (N,) floats.
        positive: (N,) bools.

    Raises:
        ValueError: if all examples are of one class.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        raise ValueError(f"positive is True {n_positive} and False {n_negative} times; give at least one of each")
    _, group, size = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = size.cumsum(0).double() - (size - 1).double() / 2
    rank_sum = mean_rank[group][positive].sum().item()
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def concept_aurocs(scores: torch.Tensor, truth: torch.Tensor, at_least: int = 5) -> dict[int, float]:
    """Return the AUROC of each concept with at least so many positive and negative chunks.

    Args:
        scores: (chunks, concepts) floats.
        truth: (chunks, concepts) bools.
        at_least: fewer chunks of either class leave a concept out.
    """
    found = {}
    for concept in range(truth.shape[1]):
        count = int(truth[:, concept].sum())
        if min(count, len(truth) - count) >= at_least:
            found[concept] = auroc(scores[:, concept], truth[:, concept])
    return found


def epsilon_shares(
    known: torch.Tensor, unknown: torch.Tensor, epsilon: torch.Tensor, vocabulary_rows: torch.Tensor
) -> torch.Tensor:
    """Return the share of epsilon in the absolute logit mass of each token.

    |eps . e_y| / (|known . e_y| + |unknown . e_y| + |eps . e_y|), with e_y the lm_head row of the token.

    Args:
        known, unknown, epsilon: (N, D) parts of the hidden state.
        vocabulary_rows: (N, D) lm_head rows of the tokens.

    Returns:
        (N,) shares in 0..1.
    """
    parts = torch.stack([(part.float() * vocabulary_rows.float()).sum(-1).abs() for part in (known, unknown, epsilon)])
    return parts[2] / parts.sum(0).clamp(min=1e-12)
