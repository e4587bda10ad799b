"""What people call a concept, and the files that say it: the released checkpoints' parquet table, or the same as JSON."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

from .checkpoints import checkpoint, checkpoint_names
from .checks import check_path, short
from .files import check_folder, parquet_library, read_artefact, reading_artefact, whole_file, write_json

HEADS = ("known", "unknown")
FLAGS = ("steerable", "tone", "alignment", "demographic")
LABEL_FILES = ("concept_labels.parquet", "concept_labels.json")
RELEASED_LABELS = "guidelabs/steerling"
LARGEST_ID = 2**31 - 1
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
    check_path("source", source)
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
        ValueError: It is another kind of file, a column is missing, a row is not what the schema says, or two rows have one
            id; the message names the file.
    """
    if path.suffix == ".json":
        return read_artefact(path, "list of concept labels", _concepts)
    _check_suffix(path)
    pyarrow = parquet_library(LABELS)
    with reading_artefact(path, "table of concept labels"):
        try:
            present = pyarrow.parquet.read_schema(path).names
            rows = pyarrow.parquet.read_table(path, columns=[name for name in COLUMNS if name in present]).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"it is no parquet file that can be read ({error}).") from error
        return _concepts(rows)


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
        write_json(path, rows, indent=1)
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


def _concepts(rows: Any) -> list[Concept]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"it is no list of rows; write one object for each concept, with {', '.join(COLUMNS)}.")
    concepts = [_concept(number, row) for number, row in enumerate(rows)]
    twice = next((id_ for id_, count in Counter(concept.id for concept in concepts).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two rows have the `concept_id` {twice}; leave one of them out.")
    return concepts


def _concept(number: int, row: dict[str, Any]) -> Concept:
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise ValueError(f"row {number} lacks {', '.join(missing)}; every row has {', '.join(COLUMNS)}.")
    place = f"of row {number}"
    if row["head"] not in HEADS:
        raise ValueError(f"`head` {place} is {short(row['head'])}; write one of {', '.join(map(repr, HEADS))}.")
    # Tables that pandas wrote have NaN where nothing is; nano's has -1.
    group = (
        None if _is_nothing(row["public_group_id"]) else _whole(row["public_group_id"], f"`public_group_id` {place}")
    )
    texts = {}
    for column in _TEXT_COLUMNS:
        texts[column] = "" if _is_nothing(row[column]) else row[column]
        if not isinstance(texts[column], str):
            raise ValueError(f"`{column}` {place} is {short(row[column])}; write a text, or null.")
    flags = {}
    for column in _FLAG_COLUMNS:
        flags[column] = False if _is_nothing(row[column]) else row[column]
        if not isinstance(flags[column], (bool, int)) or flags[column] not in (0, 1):
            raise ValueError(f"`{column}` {place} is {short(row[column])}; write true or false.")
    id_ = _whole(row["concept_id"], f"`concept_id` {place}")
    if id_ < 0:
        raise ValueError(f"`concept_id` {place} is {id_}; ids count from 0.")
    return Concept(
        id=id_,
        head=row["head"],
        name=texts["concept_name"],
        description=texts["concept_description"],
        group_id=None if group is None or group < 0 else group,
        group_name=texts["group_name"],
        **{column: bool(value) for column, value in flags.items()},
    )


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any, place: str) -> int:
    """A whole number, which pandas may have written with a decimal point."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_ID
    if not good or value != int(value):
        raise ValueError(f"{place} is {short(value)}; write a whole number up to {LARGEST_ID:,}.")
    return int(value)


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
