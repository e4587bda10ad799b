"""How strong steering should be: its effect and what it costs in fluency, over a range of strengths."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checks import check_model, check_number, check_positive, check_text, check_texts, check_tokenizer, short
from .files import check_file, write_whole
from .fluency import text_fluency
from .modeling.lookup_steerling import device_of
from .modeling.steering_steerling import Operation
from .plots import line_plot
from .torch_state import PlainTensors


@dataclass(frozen=True)
class StrengthTrial:
    """
    One strength.

    Args:
        strength: Value of the operation's field.
        effect: The objective.
        fluency: Mean log-probability of a written token under the unsteered model, in nats; nearer to 0 is more fluent.
        texts: What was written behind each prompt.
    """

    strength: float
    effect: float
    fluency: float
    texts: tuple[str, ...]


class StrengthTable(Sequence[StrengthTrial]):
    """
    Trials in the order of their strengths.

    Args:
        trials: One or more.
        field: The operation's field that was varied.
    """

    def __init__(self, trials: Sequence[StrengthTrial], field: str):
        self.trials, self.field = sorted(trials, key=lambda trial: trial.strength), field

    def __getitem__(self, index: Any) -> Any:
        return self.trials[index]

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[StrengthTrial]:
        return iter(self.trials)

    def best(self, least_effect: float) -> StrengthTrial:
        """
        The most fluent trial with at least this effect.

        Raises:
            ValueError: No trial has it.
        """
        enough = [trial for trial in self.trials if trial.effect >= least_effect]
        if not enough:
            most = max(trial.effect for trial in self.trials)
            raise ValueError(f"`least_effect` is {least_effect}, but the largest effect of any strength is {most:g}.")
        return max(enough, key=lambda trial: trial.fluency)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The trials as dictionaries, for a data frame or JSON."""
        return [asdict(trial) for trial in self.trials]

    def plot(self, path: str | os.PathLike) -> Path:
        """
        Draw effect and fluency against the strength as SVG; fluency as the probability of a token, `exp(fluency)`.

        Raises:
            ValueError: The path does not end in `.svg`.
            FileNotFoundError: Its folder does not exist.
        """
        fluency = [math.exp(trial.fluency) for trial in self.trials]
        lines = {
            "effect": [(trial.strength, trial.effect) for trial in self.trials],
            "fluency": [(trial.strength, share) for trial, share in zip(self.trials, fluency)],
        }
        drawn = line_plot(lines, title="Effect and fluency of steering", x=self.field, y="effect, fluency")
        return write_whole(check_file(path, (".svg",)), drawn)

    def __str__(self) -> str:
        lines = [f"{self.field:>10} {'effect':>8} {'fluency':>8}"]
        lines += [f"{trial.strength:10.3g} {trial.effect:8.3f} {trial.fluency:8.3f}" for trial in self.trials]
        return "\n".join(lines)


def search_strength(
    model: Any,
    tokenizer: Any,
    operation: Operation,
    prompts: Sequence[str],
    objective: Callable[[list[str]], float],
    *,
    strengths: Sequence[float] | None = None,
    between: tuple[float, float] | None = None,
    least_effect: float | None = None,
    trials: int = 6,
    field: str = "strength",
    **generation: Any,
) -> StrengthTable:
    """
    Try an operation at several strengths: a grid, or a bisection for the weakest one with enough effect.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        operation: What to vary.
        prompts: Are continued under every strength, as one batch.
        objective: The effect of the texts that follow the prompts; larger is better.
        strengths: The grid.
        between: In place of a grid, a weak and a strong value to bisect between; effects should grow from one to the other.
        least_effect: With `between`, the effect to reach.
        trials: With `between`, how many strengths to try.
        field: Which field of the operation to vary, "value" for `SetConcepts`.
        generation: For `model.generate`, such as `max_new_tokens` and `do_sample`.

    Raises:
        ValueError: The operation has no such field or cannot have such a strength, or not exactly one of `strengths` and
            `between` is given, or the model is steered, or an argument of `generation` is not yours to set.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    if not isinstance(operation, Operation):
        raise ValueError(f"`operation` is {short(operation)}: give an operation, such as Amplify(3).")
    if isinstance(prompts, str):
        raise ValueError(f"`prompts` is the single text {prompts!r:.80}: put it into a list.")
    check_texts("prompts", prompts)
    if not callable(objective):
        raise ValueError(f"`objective` is {short(objective)}: give a function of a list of texts.")
    check_positive("trials", trials)
    check_text("field", field)
    lists: tuple[tuple[str, Any, int | None], ...] = (("strengths", strengths, None), ("between", between, 2))
    for name, values, count in lists:
        if values is not None:
            if isinstance(values, str) or not isinstance(values, Sequence) or (count and len(values) != count):
                raise ValueError(f"`{name}` is {short(values)}: give a list of {'two ' if count else ''}numbers.")
            for value in values:
                check_number(name, value)
    if least_effect is not None:
        check_number("least_effect", least_effect)
    if field not in {part.name for part in fields(operation)}:
        raise ValueError(f"`field` is {field!r}, which {operation.name} does not have.")
    if (strengths is None) == (between is None) or (between is None) != (least_effect is None):
        raise ValueError("Give either `strengths`, or `between` and `least_effect`.")
    if getattr(model, "attached_operations", ()):
        raise ValueError("`model` is steered, and fluency is that of the unsteered model: remove its steering first.")
    if not prompts or (strengths is not None and not len(strengths)):
        raise ValueError("`prompts` and `strengths` need one entry or more.")
    for name in ("steering", "num_return_sequences", "return_dict_in_generate"):
        if name in generation:
            raise ValueError(f"`{name}` cannot be given: each prompt gets one text, under `operation`. Leave it out.")

    def changed(strength: float) -> Operation:
        change: dict[str, Any] = {field: strength}
        return replace(operation, **change)

    for strength in strengths if strengths is not None else between or ():
        changed(strength).check(model.config)
    with PlainTensors():
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(device_of(model))

    def attempt(strength: float) -> StrengthTrial:
        output = model.generate(**inputs, steering=changed(strength), **{"tokenizer": tokenizer, **generation})
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        fluency = text_fluency(model, output, _text_mask(model, inputs.attention_mask, output))
        return StrengthTrial(strength, float(objective(texts)), fluency, tuple(texts))

    found = []
    if strengths is not None:
        found = [attempt(strength) for strength in tqdm(strengths, desc=f"{operation.name}, {field}")]
    elif between is not None and least_effect is not None:
        weak, strong = between
        for _ in tqdm(range(trials), desc=f"{operation.name}, {field}"):
            middle = (weak + strong) / 2
            found.append(attempt(middle))
            weak, strong = (weak, middle) if found[-1].effect >= least_effect else (middle, strong)
    return StrengthTable(found, field)


def _text_mask(model: Any, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(B, T): 0 for prompts, 1 for what was written, -1 for padding on either side."""
    padding = {model.config.pad_token_id, model.generation_config.pad_token_id} - {None}
    written = torch.ones_like(output)
    for token in padding:
        written[output == token] = -1
    written[:, : prompt.shape[1]] = prompt - 1
    return written
