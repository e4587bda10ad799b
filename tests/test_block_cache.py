"""The exact block cache: the same tokens and logits as the whole canvas, for any rows that share a batch."""

import copy
import random
from itertools import combinations

import pytest
import torch
from generation_model import BLOCK, MASK, PAD, make_model, make_prompt
from steerling_hf.modeling.cache_steerling import SteerlingCache
from steerling_hf.modeling.steering_steerling import Inject
from steerling_hf.modeling.windows_steerling import PASS_COST, WindowEncoder, _share_passes
from transformers import CompileConfig

LENGTHS = (1, 5, 8, 9, 16, 21, 30)
WAYS = {"cached": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}


@pytest.fixture
def model():
    return make_model()


def generate(model, prompt, **settings):
    return model.generate(prompt, return_dict_in_generate=True, **settings)


def ragged(lengths=LENGTHS, side="left"):
    """(rows, longest) prompts, their attention mask, and each without padding."""
    prompts = [make_prompt(length)[0] for length in lengths]
    longest = max(lengths)
    ids, mask = torch.full((len(lengths), longest), PAD), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, columns], mask[row, columns] = prompt, 1
    return ids, mask, [prompt[None] for prompt in prompts]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 29])
def test_cached_and_static_runs_decide_the_same(model, length, guidance, aligned):
    settings = {"max_new_tokens": 27, "guidance_scale": guidance, "align_blocks": aligned, "repetition_penalty": 1.1}
    plain = generate(model, make_prompt(length), use_cache=False, **settings)
    for way in ("cached", "static"):
        output = generate(model, make_prompt(length), **settings, **WAYS[way])
        assert torch.equal(output.sequences, plain.sequences), way
        assert torch.equal(output.step_map, plain.step_map), way


def logits_of_every_step(model, prompt, **settings):
    """Masked rows' logits of each pass, whatever windows it has."""
    seen = []
    handle = model.transformer.lm_head.register_forward_hook(lambda _m, _a, logits: seen.append(logits.clone()))
    model.generate(prompt, max_new_tokens=24, **settings)
    handle.remove()
    return seen


def inject(model):
    """Shift the residual stream at masked positions behind the first block, as steering does."""
    masked = []
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5))

    def note(_module, args):
        masked.append(args[0] == MASK)

    def shift(_module, _args, output):
        return output + 3 * direction * masked[-1][..., None]

    model.transformer.tok_emb.register_forward_pre_hook(note)
    model.transformer.blocks[0].register_forward_hook(shift)


@pytest.mark.parametrize("way", ["cached", "static"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_logits_of_every_step_are_those_of_the_whole_canvas(model, way, guidance, injected, aligned):
    if injected:
        inject(model)
    settings = {"guidance_scale": guidance, "align_blocks": aligned}
    whole = logits_of_every_step(model, make_prompt(19), use_cache=False, **settings)
    windows = logits_of_every_step(model, make_prompt(19), **settings, **WAYS[way])
    assert len(whole) == len(windows) == 24
    for ours, expected in zip(windows, whole):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_an_injection_changes_the_text(model):
    plain = model.generate(make_prompt(19), max_new_tokens=24)
    inject(model)
    assert not torch.equal(model.generate(make_prompt(19), max_new_tokens=24), plain)


def windows_of(model, **settings) -> list[tuple[int, int]]:
    """(rows, length) of every pass."""
    shapes = []
    handle = model.transformer.tok_emb.register_forward_hook(lambda _m, args, _o: shapes.append(tuple(args[0].shape)))
    model.generate(**settings)
    handle.remove()
    return shapes


def test_windows_do_not_grow_with_the_text(model):
    lengths = [length for _, length in windows_of(model, inputs=make_prompt(13), max_new_tokens=51)]
    assert max(lengths) <= 3 * BLOCK
    assert sum(length == 3 * BLOCK for length in lengths) <= 6  # at most once a block
    aligned = [length for _, length in windows_of(model, inputs=make_prompt(13), max_new_tokens=51, align_blocks=True)]
    assert set(aligned) == {BLOCK, 2 * BLOCK}
    assert sum(length == 2 * BLOCK for length in aligned) <= 7
    static = windows_of(model, inputs=make_prompt(13), max_new_tokens=51, cache_implementation="static")
    assert {length for _, length in static} == {BLOCK, 2 * BLOCK}


@pytest.mark.parametrize("piece", [16, 20, 1])
def test_long_prompts_are_computed_in_pieces_of_whole_blocks(model, monkeypatch, piece):
    whole = model.generate(make_prompt(41), max_new_tokens=20)
    monkeypatch.setattr("steerling_hf.modeling.windows_steerling.PIECE", piece)
    lengths = [length for _, length in windows_of(model, inputs=make_prompt(41), max_new_tokens=20)]
    pieces = 4 if piece == 1 else 2
    assert lengths[: pieces + 1] == [32 // pieces] * pieces + [24]  # the last block rides along with the first step
    assert torch.equal(model.generate(make_prompt(41), max_new_tokens=20), whole)


# Ragged batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "seed": [3, 1, 4, 15, 9, 2, 6]}, {"guidance_scale": 1.5}]
)
def test_ragged_rows_equal_their_single_runs(model, side, way, settings):
    ids, mask, prompts = ragged(side=side)
    common = {"max_new_tokens": 21, "steps": 15, "repetition_penalty": 1.1, **WAYS[way]}
    together = generate(model, ids, attention_mask=mask, **common, **settings)
    assert together.sequences.shape == (7, 30 + 21)
    for row, prompt in enumerate(prompts):
        own = {**settings, "seed": settings["seed"][row]} if "seed" in settings else settings
        alone = generate(model, prompt, **common, **own)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[row, -length:], alone.sequences[0]), row
        assert torch.equal(together.step_map[row, -length:], alone.step_map[0]), row
        assert (together.sequences[row, :-length] == PAD).all()


def test_aligned_ragged_rows_equal_their_single_runs(model):
    ids, mask, prompts = ragged()
    together = generate(model, ids, attention_mask=mask, max_new_tokens=21, align_blocks=True)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, max_new_tokens=21, align_blocks=True)
        assert torch.equal(together.sequences[row, -alone.sequences.shape[1] :], alone.sequences[0])


@pytest.mark.compatibility
@pytest.mark.parametrize("way", WAYS)
def test_rows_end_by_themselves(model, way):
    ids, mask, prompts = ragged()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=21, repetition_penalty=1.1)[:, 30:]
    settings = {"max_new_tokens": 21, "repetition_penalty": 1.1, "eos_token_id": free[:3, 6].tolist(), **WAYS[way]}
    together = generate(model, ids, attention_mask=mask, **settings)
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, **settings)
        answer = alone.sequences[0, prompt.shape[1] :]
        lengths.add(len(answer))
        assert torch.equal(together.sequences[row, 30 : 30 + len(answer)], answer)
        assert (together.sequences[row, 30 + len(answer) :] == PAD).all()
        assert together.tokens_per_forward[row] == alone.tokens_per_forward[0]
    assert len(lengths) > 2


def test_finished_rows_leave_the_batch_but_for_static_shapes(model):
    ids, mask, _ = ragged()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=21, repetition_penalty=1.1)[:, 30:]
    settings = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 21, "repetition_penalty": 1.1}
    settings["eos_token_id"] = free[:3, 6].tolist()
    rows = [rows for rows, length in windows_of(model, **settings)]
    assert sum(rows[-3:]) < 7 <= sum(rows[1:4])  # a step's rows, in groups that need windows of one length
    steps = [shape for shape in windows_of(model, cache_implementation="static", **settings) if shape[1] == 2 * BLOCK]
    assert set(steps) == {(7, 2 * BLOCK)}


# The prompt of several answers, and the turns of a chat


def test_several_answers_share_the_prompt(model):
    prompts = make_prompt(29, rows=2)
    settings = {"max_new_tokens": 12, "do_sample": True, "seed": 0, "align_blocks": True}
    shapes = windows_of(model, inputs=prompts, num_return_sequences=3, **settings)
    assert shapes[0] == (2, 24)
    assert {rows for rows, _ in shapes[1:]} == {6}
    several = model.generate(prompts, num_return_sequences=3, **settings)
    assert torch.equal(several, model.generate(prompts.repeat_interleave(3, dim=0), **settings))
    guided = model.generate(prompts, num_return_sequences=3, guidance_scale=1.5, **settings)
    assert torch.equal(
        guided, model.generate(prompts.repeat_interleave(3, dim=0), guidance_scale=1.5, use_cache=False, **settings)
    )


@pytest.mark.compatibility
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_turns_of_a_chat_reuse_the_cache(model, guidance):
    settings = {"max_new_tokens": 12, "guidance_scale": guidance}
    ids, mask, _ = ragged((9, 21))
    first = generate(model, ids, attention_mask=mask, **settings)
    more = make_prompt(6, rows=2)
    ids, mask = torch.cat([first.sequences, more], 1), torch.cat([mask, torch.ones(2, 18, dtype=torch.long)], 1)
    settings |= {"attention_mask": mask, "cache": copy.deepcopy(first.cache)}
    shapes = windows_of(model, inputs=ids, **settings)
    assert max(length for _, length in shapes) <= 3 * BLOCK
    plain = model.generate(ids, **{**settings, "cache": None}, use_cache=False)
    again = generate(model, ids, **{**settings, "cache": first.cache})
    assert torch.equal(again.sequences, plain)


def test_a_given_cache_keeps_the_order_of_the_rows(model):
    """Also where rows have left the batch in another order, whatever is returned."""
    ids, mask, prompts = ragged()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=21, repetition_penalty=1.1)[:, 30:]
    settings = {"max_new_tokens": 21, "repetition_penalty": 1.1, "eos_token_id": free[:3, 6].tolist()}
    caches = [SteerlingCache(model.config), generate(model, ids, attention_mask=mask, **settings).cache]
    model.generate(ids, attention_mask=mask, cache=caches[0], **settings)
    for cache in caches:
        for tokens, prompt in zip(cache.tokens, prompts):
            known = min(len(tokens), prompt.shape[1])
            assert torch.equal(tokens[:known], prompt[0, :known])
        assert cache.get_seq_length() == min(map(len, cache.tokens))


def test_a_cache_can_be_reset_and_its_rows_taken(model):
    prompts = make_prompt(29, rows=2)
    expected = model.generate(prompts, max_new_tokens=12, use_cache=False)
    cache = generate(model, prompts, max_new_tokens=12).cache
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(model.generate(prompts.flip(0), max_new_tokens=12, cache=cache), expected.flip(0))
    cache.reset()
    assert cache.get_seq_length() == cache.rows == 0
    assert torch.equal(model.generate(prompts, max_new_tokens=12, cache=cache), expected)


def test_forward_refuses_the_cache_of_generate(model):
    cache = generate(model, make_prompt(29), max_new_tokens=12).cache
    with pytest.raises(ValueError, match="past_key_values.*DynamicCache"):
        model(make_prompt(8), cache=cache)


def test_gradient_checkpointing_changes_no_text(model):
    """Nothing is checkpointed without gradients, as in the callbacks of a Trainer."""
    expected = model.generate(make_prompt(17), max_new_tokens=16, align_blocks=True)
    model.activation_checkpointing_enable()
    model.train()
    for cache in ("static", None):
        assert torch.equal(
            model.generate(make_prompt(17), max_new_tokens=16, align_blocks=True, cache_implementation=cache), expected
        )


@pytest.mark.parametrize("way", WAYS)
def test_autocast(model, way):
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(make_prompt(17), max_new_tokens=12, **WAYS[way]).shape == (1, 29)


def test_a_cache_of_another_text_is_computed_anew(model):
    """It is at worst slow: what does not agree with the prompt is not used."""
    cache = generate(model, make_prompt(29), max_new_tokens=12).cache
    assert cache.get_seq_length() >= 32
    other = make_prompt(30)
    other[:, :16] = make_prompt(29)[:, :16]
    output = generate(model, other, max_new_tokens=12, cache=cache)
    assert torch.equal(output.sequences, model.generate(other, max_new_tokens=12, use_cache=False))


def test_one_cache_serves_many_calls(model):
    cache = SteerlingCache(model.config, columns=64 + 2 * BLOCK)
    for length in (29, 9, 41):
        output = generate(model, make_prompt(length), max_new_tokens=12, cache=cache)
        assert torch.equal(output.sequences, model.generate(make_prompt(length), max_new_tokens=12, use_cache=False))
        assert output.cache is cache


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(model, attention):
    ids, mask, _ = ragged((5, 21))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=False)
    model.set_attn_implementation(attention)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12), expected)


def test_half_precision(model):
    model.to(torch.bfloat16)
    ids, mask, _ = ragged((5, 21))
    for way in WAYS.values():
        assert model.generate(ids, attention_mask=mask, max_new_tokens=12, **way).shape == (2, 33)


def test_a_compiled_step_is_compiled_once(model):
    """Neither steps nor blocks nor prompts of other lengths change a shape."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 27, "cache_implementation": "static", "compile_config": config}
    expected = [model.generate(make_prompt(length), max_new_tokens=27, use_cache=False) for length in (5, 13, 9)]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for length, tokens in zip((5, 13, 9), expected):
        # The capacity is that of the whole text, so only equal sums of lengths share a compilation by themselves.
        cache = SteerlingCache(model.config, columns=80)
        given = {"compile_config": config, "max_new_tokens": 27, "cache": cache}
        assert torch.equal(model.generate(make_prompt(length), **given), tokens)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(model.generate(make_prompt(13), **settings), expected[1])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.tok_emb.weight.copy_(other.transformer.tok_emb.weight.flip(0))
    assert not torch.equal(other.generate(make_prompt(13), **settings), expected[1])


def test_states_that_are_kept_are_copies_of_a_static_step(model, monkeypatch):
    """A later step of CUDA graphs writes to it, and torch refuses to read it then."""
    keep, kept = WindowEncoder._keep_states, []

    def watched(self, canvas, window):
        keep(self, canvas, window)
        kept.append(self.states[canvas.index].untyped_storage().data_ptr() == window.untyped_storage().data_ptr())

    monkeypatch.setattr(WindowEncoder, "_keep_states", watched)
    model.generate(make_prompt(13), max_new_tokens=20, cache_implementation="static")
    assert len(kept) == 20
    assert not any(kept)


def test_passes_are_shared_so_that_padding_and_passes_cost_least():
    def cost(passes, needs):
        return sum(PASS_COST + len(own) * max(needs[number] for number in own) for own in passes)

    def partitions(numbers):
        if not numbers:
            yield []
            return
        first, rest = numbers[0], numbers[1:]
        for size in range(len(rest) + 1):
            for others in combinations(rest, size):
                left = [number for number in rest if number not in others]
                for more in partitions(left):
                    yield [[first, *others], *more]

    generator = random.Random(0)
    for _ in range(60):
        needs = [generator.randrange(1, 130) for _ in range(generator.randrange(1, 7))]
        passes = _share_passes(needs)
        assert sorted(number for own in passes for number in own) == list(range(len(needs)))
        assert all(own == sorted(own) for own in passes)
        assert cost(passes, needs) == min(cost(each, needs) for each in partitions(list(range(len(needs)))))


def test_a_cache_from_inference_mode_is_used_outside_of_it(model):
    prompt = make_prompt(20)
    with torch.inference_mode():
        cache = generate(model, prompt, max_new_tokens=12).cache
    again = generate(model, prompt, max_new_tokens=12, cache=cache)
    assert torch.equal(again.sequences, generate(model, prompt, max_new_tokens=12).sequences)


def test_after_an_error_nothing_is_left_of_a_steered_masked_prompt(model):
    cache, prompt, calls = SteerlingCache(model.config), make_prompt(20), []

    def fail(_rows, scores):
        calls.append(len(scores))
        if len(calls) > 6:
            raise RuntimeError("stop")
        return scores

    settings = {"max_new_tokens": 12, "guidance_scale": 1.7}
    broken = {"logits_processor": [fail], "steering": Inject(3, 30.0), **settings}
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, prompt, cache=cache, **broken)
    again = generate(model, prompt, cache=cache, **settings)
    assert torch.equal(again.sequences, generate(model, prompt, **settings).sequences)


def test_after_an_error_in_a_pass_the_cache_belongs_to_generate_again(model):
    cache = SteerlingCache(model.config)

    def fail(*_):
        raise RuntimeError("stop")

    handle = model.transformer.ln_f.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, make_prompt(20), max_new_tokens=12, cache=cache)
    handle.remove()
    with pytest.raises(ValueError, match="only generate"):
        model(make_prompt(20), cache=cache)
