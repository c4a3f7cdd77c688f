"""PEFT's LoRA layer over bitsandbytes' ``Linear4bit`` (QLoRA), its forward one operation.

Imported where a model has such a layer: PEFT's class imports bitsandbytes.
"""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit

from fastft.nn.lora import FusedLora

__all__ = ["FusedLora4bit"]


class FusedLora4bit(FusedLora, Linear4bit):  # type: ignore[misc]
    """``peft.tuners.lora.bnb.Linear4bit``, fused; merging quantizes the weight anew, as in PEFT."""

    fastft_original = Linear4bit


FusedLora4bit.__name__ = "Linear4bit"
