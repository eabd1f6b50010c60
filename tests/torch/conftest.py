"""Fixtures of the tests that need torch: tiny random models on disk, made once per session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable

import pytest
import torch
import transformers
from torch_support import ARCHITECTURES, TinyModel

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()  # as the project's own torch processes do


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """The tiny model of an architecture, made when first asked for."""
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            made[name] = TinyModel(tmp_path_factory.mktemp(name), ARCHITECTURES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def llama(zoo: Callable[[str], TinyModel]) -> TinyModel:
    return zoo("llama")
