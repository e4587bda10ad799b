"""What people call a concept, and the files that say it: the released checkpoints' parquet table, or the same as JSON."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

from .checkpoints import checkpoint, checkpoint_names
from .files import check_folder, parquet_library, whole_file, write_whole

HEADS = ("known", "unknown")
FLAGS = ("steerable", "tone", "alignment", "demographic")
LABEL_FILES = ("concept_labels.parquet", "concept_labels.json")
RELEASED_LABELS = "guidelabs/steerling"
LABELS = "A table of concept labels in parquet"

_TEXT_COLUMNS = ("concept_name", "concept_description", "group_name")
_FLAG_COLUMNS = tuple(f"is_{flag}" for flag in FLAGS)
COLUMNS = (
    "concept_id",
    "head",
    "concept_name",
    "concept_description",
    "public_group_id",
    "group_name",
    *_FLAG_COLUMNS,
)


@dataclass(frozen=True, slots=True)
class Concept:
    """
    One concept and its label.

    Args:
        id: The number that it has everywhere outside its head: known concepts count from 0, discovered ones go on
            behind them, so discovered concept i of a model has the id `n_concepts + i`.
        head: "known", or "unknown" for a discovered concept.
        name: Empty as long as nobody has named it.
        description: A sentence or so.
        group_id: Its group; `None` if it is in no group.
        group_name: The group's name.
        is_steerable: Whether steering with it is sensible.
        is_tone: It says how a text is written, not what about.
        is_alignment: It is about safety or privacy.
        is_demographic: It is about a group of people.
    """

    id: int
    head: str
    name: str = ""
    description: str = ""
    group_id: int | None = None
    group_name: str = ""
    is_steerable: bool = True
    is_tone: bool = False
    is_alignment: bool = False
    is_demographic: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Those of `FLAGS` that are set."""
        return tuple(flag for flag in FLAGS if getattr(self, f"is_{flag}"))

    def __str__(self) -> str:
        return self.name or f"{'discovered' if self.head == 'unknown' else self.head} concept {self.id}"


def find_labels(source: str | Path, revision: str | None = None) -> Path:
    """
    The label file of a checkpoint.

    Args:
        source: The file itself, a folder that holds `concept_labels.parquet` or `concept_labels.json`, a checkpoint
            that comes with this package, or a Hub repository.
        revision: Of the Hub repository.

    Raises:
        FileNotFoundError: There is no such file.
    """
    place = Path(checkpoint(str(source)) if str(source) in checkpoint_names() else source)
    if place.is_file():
        return place
    if place.is_dir():
        for name in LABEL_FILES:
            if (place / name).is_file():
                return place / name
        raise _no_labels(source)
    reason: Exception | None = None
    for name in LABEL_FILES:
        try:
            return Path(hf_hub_download(str(source), name, revision=revision))
        except EntryNotFoundError as error:
            reason = reason or error
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise _no_labels(source) from error
    raise _no_labels(source) from reason


def _no_labels(source: str | Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"`source` is {str(source)!r}, where there is neither {LABEL_FILES[0]} nor {LABEL_FILES[1]} (nor in the cache, if "
        f"that is a Hub repository and this machine is offline). The labels of the released checkpoints are in "
        f"{RELEASED_LABELS!r}; those of this package's own one in 'steerling-nano'."
    )


def read_labels(path: Path) -> list[Concept]:
    """
    Read a label file; columns other than the schema's are left alone.

    Args:
        path: A `.parquet` file (needs the extra `concepts`) or a `.json` file, which is a list of rows.

    Raises:
        ValueError: It is another kind of file, a column is missing, or a row is not what the schema says.
    """
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                f"{path} is no list of rows; write one object for each concept, with {', '.join(COLUMNS)}."
            )
    else:
        _check_suffix(path)
        parquet = parquet_library(LABELS).parquet
        present = parquet.read_schema(path).names
        rows = parquet.read_table(path, columns=[name for name in COLUMNS if name in present]).to_pylist()
    return [_concept(row, path) for row in rows]


def write_labels(concepts: Iterable[Concept], path: Path) -> None:
    """
    Write a label file, in the kind that the name's ending asks for.

    Raises:
        ValueError: The name ends in neither `.parquet` nor `.json`.
        FileNotFoundError: Its folder does not exist.
    """
    _check_suffix(path)
    check_folder(path)
    rows = [_row(concept) for concept in concepts]
    if path.suffix == ".json":
        write_whole(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return
    pyarrow = parquet_library(LABELS)
    kinds = {"concept_id": pyarrow.int64(), "head": pyarrow.string(), "public_group_id": pyarrow.int64()}
    kinds |= dict.fromkeys(_TEXT_COLUMNS, pyarrow.string()) | dict.fromkeys(_FLAG_COLUMNS, pyarrow.bool_())
    schema = pyarrow.schema([(name, kinds[name]) for name in COLUMNS])
    with whole_file(path) as whole:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), whole)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".parquet", ".json"):
        raise ValueError(f"`path` is {str(path)!r}: concept labels are kept in .parquet or .json files; choose one.")


def _concept(row: dict[str, Any], path: Path) -> Concept:
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise ValueError(f"{path}: the row {row!r} lacks {', '.join(missing)}; every row has {', '.join(COLUMNS)}.")
    if row["head"] not in HEADS:
        raise ValueError(f"{path}: concept {row['concept_id']} has the head {row['head']!r}; write one of {HEADS}.")
    group = row["public_group_id"]
    # Tables that pandas wrote have NaN where nothing is; nano's has -1.
    ungrouped = group is None or math.isnan(group) or group < 0
    name, description, group_name = (row[column] or "" for column in _TEXT_COLUMNS)
    return Concept(
        id=int(row["concept_id"]),
        head=row["head"],
        name=name,
        description=description,
        group_id=None if ungrouped else int(group),
        group_name=group_name,
        **{column: bool(row[column]) for column in _FLAG_COLUMNS},
    )


def _row(concept: Concept) -> dict[str, Any]:
    return {
        "concept_id": concept.id,
        "head": concept.head,
        "concept_name": concept.name,
        "concept_description": concept.description,
        "public_group_id": concept.group_id,
        "group_name": concept.group_name,
        **{column: getattr(concept, column) for column in _FLAG_COLUMNS},
    }
