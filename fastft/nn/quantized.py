"""Frozen weights in bitsandbytes' 4 bits (QLoRA): their values are made when a call needs them, and
again in its backward, as bitsandbytes itself does (Dettmers et al. 2023, "QLoRA").

bitsandbytes is imported where a model has such a layer, by whoever made it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Dense", "dtype_of", "is_4bit", "state_refusal"]


def is_4bit(base: nn.Module) -> bool:
    """Whether a base layer is bitsandbytes' ``Linear4bit``."""
    kind = type(base)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype that a layer's weight has in products. The layer says it: its weight forgets whose
    it is where it is moved."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.dtype  # type: ignore[no-any-return]
    return getattr(layer, "compute_dtype", None) or state.dtype  # type: ignore[no-any-return]


def state_refusal(base: Any) -> str | None:
    """Why the values of a 4-bit layer's weight cannot be made here as it stands; None when they
    can."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "4-bit weight without its quantization state"
    if _is_packed(state) and _unpack() is None:
        return "4-bit weight packed for inference on a CPU"
    if tuple(state.shape) != (base.out_features, base.in_features):
        return "4-bit weight of another layout"
    if not base.compute_type_is_set or base.compute_dtype is None:
        return "4-bit layer that has not chosen its dtype yet"
    return None


def _is_packed(state: Any) -> bool:
    """Whether bitsandbytes has laid the weight out anew in an evaluation, which it does for good on
    a CPU that multiplies bfloat16. Its product of such a weight has no gradient."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpack() -> Any:
    """bitsandbytes' function for that weight as it was, where it has one."""
    from bitsandbytes import functional

    return getattr(functional, "_convert_weight_packed_for_cpu_inverse", None)


class Dense:
    """Makes the values of a 4-bit layer's weight, (out_features, in_features), as they were when it
    was made: bitsandbytes packs a weight for inference, and moves it, by changing what it holds."""

    __slots__ = ("dtype", "held", "state")

    def __init__(self, base: Any) -> None:
        self.held, self.dtype = base.weight.data, base.compute_dtype
        self.state = copy.copy(base.weight.quant_state)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The values, in the layer's dtype of products."""
        from bitsandbytes.functional import dequantize_4bit

        held, state = self.held, self.state
        if _is_packed(state):
            scales, state = state.absmax, copy.copy(state)
            state.original_nested = False  # else it rounds the scales once more
            held, state = _unpack()(held, state)
            state.absmax = scales.t().reshape(-1).float()
        return dequantize_4bit(held.view(-1, 1), state).to(self.dtype)  # type: ignore[no-any-return]
