"""``patch_peft``: PEFT makes fused layers by itself, in the whole process, until unpatched."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import peft.tuners.lora.model as peft_lora_model
from peft.import_utils import is_bnb_4bit_available

from fastft.nn.conv import FUSED_CONVS
from fastft.nn.embedding import FusedLoraEmbedding
from fastft.nn.lora import FusedLoraLinear
from fastft.nn.lora_product import fused_over

__all__ = ["patch_peft", "unpatch_peft"]

_FUSED: dict[type, Any] = {
    **FUSED_CONVS,
    **{fused.fastft_original: fused for fused in (FusedLoraLinear, FusedLoraEmbedding)},
}

# PEFT's functions that make layers, while others stand in their places.
_originals: dict[tuple[ModuleType, str], Callable[..., Any]] = {}


def _fusing(make: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's ``make``; a layer that has a fused class comes out as that."""

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        layer = make(*args, **kwargs)
        fused = _FUSED.get(type(layer)) or fused_over(type(layer))
        if fused is not None:
            layer.__class__ = fused
        return layer

    return dispatch


def _replace(module: ModuleType, name: str) -> None:
    make = _originals[module, name] = getattr(module, name)
    setattr(module, name, _fusing(make))


def patch_peft() -> None:
    """From now on ``get_peft_model``, ``model.add_adapter`` and TRL's ``peft_config=`` give fused
    layers. Models made before keep theirs. Calling it twice changes nothing."""
    if _originals:
        return
    _replace(peft_lora_model, "dispatch_default")
    for package in ("aqlm", "awq", "eetq", "gptq", "hqq", "inc", "torchao"):
        _replace(peft_lora_model, f"dispatch_{package}")
    if is_bnb_4bit_available():  # PEFT imports it, too, when it makes a layer
        import peft.tuners.lora.bnb as peft_bnb

        from fastft.nn.lora_4bit import FusedLora4bit

        _FUSED[peft_bnb.Linear4bit] = FusedLora4bit
        _replace(peft_bnb, "dispatch_bnb_4bit")
        _replace(peft_bnb, "dispatch_bnb_8bit")


def unpatch_peft() -> None:
    """Undoes :func:`patch_peft`; models made meanwhile keep their fused layers."""
    while _originals:
        (module, name), make = _originals.popitem()
        setattr(module, name, make)
