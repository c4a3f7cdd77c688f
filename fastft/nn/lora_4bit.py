"""PEFT's LoRA layer over bitsandbytes' ``Linear4bit`` (QLoRA), its forward one operation.

Imported where a model has such a layer: PEFT's class imports bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit

from fastft.nn.lora import FusedLora
from fastft.nn.plans import Plan
from fastft.nn.quantized import remember, unpack

__all__ = ["FusedLora4bit"]


def _weight(layer: Any) -> Any:
    return layer.base_layer.weight


class FusedLora4bit(FusedLora, Linear4bit):  # type: ignore[misc]
    """``peft.tuners.lora.bnb.Linear4bit``, fused; merging quantizes the weight anew, as in PEFT.

    A weight stays packed for a CPU's inference only as long as that is all it is used for.
    """

    fastft_original = Linear4bit

    def plan(self, x: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Plan | str:
        """What a call with x computes, or why it cannot be fused."""
        if not torch.compiler.is_compiling():
            base: Any = self.base_layer
            if self.lora_variant:  # PEFT's DoRA reads the weight itself: in this mode it stays
                base.training = True
            if self.training or torch.is_grad_enabled() or self.lora_variant:
                unpack(base.weight)
            remember(base.weight)
        return super().plan(x, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """PEFT's merge."""
        unpack(_weight(self))
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """PEFT's unmerge."""
        unpack(_weight(self))
        super().unmerge()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unpack(_weight(self))
        super()._save_to_state_dict(*args, **kwargs)


FusedLora4bit.__name__ = "Linear4bit"
