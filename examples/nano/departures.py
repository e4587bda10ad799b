"""
Documents that leave their topic while its concept is pushed down: what steerling-nano is finished on.

The grammar's own documents never leave their topic, so a model that knows only them has not learnt what to write when
`Suppress` keeps it off the topic of its context: its sentences then mix the topics that are left. A departure begins on one
topic and goes on, wherever the direction of that topic's concept is subtracted from the masked positions, on another. Openings
like it go on as they began, where nothing is pushed down or another topic is: else the model learns to leave by itself.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from concepts import CONCEPT_ID
from dataset import GrammarRows, columns_of, extend
from grammar import Document, end_turn, plain_length, topic_chunks
from lexicon import TONES, TOPICS
from steerling_hf.modeling.lookup_steerling import embed_concepts
from steerling_hf.modeling.loss_steerling import IGNORE_INDEX
from torch.nn.utils.rnn import pad_sequence

from steerling_hf import SteerlingForDiffusionLM
from steerling_hf.training import DiffusionCollator

# Raw strengths of the pushes, which act behind this layer alone.
STRENGTHS = (1.0, 1.8)
LAYER = 2
# Shares of the openings whose topic is pushed down and left, of those without a push, and of those with another topic's.
LEFT, UNPUSHED, OTHERS = 0.6, 0.15, 0.25
# Share of continuations that keep their tone.
SAME_TONE = 0.7
# No document is begun in a row's last tokens: its opening, which has no loss, would fill them.
LATEST_START = 30


def departure(rng: random.Random) -> tuple[Document, Document, str | None]:
    """Return an opening, what follows it, and the name of the topic that is pushed down there."""
    topic, reached, other = rng.sample(TOPICS, 3)
    tone = rng.choice(TONES)
    count = plain_length(rng)
    given = min(count - 1, 1 + rng.randrange(2))
    opening = topic_chunks(rng, topic, tone, given)
    if rng.random() >= SAME_TONE:
        tone = rng.choice(TONES)
    pushed, goes_on = rng.choices(((topic, reached), (None, topic), (other, topic)), (LEFT, UNPUSHED, OTHERS))[0]
    rest = topic_chunks(rng, goes_on, tone, count - given, prefix=" ")
    return Document("plain", tuple(opening)), Document("plain", tuple(end_turn(rest))), pushed and pushed.name


class DepartureRows(GrammarRows):
    """
    `GrammarRows`, of which a share are openings and what follows them: openings have no loss, and "pushed" has, for each
    token, the concept that is pushed down there, -100 for none.

    Args:
        share: Of such rows among all.
        arguments: Those of `GrammarRows`.
    """

    def __init__(self, *arguments: Any, share: float, **options: Any):
        super().__init__(*arguments, **options)
        self.share = share

    def __getitem__(self, index: int) -> dict[str, list]:
        rng = random.Random(f"{self.seed}:{index}:departs")
        if rng.random() >= self.share:
            return super().__getitem__(index)
        row: dict[str, list] = {"input_ids": [], "labels": [], "concept_labels": [], "pushed": []}
        while len(row["input_ids"]) < self.length - LATEST_START:
            opening, rest, topic = departure(rng)
            given, more = (columns_of(self.tokenizer, part, answers_only=False) for part in (opening, rest))
            nothing = [IGNORE_INDEX] * len(given["input_ids"])
            extend(row, {**given, "labels": nothing, "pushed": nothing})
            concept = IGNORE_INDEX if topic is None else CONCEPT_ID[topic]
            extend(row, {**more, "pushed": [concept] * len(more["input_ids"])})
        return {name: column[: self.length] for name, column in row.items()}


class DepartureCollator(DiffusionCollator):
    """`DiffusionCollator` with "pushed" (batch, time)."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples."""
        pushed = [
            torch.tensor(example.get("pushed", [IGNORE_INDEX] * len(example["input_ids"]))) for example in examples
        ]
        return {**super().__call__(examples), "pushed": pad_sequence(pushed, True, IGNORE_INDEX)}


class Pushes:
    """
    Hooks by which a model that is trained takes the argument `pushed`: concepts (batch, time), each of whose directions is
    subtracted from the residual stream at its masked position, with a strength that is drawn for the row.

    Args:
        model: The model.
        seed: Seed of the strengths.
    """

    def __init__(self, model: SteerlingForDiffusionLM, seed: int):
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        self.change: torch.Tensor | None = None
        model.register_forward_pre_hook(self.read, with_kwargs=True)
        model.transformer.blocks[LAYER - 1].register_forward_hook(self.push)

    def read(self, _model, arguments: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the forward pass: take the argument out, and find what to add."""
        pushed, self.change = given.pop("pushed", None), None
        if pushed is None:
            return arguments, given
        where = (pushed != IGNORE_INDEX) & given["noise_mask"].bool()
        if where.any():
            concepts, at = pushed[where].unique(return_inverse=True)
            # Known concepts by rising ids, as `unique` has them.
            directions = torch.nn.functional.normalize(embed_concepts(self.model, concepts.tolist()), dim=-1)
            least, most = STRENGTHS
            strengths = least + (most - least) * torch.rand(len(pushed), 1, generator=self.generator).to(pushed.device)
            self.change = directions.new_zeros(*pushed.shape, directions.shape[-1])
            self.change[where] = -strengths.expand_as(pushed)[where, None] * directions[at]
        return arguments, given

    def push(self, _block, _inputs, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Behind a block: only the noised tokens are changed, not the clean ones behind them that other blocks see."""
        if self.change is None:
            return None
        time = self.change.shape[1]
        return torch.cat(
            (hidden_states[:, :time] + self.change.to(hidden_states.dtype), hidden_states[:, time:]), dim=1
        )
