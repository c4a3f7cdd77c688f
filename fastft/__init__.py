"""Fused kernels for LoRA fine-tuning under PEFT's own layers.

    model = fastft.accelerate(peft_model)   # in place; a PeftModel stays a PeftModel
    print(fastft.explain(model))            # what is fused, by which backend, and why not
    fastft.restore(model)                   # and back, bit for bit

Importing fastft imports torch and nothing heavier: no CUDA context, no Triton, no PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastft._version import __version__

if TYPE_CHECKING:
    from fastft import backends, errors, losses, memory, native, nn, ops, optim
    from fastft.patch import (
        accelerate,
        explain,
        lora,
        mixed_batch,
        patch_peft,
        restore,
        unpatch_peft,
    )

__all__ = [
    "__version__",
    "accelerate",
    "backends",
    "errors",
    "explain",
    "lora",
    "losses",
    "memory",
    "mixed_batch",
    "native",
    "nn",
    "ops",
    "optim",
    "patch_peft",
    "restore",
    "unpatch_peft",
]

_SUBMODULES = ("backends", "errors", "losses", "memory", "native", "nn", "ops", "optim")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"fastft.{name}")
    if name in __all__:
        return getattr(importlib.import_module("fastft.patch"), name)
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
