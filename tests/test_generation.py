"""generate(): the schedule, the tokens, sampling, rows, ends, streams and what it returns."""

import itertools
import math

import numpy as np
import pytest
import torch
from generation_model import BLOCK, BOS, EOS, FORBIDDEN, MASK, PAD, TURN, VOCABULARY, make_model, make_prompt
from steerling_hf.modeling.generation_config_steerling import SteerlingGenerationConfig
from steerling_hf.modeling.generation_steerling import SteerlingGenerateOutput
from steerling_hf.modeling.unmasking_steerling import EntropyTemperatureLogitsWarper, share_steps
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer


@pytest.fixture
def model():
    return make_model()


def generate(model, prompt, **settings) -> SteerlingGenerateOutput:
    return model.generate(prompt, return_dict_in_generate=True, **settings)


def oracle(model, prompt, new_tokens, steps=None, penalty=1.0, guidance=1.0, ends=()):
    """Unmask one row the slow way: the whole canvas at every step, one position after the other."""
    prompt = prompt.tolist()
    canvas, step_map = prompt + [MASK] * new_tokens, [-1] * (len(prompt) + new_tokens)
    steps, step, end = steps or new_tokens, 0, len(canvas)

    def logits_of(tokens):
        return model(torch.tensor([tokens])).logits[0]

    for start in range(0, new_tokens, BLOCK):
        stop = min(start + BLOCK, new_tokens)
        block_steps = math.floor(steps * stop / new_tokens) - math.floor(steps * start / new_tokens)
        block_steps = min(max(block_steps, 1), stop - start)
        for block_step in range(block_steps):
            masked = [len(prompt) + place for place in range(start, stop)]
            masked = [place for place in masked if canvas[place] == MASK and place < end]
            if not masked:
                break
            count = (stop - start) // block_steps + (block_step < (stop - start) % block_steps)
            logits = logits_of(canvas)
            if guidance != 1:
                blind = logits_of([MASK] * len(prompt) + canvas[len(prompt) :])
                logits = blind + guidance * (logits - blind)
            candidates = []
            for place in masked:
                scores = logits[place].clone()
                for token in set(canvas):
                    scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
                for token in set(FORBIDDEN) - set(ends):
                    scores[token] = -math.inf
                probability, token = scores.softmax(-1).max(-1)
                candidates.append((probability.item(), place, token.item()))
            for _, place, token in sorted(candidates, reverse=True)[:count]:
                canvas[place], step_map[place] = token, step
            step += 1
            end = next((i for i in range(len(prompt), len(canvas)) if canvas[i] in ends), len(canvas) - 1) + 1
    return canvas[:end], step_map[:end]


LENGTHS = [(8, None), (16, None), (21, None), (16, 4), (24, 9), (21, 5), (5, 2), (20, 1), (9, 30), (1, None)]


@pytest.mark.compatibility
@pytest.mark.parametrize("penalty", [1.0, 1.1])
@pytest.mark.parametrize("prompt_length", [1, 7, 8, 13])
def test_greedy_equals_the_oracle(model, prompt_length, penalty):
    prompt = make_prompt(prompt_length)
    for new_tokens, steps in LENGTHS:
        output = generate(model, prompt, max_new_tokens=new_tokens, steps=steps, repetition_penalty=penalty)
        tokens, step_map = oracle(model, prompt[0], new_tokens, steps, penalty)
        assert output.sequences[0].tolist() == tokens, (new_tokens, steps)
        assert output.step_map[0].tolist() == step_map, (new_tokens, steps)


def test_the_oracle_sees_text_that_varies(model):
    """A model that repeats one token would agree with any schedule."""
    tokens, step_map = oracle(model, make_prompt(13)[0], 24)
    assert len(set(tokens[13:])) >= 6
    assert step_map[13:] != sorted(step_map[13:])


@pytest.mark.parametrize("guidance", [0.5, 1.7, 3])
def test_guidance_equals_the_oracle(model, guidance):
    prompt = make_prompt(11)
    output = generate(model, prompt, max_new_tokens=16, guidance_scale=guidance, repetition_penalty=1.1)
    assert output.sequences[0].tolist() == oracle(model, prompt[0], 16, penalty=1.1, guidance=guidance)[0]
    unguided = generate(model, prompt, max_new_tokens=16, repetition_penalty=1.1)
    assert not torch.equal(output.sequences, unguided.sequences)
    assert torch.equal(
        generate(model, prompt, max_new_tokens=16, guidance_scale=1).sequences[0], unguided_plain(model)
    )


def unguided_plain(model) -> torch.Tensor:
    return generate(model, make_prompt(11), max_new_tokens=16).sequences[0]


def block_sizes(new_tokens: int) -> list[int]:
    return [min(BLOCK, new_tokens - start) for start in range(0, new_tokens, BLOCK)]


@pytest.mark.parametrize(
    ("new_tokens", "steps", "expected"),
    [
        (8, 8, [[1] * 8]),
        (8, 3, [[3, 3, 2]]),
        (16, 6, [[3, 3, 2]] * 2),
        (24, 24, [[1] * 8] * 3),
        (16, 40, [[1] * 8] * 2),  # never more steps than tokens
        (32, 3, [[8]] * 4),  # never less than one step a block
        (20, 10, [[2] * 4, [2] * 4, [2, 2]]),  # a short last block has its share of the steps
        (20, 7, [[4, 4], [3, 3, 2], [2, 2]]),
        (9, 2, [[8], [1]]),
        (1, 1, [[1]]),
    ],
)
def test_schedule(new_tokens, steps, expected):
    assert share_steps(block_sizes(new_tokens), steps) == expected


def test_schedule_uses_all_steps_and_tokens():
    for new_tokens, steps in itertools.product(range(1, 40), repeat=2):
        schedule = share_steps(block_sizes(new_tokens), steps)
        assert [sum(counts) for counts in schedule[:-1]] == [8] * (len(schedule) - 1)
        assert sum(map(sum, schedule)) == new_tokens
        assert sum(map(len, schedule)) == min(max(steps, len(schedule)), new_tokens)
        assert all(counts[-1] >= 1 and counts[0] - counts[-1] <= 1 for counts in schedule)


def test_only_what_is_visible_is_computed_and_only_masked_rows_are_projected(model):
    windows, projected = [], []
    model.transformer.tok_emb.register_forward_hook(lambda _m, args, _o: windows.append(args[0].shape[1]))
    model.transformer.lm_head.register_forward_hook(lambda _m, args, _o: projected.append(args[0].numel() // 32))
    model.generate(make_prompt(13), max_new_tokens=20, steps=10, use_cache=False)
    assert windows == [24] * 4 + [32] * 4 + [33] * 2  # blocks end at 21, 29 and 33, on a grid of 8
    assert projected == [8, 6, 4, 2] * 2 + [4, 2]
    windows.clear()
    model.generate(make_prompt(13), max_new_tokens=20, steps=10)
    assert windows[0] == 24  # the prompt's complete block rides along
    assert max(windows[1:]) <= 24
    # A step that decided only in the second of the two attention blocks that a generation block touches is followed by a
    # window without the first.
    assert {8, 16} < set(windows[1:])


# Rows


def test_rows_equal_their_single_runs(model):
    prompts = make_prompt(13, rows=4)
    together = generate(model, prompts, max_new_tokens=20, steps=14, repetition_penalty=1.1)
    for row in range(4):
        alone = generate(model, prompts[row : row + 1], max_new_tokens=20, steps=14, repetition_penalty=1.1)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert torch.equal(together.step_map[row], alone.step_map[0])
    assert len({tuple(row) for row in together.sequences[:, 13:].tolist()}) > 1


def test_a_finished_row_ends_no_other_and_leaves_the_batch(model):
    prompts = make_prompt(13, rows=4)
    free = generate(model, prompts, max_new_tokens=24, repetition_penalty=1.1).sequences[:, 13:]
    first = [int(token) for token in free[0] if (free == token).any(-1).sum() < 4]
    batch_sizes = []
    model.transformer.tok_emb.register_forward_hook(lambda _m, args, _o: batch_sizes.append(len(args[0])))
    settings = {"max_new_tokens": 24, "repetition_penalty": 1.1, "eos_token_id": first[:2]}
    together = generate(model, prompts, **settings)
    assert min(batch_sizes) < 4
    assert len({(row >= 0).sum().item() for row in together.step_map}) > 1
    for row in range(4):
        alone = generate(model, prompts[row : row + 1], **settings)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[row, :length], alone.sequences[0])
        assert torch.equal(together.step_map[row, :length], alone.step_map[0])
        assert (together.sequences[row, length:] == PAD).all()
        assert (together.step_map[row, length:] == -1).all()
        assert together.tokens_per_forward[row] == alone.tokens_per_forward[0]


# The end of a row


@pytest.mark.parametrize("steps", [None, 9])
def test_end_tokens_equal_the_oracle(model, steps):
    """Positions before an end are still decided, those behind it are not."""
    prompt = make_prompt(13)
    lengths, had_holes = set(), False
    for token in sorted(set(generate(model, prompt, max_new_tokens=24, steps=steps).sequences[0, 13:].tolist())):
        output = generate(model, prompt, max_new_tokens=24, steps=steps, eos_token_id=token)
        tokens, step_map = oracle(model, prompt[0], 24, steps, ends=(token,))
        assert output.sequences[0].tolist() == tokens
        assert output.step_map[0].tolist() == step_map
        assert tokens[-1] == token
        lengths.add(len(tokens))
        had_holes |= any(step > step_map[-1] for step in step_map)
    assert len(lengths) > 3
    assert had_holes


def test_tokens_behind_an_end_are_not_counted(model):
    prompt = make_prompt(9)
    end = int(model.generate(prompt, max_new_tokens=16, steps=2)[0, 11])
    output = generate(model, prompt, max_new_tokens=16, steps=2, eos_token_id=end)
    length = output.sequences.shape[1]
    assert length < 9 + BLOCK
    assert output.tokens_per_forward.tolist() == [length - 9]


def boost(model, token: int, by: float = 1000.0) -> None:
    model.transformer.lm_head.register_forward_hook(
        lambda _m, _a, logits: logits.index_add(
            -1, torch.tensor([token]), logits.new_full((*logits.shape[:-1], 1), by)
        )
    )


@pytest.mark.parametrize("token", FORBIDDEN)
def test_tokens_that_are_no_text_are_never_generated(model, token):
    boost(model, token)
    assert token not in model.generate(make_prompt(9), max_new_tokens=12)[0, 9:]
    assert token not in model.generate(make_prompt(9), max_new_tokens=12, do_sample=True, suppress_tokens=[3])[0, 9:]


@pytest.mark.parametrize("token", [EOS, PAD])
def test_an_end_token_may_be_generated(model, token):
    boost(model, token)
    assert model.generate(make_prompt(9), max_new_tokens=12, eos_token_id=token)[0, 9:].tolist() == [token]
    boost(model, TURN, 2000.0)
    tokens = model.generate(make_prompt(9), max_new_tokens=12, eos_token_id=[token, TURN])[0, 9:].tolist()
    assert tokens == [TURN]


def test_suppress_tokens(model):
    plain = model.generate(make_prompt(9), max_new_tokens=12)[0, 9:].tolist()
    other = model.generate(make_prompt(9), max_new_tokens=12, suppress_tokens=plain[:2])[0, 9:].tolist()
    assert not set(plain[:2]) & set(other)


def test_without_a_prompt_a_row_starts_from_bos(model):
    expected = model.generate(torch.tensor([[BOS]]), max_new_tokens=9)
    assert torch.equal(model.generate(max_new_tokens=9), expected)
    assert torch.equal(model.generate(input_ids=None, attention_mask=None, max_new_tokens=9), expected)


# Sampling


def sample(model, prompt, **settings) -> torch.LongTensor:
    return model.generate(prompt, max_new_tokens=20, do_sample=True, **settings)


def test_numbers_of_numpy(model):
    prompt = make_prompt(9, rows=2)
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 5, "temperature": 0.5, "seed": [3, 4]}
    of_numpy = {"max_new_tokens": np.int64(8), "top_k": np.int32(5), "temperature": np.float32(0.5)}
    expected = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, **{**settings, **of_numpy, "seed": np.int64(3)}), expected)
    assert torch.equal(model.generate(prompt, **{**settings, "seed": list(np.arange(3, 5))}), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(model, dtype):
    settings = {"max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(make_prompt(9), **settings)
    torch.set_default_dtype(dtype)
    try:
        found = model.generate(make_prompt(9), **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities)


@pytest.mark.compatibility
def test_seeds(model):
    prompt = make_prompt(9)
    first = sample(model, prompt, seed=7)
    torch.manual_seed(1)
    assert torch.equal(sample(model, prompt, seed=7), first)
    assert not torch.equal(sample(model, prompt, seed=8), first)


def test_without_a_seed_the_global_generator_seeds(model):
    prompt = make_prompt(9)
    torch.manual_seed(3)
    first, second = sample(model, prompt), sample(model, prompt)
    torch.manual_seed(3)
    assert torch.equal(sample(model, prompt), first)
    assert not torch.equal(first, second)


def test_greedy_and_seeded_runs_leave_the_global_generator_alone(model):
    state = torch.get_rng_state()
    model.generate(make_prompt(9), max_new_tokens=9)
    sample(model, make_prompt(9), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_rows_equal_their_single_runs(model):
    prompts = make_prompt(9, rows=3)
    together = sample(model, prompts, seed=[5, 6, 70], temperature=0.8)
    for row, seed in enumerate([5, 6, 70]):
        assert torch.equal(sample(model, prompts[row : row + 1], seed=seed, temperature=0.8)[0], together[row])
    assert torch.equal(sample(model, prompts[:2], seed=5, temperature=0.8), together[:2])


@pytest.mark.compatibility
def test_num_return_sequences(model):
    prompts = make_prompt(9, rows=2)
    several = sample(model, prompts, seed=4, num_return_sequences=3)
    assert several.shape == (6, 29)
    assert torch.equal(several, sample(model, prompts.repeat_interleave(3, dim=0), seed=4))
    assert len({tuple(row) for row in several.tolist()}) == 6


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-4}, {"min_p": 1.0}])
def test_the_narrowest_sampling_is_greedy(model, settings):
    greedy = model.generate(make_prompt(9), max_new_tokens=20)
    assert torch.equal(sample(model, make_prompt(9), seed=0, **settings), greedy)


def test_draws_follow_the_distribution(model):
    config = SteerlingGenerationConfig(do_sample=True, temperature=0.5, top_k=3, seed=0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 1.5]])
    draws = model._make_sampler(config, 1, "cpu").draw(0, torch.zeros(1, dtype=torch.long), logits.expand(20000, -1))
    expected = torch.tensor([0.0, math.exp(2), math.exp(4), 0.0, math.exp(3)])
    assert torch.allclose(draws.bincount(minlength=5) / 20000, expected / expected.sum(), atol=0.015)


def test_top_k_is_off_by_default(model):
    """Transformers' own default of 50 would narrow every distribution unasked."""
    config, _ = model._prepare_generation_config(None, do_sample=True, seed=0)
    logits = torch.linspace(0, 0.01, VOCABULARY).expand(4000, -1)
    draws = model._make_sampler(config, 1, "cpu").draw(0, torch.zeros(1, dtype=torch.long), logits)
    assert len(draws.unique()) == VOCABULARY


def test_the_entropy_temperature_is_the_reference_formula():
    logits = (
        torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 20, 40)[:, None]
    )
    logits[:, MASK] = -math.inf
    for top_p in (0.0, 0.5, 0.8, 0.95):
        warped = EntropyTemperatureLogitsWarper(top_p)(None, logits)
        temperatures = []
        for row in logits:
            probabilities = sorted(row.softmax(-1).tolist(), reverse=True)
            inside = sum(mass <= top_p for mass in itertools.accumulate(probabilities))
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            temperatures.append(0.3 + 0.4 * min(1.0, entropy / math.log(max(2, 1 + inside))))
        torch.testing.assert_close(warped, logits / torch.tensor(temperatures)[:, None], rtol=1e-3, atol=1e-5)
        assert top_p == 0.0 or max(temperatures) - min(temperatures) > 0.2


def test_entropy_temperature_is_used_when_sampling_and_temperature_multiplies_it(model):
    config = SteerlingGenerationConfig(do_sample=True, entropy_temperature=True, top_p=0.8, temperature=0.5)
    warpers = model._make_sampler(config, 1, "cpu").warpers
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    kept = warpers(torch.zeros(5, 1, dtype=torch.long), logits)
    expected = EntropyTemperatureLogitsWarper(0.8)(None, logits) / 0.5
    assert torch.equal(torch.where(kept.isinf(), kept, expected), kept)
    prompt = make_prompt(9)
    assert not torch.equal(sample(model, prompt, seed=0), sample(model, prompt, seed=0, entropy_temperature=True))
    greedy = model.generate(prompt, max_new_tokens=20)
    assert torch.equal(model.generate(prompt, max_new_tokens=20, entropy_temperature=True), greedy)


@pytest.mark.parametrize("settings", [{"temperature": 3.0}, {"top_k": 1}, {"entropy_temperature": True}])
def test_confidence_is_that_of_the_unsampled_distribution(model, settings):
    """What shapes the draws has no say in which position is next."""
    greedy = generate(model, make_prompt(9), max_new_tokens=8, steps=2)
    sampled = generate(model, make_prompt(9), max_new_tokens=8, steps=2, do_sample=True, seed=0, **settings)
    assert torch.equal(greedy.step_map, sampled.step_map)


# Processors


class Recorder(LogitsProcessor):
    """Keeps the shapes it is called with, and forbids one token."""

    sees_canvas = True

    def __init__(self, forbidden: int):
        self.forbidden = forbidden
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.shape))
        return scores.index_fill(-1, torch.tensor([self.forbidden]), -math.inf)


def test_own_processors_see_the_canvas_of_each_position(model):
    prompts = make_prompt(9, rows=2)
    favourite = model.generate(prompts, max_new_tokens=8)[0, 9:].mode().values.item()
    recorder = Recorder(favourite)
    tokens = model.generate(prompts, max_new_tokens=8, steps=4, logits_processor=LogitsProcessorList([recorder]))
    assert favourite not in tokens[:, 9:]
    assert [shape for _, shape in recorder.calls] == [(n, VOCABULARY) for n in (16, 12, 8, 4)]
    canvases = recorder.calls[1][0]
    assert canvases.shape == (12, 17)
    assert torch.equal(canvases[:, :9], prompts.repeat_interleave(6, dim=0))
    assert ((canvases == MASK).sum(-1) == 6).all()


# Streams and outputs


class Stream(BaseStreamer):
    def __init__(self):
        self.pieces, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.pieces.append(value)

    def end(self):
        self.ends += 1


@pytest.mark.compatibility
def test_the_stream_is_the_prompt_then_each_block(model):
    prompts, stream = make_prompt(9, rows=2), Stream()
    tokens = model.generate(prompts, max_new_tokens=20, streamer=stream)
    assert [piece.shape for piece in stream.pieces] == [(2, 9), (2, 8), (2, 8), (2, 4)]
    assert torch.equal(torch.cat(stream.pieces, dim=1), tokens)
    assert stream.ends == 1


def test_the_stream_ends_with_the_longest_row(model):
    prompts, stream = make_prompt(13, rows=4), Stream()
    free = model.generate(prompts, max_new_tokens=24, repetition_penalty=1.1)
    ends = free[:, 13 + 9].tolist()
    tokens = model.generate(prompts, max_new_tokens=24, repetition_penalty=1.1, eos_token_id=ends, streamer=stream)
    assert tokens.shape[1] < 13 + 24
    assert torch.equal(torch.cat(stream.pieces, dim=1), tokens)


def test_a_stream_ends_when_generation_fails(model):
    """Else whoever reads the other end of it in a thread would wait for ever."""
    stream = Stream()
    with pytest.raises(ValueError, match="steps"):
        model.generate(make_prompt(9), max_new_tokens=8, steps=0, streamer=stream)
    assert (stream.pieces, stream.ends) == ([], 1)


@pytest.mark.compatibility
def test_outputs(model):
    prompts = make_prompt(9, rows=2)
    output = generate(model, prompts, max_new_tokens=20, steps=10)
    assert torch.equal(output.sequences[:, :9], prompts)
    assert output.sequences.shape == output.step_map.shape == (2, 29)
    assert (output.step_map[:, :9] == -1).all()
    for row in output.step_map[:, 9:]:
        assert row.bincount().tolist() == [2] * 10
        assert (row[:8] < 4).all()
        assert (row[8:16] >= 4).all()
    assert output.tokens_per_forward.tolist() == [2.0, 2.0]
    assert torch.equal(model.generate(prompts, max_new_tokens=20, steps=10), output.sequences)
    assert torch.equal(model.generate(input_ids=prompts, max_length=29, steps=10), output.sequences)


def test_prompts_of_another_integer_type(model):
    tokens = model.generate(make_prompt(9).int(), max_new_tokens=8)
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, model.generate(make_prompt(9), max_new_tokens=8))


def test_generated_tokens_serve_in_training(model):
    """No tensor of inference mode is left behind to break later gradients."""
    tokens = model.generate(make_prompt(9), max_new_tokens=8)
    assert not tokens.is_inference()
    model(tokens).logits.sum().backward()
    assert model.transformer.tok_emb.weight.grad is not None


def test_half_precision(model):
    model.to(torch.bfloat16)
    assert model.generate(make_prompt(9), max_new_tokens=12, repetition_penalty=1.1).shape == (1, 21)
    assert sample(model, make_prompt(9), entropy_temperature=True, top_p=0.8, guidance_scale=1.5).shape == (1, 29)
