"""The catalog of a model's concepts: lookup, search, and what the model itself says of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from . import concept_proposals, concept_statistics
from .checks import check_model, check_path, check_positive, check_text, check_tokenizer, check_whole, short
from .concept_labels import FLAGS, HEADS, Concept, find_labels, read_labels, write_labels
from .concept_proposals import LabelProposal
from .concept_search import ConceptIndex
from .concept_statistics import ActiveConcept, Contrast, TokenScore
from .files import reading_artefact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.configuration_steerling import SteerlingConfig
    from .modeling.modeling_steerling import SteerlingForDiffusionLM

ConceptLike = SupportsIndex | str | Concept


class ConceptNotFoundError(KeyError, ValueError):
    """
    No concept, or not exactly one, is meant by a name or id; the message has near matches. A `KeyError`, because
    `catalog[...]` is a lookup, and a `ValueError`, as every refusal of this package.
    """

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote it


@dataclass(frozen=True)
class Match:
    """A concept that search found, and its BM25 score; scores of different queries cannot be compared."""

    concept: Concept
    score: float


class ConceptCatalog:
    """
    Concepts by id and by name. Wherever a concept is asked for, an id, a name or a `Concept` will do.

        catalog = ConceptCatalog.for_model(model)
        catalog["gardening"].id, catalog.search("flowers"), catalog.contrast(model, tokenizer, cheerful, gloomy)

    A catalog does not change. Its ids go from 0 to `n_known + n_unknown - 1`, whether they are labelled or not: first
    the known concepts, then the discovered ones. The padding of a model's tables has no ids.

    Args:
        concepts: The labels.
        n_known: Known concepts of the model; by default one more than the highest labelled one.
        n_unknown: Discovered concepts of the model; by default up to the highest labelled one.

    Raises:
        ValueError: Two labels have one id, or an id is not where its head's ids are.
    """

    def __init__(self, concepts: Iterable[Concept], n_known: int | None = None, n_unknown: int | None = None):
        for name, count in (("n_known", n_known), ("n_unknown", n_unknown)):
            if count is not None:
                check_whole(name, count, 0)
        self._labels: dict[int, Concept] = {}
        if not isinstance(concepts, Iterable):
            raise ValueError(f"`concepts` is {short(concepts)}: give a list of Concepts.")
        for concept in concepts:
            if not isinstance(concept, Concept):
                raise ValueError(f"`concepts` has {short(concept)}: give Concepts.")
            if concept.id in self._labels:
                raise ValueError(f"`concepts` has id {concept.id} twice: {self._labels[concept.id]} and {concept}.")
            self._labels[concept.id] = concept
        ends = {head: max((c.id + 1 for c in self._labels.values() if c.head == head), default=0) for head in HEADS}
        self.n_known = ends["known"] if n_known is None else n_known
        self.n_unknown = max(0, ends["unknown"] - self.n_known) if n_unknown is None else n_unknown
        for concept in self._labels.values():
            if not 0 <= concept.id < len(self) or concept.head != self._head(concept.id):
                raise ValueError(
                    f"`concepts` has {concept} as a concept of the {concept.head} head with id {concept.id}, but known "
                    f"concepts have ids below {self.n_known}, and {self.n_unknown} discovered ones follow."
                )

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> ConceptCatalog:
        """
        The labels of a checkpoint.

        Args:
            source: A label file, a folder that has one, a checkpoint that comes with this package ("steerling-nano"), or
                a Hub repository. The released checkpoints' labels are in "guidelabs/steerling".
            revision: Of the Hub repository.

        Raises:
            FileNotFoundError: There are no labels.
            ValueError: The file is not what the schema says.
            ImportError: The labels are in parquet, and the extra `concepts` is not installed.
        """
        path = find_labels(source, revision)
        with reading_artefact(path, "list of concept labels"):
            return cls(read_labels(path))

    @classmethod
    def for_model(cls, model: SteerlingForDiffusionLM, source: str | Path | None = None) -> ConceptCatalog:
        """
        All concepts of a model, its discovered ones included.

        Args:
            source: Where the labels are (see `from_pretrained`); by default where the model comes from.

        Raises:
            FileNotFoundError: There are no labels.
            ValueError: The labels are another model's, or the model comes from nowhere.
        """
        check_model(model)
        source = source or model.config._name_or_path
        if not source:
            raise ValueError("`model` was not loaded from anywhere: say in `source` where its labels are.")
        return cls.from_pretrained(source).fit(model.config)

    def fit(self, config: SteerlingConfig) -> ConceptCatalog:
        """
        This catalog with as many discovered concepts as a model has.

        Raises:
            ValueError: The labels are another model's.
        """
        if not hasattr(config, "n_discovered"):
            raise ValueError(f"`config` is of the type {type(config).__name__}: give a model's SteerlingConfig.")
        n_unknown = config.n_discovered
        if config.n_concepts != self.n_known or n_unknown < self.n_unknown:
            raise ValueError(
                f"This catalog has {self.n_known} known and {self.n_unknown} discovered concepts, the model "
                f"{config.n_concepts} and {n_unknown}: load the model's own with ConceptCatalog.for_model(model)."
            )
        if n_unknown == self.n_unknown:
            return self
        return ConceptCatalog(self._labels.values(), self.n_known, n_unknown)

    def save(self, path: str | Path) -> None:
        """
        Write the labels; what has none is left out.

        Args:
            path: Ends in `.parquet` (the released schema; needs the extra `concepts`) or `.json` (the same rows).

        Raises:
            ValueError: It has another ending.
        """
        check_path("path", path)
        write_labels((self._labels[i] for i in sorted(self._labels)), Path(path))

    def with_labels(self, concepts: Iterable[Concept]) -> ConceptCatalog:
        """This catalog with these labels in place of what it says of their ids."""
        concepts = list(ConceptCatalog(concepts)._labels.values())
        labels = self._labels | {concept.id: concept for concept in concepts}
        return ConceptCatalog(labels.values(), self.n_known, self.n_unknown)

    def __len__(self) -> int:
        return self.n_known + self.n_unknown

    def __iter__(self) -> Iterator[Concept]:
        return (self._concept(i) for i in range(len(self)))

    def __contains__(self, concept: object) -> bool:
        try:
            return isinstance(concept, (SupportsIndex, str, Concept)) and self[concept] is not None
        except ConceptNotFoundError:
            return False

    def __getitem__(self, concept: ConceptLike) -> Concept:
        """
        The concept of an id, or of a name; the case of letters decides between names that differ in nothing else.

        Raises:
            ConceptNotFoundError: There is none, or the name is that of several.
        """
        if isinstance(concept, str):
            return self._named(concept)
        if isinstance(concept, bool) or not isinstance(concept, (SupportsIndex, Concept)):
            raise TypeError(f"`concept` is {short(concept)}: give an id, a name or a Concept.")
        index = concept.id if isinstance(concept, Concept) else operator.index(concept)
        if not 0 <= index < len(self):
            raise ConceptNotFoundError(self._no_such_id(index))
        return self._concept(index)

    def near(self, name: str, limit: int = 5) -> list[Concept]:
        """Concepts whose names look like `name`, best first."""
        check_text("name", name)
        check_positive("limit", limit)
        found = get_close_matches(name.casefold(), self._ids_of_name, n=limit)
        inside = (known for known in self._ids_of_name if name.casefold() in known) if name else ()
        names = list(dict.fromkeys([*found, *inside]))
        return [self._concept(i) for known in names for i in self._ids_of_name[known]][:limit]

    def group(self, concept: ConceptLike) -> list[int]:
        """Ids of a concept's group: the concept itself first, then the others; it alone if it is in no group."""
        focal = self[concept]
        if focal.group_id is None:
            return [focal.id]
        members = (c.id for c in self._labels.values() if c.group_id == focal.group_id and c.id != focal.id)
        return [focal.id, *sorted(members)]

    def filter(
        self, head: str | None = None, group: int | str | None = None, flags: Iterable[str] = ()
    ) -> list[Concept]:
        """
        Concepts by what their labels say, in order of id.

        Args:
            head: "known" or "unknown".
            group: Id or name of a group.
            flags: All of these must be set: "steerable", "tone", "alignment", "demographic".

        Raises:
            ValueError: There is no such head, group or flag.
        """
        if not isinstance(flags, Iterable):
            raise ValueError(f"`flags` is {short(flags)}: choose from {', '.join(map(repr, FLAGS))}.")
        flags = [flags] if isinstance(flags, str) else list(flags)
        for name, value, choices in [("head", head, HEADS), *(("flags", flag, FLAGS) for flag in flags)]:
            if (name == "flags" or value is not None) and (not isinstance(value, str) or value not in choices):
                raise ValueError(f"`{name}` has {value!r}: choose from {', '.join(map(repr, choices))}.")
        groups = None if group is None else self._groups(group)
        return [
            concept
            for concept in self
            if (head is None or concept.head == head)
            and (groups is None or concept.group_id in groups)
            and set(flags) <= set(concept.flags)
        ]

    def search(
        self,
        query: str,
        limit: int = 10,
        head: str | None = None,
        group: int | str | None = None,
        flags: Iterable[str] = (),
    ) -> list[Match]:
        """
        Concepts whose names and descriptions have words of the query, ranked by BM25; endings of words do not count.

        Args:
            limit: At most so many.
            head, group, flags: Only these; see `filter`.

        Raises:
            ValueError: See `filter`; `limit` is not 1 or more.
            ImportError: The extra `concepts` is not installed.
        """
        check_text("query", query)
        check_positive("limit", limit)
        allowed = {concept.id for concept in self.filter(head, group, flags)}
        ranked = [Match(self._concept(i), score) for i, score in self._index.scores(query).items() if i in allowed]
        return ranked[:limit]

    def top_tokens(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        concept: ConceptLike,
        k: int = 10,
    ) -> list[TokenScore]:
        """The k tokens that a concept promotes most; see `concept_statistics.top_tokens`."""
        _check_readers(model, tokenizer)
        return concept_statistics.top_tokens(model, tokenizer, self.fit(model.config)[concept], k)

    def active_in(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        k: int = 10,
        head: str | None = None,
    ) -> list[list[ActiveConcept]]:
        """The k strongest concepts of each text; see `concept_statistics.active_in`."""
        _check_readers(model, tokenizer)
        return concept_statistics.active_in(model, tokenizer, self.fit(model.config)._concept, texts, k, head)

    def contrast(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        positive: Sequence[str],
        negative: Sequence[str],
        k: int = 10,
        head: str | None = None,
    ) -> list[Contrast]:
        """The k concepts that tell two sets of texts apart best; see `concept_statistics.contrast`."""
        _check_readers(model, tokenizer)
        concept_of = self.fit(model.config)._concept
        return concept_statistics.contrast(model, tokenizer, concept_of, positive, negative, k, head)

    def propose_labels(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        limit: int = 20,
        concepts: Iterable[ConceptLike] | None = None,
    ) -> list[LabelProposal]:
        """
        Names for the discovered concepts that are strongest in the texts; see `concept_proposals.propose_labels`.

        Args:
            limit: At most so many.
            concepts: Choose from these only; by default from all unnamed discovered ones.

        Raises:
            ValueError: One of `concepts` is not a discovered concept.
        """
        _check_readers(model, tokenizer)
        check_positive("limit", limit)
        if concepts is not None and (isinstance(concepts, str) or not isinstance(concepts, Iterable)):
            raise ValueError(f"`concepts` is {short(concepts)}: give a list of concepts.")
        catalog = self.fit(model.config)
        unnamed = (concept for concept in catalog.filter("unknown") if not concept.name)
        chosen = list(unnamed if concepts is None else (catalog[concept] for concept in concepts))
        for concept in chosen:
            if concept.head != "unknown":
                raise ValueError(f"`concepts` has {concept.name!r}, a known concept: give discovered ones.")
        return concept_proposals.propose_labels(model, tokenizer, chosen, texts, limit)

    @cached_property
    def _index(self) -> ConceptIndex:
        return ConceptIndex(list(self._labels.values()))

    @cached_property
    def _ids_of_name(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for i in sorted(self._labels):
            if self._labels[i].name:
                ids.setdefault(self._labels[i].name.casefold(), []).append(i)
        return ids

    def _head(self, concept_id: int) -> str:
        return HEADS[concept_id >= self.n_known]

    def _concept(self, concept_id: int) -> Concept:
        return self._labels.get(concept_id) or Concept(concept_id, self._head(concept_id))

    def _named(self, name: str) -> Concept:
        found = [self._concept(i) for i in self._ids_of_name.get(name.casefold(), [])]
        exact = [concept for concept in found if concept.name == name]
        if len(exact) == 1 or (not exact and len(found) == 1):
            return (exact or found)[0]
        if found:
            ids = ", ".join(str(concept.id) for concept in exact or found)
            raise ConceptNotFoundError(f"{name!r} is the name of several concepts: give one of the ids {ids}.")
        raise ConceptNotFoundError(f"No concept is named {name!r}; {self._suggest(self.near(name))}.")

    def _no_such_id(self, concept_id: int) -> str:
        if not len(self):
            return f"No concept has the id {concept_id}: this catalog is empty."
        nearest = self._concept(min(max(concept_id, 0), len(self) - 1))
        message = f"No concept has the id {concept_id}: ids go from 0 to {len(self) - 1}, the nearest is {nearest.id} ({nearest})"
        if not self.n_unknown:
            message += "; discovered concepts are in the catalog of ConceptCatalog.for_model(model)"
        return message + "."

    def _suggest(self, concepts: Sequence[Concept]) -> str:
        if not concepts:
            return "nothing looks like it, search its descriptions with catalog.search(...)"
        return "near: " + ", ".join(f"{concept.name!r} ({concept.id})" for concept in concepts)

    def _groups(self, group: int | str) -> set[int]:
        names = {c.group_id: c.group_name for c in self._labels.values() if c.group_id is not None}
        if not isinstance(group, str):
            if isinstance(group, bool) or not isinstance(group, SupportsIndex):
                raise ValueError(f"`group` is {short(group)}: give the id or the name of a group.")
            found = {operator.index(group)} & names.keys()
        else:
            found = {i for i, name in names.items() if name.casefold() == group.casefold()}
        if found:
            return found
        near = get_close_matches(str(group), names.values(), cutoff=0.4) or sorted(set(names.values()))[:5]
        raise ValueError(f"`group` is {group!r}: no group has this id or name; near: {', '.join(map(repr, near))}.")


def _check_readers(model: Any, tokenizer: Any) -> None:
    check_model(model)
    check_tokenizer(tokenizer)
