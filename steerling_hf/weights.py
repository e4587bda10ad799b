"""Finds the weights in a checkpoint folder and checks them before anything is done with them, reading headers only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian
HEADER_LIMIT = 100_000_000  # the format's own bound, in bytes

Shape = tuple[int, ...]


def find_weights(folder: Path) -> list[Path]:
    """
    The files that hold a folder's weights: one `model.safetensors`, or an index followed by its shards.

    Raises:
        FileNotFoundError: There are no weights, or a shard that the index names is missing.
        ValueError: The index is not readable.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        shards = sorted(set(_read_index(index).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {INDEX_FILE} names {len(shards)} shards, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing; fetch the folder again."
            )
        return [index, *(folder / shard for shard in shards)]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    raise FileNotFoundError(
        f"{folder}: no weights; expected {SINGLE_FILE}, or {INDEX_FILE} and its shards (safetensors is the only format)."
    )


def read_shapes(files: list[Path]) -> dict[str, Shape]:
    """
    Names and shapes of all tensors in the files that `find_weights` returned.

    Raises:
        ValueError: A file is truncated or no safetensors file, two files hold the same tensor, or the index and the
            shards disagree.
    """
    shapes: dict[str, Shape] = {}
    origin: dict[str, str] = {}
    for path in files:
        if path.name == INDEX_FILE:
            continue
        for name, entry in _read_header(path).items():
            if name in shapes:
                raise ValueError(f"{path}: holds {name!r}, which {origin[name]} holds too; fetch the folder again.")
            shapes[name], origin[name] = tuple(entry["shape"]), path.name
    if files[0].name == INDEX_FILE:
        for name, shard in _read_index(files[0]).items():
            if origin.get(name) != shard:
                raise ValueError(
                    f"{files[0]}: says that {name!r} is in {shard}, but "
                    f"{'it is in ' + origin[name] if name in origin else 'no shard holds it'}; fetch the folder again."
                )
    return shapes


def check_shapes(shapes: Mapping[str, Shape], config: Any, where: Path) -> None:
    """
    Check that weights have the tensors that a configuration asks for.

    Either or both of the tied tensors may be there, and the bare backbone (`interpretable: false`) may lack the
    prefix `transformer.`. Tensors that the configuration does not ask for are left to the loader, which reports them.

    Raises:
        ValueError: A tensor is missing or has another shape.
    """
    import torch

    from .modeling.modeling_steerling import SteerlingForDiffusionLM

    with torch.device("meta"):
        model = SteerlingForDiffusionLM(config)
    prefix = f"{model.base_model_prefix}."
    bare = not config.interpretable and not any(name.startswith(prefix) for name in shapes)
    found = {prefix + name if bare else name: shape for name, shape in shapes.items()}
    tied = {"transformer.lm_head.weight", "transformer.tok_emb.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in found and not (name in tied and tied & found.keys()):
            raise ValueError(
                f"{where}: the weights lack {name!r}, which config.json asks for; the folder is incomplete, or its "
                "config.json belongs to other weights."
            )
        if name in found and found[name] != tuple(tensor.shape):
            raise ValueError(
                f"{where}: {name!r} has shape {found[name]} in the weights, but config.json asks for "
                f"{tuple(tensor.shape)}; its config.json belongs to other weights."
            )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(Path(shard).name == shard for shard in weight_map.values()):
            raise ValueError("weight_map is empty or names files outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors index ({error}); fetch the folder again.") from error
    return weight_map


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(HEADER_LIMIT, size - LENGTH_BYTES):
            raise ValueError(f"{path}: truncated, or no safetensors file ({size:,} bytes); fetch it again.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: its safetensors header is not readable; fetch it again.") from error
    if size != end:
        raise ValueError(f"{path}: {size:,} bytes, but its header describes {end:,}; truncated, fetch it again.")
    return header
