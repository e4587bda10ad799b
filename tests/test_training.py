"""The collator, and training under transformers' Trainer as it is."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from steerling_hf.training import DiffusionCollator

SIZE = 16


def examples(count: int = 16) -> list[dict]:
    rows = [
        torch.randint(8000, (20 + 3 * i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(count)
    ]
    return [{"input_ids": row, "concept_labels": [sorted({token % 20, 3}) for token in row]} for row in rows]


@pytest.fixture
def config(tiny_config):
    return tiny_config(diff_block_size=SIZE)


def test_a_batch_is_what_the_model_takes(config, tiny_model):
    batch = DiffusionCollator(config, seed=0)(examples(3))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["noise_mask"].shape == (3, 26)
    assert batch["noisy_context"].shape == (3, 2)
    assert batch["concept_labels"].shape == (3, 26, 2)
    assert batch["attention_mask"].sum(1).tolist() == [20, 23, 26]
    assert (batch["labels"][0, 20:] == -100).all()
    assert not batch["noise_mask"][0, 20:].any()
    assert tiny_model(diff_block_size=SIZE)(**batch).loss.isfinite()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_examples_is_no_text(config, tokenizer, side):
    texts = ["The gardener watered the rose.", "Rain."]
    padded = tokenizer(texts, padding="max_length", max_length=24, padding_side=side)
    rows = [dict(zip(padded, columns)) for columns in zip(*padded.values())]
    plain = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    found, expected = (DiffusionCollator(config, seed=1)(examples) for examples in (rows, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_of_a_tokenizer_that_returns_tensors_are_told(config, tokenizer):
    with pytest.raises(ValueError, match=r"`input_ids` of an example have shape \(1, 3\)"):
        DiffusionCollator(config)([dict(tokenizer("Rain.", return_tensors="pt"))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_noise(config, dtype):
    collator = DiffusionCollator(config, prompt_probability=0.5, straddle_probability=0.5, seed=3)
    expected = collator(examples(8))
    torch.set_default_dtype(dtype)
    try:
        found = collator(examples(8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_attention_mask_of_another_length(config):
    with pytest.raises(ValueError, match="`attention_mask` of an example has length 2; `input_ids` has 3"):
        DiffusionCollator(config)([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}])


def test_noise_of_an_example_does_not_depend_on_its_batch(config):
    collator = DiffusionCollator(config, prompt_probability=0.5, straddle_probability=0.5, seed=3)
    together = collator(examples(4))
    for i, example in enumerate(examples(4)):
        alone = collator([example])
        length = len(example["input_ids"])
        for name in ("noise_mask", "labels"):
            assert torch.equal(together[name][i, :length], alone[name][0])


def test_each_seed_has_noise_of_its_own(config):
    batch = [{"input_ids": list(range(64))}]
    one, again, other = (DiffusionCollator(config, seed=seed)(batch)["noise_mask"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_without_a_seed_noise_is_fresh_and_follows_the_global_generator(config):
    collator = DiffusionCollator(config)
    torch.manual_seed(0)
    first, second = collator(examples(4))["noise_mask"], collator(examples(4))["noise_mask"]
    torch.manual_seed(0)
    assert torch.equal(collator(examples(4))["noise_mask"], first)
    assert not torch.equal(first, second)


def test_prompts_stay_clean_and_tails_stay_masked(config):
    ids = list(range(SIZE))
    collator = DiffusionCollator(config, prompt_probability=1.0)
    starts, tails = set(), 0
    for _ in range(200):
        batch = collator([{"input_ids": ids}])
        target = batch["labels"][0] != -100
        first = int(target.float().argmax())
        starts.add(first)
        assert not batch["noise_mask"][0, :first].any()
        after = int(target.nonzero().max()) + 1
        assert target[first:after].all()
        assert batch["noise_mask"][0, after:].all()
        tails += after < SIZE
    assert starts == set(range(SIZE))
    assert 50 < tails < 150


def test_straddling_windows_span_two_blocks(config):
    batch = DiffusionCollator(config, straddle_probability=1.0, seed=0)([{"input_ids": list(range(4 * SIZE))}])
    assert batch["noisy_context"][0].tolist() == [False, True, False, True]
    target = (batch["labels"][0] != -100).view(2, 2 * SIZE)
    for window, noise in zip(target, batch["noise_mask"][0].view(2, 2 * SIZE)):
        first = int(window.float().argmax())
        assert 0 < first < SIZE
        assert window.nonzero().flatten().tolist() == list(range(first, first + SIZE))
        assert noise[first + SIZE :].all()
        assert not noise[:first].any()


def test_probabilities_are_shares_of_the_blocks(config):
    batch = [{"input_ids": list(range(8 * SIZE))}] * 100
    torch.manual_seed(0)
    prompts = DiffusionCollator(config, prompt_probability=0.25)(batch)["labels"].view(-1, SIZE)
    # Of the blocks with a prompt, one in 32 has an empty one and no tail.
    assert (prompts == -100).any(-1).float().mean() == pytest.approx(0.25 * 31 / 32, abs=0.05)
    straddles = DiffusionCollator(config, straddle_probability=0.25)(batch)["noisy_context"]
    # A block can straddle unless the one before does: s = 0.25 (1 - s).
    assert straddles[:, 2:].float().mean() == pytest.approx(0.2, abs=0.05)


def test_labels_given_are_kept(config):
    ids = list(range(SIZE))
    labels = [-100] * 10 + ids[10:]
    batch = DiffusionCollator(config, prompt_probability=0.5)([{"input_ids": ids, "labels": labels}] * 50)
    assert (batch["labels"][:, :10] == -100).all()
    assert not batch["noise_mask"][:, :10].any()


def test_what_has_no_label_is_never_noised(config):
    labels = [-100] * 5 + list(range(5, 11)) + [-100] * 5
    batch = DiffusionCollator(config, prompt_probability=1.0)(
        [{"input_ids": list(range(SIZE)), "labels": labels}] * 100
    )
    assert not batch["noise_mask"][:, torch.tensor(labels) == -100].any()


def test_every_example_keeps_a_target(config):
    collator = DiffusionCollator(config, prompt_probability=1.0, straddle_probability=0.5)
    labels = [-100] * SIZE + [7, -100]
    for _ in range(100):
        batch = collator([{"input_ids": [5] * (SIZE + 2), "labels": labels}])
        assert batch["labels"][0].tolist() == labels
        assert batch["noise_mask"][0, SIZE]


def test_an_example_without_targets_stays_clean(config, tiny_model):
    collator = DiffusionCollator(config, prompt_probability=0.5, straddle_probability=0.5)
    nothing = {"input_ids": [5] * 40, "labels": [-100] * 40}
    batch = collator([nothing, nothing])
    assert not batch["noise_mask"].any()
    assert tiny_model(diff_block_size=SIZE)(**batch).loss == 0


def test_windows_that_miss_all_targets_leave_no_noisy_context(config):
    labels = [7] + [-100] * (2 * SIZE - 1)
    batch = DiffusionCollator(config, straddle_probability=1.0)([{"input_ids": [7] * (2 * SIZE), "labels": labels}])
    assert batch["labels"][0].tolist() == labels
    assert not batch["noisy_context"].any()


def test_examples_with_and_without_concepts_share_a_batch(config, tiny_model):
    model, collator = tiny_model(diff_block_size=SIZE), DiffusionCollator(config, seed=0)
    bare = {"input_ids": [1, 2], "labels": None, "concept_labels": None}
    for others in ([], [bare], [{"input_ids": [1, 2]}]):
        batch = collator([*others, {"input_ids": [1, 2, 3], "concept_labels": [[5], [], [3, 4]]}])
        assert batch["concept_labels"][-1].tolist() == [[5, -100], [-100, -100], [3, 4]]
        assert (batch["concept_labels"][:-1] == -100).all()
    assert collator([bare])["concept_labels"].shape == (1, 2, 0)
    plain = {name: values for name, values in collator([bare]).items() if name != "concept_labels"}
    assert torch.equal(model(**collator([bare])).loss, model(**plain).loss)


@pytest.mark.parametrize("interpretable", [True, False])
def test_evaluation_without_concepts_has_a_loss(interpretable, tiny_model, tmp_path):
    model = tiny_model(diff_block_size=SIZE, interpretable=interpretable)
    rows = [{"input_ids": example["input_ids"]} for example in examples(4)]
    trainer = train(model, tmp_path, batch=4, accumulate=1, steps=1, data=rows)
    assert trainer.evaluate()["eval_loss"] > 0


def test_processes_that_draw_alike_noise_their_own_examples(config):
    noise = []
    for example in ({"input_ids": list(range(64))}, {"input_ids": list(range(1, 65))}):
        torch.manual_seed(0)  # as Trainer does in every process
        noise.append(DiffusionCollator(config)([example])["noise_mask"])
    assert not torch.equal(*noise)


def test_a_seed_that_no_generator_takes_is_told(config):
    with pytest.raises(ValueError, match="`seed` is 4294967296"):
        DiffusionCollator(config, seed=2**32)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": []}, "`input_ids` of an example have shape"),
        ({"input_ids": [1] * 300}, "hold 300 tokens, more than the context of 256"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` of an example has length 1"),
        ({"input_ids": [1, 2], "concept_labels": [[1]]}, "`concept_labels` of an example has length 1"),
    ],
)
def test_bad_examples_are_told(example, message, config):
    with pytest.raises(ValueError, match=message):
        DiffusionCollator(config)([example])


def test_concept_labels_for_a_model_without_heads_are_told(tiny_config):
    collator = DiffusionCollator(tiny_config(interpretable=False))
    with pytest.raises(ValueError, match="`concept_labels` of an example need concept heads"):
        collator([{"input_ids": [1], "concept_labels": [[2]]}])


def test_a_probability_outside_its_range_is_told(config):
    with pytest.raises(ValueError, match="`prompt_probability` is 1.5"):
        DiffusionCollator(config, prompt_probability=1.5)


def train(
    model,
    folder,
    *,
    batch: int,
    accumulate: int,
    steps: int = 4,
    seed: int | None = 0,
    resume=None,
    data=None,
    **options,
):
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )
    data = data or examples()
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=DiffusionCollator(model.config, 0.5, 0.25, seed=seed),
        train_dataset=data,
        eval_dataset=data[:4],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.compatibility
@pytest.mark.parametrize("seed", [0, None])
def test_gradient_accumulation_changes_nothing(seed, tiny_model, tmp_path):
    whole = train(tiny_model(), tmp_path / "whole", batch=8, accumulate=1, seed=seed).model
    parts = train(tiny_model(), tmp_path / "parts", batch=2, accumulate=4, seed=seed).model
    start = dict(tiny_model().named_parameters())
    for (name, one), two in zip(whole.named_parameters(), parts.parameters()):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6, msg=name)
    assert (whole.transformer.tok_emb.weight - start["transformer.tok_emb.weight"]).abs().max() > 1e-3


@pytest.mark.compatibility
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tiny_model, tmp_path):
    whole = train(tiny_model(), tmp_path / "whole", batch=4, accumulate=1, steps=6).model
    parts = {"folder": tmp_path / "parts", "batch": 4, "accumulate": 1, "save_strategy": "steps", "save_steps": 3}
    train(tiny_model(), steps=3, **parts)
    resumed = train(tiny_model(), steps=6, resume=tmp_path / "parts" / "checkpoint-3", **parts).model
    for one, two in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(two, one)


@pytest.mark.compatibility
def test_evaluation_is_repeatable(tiny_model, tmp_path):
    trainer = train(tiny_model(), tmp_path, batch=4, accumulate=1, steps=1, prediction_loss_only=True)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] > 0
