"""
Writes a checkpoint as a flat folder in the form of a Hub repository: code, configuration, tokenizer, weights and card.

What it writes loads with `trust_remote_code=True` where this package is not installed.
"""

import copy
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import modeling, tokenization
from .card import EVALUATION_FILE, check_repo_id, default_repo_id, read_evaluation, render_card
from .checkpoints import checkpoint, checkpoint_names
from .checks import check_path, check_switches
from .concept_labels import LABEL_FILES
from .files import write_whole
from .isolation import run_isolated
from .links import check_links
from .modeling.configuration_steerling import SteerlingConfig
from .modeling.generation_config_steerling import SteerlingGenerationConfig
from .registration import OLDER_MODEL_TYPE
from .tokenization.tokenization_steerling import SteerlingTokenizer
from .weights import check_shapes, find_weights, read_shapes

AUTO_MAP = {
    "AutoConfig": "configuration_steerling.SteerlingConfig",
    "AutoModel": "modeling_steerling.SteerlingAutoModel",
    "AutoModelForCausalLM": "modeling_steerling.SteerlingForDiffusionLM",
    "AutoModelForMaskedLM": "modeling_steerling.SteerlingForDiffusionLM",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_steerling.SteerlingTokenizer", None]}
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")


@dataclass
class _Checkpoint:
    """What the source has; `model` or `weights` or neither gives the tensors."""

    config: SteerlingConfig
    generation_config: GenerationConfig
    tokenizer: PreTrainedTokenizerBase | None
    weights: list[Path]
    model: PreTrainedModel | None = None
    folder: Path | None = None

    @property
    def labels(self) -> Path | None:
        """Where labels may be: a model keeps the meaning of its concepts, though it may have been trained since it was loaded."""
        if self.model is None:
            return self.folder
        return Path(self.model.config.name_or_path) if self.model.config.name_or_path else None


def export(
    source: str | os.PathLike[str] | PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: str | os.PathLike[str] | None = None,
    copy: bool = False,
    check: bool = False,
    repo_id: str | None = None,
) -> Path:
    """
    Write `source` as a flat folder that can be loaded, or pushed to the Hub, as it is.

    Everything is checked before anything is written, and the folder appears whole or not at all.

    Args:
        source: The name of one of `steerling_hf.checkpoint_names()`; or a folder with the configuration, flat or nested,
            and the weights of a Steerling checkpoint; or a model in memory.
        folder: Where to write. It must not exist yet, and its parent must.
        tokenizer: The tokenizer to go with it. By default the source's own, or that of the checkpoint of ours that has
            the same token ids; a model in memory with other ids needs one. (Labels of concepts come from the source's folder,
            or the one that the model in memory was loaded from, if that was a folder.)
        weights: A folder to take the weights from, in place of the source.
        copy: Copy the weights. Otherwise they are hard links to the source's files, which cost no space, or copies where
            the file system cannot link. To change a linked file in place would change both; `save_pretrained` does not.
        check: Load the result through all five Auto classes in a fresh interpreter that cannot import this package, and
            generate a few tokens, before the folder appears.
        repo_id: "owner/name" on the Hub, for the card; by default guidelabs' own for the released checkpoints, or the
            folder's name.

    Returns:
        The folder, absolute.

    Raises:
        FileExistsError: `folder` exists.
        FileNotFoundError: The source, its configuration, a shard, or the folder's parent is missing.
        PermissionError: The folder's parent cannot be written to.
        ValueError: The source is no Steerling checkpoint; its weights, tokenizer and configuration do not agree; one of its
            files is a link that leaves its folder (see `links`); or `repo_id` is no name of a repository.
        TypeError: `source`, `folder` or `weights` is no path.
        RuntimeError: The check failed.
    """
    _check_arguments(source, folder, weights, repo_id)
    check_switches(copy=copy, check=check)
    target = Path(folder).absolute()
    _check_target(target)
    found = _from_model(source) if isinstance(source, PreTrainedModel) else _from_folder(source, weights)
    if isinstance(source, PreTrainedModel) and weights is not None:
        raise ValueError(f"`weights` is {os.fspath(weights)!r}, but a model in memory brings its own; leave it out.")
    tokenizer = _check_tokenizer(tokenizer if tokenizer is not None else found.tokenizer, found.config)
    name = _name_of(found.config)

    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir()
        _write_weights(found, staging, copy)
        _write_rest(found, tokenizer, staging, repo_id or default_repo_id(name or target.name), name)
        if check:
            _check_loading(staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _check_arguments(source: Any, folder: Any, weights: Any, repo_id: Any) -> None:
    check_path("folder", folder)
    if not isinstance(source, PreTrainedModel):
        check_path("source", source)
    if weights is not None:
        check_path("weights", weights)
    if repo_id is not None:
        check_repo_id(repo_id)


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"`folder` is {str(target)!r}, which exists; choose another name or remove it first.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`folder` is {str(target)!r}, but {target.parent} does not exist; create it first.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"`folder` is {str(target)!r}, but {target.parent} cannot be written to.")


def _from_model(model: PreTrainedModel) -> _Checkpoint:
    if model.config.model_type != SteerlingConfig.model_type:
        raise ValueError(f"`source` is a {type(model).__name__}; only Steerling models can be exported.")
    config = SteerlingConfig.from_dict(model.config.to_dict())
    config.dtype = model.dtype
    if config.name_or_path and Path(config.name_or_path).is_dir():
        check_links(Path(config.name_or_path))
    ends = _with_all_ends(model.generation_config, config)
    return _Checkpoint(config, ends, _tokenizer_by_ids(config), [], model=model)


def _from_folder(source: str | os.PathLike[str], weights: str | os.PathLike[str] | None) -> _Checkpoint:
    ours = os.fspath(source) in checkpoint_names()
    folder = Path(checkpoint(os.fspath(source)) if ours else source)
    config = _read_config(folder)
    check_links(folder)
    if ours or (folder / SteerlingTokenizer.vocab_files_names["vocab_file"]).is_file():
        tokenizer = SteerlingTokenizer.from_pretrained(folder)
    else:  # The released folders' own tokenizer has no vocabulary file, so ours with the same ids takes its place.
        tokenizer = _tokenizer_by_ids(config)

    weights_folder = Path(weights) if weights is not None else folder
    if weights_folder is not folder:
        check_links(weights_folder)
    if weights is None and ours and not any(folder.glob("*.safetensors")):
        files = []  # The released checkpoints are here in JSON only: an export of code and configuration.
    else:
        files = find_weights(weights_folder)
        check_shapes(read_shapes(files), config, weights_folder)
    read_evaluation(folder)
    ends = _with_all_ends(_read_generation_config(folder, config), config)
    return _Checkpoint(config, ends, tokenizer, files, folder=folder)


def _read_config(folder: Path) -> SteerlingConfig:
    path = folder / "config.json"
    if not path.is_file():
        reason = "has no config.json" if folder.is_dir() else "is no folder"
        names = ", ".join(checkpoint_names())
        raise FileNotFoundError(
            f"`source` is {str(folder)!r}, which {reason}; give a checkpoint folder or one of {names}."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}); fetch it again.") from error
    if model_type not in (SteerlingConfig.model_type, OLDER_MODEL_TYPE):
        raise ValueError(f"{path}: `model_type` is {model_type!r}; only Steerling checkpoints can be exported.")
    return SteerlingConfig.from_dict(values)


def _read_generation_config(folder: Path, config: SteerlingConfig) -> GenerationConfig:
    for candidate in (folder, _ours_by_ids(config)):
        if candidate is not None and (candidate / "generation_config.json").is_file():
            return SteerlingGenerationConfig.from_pretrained(candidate)
    return SteerlingGenerationConfig.from_model_config(config)


def _with_all_ends(generation_config: GenerationConfig, config: SteerlingConfig) -> GenerationConfig:
    """A copy in which rows that end at all end with a text as well: Trainer adds the tokenizer's end otherwise, and warns."""
    ends = generation_config.eos_token_id
    if ends is None:
        return generation_config
    ends = ends if isinstance(ends, list) else [ends]
    found = copy.deepcopy(generation_config)
    found.eos_token_id = [*ends, *(token for token in config.eos_token_ids if token not in ends)]
    return found


def _ours_by_ids(config: SteerlingConfig) -> Path | None:
    """The folder of the checkpoint of ours with the same token ids, if there is one."""
    keys = ("vocab_size", *TOKEN_IDS)
    for name in checkpoint_names():
        values = SteerlingConfig.from_pretrained(checkpoint(name))
        if all(getattr(values, key) == getattr(config, key) for key in keys):
            return Path(checkpoint(name))
    return None


def _tokenizer_by_ids(config: SteerlingConfig) -> PreTrainedTokenizerBase | None:
    folder = _ours_by_ids(config)
    return SteerlingTokenizer.from_pretrained(folder) if folder is not None else None


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, config: SteerlingConfig) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` is None, the source has no vocabulary file, and no checkpoint of ours has its token ids; give one."
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer):,} ids, but `vocab_size` is {config.vocab_size:,}; give its own."
        )
    for key in TOKEN_IDS:
        ours, theirs = getattr(config, key), getattr(tokenizer, key)
        known = config.eos_token_ids if key == "eos_token_id" else (ours,)
        if ours is not None and theirs not in known:
            raise ValueError(
                f"`tokenizer` has {key} {theirs}, but the configuration says {ours}; give its own tokenizer."
            )
    return tokenizer


def _name_of(config: SteerlingConfig) -> str | None:
    """The name of the checkpoint of ours that has the same sizes and token ids, if there is one."""
    folder = _ours_by_ids(config)
    sizes = ("n_layers", "n_embd", "n_concepts", "n_unknown_concepts")
    if folder is not None:
        values = SteerlingConfig.from_pretrained(folder)
        if all(getattr(values, key) == getattr(config, key) for key in sizes):
            return folder.name
    return None


def _write_weights(found: _Checkpoint, staging: Path, copy: bool) -> None:
    if found.model is not None:
        found.model.save_pretrained(staging)
    for file in found.weights:
        if copy or not _link(file, staging / file.name):
            shutil.copyfile(file, staging / file.name)


def _link(file: Path, destination: Path) -> bool:
    try:
        os.link(file.resolve(), destination)  # The Hub's cache holds symbolic links: link what they point to.
    except OSError:
        return False
    return True


def _write_rest(
    found: _Checkpoint, tokenizer: PreTrainedTokenizerBase, staging: Path, repo_id: str, name: str | None
) -> None:
    for module in (modeling, tokenization):
        for file in Path(module.__path__[0]).glob("*_steerling.py"):
            shutil.copyfile(file, staging / file.name)
    found.config.architectures = ["SteerlingForDiffusionLM"]
    found.config.auto_map = dict(AUTO_MAP)
    found.config.to_json_file(staging / "config.json")
    found.generation_config.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    _update_json(staging / "tokenizer_config.json", auto_map=TOKENIZER_AUTO_MAP)
    copied = dict.fromkeys(LABEL_FILES, found.labels) | {EVALUATION_FILE: found.folder}
    for name_of_file, origin in copied.items():
        if origin is not None and (origin / name_of_file).is_file():
            shutil.copyfile(origin / name_of_file, staging / name_of_file)
    chats = bool(tokenizer.chat_template)
    write_whole(staging / "README.md", render_card(found.config, repo_id, name, chats, found.folder))


def _update_json(path: Path, **values: Any) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_loading(staging: Path) -> None:
    script = Path(__file__).with_name("check_export.py").read_text(encoding="utf-8")
    try:
        run_isolated(script, [str(staging)])
    except RuntimeError as error:
        raise RuntimeError(f"The exported folder does not load on its own, so it was removed: {error}") from error
