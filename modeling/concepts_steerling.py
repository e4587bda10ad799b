"""Concept heads: a hidden state as a sparse sum of concept embeddings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .packing_steerling import multiply_packed, packed_copy

LOGIT_BOUND = 15.0
# What a head without top-k reports, although all its concepts form the features.
REPORTED_WITHOUT_TOPK = 64
# Elements of one gathered piece of a table, or of the scores that exist at a time: 64 MB in float32.
GATHER_BUDGET = 1 << 24
# A concept that is weaker than k of so many times k others is outside the top k. What the first sample leaves open, the next
# one tells of the few rows that are left.
SCREENS = (64, 256)
# By so much weaker that it is no matter of rounding.
CLEARLY = 1e-4
# Scores of which only the largest is looked at first when the strongest are searched.
GROUP = 16


@dataclass
class SteerlingConceptOutput(ModelOutput):
    """
    What one concept head says about each position.

    Args:
        features (`torch.Tensor` of shape `(..., D)`): Sum of weight times embedding over the selected concepts.
        indices (`torch.LongTensor` of shape `(..., k)`): Concepts, strongest first.
        weights (`torch.FloatTensor` of shape `(..., k)`): Sigmoid of their logits, float32.
    """

    features: torch.Tensor | None = None
    indices: torch.LongTensor | None = None
    weights: torch.FloatTensor | None = None


@dataclass
class SteerlingPartialOutput(SteerlingConceptOutput):
    """
    What one concept head says of some concepts alone: features are their part of the sum, and a weight is 0 where the
    concept is outside the top k. All positions have the same indices.
    """


class SteerlingResidual(nn.Module):
    """What the concepts do not explain of a hidden state; a module, so that hooks can change it as they change a head."""

    def forward(self, hidden_states: torch.Tensor, explained: torch.Tensor) -> torch.Tensor:
        """Epsilon (..., D) of hidden states (..., D) and the sum of both heads' untouched features (..., D)."""
        return hidden_states - explained


class SteerlingConceptTable(nn.Module):
    """
    A matrix that is read in pieces. Its `forward` lends the weight to a function, because accelerate brings offloaded
    weights to the device when a module's `forward` is called, and not when an attribute is read. All weights of a concept
    head are such tables: quantisers convert linear layers, and which concepts a head names shall not depend on them.
    """

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, function: Callable, *inputs: torch.Tensor):
        return function(self.weight, *inputs)


class SteerlingConceptHead(nn.Module):
    """
    Scores every concept against a hidden state and sums the embeddings of the strongest.

    `w_c = sigmoid(clamp(logit_c, -15, 15))` and `features = sum_c w_c E_c` over the top k. A linear head has
    `logit = P h`, an attention-scored one `logit_c = (W_q h) . E_c / sqrt(D)`. A factorised head keeps `E = coef basis^T`
    and `P = up down` at a small rank. For many positions, concepts are scored `concept_block_size` or a few more at a time,
    so that scores of shape (positions, concepts) never exist as a whole.

    Args:
        config: The model's configuration.
        n_concepts: Concepts of this head; tables are padded to a multiple of `config.pad_multiple` rows.
        topk: Concepts reported per position, at most `topk_features`; `None` makes all concepts form the features.
        topk_features: Concepts that form the features; `None` means `topk`.
        use_attention: Score by attention over the embeddings.
        factorized: Keep the tables at rank `config.factorize_rank`.
    """

    def __init__(
        self,
        config,
        n_concepts: int,
        topk: int | None,
        topk_features: int | None,
        use_attention: bool,
        factorized: bool,
    ):
        super().__init__()
        self.n_concepts = n_concepts
        self.topk = topk
        self.topk_features = n_concepts if topk is None else topk_features or topk
        self.chunk = config.concept_block_size
        self.use_attention = use_attention
        self.factorized = factorized
        self.rank_by_weight = not (config.topk_on_logits or factorized)
        self.scaling = config.n_embd**-0.5 if use_attention else 1.0
        width, rank = config.n_embd, config.factorize_rank
        rows = -(-n_concepts // config.pad_multiple) * config.pad_multiple
        if factorized:
            self.embedding_coef = SteerlingConceptTable(rows, rank)
            self.embedding_basis = SteerlingConceptTable(width, rank)
        else:
            self.concept_embedding = SteerlingConceptTable(rows, width)
        if use_attention:
            self.concept_query_projection = SteerlingConceptTable(width, width)
        elif factorized:
            self.predictor_down = SteerlingConceptTable(rank, width)
            self.predictor_up = SteerlingConceptTable(rows, rank)
        else:
            self.concept_predictor = SteerlingConceptTable(rows, width)

    @property
    def _values(self) -> SteerlingConceptTable:
        return self.embedding_coef if self.factorized else self.concept_embedding

    @property
    def _keys(self) -> SteerlingConceptTable:
        if self.use_attention:
            return self._values
        return self.predictor_up if self.factorized else self.concept_predictor

    def forward(self, hidden_states: torch.Tensor, only: torch.Tensor | None = None) -> SteerlingConceptOutput:
        """
        Decompose `hidden_states` of shape `(..., D)`. With `only`, ids (m,) of this head, each once, as a `SteerlingPartialOutput`, which
        takes a fraction of the time, since for most concepts a sample of the others tells that they are outside the top k.
        """
        if only is not None:
            return self._partial(hidden_states, only)
        query = self._query(hidden_states.reshape(-1, hidden_states.shape[-1]))
        indices, weights = self._keys(self._strongest, query)
        if self.topk is None:
            sums = self._sum_all(query)
        else:
            sums = self._values(_weighted_sum, indices, weights)
            indices, weights = indices[:, : self.topk], weights[:, : self.topk]
        shape = hidden_states.shape[:-1]
        return SteerlingConceptOutput(
            features=self._expand(sums).to(hidden_states.dtype).view(hidden_states.shape),
            indices=indices.reshape(*shape, indices.shape[-1]),
            weights=weights.reshape(*shape, weights.shape[-1]),
        )

    def _partial(self, hidden_states: torch.Tensor, only: torch.Tensor) -> SteerlingPartialOutput:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        query, only = self._query(rows), only.to(hidden_states.device)
        if self.topk is None:
            weights = self._keys(self._score, query, only).sigmoid()
        else:
            weights = query.new_zeros(len(query), len(only), dtype=torch.float32)
            unclear = self._keys(self._unclear, query, only)
            if len(unclear):
                top, top_weights = self._keys(self._strongest, query[unclear])
                weights[unclear] = weights_among(top, top_weights, only)
        shape = hidden_states.shape[:-1]
        indices: Any = only.expand(*shape, len(only))
        return SteerlingPartialOutput(
            features=(weights @ self.embeddings(only).float()).to(hidden_states.dtype).view(hidden_states.shape),
            indices=indices,
            weights=weights.view(*shape, len(only)),
        )

    def _unclear(self, keys: torch.Tensor, query: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Numbers of the rows of `query` in whose top k some of the concepts (m,) may be, judging by samples of the others."""
        clearly = self._score(keys, query, concepts) + CLEARLY
        unclear = torch.arange(len(query), device=query.device)
        for screen in SCREENS:
            step = max(1, self.n_concepts // (screen * self._k))
            sample = self._products(keys, query[unclear], slice(0, self.n_concepts, step))
            unclear = unclear[self._may_be_strongest(sample, clearly[unclear])]
            if step == 1 or not len(unclear):
                break
        return unclear

    def _may_be_strongest(self, sample: torch.Tensor, clearly: torch.Tensor) -> torch.Tensor:
        """Whether less than k of a sample (n, s) of products are stronger than some of the logits (n, m): (n,)."""
        groups = sample.shape[-1] // GROUP
        if groups >= 4 * self._k:
            # Of a group with a stronger concept only the strongest is counted, which is soon done.
            sample = sample[:, : groups * GROUP].unflatten(-1, (GROUP, groups)).amax(dim=1)
        stronger = (sample[..., None] * self.scaling > clearly[:, None]).sum(dim=1)
        # Beyond the bound all are alike.
        return ((stronger < self._k) | (clearly >= LOGIT_BOUND)).any(dim=-1)

    def logits(self, hidden_states: torch.Tensor, concepts: torch.Tensor | None = None) -> torch.Tensor:
        """
        Logits, float32, of concepts (m,), ids of this head: `(..., m)`. By default of all concepts, `(..., n_concepts)`:
        for a few positions or a small head, since this is the very tensor that `forward` avoids.
        """
        return self._keys(
            self._score, self._query(hidden_states), slice(0, self.n_concepts) if concepts is None else concepts
        )

    def embeddings(self, indices: torch.Tensor) -> torch.Tensor:
        """Embeddings of the concepts `indices` (ids of this head, any shape), of shape `(*indices.shape, D)`."""
        return self._expand(self._values(lambda table, ids: nn.functional.embedding(ids, table), indices))

    def alignments(self, indices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Products `E_c . v` of the embeddings of concepts (n, k), ids of this head, with vectors (n, D): (n, k), float32."""
        if self.factorized:
            vectors = self.embedding_basis(lambda basis, x: x @ basis.to(x.dtype), vectors)
        return self._values(_row_products, indices, vectors)

    def weights_of(
        self, hidden_states: torch.Tensor, top: torch.Tensor, top_weights: torch.Tensor, concepts: torch.Tensor
    ) -> torch.Tensor:
        """
        Weights with which concepts enter the features of hidden states, 0 outside the top k.

        Args:
            hidden_states: (n, D).
            top: (n, k) concepts that `forward` reports of them.
            top_weights: (n, k) weights that it reports.
            concepts: (m,) ids of this head, each once.

        Returns:
            (n, m), float32, on the device of the states.
        """
        device = hidden_states.device
        if self.topk is None:
            return self._keys(self._score, self._query(hidden_states), concepts).sigmoid().to(device)
        if self.topk_features > self.topk:
            top, top_weights = self._keys(self._strongest, self._query(hidden_states))
        return weights_among(top.to(device), top_weights.to(device), concepts.to(device))

    def _query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is compared with the rows of the key table: of width D, or of the factorisation's rank."""
        if not self.use_attention:
            return self.predictor_down(_project, hidden_states) if self.factorized else hidden_states
        query = self.concept_query_projection(_project, hidden_states)
        return self.embedding_basis(lambda basis, x: x @ basis, query) if self.factorized else query

    def _expand(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of rows of the value table as vectors of width D."""
        if not self.factorized:
            return values
        return self.embedding_basis(lambda basis, x: x.to(basis.dtype) @ basis.T, values)

    @property
    def _k(self) -> int:
        """How many concepts are looked for."""
        return min(self.n_concepts, REPORTED_WITHOUT_TOPK if self.topk is None else self.topk_features)

    @property
    def scored_table(self) -> SteerlingConceptTable:
        """The table that all hidden states are multiplied with."""
        return self._keys

    def _score(self, keys: torch.Tensor, query: torch.Tensor, concepts: slice | torch.Tensor) -> torch.Tensor:
        return self._bound(self._products(keys, query, concepts))

    def _products(self, keys: torch.Tensor, query: torch.Tensor, concepts: slice | torch.Tensor) -> torch.Tensor:
        whole = isinstance(concepts, slice) and concepts == slice(0, self.n_concepts)
        packed = packed_copy(keys, query) if whole else None
        if packed is not None:
            return multiply_packed(query, packed)[..., concepts]
        keys = keys[concepts]
        if self.factorized:
            query, keys = query.float(), keys.float()
        return (query @ keys.T).float()

    def _bound(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores * self.scaling).clamp(-LOGIT_BOUND, LOGIT_BOUND)

    def _chunks(self, rows: int) -> Iterator[slice]:
        """Pieces of the table, as large as scores of so many rows may be."""
        chunk = max(self.chunk, GATHER_BUDGET // max(rows, 1))
        for start in range(0, self.n_concepts, chunk):
            yield slice(start, min(start + chunk, self.n_concepts))

    def _strongest(self, keys: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights of the strongest concepts of each row of `query`, both of shape (rows, k), strongest first."""
        k = self._k

        def strongest_of(concepts: slice) -> tuple[torch.Tensor, torch.Tensor]:
            scores = self._score(keys, query, concepts)
            if self.rank_by_weight:
                scores = scores.sigmoid()
            scores, ids = _largest(scores, min(k, scores.shape[-1]))
            return scores, ids + concepts.start

        with torch.no_grad():
            first, *rest = self._chunks(len(query))
            best, indices = strongest_of(first)
            for concepts in rest:
                scores, ids = strongest_of(concepts)
                best, order = torch.cat((best, scores), dim=-1).topk(min(k, concepts.stop), dim=-1)
                indices = torch.cat((indices, ids), dim=-1).gather(-1, order)
        # The chosen few are scored again in float32: exact weights in half precision, and a graph of only k scores a row.
        return indices, self._bound(_row_products(keys, indices, query)).sigmoid()

    def _sum_all(self, query: torch.Tensor) -> torch.Tensor:
        """Sum of weight times row of the value table over all concepts, chunk by chunk: (rows, width), float32."""

        def sum_chunk(values: torch.Tensor, weights: torch.Tensor, concepts: slice) -> torch.Tensor:
            return weights @ values[concepts].float()

        return sum(
            self._values(sum_chunk, self._keys(self._score, query, concepts).sigmoid(), concepts)
            for concepts in self._chunks(len(query))
        )


def weights_among(ids: torch.Tensor, weights: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    """
    Sums of weights by concept, in the memory of what goes in and comes out.

    Args:
        ids, weights: (n, k) concepts and their weights; a concept may be named twice.
        concepts: (m,) ids, each once.

    Returns:
        (n, m), 0 for concepts that are not named.
    """
    ordered, order = concepts.to(ids.dtype).sort()
    places = torch.searchsorted(ordered, ids.contiguous()).clamp(max=len(concepts) - 1)
    found = weights * (ordered[places] == ids)
    return weights.new_zeros(len(ids), len(concepts)).scatter_add(1, order[places], found)


def _largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores.topk(k)` of (n, m) scores, which for large m is slow: only the groups with the k largest maxima matter."""
    groups = scores.shape[-1] // GROUP
    if groups < 4 * k:
        return scores.topk(k, dim=-1)
    rest = torch.arange(groups * GROUP, scores.shape[-1], device=scores.device).expand(len(scores), -1)
    chosen = (
        scores[:, : groups * GROUP].unflatten(-1, (GROUP, groups)).amax(dim=1).topk(k, dim=-1, sorted=False).indices
    )
    members = torch.arange(GROUP, device=scores.device)[:, None] * groups
    ids = torch.cat([(chosen[:, None] + members).flatten(1), rest], dim=-1)
    values, places = scores.gather(-1, ids).topk(k, dim=-1)
    return values, ids.gather(-1, places)


def _project(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(states, weight)


def _row_products(table: torch.Tensor, indices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """`table[indices[n, k]] . vectors[n]`, float32, of shape (n, k), for so many rows at a time as fit the budget."""
    rows = max(1, GATHER_BUDGET // (indices.shape[-1] * table.shape[-1]))
    products = [
        torch.einsum("nd,nkd->nk", part.float(), nn.functional.embedding(ids, table).float())
        for part, ids in zip(vectors.split(rows), indices.split(rows))
    ]
    return torch.cat(products)


def _weighted_sum(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_k weights[n, k] * values[indices[n, k]]` without the (rows, k, width) tensor in between."""
    return nn.functional.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")


__all__ = [
    "SteerlingConceptHead",
    "SteerlingConceptOutput",
    "SteerlingConceptTable",
    "SteerlingPartialOutput",
    "SteerlingResidual",
    "weights_among",
]
