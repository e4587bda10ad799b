"""An answer and the means to answer again: what an audit reads, and what remedies are tried on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .fluency import text_fluency
from .modeling.lookup_steerling import device_of, embed_concepts, project, split_concepts
from .modeling.steering_steerling import Operation
from .reading import reading

CONCEPTS_AT_ONCE = 64  # each of them has a logit for every token of the vocabulary


@dataclass(frozen=True, eq=False)
class Case:
    """
    An answer and all that it takes to answer again. Weights, support and fluency are those of the unsteered model.

    Args:
        model, tokenizer, catalog: The catalog may be `None`.
        prompt, answer: Token ids.
        generation: Arguments of `generate`.
    """

    model: Any
    tokenizer: Any
    catalog: Any
    prompt: Sequence[int]
    answer: Sequence[int]
    generation: Mapping[str, Any]

    def answer_under(self, *operations: Operation) -> list[int]:
        """The answer's token ids under operations, and under whatever steered the audited one."""
        ids = torch.tensor([list(self.prompt)], device=device_of(self.model))
        fixed = {"steering": (self.generation.get("steering"), *operations), "return_dict_in_generate": False}
        output = self.model.generate(ids, **{"tokenizer": self.tokenizer, **self.generation, **fixed})
        return output[0, len(self.prompt) :].tolist()

    def text(self, answer: Sequence[int]) -> str:
        """What an answer says."""
        return self.tokenizer.decode(list(answer), skip_special_tokens=True)

    def weights(self, concepts: Sequence[int], text: Sequence[int], start: int = 0) -> torch.Tensor:
        """
        (T - start, n) weights of n concepts, float32, known ones before discovered ones, at the tokens of a text from `start`
        on, when the model reads the whole text.
        """
        ids = torch.tensor([list(text)], device=device_of(self.model))
        with reading(self.model):
            states = self.model.transformer(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[
                0, start:
            ]
            return self._weights_at(states, concepts)

    def _weights_at(self, states: torch.Tensor, concepts: Sequence[int]) -> torch.Tensor:
        found = []
        for head, members in split_concepts(self.model, concepts):
            output = head.forward(states)
            mine = torch.tensor(members, device=output.indices.device)
            found.append(head.weights_of(states, output.indices, output.weights, mine).float().cpu())
        return torch.cat(found, dim=-1)

    def support(self, concepts: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """
        How far concepts are behind an answer, before any of it is written: the mean over its tokens y of

            log p(y) - log p(y | w_c = 0)

        where p is read with the token's whole attention block masked, and w_c = 0 takes the concept's part out of the composed
        state there. Unlike a contribution to the logit of y, this sees what the concept does to all other tokens.

        Args:
            concepts: n ids, known ones first.
            answer: Token ids.

        Returns:
            (n,) nats a token, float32.
        """
        total = torch.zeros(len(concepts), dtype=torch.float32, device="cpu")
        with reading(self.model):
            for states, tokens in self._masked_blocks(answer):
                logits, weights = self.model.compute_logits(states).float(), self._weights_at(states, concepts)
                chosen = torch.arange(len(tokens), device="cpu"), tokens.to(logits.device)
                before = logits.log_softmax(-1)[chosen].cpu()
                start = 0
                for vectors in embed_concepts(self.model, concepts).split(CONCEPTS_AT_ONCE):
                    parts = project(self.model, vectors)
                    stop = start + len(vectors)
                    for row, token in enumerate(tokens.tolist()):
                        without = logits[row] - weights[row, start:stop, None].to(parts.device) * parts
                        total[start:stop] += before[row] - without.log_softmax(-1)[:, token].cpu()
                    start = stop
        return total / len(answer)

    def _masked_blocks(self, answer: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states (m, D) at an answer's m tokens (m,) in each attention block, which is masked, with all before it given."""
        ids = torch.tensor([*self.prompt, *answer], device=device_of(self.model))
        start, grid = len(self.prompt), self.model.config.diff_block_size
        while start < len(ids):
            stop = min(len(ids), (start // grid + 1) * grid)
            seen = ids[:stop].clone()
            seen[start:] = self.model.config.mask_token_id
            yield (
                self.model.transformer(input_ids=seen[None], use_cache=False, return_dict=True).last_hidden_state[
                    0, start:
                ],
                ids[start:stop],
            )
            start = stop

    def highest(self, concept: int, text: Sequence[int]) -> float:
        """The highest of a concept's `weights` in a text."""
        return float(self.weights([concept], text).max())

    def fluency(self, answer: Sequence[int]) -> float:
        """Nats a token of an answer behind the prompt; see `text_fluency`."""
        ids = torch.tensor([[*self.prompt, *answer]], device=device_of(self.model))
        written = (torch.arange(ids.shape[1], device=ids.device) >= len(self.prompt)).long()[None]
        return text_fluency(self.model, ids, written)
