"""Steering that can be kept and shared: operations, the concepts that they mean, and the weights that they were made for."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .card import check_repo_id
from .checks import check_path
from .files import check_folder, check_format, read_artefact, write_json
from .fingerprint import concept_fingerprint
from .modeling.steered_steerling import flatten_operations
from .modeling.steering_steerling import Operation
from .operations import read_operations
from .shapes import check_shape

FILE_NAME = "steering_recipe.json"
FORMAT = 1
SHAPE = {
    "format": int,
    "description?": str,
    "operations": [{"operation": str, ...: object}],
    "concepts?": {...: str},
    "fingerprint?": (str, None),
    "model?": (str, None),
    "revision?": (str, None),
    "effect?": {...: float},
}


@dataclass(frozen=True)
class SteeringRecipe:
    """
    Operations for `model.steer`, `model.add_steering` and `generate(steering=...)`, ready for a file.

        recipe = SteeringRecipe.of(model, Suppress(catalog["phone number"].id), catalog=catalog)
        recipe.save("quiet.json")
        model.generate(**inputs, steering=SteeringRecipe.load("quiet.json"))

    Args:
        operations: In the order in which they apply.
        concepts: Names of the concepts that they mention, by id.
        fingerprint: Of the concept table that they were made for (`concept_fingerprint`); `None` fits any weights.
        model: Name or path of that checkpoint.
        revision: Its commit, if it came from the Hub.
        effect: Numbers that were measured with it.
        description: What it is for.
    """

    operations: Sequence[Operation]
    concepts: Mapping[int, str] = field(default_factory=dict)
    fingerprint: str | None = None
    model: str | None = None
    revision: str | None = None
    effect: Mapping[str, float] = field(default_factory=dict)
    description: str = ""

    @classmethod
    def of(cls, model: Any, *operations: Any, catalog: Any = None, **other: Any) -> "SteeringRecipe":
        """
        A recipe for a model's weights.

        Args:
            model: What it is made for.
            operations: Operations, sequences of such or recipes, whose operations it takes; all are checked.
            catalog: A `ConceptCatalog` that names the concepts.
            other: `effect` and `description`.

        Raises:
            ValueError: An operation does not suit the model.
        """
        single = flatten_operations(model, operations)
        names = {}
        if catalog is not None:
            names = {concept: str(catalog[concept]) for concept in sorted(_mentioned(single))}
        return cls(
            tuple(single),
            names,
            concept_fingerprint(model),
            model.config.name_or_path or None,
            getattr(model.config, "_commit_hash", None),
            **other,
        )

    def check(self, model: Any) -> None:
        """
        Raises:
            ValueError: The recipe was made for other concepts than the model's.
        """
        if self.fingerprint is not None and self.fingerprint != concept_fingerprint(model):
            made_for = f"{self.model or 'another checkpoint'}" + (f" at {self.revision}" if self.revision else "")
            raise ValueError(
                f"This recipe was made for the concepts of {made_for}, and {model.config.name_or_path or 'this model'} has "
                "others, so its ids mean something else here. To use it all the same: recipe.for_any_weights()."
            )

    def for_any_weights(self) -> "SteeringRecipe":
        """The recipe without its fingerprint, which then fits any model that has concepts of these ids."""
        return replace(self, fingerprint=None)

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes."""
        return {
            "format": FORMAT,
            "description": self.description,
            "operations": [operation.to_dict() for operation in self.operations],
            "concepts": {str(concept): name for concept, name in self.concepts.items()},
            "fingerprint": self.fingerprint,
            "model": self.model,
            "revision": self.revision,
            "effect": {name: float(value) for name, value in self.effect.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SteeringRecipe":
        """
        The recipe of `to_dict`.

        Raises:
            ValueError: It is of another format, a value is not what it should be, or an operation fits no model.
        """
        check_format(values, FORMAT, "recipe")
        check_shape(values, SHAPE, "recipe", exact=True)
        known = {
            key: values[key] for key in ("fingerprint", "model", "revision", "effect", "description") if key in values
        }
        concepts = {}
        for concept, name in values.get("concepts", {}).items():
            if not concept.isdecimal() or str(int(concept)) != concept:
                raise ValueError(
                    f"`recipe['concepts']` has {concept!r}, which is no concept's id; write a whole number."
                )
            concepts[int(concept)] = name
        return cls(read_operations(values["operations"], "recipe['operations']"), concepts, **known)

    def save(self, path: str | os.PathLike) -> Path:
        """
        Write a JSON file, or `steering_recipe.json` in a folder; whole or not at all.

        Raises:
            FileNotFoundError: The file's folder does not exist.
        """
        check_path("path", path)
        target = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        return write_json(check_folder(target), self.to_dict(), indent=2)

    @classmethod
    def load(cls, source: str | os.PathLike, revision: str | None = None) -> "SteeringRecipe":
        """
        Read a recipe.

        Args:
            source: A file, a folder or a Hub repository with `steering_recipe.json`.
            revision: Of the repository.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file holds no recipe.
        """
        check_path("source", source)
        path = Path(source) / FILE_NAME if Path(source).is_dir() else Path(source)
        if not path.is_file():
            path = _download(str(source), revision)
        return read_artefact(path, "steering recipe", cls.from_dict)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """
        Upload the recipe as `steering_recipe.json` to a Hub repository, which is made if there is none.

        Args:
            repo_id: "owner/name".
            options: `token`, `revision`, `commit_message` and others of `HfApi.upload_file`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: `repo_id` is no name of a repository.
        """
        check_repo_id(repo_id)
        from huggingface_hub import HfApi

        api = HfApi(token=options.get("token"))
        api.create_repo(repo_id, exist_ok=True)
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False).encode()
        commit = api.upload_file(path_or_fileobj=content, path_in_repo=FILE_NAME, repo_id=repo_id, **options)
        return str(commit.commit_url)

    def diff(self, other: "SteeringRecipe") -> list[str]:
        """Lines `place: this -> other` of all that differs; "-" stands for what one of them does not have."""
        ours, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        places = [*ours, *(place for place in theirs if place not in ours)]
        return [
            f"{place}: {ours.get(place, '-')} -> {theirs.get(place, '-')}"
            for place in places
            if ours.get(place, "-") != theirs.get(place, "-")
        ]


def _mentioned(operations: Sequence[Operation]) -> set[int]:
    """Ids of all concepts in operations and their conditions."""
    found: set[int] = set()
    for operation in operations:
        values = [getattr(operation, name, ()) for name in ("concepts", "concept", "group")]
        values.append(() if operation.condition is None else operation.condition.concept)
        for value in values:
            found.update([value] if isinstance(value, int) else value)
    return found


def _flatten(value: Any, place: str = "") -> dict[str, str]:
    """The leaves of nested dictionaries and lists as JSON, by their places such as `operations[0].strength`."""
    if isinstance(value, dict):
        parts = [(f"{place}.{key}" if place else key, part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(f"{place}[{number}]", part) for number, part in enumerate(value)]
    else:
        return {place: json.dumps(value, ensure_ascii=False)}
    return {key: leaf for name, part in parts for key, leaf in _flatten(part, name).items()}


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, FILE_NAME, revision=revision))
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a recipe's file nor a folder or Hub repository with {FILE_NAME}."
        ) from error
