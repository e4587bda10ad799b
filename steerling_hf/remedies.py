"""Recipes against an answer, each tried on the prompt that led to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tqdm import tqdm

from .case import Case
from .modeling.steering_steerling import Condition, Imitate, Operation, Suppress
from .recipe import SteeringRecipe

# Parts of the preset's strengths, which are the 8B model's: the weakest that works is suggested.
LEVELS = (0.125, 0.25, 0.5, 1.0)
# A remedy works if the concept's weight in what is said, read alone, falls to this part of what it was,
LEFT_OVER = 0.5
# and if the language survives: nats a token of fluency that may be lost.
FLUENCY_LOST = 2.0
# What the prompt has to show of a concept for a remedy to wait for it there.
LEAST_IN_PROMPT = 0.2


@dataclass(frozen=True)
class Remedy:
    """
    A recipe and what it did to the audited answer.

    Args:
        kind: "suppress", "imitate" or "suppress and imitate".
        recipe: What to give to `generate(steering=...)`.
        concept: Id of the concept that it is against.
        works: Whether the answer became acceptable, and is still language.
        before, after: The answer without it and with it.
        evidence: Numbers: the concept's highest weight in the prompt, and before and after, its highest weight in the answer
            when the model reads this alone, its support of the answer (see `Case.support`), and how fluent the answer is
            (nats a token, see `text_fluency`).
    """

    kind: str
    recipe: SteeringRecipe
    concept: int
    works: bool
    before: str
    after: str
    evidence: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What a JSON file can hold: the recipe, and beside it what a report shows of it."""
        recipe = self.recipe.to_dict()
        shown = {name: recipe[name] for name in ("description", "operations", "concepts")}
        return {**vars(self), **shown, "recipe": recipe, "evidence": dict(self.evidence)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Remedy:
        """The remedy of `to_dict`."""
        own = {part.name: values[part.name] for part in fields(cls)}
        return cls(**{**own, "recipe": SteeringRecipe.from_dict(own["recipe"])})


def find_remedies(
    case: Case,
    concepts: Sequence[int],
    target: str | None = None,
    accept: Callable[[str], bool] | None = None,
    progress: bool = False,
) -> tuple[Remedy, ...]:
    """
    Try remedies on a case: to suppress a concept, as weakly as works; to imitate a target; both.

    Args:
        case: What was answered, and how.
        concepts: The known concept that drove the answer, and its relatives among those that did.
        target: The answer that one would rather have.
        accept: Whether an answer is acceptable; by default if the model, reading it alone, finds half of the concept in it.
        progress: Whether to show a progress bar.

    Returns:
        Those that work first, and of these the one first that leaves the least of the concept.
    """
    concept = concepts[0]
    name = f"concept {concept}" if case.catalog is None else repr(str(case.catalog[concept]))
    imitate = None if target is None else _imitate(case, target)
    shown = dict(zip(concepts, case.weights(concepts, case.prompt).amax(0).tolist()))
    witness = max(shown, key=shown.__getitem__)
    # A remedy that looks for its concept in the prompt leaves all other prompts alone.
    condition = Condition(witness, shown[witness] / 2) if shown[witness] >= LEAST_IN_PROMPT else None
    before = _measure(case, concept, case.answer)
    bar = tqdm(desc="trying remedies", disable=not progress)

    def attempt(kind: str, description: str, *operations: Operation) -> Remedy:
        answer = case.answer_under(*operations)
        text, after = case.text(answer), _measure(case, concept, answer)
        evidence = {"weight in prompt": shown[concept]}
        for name, value in before.items():
            evidence |= {f"{name} before": value, f"{name} after": after[name]}
        good = accept(text) if accept is not None else after["weight"] <= LEFT_OVER * before["weight"]
        recipe = SteeringRecipe.of(
            case.model, *operations, catalog=case.catalog, effect=evidence, description=description
        )
        bar.update()
        said = bool(text.strip()) and after["fluency"] >= before["fluency"] - FLUENCY_LOST
        return Remedy(kind, recipe, concept, said and bool(good), case.text(case.answer), text, evidence)

    def suppress(level: float) -> Remedy:
        strengths = {name: level * getattr(Suppress, name) for name in ("strength", "token_strength")}
        operation = Suppress(concept, concepts[1:], condition=condition, **strengths)
        return attempt("suppress", f"suppresses {name}", operation)

    with bar:
        levels = [suppress(LEVELS[0])]
        for level in LEVELS[1:]:
            if not levels[-1].works:
                levels.append(suppress(level))
        # Where no level works, the others say nothing against it, and the weakest harms least.
        weakest = levels[-1] if levels[-1].works else levels[0]
        found = [weakest]
        if imitate is not None:
            imitate = replace(imitate, condition=condition)
            both = (*weakest.recipe.operations, imitate)
            found.append(attempt("imitate", f"imitates {target!r} in place of {name}", imitate))
            found.append(attempt("suppress and imitate", f"suppresses {name} and imitates {target!r}", *both))
    return tuple(sorted(found, key=lambda remedy: (not remedy.works, remedy.evidence["weight after"])))


def _measure(case: Case, concept: int, answer: Sequence[int]) -> dict[str, float]:
    """What of a concept there is in an answer, and how fluent this is."""
    if not answer:
        return {"weight": 0.0, "support": 0.0, "fluency": 0.0}
    return {
        "weight": case.highest(concept, answer),
        "support": float(case.support([concept], answer)),
        "fluency": case.fluency(answer),
    }


def _imitate(case: Case, target: str) -> Imitate:
    """Imitates an answer, ended as the model ends its own: what follows must not be left to chance."""
    config = case.model.config
    ends = [token for token in (config.endofchunk_token_id, config.eot_id) if token is not None]
    ids = case.tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"]
    imitate = Imitate([*ids, *(end for end in ends if end not in ids)])
    imitate.check(config)
    return imitate
