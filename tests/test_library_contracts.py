"""What transformers gives to criteria and processors and takes from outputs, where rows grow at different steps."""

import math
import time

import pytest
import torch
from generation_model import BLOCK, EOS, MASK, PAD, VOCABULARY, make_model, make_prompt
from steerling_hf.modeling.unmasking_steerling import ThresholdRule
from transformers import (
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, SequenceBiasLogitsProcessor


@pytest.fixture
def model():
    return make_model()


def padded(lengths=(5, 9, 2)) -> dict[str, torch.Tensor]:
    """Prompts of several lengths, padded on the left."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :], mask[row, width - length :] = make_prompt(length)[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, **settings}
    return model.generate(**inputs, **settings)


def alone(inputs, row: int) -> dict[str, torch.Tensor]:
    kept = inputs["attention_mask"][row].bool()
    return {"input_ids": inputs["input_ids"][row][kept][None]}


def assert_rows_are_what_they_are_alone(model, inputs, make_criteria, **settings):
    """Text, steps and traces; gives the lengths of the new texts."""
    width, lengths = inputs["input_ids"].shape[1], []
    together = generate(model, inputs, stopping_criteria=make_criteria(len(inputs["input_ids"]), width), **settings)
    for row in range(len(inputs["input_ids"])):
        single = alone(inputs, row)
        length = single["input_ids"].shape[1]
        one = generate(model, single, stopping_criteria=make_criteria(1, length), **settings)
        new = one.sequences.shape[1] - length
        lengths.append(new)
        assert torch.equal(together.sequences[row, width : width + new], one.sequences[0, length:])
        assert (together.sequences[row, width + new :] == PAD).all()
        assert torch.equal(together.step_map[row, width : width + new], one.step_map[0, length:])
        assert together.tokens_per_forward[row] == one.tokens_per_forward[0]
        assert torch.equal(together.traces[row].tokens, one.traces[0].tokens)
        assert torch.equal(together.traces[row].step_map, one.traces[0].step_map)
    return lengths


# Criteria


class Watch(StoppingCriteria):
    """Keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "settings", [{}, {"unmasking": "threshold", "threshold": 0.3}, {"align_blocks": True}], ids=str
)
def test_criteria_see_all_rows_grow_token_by_token(model, settings):
    inputs, watch = padded(), Watch()
    sequences = generate(model, inputs, stopping_criteria=[watch], **settings).sequences
    assert len(watch.seen) == 20
    for seen, length in zip(watch.seen, range(10, 30)):
        assert torch.equal(seen, sequences[:, :length])


def test_criteria_see_padding_behind_the_end_of_a_row(model):
    inputs, watch = padded(), Watch()
    free = generate(model, inputs).sequences
    sequences = generate(model, inputs, eos_token_id=int(free[0, 12]), stopping_criteria=[watch]).sequences
    assert (sequences == PAD).sum() > (inputs["input_ids"] == PAD).sum()
    assert len(watch.seen) == sequences.shape[1] - 9
    assert torch.equal(watch.seen[-1], sequences)


class LooksBack(StoppingCriteria):
    """As evaluation harnesses have it: one state for each row, one answer for all, and the prompt's width given."""

    def __init__(self, tokens, width: int, rows: int):
        self.tokens, self.width, self.done = tokens, width, [False] * rows

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        for row, ids in enumerate(input_ids[:, self.width :][:, -2:].tolist()):
            self.done[row] |= any(token in self.tokens for token in ids)
        return all(self.done)


def test_a_criterion_with_a_state_for_each_row_and_one_answer(model):
    inputs = padded()
    free = generate(model, inputs).sequences[:, 9:]
    tokens = {int(free[row, place]) for row, place in ((0, 4), (1, 11), (2, 7))}
    first = [min(row.tolist().index(token) for token in tokens if token in row) for row in free]
    criterion = LooksBack(tokens, 9, 3)
    sequences = generate(model, inputs, stopping_criteria=StoppingCriteriaList([criterion])).sequences[:, 9:]
    assert criterion.done == [True] * 3
    assert len(set(first)) > 1
    assert torch.equal(sequences, free[:, : max(first) + 1])


class EndsAt(StoppingCriteria):
    """Ends each row at tokens, and not before it has been asked for that row so many times."""

    def __init__(self, tokens, rows: int, least: int = 3):
        self.tokens, self.asked, self.least = torch.tensor(tokens), torch.zeros(rows, dtype=torch.long), least

    def __call__(self, input_ids, scores, **kwargs):
        self.asked += 1
        return torch.isin(input_ids[:, -1], self.tokens) & (self.asked >= self.least)


@pytest.mark.parametrize(
    "settings", [{}, {"steps": 6}, {"unmasking": ThresholdRule(0.25)}, {"repetition_penalty": 1.2}], ids=str
)
def test_rows_ended_by_criteria_equal_their_single_runs(model, settings):
    inputs = padded()
    free = generate(model, inputs, **settings).sequences[:, 9:]
    tokens = [int(free[0, 5]), int(free[1, 13]), int(free[2, 9])]
    lengths = assert_rows_are_what_they_are_alone(model, inputs, lambda rows, _: [EndsAt(tokens, rows)], **settings)
    assert min(lengths) < 20


def test_criteria_of_the_library(model):
    inputs = padded()
    free = generate(model, inputs).sequences
    end = int(free[1, 15])
    by_criterion = generate(model, inputs, stopping_criteria=[EosTokenCriteria(eos_token_id=[end])]).sequences
    expected = [row.tolist().index(end) + 1 if end in row else 20 for row in free[:, 9:]]
    for row, length in enumerate(expected):
        assert torch.equal(by_criterion[row, 9 : 9 + length], free[row, 9 : 9 + length])
        assert (by_criterion[row, 9 + length :] == PAD).all()
    assert generate(model, inputs, stopping_criteria=[MaxLengthCriteria(14)]).sequences.shape == (3, 14)
    assert torch.equal(generate(model, inputs, stopping_criteria=[MaxTimeCriteria(1e6)]).sequences, free)
    late = MaxTimeCriteria(1.0, initial_timestamp=time.time() - 2)
    ended = generate(model, inputs, stopping_criteria=[late])
    assert (
        max(int(trace.step_map.max()) for trace in ended.traces) == 0
    )  # as by `max_time`, at once and not at the next column


@pytest.mark.parametrize("answer", [None, [True], torch.zeros(3, 2), "yes"], ids=str)
def test_criteria_that_answer_nothing_sensible(model, answer):
    with pytest.raises(ValueError, match="`stopping_criteria`: function returned"):
        generate(model, padded(), stopping_criteria=[lambda ids, scores: answer])


# Processors


class PerRow(LogitsProcessor):
    """Forbids other tokens in each row of the batch, and keeps what it is shown."""

    def __init__(self, forbidden):
        self.forbidden, self.seen = forbidden, []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == len(self.forbidden)
        self.seen.append(input_ids.clone())
        for row, tokens in enumerate(self.forbidden):
            scores[row, tokens] = -math.inf
        return scores


@pytest.mark.parametrize("settings", [{}, {"align_blocks": True}, {"eos_token_id": 3}], ids=str)
def test_a_processor_with_something_for_each_row(model, settings):
    inputs = padded()
    forbidden = [row.unique().tolist()[:4] for row in generate(model, inputs).sequences[:, 9:]]
    processor = PerRow(forbidden)
    together = generate(model, inputs, logits_processor=[processor], **settings).sequences[:, 9:]
    for row, tokens in enumerate(forbidden):
        one = generate(model, alone(inputs, row), logits_processor=[PerRow([tokens])], **settings).sequences[0]
        one = one[alone(inputs, row)["input_ids"].shape[1] :]
        assert torch.equal(together[row, : len(one)], one)
        assert not set(tokens) & set(one.tolist())
    # Prompts with their padding, and what stands left of a column.
    assert all(torch.equal(ids[:, :9], inputs["input_ids"]) for ids in processor.seen)
    assert {ids.shape[1] for ids in processor.seen} == set(range(9, 29))


def test_processors_of_the_library_count_from_the_left(model):
    free = generate(model, padded()).sequences[:, 9:]
    end = int(free[0, 2])
    processor = MinLengthLogitsProcessor(9 + 6, [end], device="cpu")
    by_user = generate(model, padded(), eos_token_id=end, logits_processor=[processor]).sequences
    by_config = generate(model, padded(), eos_token_id=end, min_new_tokens=6).sequences
    assert torch.equal(by_user, by_config)


@pytest.mark.parametrize(
    "answer", [None, torch.zeros(3), torch.zeros(3, VOCABULARY, dtype=torch.long)], ids=["none", "shape", "ints"]
)
def test_a_processor_that_returns_nothing_sensible(model, answer):
    with pytest.raises(ValueError, match="`logits_processor`: function returned"):
        generate(model, padded(), logits_processor=[lambda ids, scores: answer])


@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_no_end_before_so_many_tokens(model, name):
    inputs = padded()
    free = generate(model, inputs).sequences[:, 9:]
    ends = free[:, :12].unique().tolist()
    amount = 7 if name == "min_new_tokens" else 9 + 7
    for way in ({}, {"cache_implementation": "static"}):
        text = generate(model, inputs, eos_token_id=ends, **{name: amount}, **way).sequences[:, 9:]
        assert not torch.isin(text[:, :7], torch.tensor(ends)).any()
    assert generate(model, inputs, eos_token_id=ends).sequences.shape[1] < 9 + 7


def test_no_token_ends_a_row(model, library_warnings):
    model.generation_config.eos_token_id = int(generate(model, padded()).sequences[0, 12])
    assert generate(model, padded((9,))).sequences.shape[1] <= 29
    free = generate(model, padded(), eos_token_id=-1).sequences
    assert free.shape == (3, 29)
    assert not (free[:, 9:] == PAD).any()
    gap = torch.tensor([[5, MASK, 7]])
    last = {(VOCABULARY - 1,): 1000.0}
    for ends in (-1, [-1, 5]):
        assert model.generate(gap, max_new_tokens=0, eos_token_id=ends, sequence_bias=last)[0, 1] == VOCABULARY - 1
    library_warnings.clear()  # of the library, that this never stops before `max_new_tokens`


def test_biases_of_single_tokens_are_those_of_the_library(model):
    biases = {(3,): 9.5, (40,): -3.0, (7,): -math.inf}
    found = generate(model, padded(), sequence_bias=biases)
    expected = generate(model, padded(), logits_processor=[SequenceBiasLogitsProcessor(biases)])
    assert torch.equal(found.sequences, expected.sequences)
    assert not torch.equal(found.sequences, generate(model, padded()).sequences)
    as_list = [[list(sequence), bias] for sequence, bias in biases.items()]
    assert torch.equal(generate(model, padded(), sequence_bias=as_list).sequences, found.sequences)


def test_a_bias_completes_a_sequence_from_any_side(model):
    prompt = torch.tensor([[5, MASK, 7, 11, MASK, MASK, 8, 9]])
    for sequence, place, token in (((5, 33), 1, 33), ((34, 7, 11), 1, 34), ((5, 35, 7), 1, 35), ((36, 8), 5, 36)):
        filled = model.generate(prompt, max_new_tokens=0, sequence_bias={sequence: 1000.0})
        assert filled[0, place] == token
    absent = model.generate(prompt, max_new_tokens=0, sequence_bias={(6, 33): 1000.0})
    assert torch.equal(absent, model.generate(prompt, max_new_tokens=0))


# Scores


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 6},
        {"repetition_penalty": 1.3, "suppress_tokens": [3]},
        {"do_sample": True, "seed": 2, "top_k": 4},
    ],
    ids=str,
)
def test_transition_scores(model, settings):
    inputs = padded()
    end = int(generate(model, inputs, **settings).sequences[0, 15])
    output = generate(model, inputs, eos_token_id=end, output_scores=True, output_logits=True, **settings)
    new = output.sequences.shape[1] - 9
    assert [tuple(scores.shape) for scores in output.scores] == [(3, VOCABULARY)] * new
    found = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    torch.testing.assert_close(found, output.log_probabilities[:, 9:])
    assert (output.log_probabilities[0, 9 + 7 :] == 0).all()
    for scores, logits in zip(output.scores, output.logits):
        assert logits.isfinite().all(dim=-1).tolist() == [bool(row[EOS].isfinite()) for row in logits]
        assert (scores[:, MASK] == -math.inf).all()


def test_logits_are_unprocessed(model):
    """The first that is decided is that of the forward pass."""
    prompt = make_prompt(9)
    output = generate(model, {"input_ids": prompt}, max_new_tokens=BLOCK, output_logits=True, repetition_penalty=1.3)
    first = int((output.step_map[0] == 0).nonzero()[0])
    expected = model(torch.cat([prompt, torch.full((1, BLOCK), MASK)], 1)).logits[0, first]
    torch.testing.assert_close(output.logits[first - 9][0], expected, rtol=1e-4, atol=1e-4)
    assert output.scores is None


def test_scores_are_kept_only_when_asked_for(model):
    output = generate(model, padded())
    assert output.scores is output.logits is None
