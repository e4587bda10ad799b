"""How much a text is like what a model would write."""

from typing import Any

import torch

# Every so many-th token is masked at once, and predicted from all others.
FOLDS = 8


@torch.no_grad()
def text_fluency(model: Any, ids: torch.Tensor, written: torch.Tensor) -> float:
    """
    Mean log-probability in nats of the tokens (B, T) of `ids` where `written` (B, T) is 1, each predicted from all other
    tokens but every 8th under a `SteerlingForDiffusionLM`: a pseudo-likelihood (Salazar et al. 2020, arXiv:1910.14659) in 8 passes. 0 and below; what
    `written` marks with -1 is padding.
    """
    total, count = 0.0, 0
    attended = (written >= 0).long()
    places = attended.cumsum(dim=-1)  # in the text, whatever the padding
    for fold in range(FOLDS):
        hidden = written.eq(1) & (places % FOLDS == fold)
        if hidden.any():
            masked = ids.masked_fill(hidden, model.config.mask_token_id)
            states = model.transformer(masked, attended, use_cache=False, return_dict=True).last_hidden_state
            scores = model.compute_logits(states[hidden.to(states.device)]).float().log_softmax(-1).to(ids.device)
            total += float(scores.gather(-1, ids[hidden][:, None]).sum())
            count += int(hidden.sum())
    return total / max(count, 1)
