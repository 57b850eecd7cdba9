"""Environment, and tiny local models: nothing here touches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU kernels, on the CPU; before triton is imported

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from models import save_tiny_model

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer untied Llama and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(autouse=True)
def _seed() -> None:
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    """The experiments' runner quiets the package for its process; the next test listens again."""
    yield
    logging.getLogger("hf_poprisk").setLevel(logging.NOTSET)
