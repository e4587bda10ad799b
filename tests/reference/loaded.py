"""Models of the recorded cases, as the parity tests load them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from steerling_hf import SteerlingForDiffusionLM

from .cases import make_weights
from .folders import write_folder


def loaded_models(tmp_path_factory: Any, case_of: Callable[[str], Any]) -> Iterator[Callable[[str], torch.nn.Module]]:
    """For a fixture: a function from a case's name to its model, each loaded once; meanwhile torch has one thread."""
    loaded: dict[str, torch.nn.Module] = {}

    def get(name: str) -> torch.nn.Module:
        if name not in loaded:
            case, folder = case_of(name), tmp_path_factory.mktemp(name)
            write_folder(folder, case.config, make_weights(case.config, case.seed, case.weight_gain))
            loaded[name] = SteerlingForDiffusionLM.from_pretrained(folder)
        return loaded[name]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield get
    torch.set_num_threads(threads)
