"""Texts that share a row: where each begins, and which attention blocks of its own grid its tokens fall into."""

import torch

# What collators of packed rows add for attention kernels that read no mask. They repeat what `position_ids` say.
PACKING_HINTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def number_texts(position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Which text of its row each token belongs to, counted from 0: a text begins where `position_ids` do not grow by one.

    Args:
        position_ids: (B, T).
        attention_mask: (B, T), 0 for padding, which begins no text and interrupts none.

    Returns:
        (B, T), long. Padding belongs to the text before it.
    """
    columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    real = torch.ones_like(columns, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    before = torch.where(real, columns, -1).cummax(dim=1).values.roll(1, dims=1)
    before[:, 0] = -1
    previous = position_ids.gather(1, before.clamp(min=0))
    # Positions count padding inside a row or they do not: both go on behind it.
    goes_on = (position_ids == previous + 1) | (position_ids == position_ids.roll(1, dims=1) + 1)
    begins = real & (before >= 0) & ~goes_on
    return begins.long().cumsum(dim=1)


def number_blocks(texts: torch.Tensor, position_ids: torch.Tensor, size: int) -> torch.Tensor:
    """
    Which attention block of its row each token belongs to, counted from 0 through all texts of the row.

    Args:
        texts: (B, T), of `number_texts`.
        position_ids: (B, T), the places in the texts.
        size: Positions of an attention block.

    Returns:
        (B, T), long.
    """
    grid = position_ids // size
    begins = (texts.diff(dim=1) != 0) | (grid.diff(dim=1) != 0)
    return torch.nn.functional.pad(begins.long().cumsum(dim=1), (1, 0))


def drop_packing_hints(arguments: dict, position_ids: torch.Tensor | None) -> None:
    """
    Take `PACKING_HINTS` out of a call's further arguments.

    Raises:
        ValueError: They are there without `position_ids`, so that the texts of a row could not be told apart.
    """
    given = [name for name in PACKING_HINTS if arguments.pop(name, None) is not None]
    if given and position_ids is None:
        raise ValueError(
            f"`{given[0]}` is given without `position_ids`, which tell packed texts apart here; let the collator return them "
            "(return_position_ids=True)."
        )


__all__ = ["PACKING_HINTS", "drop_packing_hints", "number_blocks", "number_texts"]
