"""Trainers that nobody here wrote: transformers' own beyond test_training.py, and TRL's."""

import copy

import pytest
import torch
from steerling_hf.modeling import loss_steerling as objective
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers.trainer_utils import align_special_tokens

from steerling_hf import SteerlingForDiffusionLM, checkpoint

TEXTS = ("The gardener watered the rose.", "Rain.", "The captain raised the mast of the old boat.")


@pytest.fixture
def right(tokenizer):
    tokenizer.padding_side = "right"
    return tokenizer


def make_trainer(model, folder, tokenizer, **options):
    callables = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    arguments = TrainingArguments(
        **{
            "output_dir": folder,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        }
    )
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, arguments, collator, train_dataset=rows, eval_dataset=rows, **callables)


def test_ordinary_collators_are_evaluated_and_the_best_model_is_loaded(tiny_model, right, tmp_path):
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = make_trainer(tiny_model(), tmp_path, right, load_best_model_at_end=True, **best)
    assert trainer.label_names == ["labels"]
    trainer.train()
    assert trainer.state.best_metric > 0


def test_columns_of_concepts_are_kept(tiny_model, right, tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, right)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "concept_labels", "noise_mask"} <= set(trainer._signature_columns)


def test_a_bare_backbone_resumes_with_its_own_weights(tiny_model, right, tmp_path):
    model = tiny_model(interpretable=False)
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    make_trainer(model, tmp_path, right, **options).train()
    torch.manual_seed(5)
    other = SteerlingForDiffusionLM(model.config)
    make_trainer(other, tmp_path, right, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, one), two in zip(other.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(one, two[1], msg=name)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda *_, **__: None}])
def test_labels_that_are_taken_away_are_missed(options, tiny_model, right, tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, right, **options)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match="`num_items_in_batch` is given without `labels`.*label_smoothing_factor"):
            run()


def test_losses_of_ones_own_on_masked_inputs_stay_possible(tiny_model, right):
    model = tiny_model().train()
    ids = right(TEXTS[0], return_tensors="pt")["input_ids"]
    model(ids).logits.sum().backward()  # gradients of what is seen
    ids[0, 2] = model.config.mask_token_id
    assert model(ids, num_items_in_batch=1).logits.requires_grad


def test_answers_end_where_they_did_after_an_alignment(tokenizer):
    model = SteerlingForDiffusionLM.from_pretrained(checkpoint("steerling-nano"))
    ends = model.generation_config.eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id]
    align_special_tokens(model, tokenizer)  # what Trainer does with a tokenizer; a warning would fail the test
    assert model.generation_config.eos_token_id == ends
    assert model.config.eos_token_id == tokenizer.eos_token_id


def make_sft(model, folder, tokenizer, **options):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = trl.SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 1,
            "per_device_train_batch_size": 3,
            "learning_rate": 0.5,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "gradient_checkpointing": False,
            **options,
        }
    )
    rows = datasets.Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS])
    return trl.SFTTrainer(model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [True, False])
def test_sft_trains_the_loss_of_the_texts_alone(packing, tiny_model, right, tmp_path, monkeypatch, library_warnings):
    """One step is that of the texts in rows of their own, first tokens left out where TRL packs; every token is noised."""
    monkeypatch.setattr(objective.Layout, "draw_noise", lambda layout, targets: targets)
    model = tiny_model()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    trainer = make_sft(model, tmp_path, right, packing=packing, max_length=64)
    trainer.train()
    library_warnings.clear()  # TRL advises flash attention for packed texts
    rows = [right(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    labels = [torch.cat((torch.full_like(ids[:, :1], -100), ids[:, 1:]), dim=1) if packing else ids for ids in rows]
    total = int(sum((label != -100).sum() for label in labels))
    loss = sum(expected(ids, labels=label, num_items_in_batch=total).loss for ids, label in zip(rows, labels))
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.5).step()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, one), two in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(model.transformer.tok_emb.weight, start.transformer.tok_emb.weight)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_smoothing_factor": 0.1}, "`labels` are missing"), ({"loss_type": "dft"}, "`loss_type` of SFTConfig")],
)
def test_what_sft_cannot_train_is_told(options, message, tiny_model, right, tmp_path, library_warnings):
    trainer = make_sft(tiny_model(), tmp_path, right, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    library_warnings.clear()  # the tokenizer's end was added to the model's


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DPO", "GRPO", "RLOO", "KTO"])
def test_objectives_of_next_tokens_are_refused(name, tiny_model, right, tmp_path, library_warnings):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = [{"prompt": "Rain", "chosen": " falls.", "rejected": "."}] * 2
    judged = [{"prompt": "Rain", "completion": " falls.", "label": label} for label in (True, False)]
    more = {} if name in ("DPO", "KTO") else {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    if name == "DPO":
        more["ref_model"] = tiny_model()
    config = getattr(trl, f"{name}Config")(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    rows = datasets.Dataset.from_list(judged if name == "KTO" else pairs)
    with pytest.raises((ValueError, AttributeError), match="need.* log-probabilities of next tokens in unmasked text"):
        getattr(trl, f"{name}Trainer")(
            model=SteerlingForDiffusionLM.from_pretrained(checkpoint()),
            args=config,
            train_dataset=rows,
            processing_class=right,
            **more,
        )
    library_warnings.clear()


def test_scores_of_next_tokens_are_refused_without_a_trainer(tiny_model, right):
    utils = pytest.importorskip("trl.trainer.utils")
    model = tiny_model()
    utils.add_fused_lm_head(model)
    ids = right(TEXTS[0], return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="log-probabilities of next tokens"):
        model(ids, labels=ids, fused_lm_head=True)
    assert model(ids).logits.shape == (1, ids.shape[1], 8200)
