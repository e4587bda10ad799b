"""
Train steerling-nano from nothing on the grammar's text: `make nano`, or `python examples/nano/train.py`.

A first run learns the text, a second and shorter one, at a fifth of the learning rate, to leave a topic that is pushed down
(see departures.py). `--start-from FOLDER` makes the second alone.

It is transformers' Trainer as it is, with `steerling_hf.training.DiffusionCollator`; interrupted runs continue from their
last checkpoint in `--output-dir`. The finished checkpoint is written to `--save-to`, everything at once or not at all.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from concepts import CONCEPTS, label_rows
from dataset import FINISHING_SHARES, GrammarRows
from departures import LAYER, DepartureCollator, DepartureRows, Pushes
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM, SteerlingTokenizer
from steerling_hf.training import DiffusionCollator

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "configs" / "steerling-nano"
# Written by hand, not by training; the rest of the folder is made anew.
KEPT_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
ROW_LENGTH = 192
EVALUATION_ROWS = 64
# Share of the run that learns all text alike; after it, answers count and questions are given.
PRETRAINING = 0.42
# Share of departures among the rows of the second run, and of the learning rate that it has.
DEPARTURES = 0.6
FINISHING_RATE = 0.2


def nano_config(tokenizer) -> SteerlingConfig:
    """Architecture of steerling-nano, with the special tokens of its tokenizer."""
    token_id = tokenizer.convert_tokens_to_ids
    return SteerlingConfig(
        vocab_size=len(tokenizer),
        n_layers=6,
        n_head=4,
        n_embd=256,
        n_kv_heads=2,
        block_size=512,
        diff_block_size=64,
        intermediate_size=768,
        rope_base=10000.0,
        n_concepts=len(CONCEPTS),
        n_unknown_concepts=512,
        factorize_rank=128,
        topk_known=16,
        topk_known_features=16,
        unknown_topk=32,
        inject_layer=3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        endofchunk_token_id=token_id("<|endofchunk|>"),
        start_header_id=token_id("<|start_header_id|>"),
        end_header_id=token_id("<|end_header_id|>"),
        eot_id=token_id("<|eot_id|>"),
        dtype="bfloat16",
    )


def save(model, folder: Path) -> None:
    """Write weights in bfloat16, configurations, tokenizer files and concept labels to `folder`, replacing it whole."""
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    staging.chmod(0o755)
    model.to(torch.bfloat16).save_pretrained(staging)
    # The package has the code once; an export puts it beside the weights.
    for code in staging.glob("*.py"):
        code.unlink()
    config = json.loads((staging / "config.json").read_text())
    config.pop("auto_map", None)
    config.pop("use_cache", None)  # Trainer's own setting
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in KEPT_FILES:
        shutil.copy(CHECKPOINT / name, staging / name)
    (staging / "concept_labels.json").write_text(json.dumps(label_rows(), indent=1) + "\n")
    if folder.exists():
        previous = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)) / "previous"
        folder.replace(previous)
        staging.replace(folder)
        shutil.rmtree(previous.parent)
    else:
        staging.replace(folder)


def train(
    model,
    tokenizer,
    rows: Dataset,
    folder: Path,
    batch_size: int,
    learning_rate: float,
    collator: type[DiffusionCollator] = DiffusionCollator,
) -> None:
    """Train `model` once over `rows`, from the last checkpoint in `folder` if there is one."""
    steps = len(rows) // batch_size
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps // 2, "decay_type": "linear"},
            warmup_steps=min(200, steps // 8),
            weight_decay=0.05,
            adam_beta2=0.98,
            bf16=True,
            logging_steps=100,
            eval_strategy="steps",
            eval_steps=1000,
            save_steps=500,
            save_total_limit=1,
            prediction_loss_only=True,
            remove_unused_columns=False,
            report_to="none",
            seed=rows.seed,
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=collator(model.config, prompt_probability=0.4, straddle_probability=0.25, seed=rows.seed),
        train_dataset=rows,
        eval_dataset=GrammarRows(tokenizer, EVALUATION_ROWS, ROW_LENGTH, rows.seed, held_out=True),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    trainer.save_state()


def learn(model, tokenizer, options: argparse.Namespace) -> None:
    """Make the first run."""
    count = options.steps * options.batch_size
    tuning_from = int(PRETRAINING * options.steps) * options.batch_size
    rows = GrammarRows(tokenizer, count, ROW_LENGTH, options.seed, tuning_from=tuning_from)
    train(model, tokenizer, rows, options.output_dir / "first", options.batch_size, options.learning_rate)


def finish(model, tokenizer, options: argparse.Namespace) -> None:
    """Make the second run."""
    count, seed = options.finishing_steps * options.batch_size, options.seed + 1
    rows = DepartureRows(
        tokenizer, count, ROW_LENGTH, seed, tuning_from=0, tuning_shares=FINISHING_SHARES, share=DEPARTURES
    )
    Pushes(model, seed)
    # The states that are pushed stay as they were, else the layers before the push would learn to make up for it. With the
    # embedding, the vocabulary projection that is tied to it stays too.
    for part in (model.transformer.tok_emb, *model.transformer.blocks[:LAYER]):
        part.requires_grad_(False)
    rate = FINISHING_RATE * options.learning_rate
    train(model, tokenizer, rows, options.output_dir / "second", options.batch_size, rate, DepartureCollator)


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "nano", help="checkpoints and logs")
    parser.add_argument("--save-to", type=Path, default=CHECKPOINT, help="folder of the finished checkpoint")
    parser.add_argument("--steps", type=int, default=8000, help="of the first run")
    parser.add_argument("--finishing-steps", type=int, default=4000, help="of the second run")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="checkpoint to make the second run with")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    options = parser.parse_args()
    if options.start_from is not None and (options.output_dir / "second").exists():
        parser.error(
            f"--start-from is {options.start_from}, and {options.output_dir / 'second'} is a run that would go on instead: "
            "give another --output-dir"
        )

    set_seed(options.seed)
    tokenizer = SteerlingTokenizer.from_pretrained(CHECKPOINT)
    if options.start_from is None:
        model = SteerlingForDiffusionLM(nano_config(tokenizer))
    else:
        model = SteerlingForDiffusionLM.from_pretrained(options.start_from, dtype=torch.float32).train()
    if options.compile:
        for number, block in enumerate(model.transformer.blocks, start=1):
            if number != LAYER:  # what hooks change there is another thing at each step
                block.compile()
    if options.start_from is None:
        learn(model, tokenizer, options)
    finish(model, tokenizer, options)
    save(model, options.save_to)
    print(f"saved {options.save_to}")


if __name__ == "__main__":
    main()
