"""Drop-in: ``accelerate``, ``restore``, ``explain``, ``lora``, ``mixed_batch``, ``patch_peft``."""

from __future__ import annotations

from fastft.nn.mixed import mixed_batch
from fastft.patch.apply import accelerate, lora, restore
from fastft.patch.peft_patch import patch_peft, unpatch_peft
from fastft.patch.report import Explanation, explain

__all__ = [
    "Explanation",
    "accelerate",
    "explain",
    "lora",
    "mixed_batch",
    "patch_peft",
    "restore",
    "unpatch_peft",
]
