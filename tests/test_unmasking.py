"""Infilling, rules of commitment, phrases, ends and streams of generate()."""

import threading

import pytest
import torch
from generation_model import BLOCK, MASK, PAD, VOCABULARY, make_model, make_prompt
from steerling_hf.modeling.generation_config_steerling import SteerlingGenerationConfig
from steerling_hf.modeling.unmasking_steerling import (
    EntropyBoundRule,
    EntropyRule,
    FactorRule,
    ForbiddenPhrases,
    MarginRule,
    ThresholdRule,
    confidence,
    entropy,
)
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


@pytest.fixture
def model():
    return make_model()


def generate(model, prompt, **settings):
    return model.generate(prompt, return_dict_in_generate=True, **settings)


# Infilling


def with_masks(length: int, places) -> torch.LongTensor:
    prompt = make_prompt(length)
    prompt[:, list(places)] = MASK
    return prompt


def infill_oracle(model, prompt, new_tokens=0):
    """Fill masks block by block, one position at a time, by logits of the whole canvas; then continue."""
    canvas = torch.cat([prompt, torch.full((1, new_tokens), MASK)], 1)
    blocks = [(start, min(start + BLOCK, prompt.shape[1])) for start in range(0, prompt.shape[1], BLOCK)]
    blocks += [
        (start, min(start + BLOCK, canvas.shape[1])) for start in range(prompt.shape[1], canvas.shape[1], BLOCK)
    ]
    for start, stop in blocks:
        while (places := (canvas[0, start:stop] == MASK).nonzero()[:, 0] + start).numel():
            logits = model(canvas).logits[0, places]
            logits[:, [PAD, 92, MASK]] = -torch.inf
            best, tokens = logits.softmax(-1).max(-1)
            canvas[0, places[best.argmax()]] = tokens[best.argmax()]
    return canvas


@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize(
    ("length", "places", "new_tokens"),
    [(20, [3, 4, 17], 0), (20, range(1, 20), 0), (21, [0, 9, 10, 20], 11), (8, [7], 9), (30, [1], 5)],
)
def test_masks_in_a_prompt_are_filled_in(model, length, places, new_tokens, way):
    prompt = with_masks(length, places)
    tokens = model.generate(prompt, max_new_tokens=new_tokens, **way)
    assert torch.equal(tokens, infill_oracle(model, prompt, new_tokens))
    given = prompt != MASK
    assert torch.equal(tokens[:, :length][given], prompt[given])


def test_infilling_alone_reports_what_it_decided(model):
    output = generate(model, with_masks(20, [3, 4, 17]), max_new_tokens=0)
    assert output.sequences.shape == (1, 20)
    decided = output.step_map[0] >= 0
    assert decided.nonzero()[:, 0].tolist() == [3, 4, 17]
    assert output.tokens_per_forward.tolist() == [1.0]
    assert generate(model, with_masks(20, [3, 4, 17]), max_new_tokens=0, steps=2).step_map.max() == 1


@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_rows_with_and_without_masks_share_a_batch(model, way):
    prompts = torch.cat([with_masks(20, [3, 17]), make_prompt(20)])
    together = model.generate(prompts, max_new_tokens=9, **way)
    for row in range(2):
        assert torch.equal(together[row : row + 1], model.generate(prompts[row : row + 1], max_new_tokens=9))
    filled = generate(model, prompts, max_new_tokens=0, **way)
    assert torch.equal(filled.sequences[:1], model.generate(prompts[:1], max_new_tokens=0))
    assert torch.equal(filled.sequences[1:], prompts[1:])
    assert filled.tokens_per_forward.tolist() == [1.0, 0.0]


def test_an_end_token_never_stands_in_a_gap(model):
    prompt = with_masks(20, [3, 4, 17])
    ends = model.generate(prompt, max_new_tokens=0)[0, [3, 4, 17]].tolist()
    tokens = model.generate(prompt, max_new_tokens=9, eos_token_id=ends)[0]
    assert not set(tokens[[3, 4, 17]].tolist()) & set(ends)


def test_a_later_block_is_invisible_to_a_mask(model):
    """What block-causal attention cannot see: text behind the mask's own block."""
    prompt = with_masks(20, [3])
    other = prompt.clone()
    other[:, BLOCK:] = make_prompt(12)
    assert model.generate(prompt, max_new_tokens=0)[0, 3] == model.generate(other, max_new_tokens=0)[0, 3]
    other[:, 5] = (other[:, 5] + 1) % PAD
    assert not torch.allclose(model(prompt).logits[0, 3], model(other).logits[0, 3])


def test_guidance_hides_the_prompt_but_not_what_was_filled_in(model):
    prompt = with_masks(20, [3, 17])
    guided = model.generate(prompt, max_new_tokens=9, guidance_scale=2.0)
    assert torch.equal(guided, model.generate(prompt, max_new_tokens=9, guidance_scale=2.0, use_cache=False))


# Rules


def probabilities(*rows) -> torch.Tensor:
    """Logits of distributions whose first probabilities are given."""
    table = torch.full((len(rows), VOCABULARY), 1e-9)
    for row, values in zip(table, rows):
        row[: len(values)] = torch.tensor(values)
        row[len(values) :] = (1 - sum(values)) / (VOCABULARY - len(values))
    return table.log()


SURE = probabilities([0.5, 0.4], [0.95, 0.01], [0.7, 0.05], [0.99, 0.001])


@pytest.mark.parametrize(
    ("rule", "count", "expected"),
    [
        (MarginRule(), 2, [3, 1]),
        (MarginRule(), 4, [3, 1, 2, 0]),
        (ThresholdRule(0.9), 1, [3, 1]),
        (ThresholdRule(0.999), 1, [3]),
        (ThresholdRule(0.999), 2, [3, 1]),
        (ThresholdRule(0.1), 1, [3, 1, 2, 0]),
        # (k + 1) * (1 - c_k): 0.02, 0.15, 1.2, 2.5
        (FactorRule(0.01), 1, [3]),
        (FactorRule(0.1), 1, [3]),
        (FactorRule(0.2), 1, [3, 1]),
        (FactorRule(1.3), 1, [3, 1, 2]),
        (FactorRule(3.0), 1, [3, 1, 2, 0]),
        (FactorRule(0.01), 3, [3, 1, 2]),
    ],
)
def test_rules(rule, count, expected):
    assert rule(SURE, count).tolist() == expected


def test_a_threshold_is_reached_at_its_very_value():
    assert ThresholdRule(float(confidence(SURE)[1]))(SURE, 1).tolist() == [3, 1]


def test_margin_is_not_confidence():
    logits = probabilities([0.5, 0.45], [0.4, 0.05])
    assert MarginRule()(logits, 1).tolist() == [1]


def test_entropy_under_autocast():
    """Of tokens, some of which are ruled out: in half precision their distance would be infinite."""
    logits = SURE.clone()
    logits[:, -1] = -torch.inf
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(entropy(logits), torch.special.entr(logits.softmax(-1)).sum(-1))


def test_entropy_bound():
    entropies = torch.special.entr(SURE.softmax(-1)).sum(-1)
    order = entropies.argsort().tolist()
    running = entropies[order].cumsum(0) - entropies[order]
    for taken in range(1, 5):
        bound = float(running[taken - 1]) + 1e-4
        assert EntropyBoundRule(bound)(SURE, 1).tolist() == order[:taken]
    assert EntropyBoundRule(0.0)(SURE, 3).tolist() == EntropyRule()(SURE, 3).tolist() == order[:3]


@pytest.mark.parametrize(
    ("rule", "key", "slow", "fast"),
    [
        ("threshold", "threshold", 1.0, 1e-6),
        ("factor", "factor", 1e-6, 1e6),
        ("entropy_bound", "entropy_bound", 0.0, 1e6),
    ],
)
def test_adaptive_rules_between_their_extremes(model, rule, key, slow, fast):
    settings = {"max_new_tokens": 16, "unmasking": rule}
    one_by_one = generate(model, make_prompt(9), **settings, **{key: slow})
    assert one_by_one.tokens_per_forward.item() == 1.0
    assert generate(model, make_prompt(9), **settings, **{key: fast}).tokens_per_forward.item() == BLOCK
    if rule != "entropy_bound":
        assert torch.equal(one_by_one.sequences, model.generate(make_prompt(9), max_new_tokens=16))
    scheduled = generate(model, make_prompt(9), **settings, **{key: slow}, steps=4)
    assert scheduled.tokens_per_forward.item() == 4.0


def test_adaptive_rows_equal_their_single_runs(model):
    prompts = make_prompt(9, rows=3)
    settings = {"max_new_tokens": 20, "unmasking": "threshold", "threshold": 0.3}
    together = generate(model, prompts, **settings)
    assert len(set(together.tokens_per_forward.tolist())) > 1
    for row in range(3):
        alone = generate(model, prompts[row : row + 1], **settings)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert together.tokens_per_forward[row] == alone.tokens_per_forward[0]


def leftmost(logits, count):
    assert logits.shape[1] == VOCABULARY
    return torch.arange(count)


def test_a_rule_of_the_users_own(model):
    for rule in (leftmost, lambda logits, count: list(range(count))):
        output = generate(model, make_prompt(9), max_new_tokens=12, unmasking=rule)
        assert output.step_map[0, 9:].tolist() == list(range(12))


@pytest.mark.parametrize(
    "chosen",
    [
        torch.empty(0, dtype=torch.long),
        [],
        torch.tensor([0, 0]),
        torch.tensor([True] * 8),
        torch.tensor([[0]]),
        torch.tensor([9]),
        torch.tensor([-1]),
        None,
        "first",
        0.5,
    ],
)
def test_a_rule_that_chooses_nothing_sensible(model, chosen):
    with pytest.raises(ValueError, match="`unmasking` chose"):
        model.generate(make_prompt(9), max_new_tokens=8, unmasking=lambda logits, count: chosen)


def test_a_rule_of_the_users_own_has_a_name_but_no_file(tmp_path):
    config = SteerlingGenerationConfig(unmasking=ThresholdRule(0.5))
    assert "ThresholdRule" in repr(config)
    with pytest.raises(ValueError, match="unmasking"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# Phrases


def contains(tokens, phrase) -> bool:
    tokens, phrase = list(tokens), list(phrase)
    return any(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens)))


@pytest.mark.parametrize("steps", [None, 4, 1])
def test_bad_words(model, steps):
    plain = model.generate(make_prompt(9), max_new_tokens=24, steps=steps)[0].tolist()
    phrases = [plain[i : i + 2] for i in range(9, 31, 3)] + [plain[8:10], plain[20:23], [plain[15]]]
    text = model.generate(make_prompt(9), max_new_tokens=24, steps=steps, bad_words_ids=phrases)[0].tolist()
    assert MASK not in text
    assert not any(contains(text[8:], phrase) for phrase in phrases)
    assert plain[15] not in text[9:]


def test_a_phrase_is_completed_from_any_side():
    phrases = ForbiddenPhrases([[1, 2, 3]])
    for place, canvas in enumerate(([0, MASK, 2, 3], [0, 1, MASK, 3], [0, 1, 2, MASK])):
        logits = torch.zeros(1, 5)
        phrases.forbid(torch.tensor(canvas), torch.tensor([place + 1]), logits)
        assert logits.isinf().nonzero().tolist() == [[0, place + 1]]
    short = ForbiddenPhrases([[1, 2], [5, 6, 7, 8, 9]])
    assert short.compatible(torch.tensor([1, 2, MASK, MASK]), torch.tensor([2, 3]), torch.tensor([4, 4])) == 2
    canvas = torch.tensor([MASK, MASK, 3, MASK])
    assert phrases.compatible(canvas, torch.tensor([0, 1, 3]), torch.tensor([1, 2, 4])) == 1
    assert phrases.compatible(canvas, torch.tensor([0, 1, 3]), torch.tensor([1, 4, 4])) == 3


@pytest.mark.parametrize(("phrase", "canvas", "place"), [((5, 5, 7), [5, MASK, 0], 1), ((7, 5, 5), [0, MASK, 5], 1)])
def test_a_phrase_does_not_reach_beyond_the_text(phrase, canvas, place):
    logits = torch.zeros(1, 9)
    ForbiddenPhrases([phrase]).forbid(torch.tensor(canvas), torch.tensor([place]), logits)
    assert logits.isfinite().all()


# Ends


class EndsWith(StoppingCriteria):
    def __init__(self, token: int):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return input_ids[:, -1] == self.token


def test_a_criterion_ends_a_row_at_the_first_text_it_accepts(model):
    prompt = make_prompt(9)
    plain = model.generate(prompt, max_new_tokens=24)[0].tolist()
    token = plain[20]
    criterion = EndsWith(token)
    tokens = model.generate(prompt, max_new_tokens=24, stopping_criteria=StoppingCriteriaList([criterion]))[0].tolist()
    first = 9 + plain[9:].index(token)
    assert tokens == plain[: first + 1]
    assert criterion.seen == [plain[:length] for length in range(10, first + 2)]


def test_criteria_see_nothing_behind_an_end(model):
    prompt, criterion = make_prompt(9), EndsWith(-1)
    settings = {"max_new_tokens": 24, "unmasking": leftmost}
    first = int(model.generate(prompt, **settings)[0, 9])
    criteria = StoppingCriteriaList([criterion])
    tokens = model.generate(prompt, eos_token_id=first, stopping_criteria=criteria, **settings)
    assert criterion.seen == [tokens[0].tolist()]


def test_criteria_are_for_each_row(model):
    prompts = make_prompt(9, rows=3)
    plain = model.generate(prompts, max_new_tokens=24)
    criteria = StoppingCriteriaList([EndsWith(int(plain[0, 14]))])
    together = model.generate(prompts, max_new_tokens=24, stopping_criteria=criteria)
    for row in range(3):
        alone = model.generate(prompts[row : row + 1], max_new_tokens=24, stopping_criteria=criteria)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == PAD).all()


def test_max_time(model):
    output = generate(model, make_prompt(9), max_new_tokens=24, max_time=1e-9)
    assert output.sequences.shape[1] < 33
    assert MASK not in output.sequences
    assert torch.equal(
        model.generate(make_prompt(9), max_new_tokens=24, max_time=1e9),
        model.generate(make_prompt(9), max_new_tokens=24),
    )


def test_a_row_that_has_ended_when_time_is_over_stays_as_it_is(model):
    prompt = make_prompt(9)
    settings = {"max_new_tokens": 24, "unmasking": leftmost}
    first = int(model.generate(prompt, **settings)[0, 9])
    tokens = model.generate(prompt, eos_token_id=first, max_time=1e-9, **settings)
    assert tokens[0].tolist() == [*prompt[0].tolist(), first]


def test_when_time_is_over_a_prompt_keeps_its_gaps(model):
    prompt = with_masks(20, [3, 17])
    tokens = model.generate(prompt, max_new_tokens=9, max_time=1e-9)
    assert tokens.shape == (1, 20)
    given = prompt != MASK
    assert torch.equal(tokens[given], prompt[given])
    assert int((tokens == MASK).sum()) == 1


# What comes out


@pytest.mark.parametrize("steps", [None, 5])
def test_log_probabilities_are_those_of_the_deciding_step(model, steps):
    prompt = make_prompt(9)
    output = generate(model, prompt, max_new_tokens=16, steps=steps, output_scores=True)
    canvas = torch.cat([prompt, torch.full((1, 16), MASK)], 1)
    for step in range(int(output.step_map.max()) + 1):
        logits = model(canvas).logits[0]
        logits[:, [PAD, 92, MASK]] = -torch.inf
        places = (output.step_map[0] == step).nonzero()[:, 0]
        tokens = output.sequences[0, places]
        expected = logits.log_softmax(-1)[places, tokens]
        torch.testing.assert_close(output.log_probabilities[0, places], expected, rtol=1e-4, atol=1e-4)
        canvas[0, places] = tokens
    assert (output.log_probabilities[0, :9] == 0).all()
    assert generate(model, prompt, max_new_tokens=16).log_probabilities is None


class Drafts(BaseStreamer):
    def __init__(self):
        self.pieces, self.drafts = [], []

    def put(self, value):
        self.pieces.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        self.pieces.append(None)


def test_drafts_show_the_undecided_block(model):
    stream = Drafts()
    tokens = model.generate(make_prompt(9), max_new_tokens=16, streamer=stream)
    assert stream.pieces.pop() is None
    assert torch.equal(torch.cat(stream.pieces, 1), tokens)
    assert [(draft == MASK).sum().item() for draft in stream.drafts] == [*range(8, 0, -1), *range(8, 0, -1)]


def test_a_filled_in_prompt_is_streamed_once_it_is_complete(model):
    stream = Drafts()
    tokens = model.generate(with_masks(20, [3, 17]), max_new_tokens=9, streamer=stream)
    assert stream.pieces.pop() is None
    assert [piece.shape[1] for piece in stream.pieces] == [20, 8, 1]
    assert torch.equal(torch.cat(stream.pieces, 1), tokens)


def test_generation_in_threads_at_once(model):
    """No state is kept in the model."""
    prompts = [make_prompt(length) for length in (5, 9, 13)]
    results = {}

    def work(number):
        results[number] = model.generate(prompts[number], max_new_tokens=16)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(prompts):
        assert torch.equal(results[number], model.generate(prompt, max_new_tokens=16))
