"""Which concepts stand behind the tokens of a text that exists."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from .checks import check_model, check_positive, check_switches, check_tokenizer
from .modeling.attribution_steerling import SteerlingAttributions, attribute_logits
from .modeling.lookup_steerling import device_of
from .modeling.outputs_steerling import SteerlingConcepts


@torch.no_grad()
def attribute_concepts(
    model: Any, tokenizer: Any, texts: str | Sequence[str | Sequence[int]], batch_size: int = 8, progress: bool = False
) -> SteerlingAttributions:
    """
    Attribute the logit of each token of finished texts to concepts, as the model sees the token in its place: with all of
    its own attention block and all earlier ones. How a text came about is attributed by
    `generate(..., output_attributions=True, return_dict_in_generate=True)`.

    Args:
        model: A `SteerlingForDiffusionLM` with concept heads; what steers it applies.
        tokenizer: Its tokenizer.
        texts: One text, or several texts or lists of token ids.
        batch_size: Texts in a pass, whose logits (batch, T, V) are computed in full.
        progress: Whether to show a progress bar.

    Returns:
        Attributions of shapes (rows, T) and (rows, T, k) on the CPU, padded with 0 behind each text.

    Raises:
        ValueError: A text has no token or too many, or something is no text; or the model has no concept heads.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    check_switches(progress=progress)
    if model.known_head is None:
        raise ValueError(
            "`model` has no concept heads (interpretable=False), so nothing can be attributed to concepts."
        )
    check_positive("batch_size", batch_size)
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)):
        raise ValueError(f"`texts` is {texts!r:.80}: give a text, or a list of texts or of lists of token ids.")
    given = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, Iterable) for text in given):
        raise ValueError(f"`texts` is {texts!r:.80}: give a text, or a list of texts or of lists of token ids.")
    encoded = [
        tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else _ids(text)
        for text in given
    ]
    for number, ids in enumerate(encoded):
        if not 0 < len(ids) <= model.config.block_size:
            raise ValueError(f"`texts` has {len(ids)} tokens in text {number}: give 1 to {model.config.block_size}.")
        if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
            raise ValueError(
                f"`texts` has token ids from {min(ids)} to {max(ids)} in text {number}: the vocabulary's go from 0 to "
                f"{model.config.vocab_size - 1}."
            )
    device, longest = device_of(model), max(map(len, encoded), default=0)
    found: list[SteerlingAttributions] = []
    for start in tqdm(range(0, len(encoded), batch_size), desc="attributing", disable=not progress):
        rows = [torch.tensor(ids, device="cpu") for ids in encoded[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id or 0)
        text = torch.arange(ids.shape[1], device="cpu") < torch.tensor([[len(row)] for row in rows], device="cpu")
        outputs = model(ids.to(device), attention_mask=text.to(device), output_concepts=True, return_dict=True)
        kept = {
            key: value[text.to(value.device)]
            for key, value in outputs.concepts.items()
            if key.endswith(("indices", "weights"))
        }
        tokens = ids[text].to(outputs.logits.device)
        logits = outputs.logits[text.to(outputs.logits.device)].gather(-1, tokens[:, None])[:, 0]
        part = attribute_logits(model, SteerlingConcepts(**kept), tokens, logits)
        found.append(_spread(part, text, longest))
    joined = {key: torch.cat([part[key] for part in found]) for key in (found[0] if found else ())}
    return SteerlingAttributions(**joined)


def _ids(given: Iterable[Any]) -> list[int]:
    ids = given.tolist() if isinstance(given, torch.Tensor) else list(given)
    for id_ in ids:
        if isinstance(id_, (bool, str, float)) or not hasattr(id_, "__index__"):
            raise ValueError(f"`texts` has the token id {id_!r:.80}: give whole numbers.")
    return [int(id_) for id_ in ids]


def _spread(attributions: SteerlingAttributions, text: torch.Tensor, length: int) -> SteerlingAttributions:
    """(rows, length, ...) of values (n, ...) at the n places where `text` (rows, T) is true."""
    text = torch.nn.functional.pad(text, (0, length - text.shape[1]))
    spread = {}
    for key, values in attributions.items():
        spread[key] = values.new_zeros(*text.shape, *values.shape[1:], device="cpu")
        spread[key][text] = values.cpu()
    return SteerlingAttributions(**spread)
