"""What a forward pass returns."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.utils import ModelOutput

from .compatibility_steerling import CacheOutput


@dataclass
class SteerlingConcepts(ModelOutput):
    """
    The decomposition of the last hidden state: `composed = known_features + unknown_features + epsilon`.

    Args:
        hidden (`torch.Tensor` of shape `(B, T, D)`): The last hidden state.
        known_features, unknown_features (`torch.Tensor` of shape `(B, T, D)`): What either head explains.
        epsilon (`torch.Tensor` of shape `(B, T, D)`): What neither explains; zero without epsilon correction
            (`use_epsilon_correction`), unless there is no discovered head.
        composed (`torch.Tensor` of shape `(B, T, D)`): What the vocabulary projection reads.
        known_indices, unknown_indices (`torch.LongTensor` of shape `(B, T, k)`): Concepts, strongest first.
        known_weights, unknown_weights (`torch.FloatTensor` of shape `(B, T, k)`): Their weights in 0..1.
    """

    hidden: torch.Tensor | None = None
    known_features: torch.Tensor | None = None
    unknown_features: torch.Tensor | None = None
    epsilon: torch.Tensor | None = None
    composed: torch.Tensor | None = None
    known_indices: torch.LongTensor | None = None
    known_weights: torch.FloatTensor | None = None
    unknown_indices: torch.LongTensor | None = None
    unknown_weights: torch.FloatTensor | None = None


@dataclass
class SteerlingOutput(CacheOutput):
    """
    Output of `SteerlingForDiffusionLM`.

    Args:
        loss (`torch.Tensor` of shape `()`): Given `labels`, the training loss.
        diffusion_loss (`torch.Tensor` of shape `()`): Its part that bounds the negative log-likelihood per token, in nats.
        logits (`torch.Tensor` of shape `(B, T, V)`): Scores of the token at each position itself (there is no shift by
            one). `None` when `labels` are given: training projects only the masked targets.
        cache (`Cache`): Keys and values, if a cache is used.
        hidden_states, attentions (`tuple[torch.Tensor]`): On request, as everywhere in transformers.
        concepts (`SteerlingConcepts`): Given `output_concepts=True`.
    """

    loss: torch.Tensor | None = None
    diffusion_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    concepts: SteerlingConcepts | None = None


@dataclass
class SteerlingFeatureOutput(CacheOutput):
    """
    Output of a `SteerlingForDiffusionLM` that AutoModel has loaded.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, D)`): What the concept heads and the vocabulary projection read.
        logits, cache, hidden_states, attentions, concepts: As in `SteerlingOutput`.
    """

    last_hidden_state: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    concepts: SteerlingConcepts | None = None


@dataclass
class SteerlingBackboneOutput(CacheOutput):
    """
    Output of `SteerlingModel`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, D)`): What the concept heads and the vocabulary projection read.
        cache, hidden_states, attentions: As in `SteerlingOutput`.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


__all__ = ["SteerlingBackboneOutput", "SteerlingConcepts", "SteerlingFeatureOutput", "SteerlingOutput"]
