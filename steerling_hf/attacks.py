"""How often attacks succeed: the same prompts, answered greedily under several conditions and judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .attack_prompts import AttackPrompt, check_ids
from .attack_report import AttackError, AttackRecord, AttackReport, TextQuality, describe_judge, judged
from .chat import chat_inputs
from .checks import check_positive, check_switches, check_tokenizer
from .fluency import text_fluency
from .judges import Judge
from .modeling.lookup_steerling import device_of
from .modeling.steered_steerling import flatten_operations
from .reading import pad_left

Broken = Callable[[AttackPrompt, str], tuple[int, int]]

# What evaluate_attacks gives to `generate` itself, or cannot do with.
OWN_ARGUMENTS = (
    "attention_mask",
    "custom_generate",
    "generation_config",
    "input_ids",
    "inputs",
    "return_dict_in_generate",
    "steering",
    "streamer",
)


@dataclass(frozen=True)
class _Way:
    """A condition: a model, and steering for `generate`, a tuple for all rows or a list with an entry for each prompt."""

    name: str
    model: Any
    steering: tuple[Any, ...] | list[Any] | None
    description: Any


@dataclass(frozen=True)
class _Answer:
    """Token ids of prompt and answer, the end token included, and how many are the prompt's; or what was raised."""

    ids: Sequence[int] = ()
    given: int = 0
    error: str | None = None


def evaluate_attacks(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[AttackPrompt | str],
    judge: Judge,
    conditions: Mapping[str, Any],
    *,
    broken: Broken | None = None,
    chat: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: bool = False,
    **generation: Any,
) -> AttackReport:
    """
    Measure attack success, refusals, over-refusals and broken text under several conditions. Each prompt gets one greedy
    answer under each. A prompt whose generation raises is recorded with the error, and costs no other prompt its answer; it,
    empty answers and verdicts of `None` count as neither success nor refusal, in unchanged denominators.

        evaluate_attacks(model, tokenizer, prompts, judge, {"base": None, "control": recipe, "tuned": other_model}, chat=True)

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompts: At least one harmful one; strings are harmful prompts. Ids must differ.
        judge: Takes prompts and as many answers, without control tokens, and returns a `Verdict` on each. It is asked once
            for each condition, and only about answers that say something.
        conditions: By name: `None` for the model as it is; a recipe, an operation, or a sequence of these, for all prompts;
            a function of a prompt that returns one of these, for that prompt; or another model with the same tokenizer. The
            first is the baseline of paired tests.
        broken: Counts the valid sentences, and all sentences, of an answer to a prompt, so that the parse rate can be
            reported. It gets the answer as it was written, up to and with its end token and with all control tokens, since
            these tell what is finished. By default the pseudo-perplexity of answers under the unsteered `model` is measured.
        chat: Put each text into the tokenizer's chat template as a user's message, in which control tokens are only text.
            Otherwise texts are prompts as they are.
        batch_size: Prompts that are answered at once.
        max_new_tokens: Most tokens of an answer.
        progress: Show a bar.
        generation: For `generate`, such as `steps` or `stop_strings`.

    Raises:
        ValueError: An argument cannot be used; raised before anything is generated.
        AttackError: Nothing could be generated under a condition; or the judge or `broken` failed, or the judge could say
            nothing at all of the baseline's attacks. Its `report` holds all answers so far.
    """
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise ValueError(f"`model` is of the type {type(model).__name__}: give a language model of transformers.")
    check_tokenizer(tokenizer)
    check_switches(chat=chat, progress=progress)
    given = _prompts(prompts)
    check_positive("batch_size", batch_size)
    check_positive("max_new_tokens", max_new_tokens)
    if not callable(judge):
        raise ValueError(f"`judge` is {judge!r}: give a function of prompts and answers, such as a PatternJudge.")
    if broken is not None and not callable(broken):
        raise ValueError(f"`broken` is {broken!r}: give a function of a prompt and its answer, or leave it out.")
    if broken is None:
        _check_fluency(model)
    options = _generation(generation, max_new_tokens, tokenizer)
    ways = _ways(model, given, conditions)
    rows = _encode(tokenizer, given, chat)

    settings = {
        "model": _model_name(model),
        "judge": describe_judge(judge),
        "conditions": {way.name: way.description for way in ways},
        "chat": chat,
        "generation": {name: _plain(value) for name, value in options.items() if name != "tokenizer"},
    }
    records: list[AttackRecord] = []
    quality: dict[str, TextQuality] = {}
    for way in ways:
        answers = _answer_all(way, rows, tokenizer, options, batch_size, progress)
        new = [_record(way.name, prompt, answer, tokenizer) for prompt, answer in zip(given, answers)]
        so_far = AttackReport((*records, *new), dict(quality), settings)
        if all(record.error is not None for record in new):
            raise AttackError(f"Nothing could be generated under {way.name!r}: {new[0].error}", so_far)
        try:
            new = judged(judge, new, first=not records)
        except Exception as error:
            raise AttackError(f"The judge failed on {way.name!r}: {error}", so_far) from error
        records += new
        try:
            quality[way.name] = (
                _pseudo_perplexity(model, given, answers, batch_size) if broken is None else _parse_rate(broken, new)
            )
        except Exception as error:
            raise AttackError(
                f"The text of {way.name!r} could not be measured: {error}",
                AttackReport(tuple(records), quality, settings),
            ) from error
    return AttackReport(tuple(records), quality, settings)


# Before anything is generated


def _prompts(prompts: Sequence[AttackPrompt | str]) -> list[AttackPrompt]:
    if isinstance(prompts, (str, AttackPrompt)):
        raise ValueError("`prompts` is a single prompt: put it into a list.")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"`prompts` is {prompts!r:.80}: give a list of AttackPrompts or strings.")
    given = []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, AttackPrompt)):
            raise ValueError(f"`prompts` has {prompt!r}: give AttackPrompts, as read_prompts does, or strings.")
        given.append(AttackPrompt(prompt, harmful=True, id=str(number)) if isinstance(prompt, str) else prompt)
    if not any(prompt.harmful for prompt in given):
        found = f"has {len(given)} prompts, but no harmful one" if given else "is empty"
        raise ValueError(f"`prompts` {found}: attack success needs one or more.")
    try:
        check_ids(given)
    except ValueError as error:
        raise ValueError(f"`prompts` cannot be told apart: {error}") from error
    harmful = {prompt.id for prompt in given if prompt.harmful}
    for prompt in given:
        if prompt.benign_of is not None and prompt.benign_of not in harmful:
            raise ValueError(
                f"`benign_of` of prompt {prompt.id!r} is {prompt.benign_of!r}, which is no harmful prompt's id here: add that "
                "prompt, or leave `benign_of` out."
            )
    return given


def _check_fluency(model: Any) -> None:
    if getattr(model.config, "mask_token_id", None) is None or not hasattr(model, "compute_logits"):
        raise ValueError("`model` is no Steerling model, so its pseudo-perplexity cannot be measured: give `broken`.")
    if getattr(model, "attached_operations", ()):
        raise ValueError(
            "`model` is steered, but pseudo-perplexity is that of the unsteered model: give its steering as a condition, or `broken`."
        )


def _generation(generation: Mapping[str, Any], max_new_tokens: int, tokenizer: Any) -> dict[str, Any]:
    options = dict(generation)
    for name in OWN_ARGUMENTS:
        if name in options:
            raise ValueError(f"`{name}` cannot be given: evaluate_attacks sets it. Leave it out.")
    if options.pop("do_sample", False):
        raise ValueError("`do_sample` is True, but each prompt gets one greedy answer: leave it out.")
    if options.pop("num_return_sequences", 1) != 1:
        raise ValueError("`num_return_sequences` is not 1, but each prompt gets one answer: leave it out.")
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    return {**options, "max_new_tokens": max_new_tokens, "do_sample": False}


def _ways(model: Any, prompts: Sequence[AttackPrompt], conditions: Mapping[str, Any]) -> list[_Way]:
    if not isinstance(conditions, Mapping) or not conditions:
        raise ValueError(f"`conditions` is {conditions!r}: give one or more by name, such as {{'base': None}}.")
    ways = []
    for name, condition in conditions.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"`conditions` has the name {name!r}: give strings.")
        try:
            ways.append(_way(name, model, prompts, condition))
        except ValueError as error:
            raise ValueError(f"`conditions` has {name!r}, which cannot be used: {error}") from error
        if ways[-1].model.training:
            raise ValueError(f"The model of {name!r} is in training mode: call .eval() first.")
    return ways


def _way(name: str, model: Any, prompts: Sequence[AttackPrompt], condition: Any) -> _Way:
    if condition is None:
        return _Way(name, model, None, None)
    if isinstance(condition, torch.nn.Module):
        own, its = model.config.vocab_size, getattr(getattr(condition, "config", None), "vocab_size", None)
        if not hasattr(condition, "generate") or its != own:
            raise ValueError(
                f"a model needs `generate` and the same tokenizer, but this {type(condition).__name__} has a vocabulary of "
                f"{its}, and `model` one of {own}."
            )
        return _Way(name, condition, None, _model_name(condition))
    if callable(condition) and not isinstance(condition, type):
        chosen = [tuple(flatten_operations(model, condition(prompt))) for prompt in prompts]
        return _Way(name, model, chosen, f"function {getattr(condition, '__qualname__', condition)}")
    operations = tuple(flatten_operations(model, condition))
    if not operations:
        raise ValueError("it has no operation; give None for the model as it is.")
    return _Way(name, model, operations, [operation.to_dict() for operation in operations])


def _encode(tokenizer: Any, prompts: Sequence[AttackPrompt], chat: bool) -> list[list[int]]:
    if not chat:
        return [list(tokenizer(prompt.text, verbose=False)["input_ids"]) for prompt in prompts]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "`chat` is True, but `tokenizer` has no chat template: take an instructed model's, or ready prompts."
        )
    messages = ([{"role": "user", "content": prompt.text}] for prompt in prompts)
    return [list(chat_inputs(tokenizer, asked)["input_ids"]) for asked in messages]


# Generation


def _answer_all(
    way: _Way,
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
    options: Mapping[str, Any],
    batch_size: int,
    progress: bool,
) -> list[_Answer]:
    answers: list[_Answer] = []
    with tqdm(total=len(rows), desc=way.name, disable=not progress) as bar:
        for at in range(0, len(rows), batch_size):
            numbers = range(at, min(at + batch_size, len(rows)))
            try:
                answers += _generate(way, rows, numbers, tokenizer, options)
            except Exception:
                # One row that cannot be answered must not take its neighbours with it.
                answers += [_try_one(way, rows, number, tokenizer, options) for number in numbers]
            bar.update(len(numbers))
    return answers


def _try_one(
    way: _Way, rows: Sequence[Sequence[int]], number: int, tokenizer: Any, options: Mapping[str, Any]
) -> _Answer:
    try:
        return _generate(way, rows, range(number, number + 1), tokenizer, options)[0]
    except Exception as error:
        return _Answer(error=f"{type(error).__name__}: {error}")


def _generate(
    way: _Way, rows: Sequence[Sequence[int]], numbers: range, tokenizer: Any, options: Mapping[str, Any]
) -> list[_Answer]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    chosen = [rows[number] for number in numbers]
    inputs = {name: tensor.to(device_of(way.model)) for name, tensor in pad_left(chosen, pad).items()}
    steering: dict[str, Any] = {}
    if way.steering is not None:
        per_prompt = isinstance(way.steering, list)
        steering["steering"] = [way.steering[number] for number in numbers] if per_prompt else way.steering
    output = way.model.generate(**inputs, **steering, **options).tolist()
    width = inputs["input_ids"].shape[1]
    ends = options.get("eos_token_id", way.model.generation_config.eos_token_id)
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    found = []
    for prompt, row in zip(chosen, output):
        new = row[width:]
        end = next((place for place, token in enumerate(new) if token in ends), None)
        if end is None:
            while new and new[-1] == pad:
                new.pop()
        else:
            new = new[: end + 1]
        # From the output, in which masks of a prompt are filled in.
        found.append(_Answer((*row[width - len(prompt) : width], *new), len(prompt)))
    return found


def _record(name: str, prompt: AttackPrompt, answer: _Answer, tokenizer: Any) -> AttackRecord:
    if answer.error is not None:
        return AttackRecord(name, prompt, None, None, error=answer.error)
    new = list(answer.ids[answer.given :])
    # Nothing may be tidied that could hide an error from a parser.
    exact = {"clean_up_tokenization_spaces": False}
    written = tokenizer.decode(new, skip_special_tokens=False, **exact)
    return AttackRecord(name, prompt, tokenizer.decode(new, skip_special_tokens=True, **exact).strip(), written)


# Broken text


def _parse_rate(broken: Broken, records: Sequence[AttackRecord]) -> TextQuality:
    counts = []
    for record in records:
        if record.written is None:
            continue
        counted = broken(record.prompt, record.written)
        try:
            valid, sentences = map(int, counted)
        except (TypeError, ValueError):
            valid, sentences = 1, 0
        if not 0 <= valid <= sentences:
            raise ValueError(
                f"`broken` gave {counted!r} for the answer to prompt {record.prompt.id!r}: give the number of valid sentences, "
                "and that of all sentences."
            )
        counts.append((record.prompt.harmful, valid, sentences))

    def share(chosen: Sequence[tuple[bool, int, int]]) -> tuple[float | None, int]:
        sentences = sum(count for _, _, count in chosen)
        return (sum(valid for _, valid, _ in chosen) / sentences if sentences else None), sentences

    benign, benign_count = share([count for count in counts if not count[0]])
    overall, overall_count = share(counts)
    return TextQuality("parse_rate", benign, overall, benign_count, overall_count)


def _pseudo_perplexity(
    model: Any, prompts: Sequence[AttackPrompt], answers: Sequence[_Answer], batch_size: int
) -> TextQuality:
    totals = {True: (0.0, 0), False: (0.0, 0)}
    for harmful in totals:
        group = [
            answer
            for prompt, answer in zip(prompts, answers)
            if prompt.harmful is harmful and len(answer.ids) > answer.given
        ]
        for at in range(0, len(group), batch_size):
            total, count = _log_probability(model, group[at : at + batch_size])
            totals[harmful] = totals[harmful][0] + total, totals[harmful][1] + count
    everything = tuple(map(sum, zip(*totals.values())))

    def perplexity(total: float, count: int) -> float | None:
        return math.exp(-total / count) if count else None

    return TextQuality(
        "pseudo-perplexity", perplexity(*totals[False]), perplexity(*everything), totals[False][1], int(everything[1])
    )


def _log_probability(model: Any, answers: Sequence[_Answer]) -> tuple[float, int]:
    """The summed log-probability of the answers' tokens, each predicted from prompt and answer, and their number."""
    ids = pad_left([answer.ids for answer in answers], model.config.pad_token_id or 0)["input_ids"]
    longest = ids.shape[1]
    written = torch.tensor(
        [
            [-1] * (longest - len(answer.ids)) + [0] * answer.given + [1] * (len(answer.ids) - answer.given)
            for answer in answers
        ],
        device="cpu",
    )
    count = int(written.eq(1).sum())
    device = device_of(model)
    return text_fluency(model, ids.to(device), written.to(device)) * count, count


# Settings


def _model_name(model: Any) -> str:
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return repr(value)


__all__ = ["evaluate_attacks"]
