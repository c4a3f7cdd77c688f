"""``patch_peft``: PEFT makes fused layers by itself, in the whole process, until unpatched."""

from __future__ import annotations

from typing import Any

import peft.tuners.lora.model as peft_lora_model

from fastft.nn.conv import FUSED_CONVS
from fastft.nn.embedding import FusedLoraEmbedding
from fastft.nn.lora import FusedLoraLinear

__all__ = ["patch_peft", "unpatch_peft"]

_original = peft_lora_model.dispatch_default
_FUSED: dict[type, Any] = {
    **FUSED_CONVS,
    **{fused.fastft_original: fused for fused in (FusedLoraLinear, FusedLoraEmbedding)},
}


def _dispatch_fused(*args: Any, **kwargs: Any) -> Any:
    """PEFT's ``dispatch_default``; a layer that has a fused class comes out as that."""
    layer = _original(*args, **kwargs)
    fused = _FUSED.get(type(layer))
    if fused is not None:
        layer.__class__ = fused
    return layer


def patch_peft() -> None:
    """From now on ``get_peft_model``, ``model.add_adapter`` and TRL's ``peft_config=`` give fused
    layers. Models made before keep theirs. Calling it twice changes nothing."""
    peft_lora_model.dispatch_default = _dispatch_fused


def unpatch_peft() -> None:
    """Undoes :func:`patch_peft`; models made meanwhile keep their fused layers."""
    peft_lora_model.dispatch_default = _original
