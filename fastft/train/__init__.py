"""The workflow on top of Transformers, PEFT and datasets: ``fastft train`` and ``fastft demo``.

Names are loaded on first use, so that the command line starts without importing Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.train.adapters import load_adapter, save_adapter
    from fastft.train.config import TrainConfig, load_config
    from fastft.train.models import load_model, obtain_default_model
    from fastft.train.run import TrainResult, train
    from fastft.train.together import train_together

__all__ = [
    "TrainConfig",
    "TrainResult",
    "load_adapter",
    "load_config",
    "load_model",
    "obtain_default_model",
    "save_adapter",
    "train",
    "train_together",
]

_HOME = {
    "TrainConfig": "config",
    "TrainResult": "run",
    "load_adapter": "adapters",
    "load_config": "config",
    "load_model": "models",
    "obtain_default_model": "models",
    "save_adapter": "adapters",
    "train": "run",
    "train_together": "together",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
