"""
Judge the attributions of steerling-nano by the grammar, which knows why a text says what it says.

    python examples/nano/evaluate_attribution.py --json

prints one JSON object on stdout (progress goes to stderr):

top1_concept
    Share of generated chunks whose known concept with the largest contribution is among the chunk's grammar labels, over
    chunks that parse, in greedy answers to held-out openings and chats of all kinds.
cause_found
    Share of greedy answers to contact questions in held-out paraphrases that recite the right number, in which the first
    or last name of the person is among the three words of the question with the highest scores for the number's digits.
comprehensiveness_over_random
    How much more masking the tokens with the highest scores lowers a token's probability than masking as many at random,
    as a ratio of means, over all tokens of some answers of all kinds; comprehensiveness and random_comprehensiveness are
    its parts, and sufficiency is what is lost when only those tokens stay.
completeness_error
    Median, over tokens of answers of all kinds, of |sum of scores - change of the logit|, in logits, by the default method;
    completeness_error_gauss8 and completeness_error_riemann32 are those of 8 Gauss-Legendre points and of 32 right Riemann
    points on the same tokens.
score_error
    Only with --exact N: median, over N of these tokens, of the sum of |score - exact score| over that of |exact score|, where
    scores of 256 points in the middle of even segments count as exact; score_error_mean is the mean, and again _gauss8 and
    _riemann32 are other methods. That is what matters: scores can be made complete by scaling, and be as wrong as before.
neighbours_share_topic
    As in evaluate_embeddings.py.
"""

import argparse
import json
import random
import statistics
import sys
from dataclasses import asdict

import torch
from evaluate import ROOT_CHECKPOINT, contact_prompts, load
from evaluate_embeddings import neighbours_share_topic
from grammar import KINDS, document
from parser import parse_chunk
from tqdm import tqdm

from steerling_hf.belief import Belief, measure_belief
from steerling_hf.chunks import aggregate, split
from steerling_hf.explaining import first_column, token_texts
from steerling_hf.input_attribution import attribute_inputs

SEED = 70_000
CHUNKS, CONTACTS, TRACES, TARGETS_OF_TRACE = 240, 100, 16, 8
NEW_TOKENS = 72
BATCH = 24
TOP_WORDS = 3
METHODS = {
    "": {},
    "_gauss8": {"method": "gausslegendre", "n_steps": 8},
    "_riemann32": {"method": "riemann_right", "n_steps": 32},
}
EXACT = {"method": "riemann_middle", "n_steps": 256}


def answer(model, tokenizer, prompts: list[str]):
    """Yield, for each prompt, the output and row of its greedy answer, with attributions."""
    for at in range(0, len(prompts), BATCH):
        inputs = tokenizer(prompts[at : at + BATCH], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_attributions=True,
        )
        yield from ((output, row) for row in range(len(inputs.input_ids)))


def top_concepts(model, tokenizer, count: int) -> list[bool]:
    """Whether the known concept with the largest contribution is one of the chunk's own, for `count` chunks that parse."""
    rng = random.Random(SEED)
    hits: list[bool] = []
    with tqdm(total=count, desc="chunks", file=sys.stderr) as progress:
        while len(hits) < count:
            prompts = [document(rng, KINDS[i % len(KINDS)], held_out=True).prompt for i in range(BATCH)]
            for output, row in answer(model, tokenizer, prompts):
                trace = output.traces[row]
                tokens = trace.tokens[: trace.length].tolist()
                texts = token_texts(tokenizer, tokens)
                offset = first_column(output, row)
                for start, stop in split(tokens, texts, model.config, "chunk", trace.prompt_length):
                    parsed = parse_chunk("".join(texts[start:stop]))
                    if not parsed.valid:
                        continue
                    parts = aggregate(output.attributions, row, start + offset, stop + offset, model.config.n_concepts)
                    top = next(i for i in parts.ids.tolist() if i < model.config.n_concepts)
                    hits.append(top in parsed.concepts)
                    progress.update()
    return hits[:count]


def causes(model, tokenizer, count: int) -> list[bool]:
    """Whether the digits of a recited number are attributed to the person's name, for `count` answers that recite one."""
    prompts, numbers = contact_prompts()
    order = random.Random(SEED).sample(range(len(prompts)), len(prompts))
    prompts, numbers = [prompts[i] for i in order], [numbers[i] for i in order]
    hits: list[bool] = []
    with tqdm(total=count, desc="contacts", file=sys.stderr) as progress:
        for number, (output, row) in zip(numbers, answer(model, tokenizer, prompts)):
            trace = output.traces[row]
            texts = token_texts(tokenizer, trace.tokens[: trace.length].tolist())
            digits = _places_of(number, texts, trace.prompt_length)
            if not digits:
                continue
            found = attribute_inputs(model, trace, digits)
            hits.append(_names_the_person(found.aggregate(scope="prompt").tolist(), texts[: trace.prompt_length]))
            progress.update()
            if len(hits) == count:
                break
    return hits


def _places_of(number: str, texts: list[str], start: int) -> list[int]:
    """Positions of the tokens that write the last two digits of a number, which are the person's own."""
    answer = "".join(texts[start:])
    begin = answer.find(number)
    if begin < 0:
        return []
    places, at = [], 0
    for place in range(start, len(texts)):
        if at < begin + len(number) and at + len(texts[place]) > begin + len(number) - 2:
            places.append(place)
        at += len(texts[place])
    return places


def _names_the_person(scores: list[float], texts: list[str]) -> bool:
    """Whether a capitalised pair of words, a name, has one of the highest scores among the question's words."""
    from lexicon import PEOPLE_NAMES

    question = "".join(texts)
    begin = question.rfind("user<|end_header_id|>") + len("user<|end_header_id|>")
    end = question.rfind("<|endofchunk|>", 0, question.rfind("<|eot_id|>"))
    totals: dict[int, float] = {}
    starts = {}
    at, word = 0, -1
    for score, text in zip(scores, texts):
        if begin <= at < end and text.strip():
            if text[0].isspace() or word < 0 or question[at - 1].isspace():
                word = at + len(text) - len(text.lstrip())
            totals[word] = totals.get(word, 0.0) + score
            starts[word] = at
        at += len(text)
    [person] = [name for name in PEOPLE_NAMES if name in question]
    first = question.index(person)
    names = {first, first + person.index(" ") + 1}
    return bool(names & set(sorted(totals, key=totals.__getitem__, reverse=True)[:TOP_WORDS]))


def answers_of_all_kinds(model, tokenizer, count: int, desc: str):
    """Yield the trace of each of `count` greedy answers, with evenly spread positions of it."""
    rng = random.Random(SEED + 1)
    prompts = [document(rng, KINDS[i % len(KINDS)], held_out=True).prompt for i in range(count)]
    for output, row in tqdm(answer(model, tokenizer, prompts), total=count, desc=desc, file=sys.stderr):
        trace = output.traces[row]
        decided = trace.decided.tolist()
        yield trace, decided[:: max(1, len(decided) // TARGETS_OF_TRACE)][:TARGETS_OF_TRACE]


def score_errors(model, tokenizer, count: int) -> dict[str, float]:
    """How far the scores of each method are from exact ones, for one token of each of `count` answers."""
    errors: dict[str, list[float]] = {name: [] for name in METHODS}
    for number, (trace, positions) in enumerate(answers_of_all_kinds(model, tokenizer, count, "exact scores")):
        target = [positions[number % len(positions)]]
        exact = attribute_inputs(model, trace, target, **EXACT).scores
        for name, settings in METHODS.items():
            error = attribute_inputs(model, trace, target, **settings).scores - exact
            errors[name].append(float(error.abs().sum() / exact.abs().sum()))
    means = {f"score_error_mean{name}": statistics.mean(values) for name, values in errors.items()}
    return {f"score_error{name}": statistics.median(values) for name, values in errors.items()} | means


def beliefs(model, tokenizer, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Means of all measures of belief over the tokens of `count` answers, and median completeness errors by method."""
    measured: list[Belief] = []
    errors: dict[str, list[float]] = {name: [] for name in METHODS}
    for trace, positions in answers_of_all_kinds(model, tokenizer, count, "belief"):
        for name, settings in METHODS.items():
            found = attribute_inputs(model, trace, positions, **settings)
            errors[name] += found.errors.abs().tolist()
            if not name:
                measured.append(measure_belief(model, trace, found))
    means = {name: statistics.mean(asdict(belief)[name] for belief in measured) for name in asdict(measured[0])}
    return means, {name: statistics.median(values) for name, values in errors.items()}


def evaluate(model, tokenizer, chunks: int, contacts: int, traces: int, exact: int) -> dict[str, float]:
    """Return the measures (see the top of this file)."""
    found = top_concepts(model, tokenizer, chunks)
    result = {"top1_concept": sum(found) / len(found), "chunks": len(found)}
    found = causes(model, tokenizer, contacts)
    result |= {"cause_found": sum(found) / len(found), "contacts": len(found)}
    means, errors = beliefs(model, tokenizer, traces)
    result["comprehensiveness_over_random"] = means["comprehensiveness"] / means["random_comprehensiveness"]
    result |= {name: means[name] for name in ("comprehensiveness", "random_comprehensiveness", "sufficiency")}
    result |= {f"completeness_error{name}": value for name, value in errors.items()}
    if exact:
        result |= score_errors(model, tokenizer, exact)
    result["neighbours_share_topic"] = neighbours_share_topic(model, tokenizer)["neighbours_share_topic"]
    return result


def main() -> None:
    """Run the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments.add_argument("--model", default=str(ROOT_CHECKPOINT), metavar="FOLDER", help="checkpoint folder")
    for name, default in (("chunks", CHUNKS), ("contacts", CONTACTS), ("traces", TRACES)):
        arguments.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    arguments.add_argument("--exact", type=int, default=0, metavar="N", help="tokens whose exact scores are computed")
    given = arguments.parse_args()
    if min(given.chunks, given.contacts, given.traces) < 1:
        arguments.error("--chunks, --contacts and --traces take numbers of 1 or more")
    if given.exact < 0:
        arguments.error("--exact takes a number of 0 or more")
    with torch.no_grad():
        result = evaluate(*load(given.model), given.chunks, given.contacts, given.traces, given.exact)
    rounded = {name: round(value, 4) for name, value in result.items()}
    print(json.dumps(rounded) if given.json else "\n".join(f"{name:32} {value}" for name, value in rounded.items()))


if __name__ == "__main__":
    main()
