"""What all tests share: no network, no warning that goes unseen, a tiny model, and a Python without this package."""

import os

# Before transformers is imported: no test may reach for a network, and none may show a progress bar.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as library_logging

from steerling_hf import SteerlingConfig, SteerlingForDiffusionLM, SteerlingTokenizer, checkpoint, export
from steerling_hf.isolation import run_isolated

# Sizes at which a whole test takes milliseconds; ids and vocabulary are those of steerling-nano's tokenizer.
TINY = {
    "vocab_size": 8200,
    "n_layers": 2,
    "n_head": 4,
    "n_kv_heads": 2,
    "n_embd": 32,
    "block_size": 256,
    "intermediate_size": 48,
    "n_concepts": 20,
    "topk_known": 4,
    "topk_known_features": 4,
    "n_unknown_concepts": 30,
    "unknown_topk": 6,
    "factorize_rank": 8,
    "inject_layer": 1,
    "eos_token_id": 8192,
    "pad_token_id": 8193,
    "bos_token_id": 8194,
    "endofchunk_token_id": 8195,
    "mask_token_id": 8196,
    "start_header_id": 8197,
    "end_header_id": 8198,
    "eot_id": 8199,
    "initializer_range": 0.2,  # wide enough that outputs differ between positions
}


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


_collector = _Collector()
for _name in ("transformers", "accelerate"):
    logging.getLogger(_name).addHandler(_collector)


@pytest.fixture(autouse=True)
def library_warnings() -> Iterator[list[str]]:
    """
    What transformers and accelerate log as a warning or worse, in the test and in the fixtures that it is the first to ask for;
    a test that expects some clears the list.
    """
    # What is said once is said once a test, or nobody would know which test it belongs to.
    library_logging.warning_once.cache_clear()
    library_logging.info_once.cache_clear()
    yield _collector.messages
    messages = _collector.messages.copy()
    _collector.messages.clear()
    assert not messages, f"the library warns: {messages}"


def make_config(**overrides) -> SteerlingConfig:
    return SteerlingConfig(**{**TINY, **overrides})


def make_model(**overrides) -> SteerlingForDiffusionLM:
    torch.manual_seed(0)
    return SteerlingForDiffusionLM(make_config(**overrides)).eval()


@pytest.fixture
def tiny_config() -> Callable[..., SteerlingConfig]:
    """Makes a configuration of toy size; keywords override."""
    return make_config


@pytest.fixture
def tiny_model() -> Callable[..., SteerlingForDiffusionLM]:
    """Makes a model of toy size with seeded random weights, in evaluation mode; keywords override the configuration."""
    return make_model


@pytest.fixture
def tokenizer() -> SteerlingTokenizer:
    """The tokenizer of steerling-nano, which the tiny model shares."""
    return SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))


@pytest.fixture(scope="session")
def exported_folder(tmp_path_factory) -> Path:
    """The tiny model as a Hub folder, code included. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("hub") / "steerling-tiny"
    return export(make_model(), folder)


@pytest.fixture(scope="session")
def exported_nano(tmp_path_factory) -> Path:
    """steerling-nano as a Hub folder, code included. Read it, do not write to it."""
    return export("steerling-nano", tmp_path_factory.mktemp("hub") / "steerling-nano")


STRICT_AND_ALONE = """
import logging, sys, warnings
warnings.simplefilter("error", FutureWarning)
sys.modules["steerling_hf"] = None
class Strict(logging.Handler):
    def emit(self, record):
        raise RuntimeError("the library warns: " + record.getMessage())
logging.getLogger("transformers").addHandler(Strict(logging.WARNING))
"""


@pytest.fixture(scope="session")
def isolated() -> Callable[..., str]:
    """
    Runs code in a fresh interpreter in which steerling_hf cannot be imported and a warning of transformers raises; gives
    what it prints.
    """

    def run(code: str, *arguments: object) -> str:
        return run_isolated(STRICT_AND_ALONE + code, [str(argument) for argument in arguments], timeout=600)

    return run
