"""A model for the tests of generation: tiny, with a short attention grid and predictions that differ by position."""

import torch

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM

BLOCK, VOCABULARY, CONTEXT = 8, 96, 64
PAD, BOS, EOS, MASK, TURN = 90, 91, 92, 93, 94
FORBIDDEN = (PAD, EOS, MASK)


def make_model(seed: int = 1, **overrides) -> SteerlingForDiffusionLM:
    """Seeded weights, evaluation mode; keywords override the configuration."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "n_layers": 2,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_embd": 32,
        "intermediate_size": 48,
        "block_size": CONTEXT,
        "diff_block_size": BLOCK,
        "n_concepts": 20,
        "n_unknown_concepts": 30,
        "factorize_rank": 8,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "mask_token_id": MASK,
        "endofchunk_token_id": None,
        "initializer_range": 0.5,
    }
    model = SteerlingForDiffusionLM(SteerlingConfig(**{**config, **overrides})).eval()
    # Sharp attention that outweighs the mask's embedding, so that each position predicts something of its own.
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.q_norm.weight.mul_(6)
            block.ln_1.weight.mul_(4)
            block.ln_2.weight.mul_(2)
    return model


def make_prompt(length: int, rows: int = 1) -> torch.LongTensor:
    """(rows, length) random ids that are no special tokens."""
    return torch.randint(0, PAD, (rows, length), generator=torch.Generator().manual_seed(length))
