"""Drop-in: ``accelerate``, ``restore``, ``explain``, ``lora``, ``patch_peft``."""

from __future__ import annotations

from fastft.patch.apply import accelerate, lora, restore
from fastft.patch.peft_patch import patch_peft, unpatch_peft
from fastft.patch.report import Explanation, explain

__all__ = [
    "Explanation",
    "accelerate",
    "explain",
    "lora",
    "patch_peft",
    "restore",
    "unpatch_peft",
]
