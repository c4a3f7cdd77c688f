"""What a run needs, tiny: a model folder, a data file, a configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Before torch starts its threads: a product of 64 x 64 gains nothing from two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.train.tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("even", "odd")
    rows = [{"prompt": f"what is {i}?", "completion": f"{i} is {words[i % 2]}"} for i in range(48)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def settings(model_folder, data_file, tmp_path) -> dict:
    """Keys of a TrainConfig for a run of a few tenths of a second."""
    return {
        "model": str(model_folder),
        "data": str(data_file),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "dtype": "float32",
    }
