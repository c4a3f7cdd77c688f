"""Frozen weights in bitsandbytes' 4 bits (QLoRA): their values are made when a call needs them, and
again in its backward, as bitsandbytes itself does (Dettmers et al. 2023, "QLoRA").

bitsandbytes is imported where a model has such a layer, by whoever made it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Dense",
    "dtype_of",
    "is_4bit",
    "remember",
    "shape_of",
    "state_refusal",
    "unpack",
    "unpack_all",
]

# The attribute of a quantization state that holds what it was before bitsandbytes packed it.
_BEFORE = "fastft_before_packing"


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


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter's values."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def state_refusal(base: Any) -> str | None:
    """Why the values of a 4-bit layer's weight cannot be made here as it stands; None when they
    can."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "4-bit weight without its quantization state"
    if tuple(state.shape) != (base.out_features, base.in_features):
        return "4-bit weight of another layout"
    if not base.compute_type_is_set or base.compute_dtype is None:
        return "4-bit layer that has not chosen its dtype yet"
    return None


def remember(weight: Any) -> None:
    """Keeps a state as it is, for :func:`unpack`: a layer in eval mode on a CPU that multiplies
    bfloat16 packs its weight at its first call, and rounds the state in place."""
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or _packed(state):
        return
    vars(state).pop(_BEFORE, None)
    setattr(state, _BEFORE, _copied(state))


def unpack(weight: Any) -> None:
    """Undoes that packing, in place: of packed weights bitsandbytes has no gradients, and none
    of its other functions expects them. Its own inverse rounds the scales, and leaves those that
    are not quantized themselves transposed."""
    state: Any = getattr(weight, "quant_state", None)
    if not _packed(state):
        if state is not None and state.absmax.dim() == 2:  # that inverse has run, in a save
            state.absmax = state.absmax.t().reshape(-1).float()
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    before, scales = vars(state).pop(_BEFORE, None), state.absmax.t().reshape(-1).float()
    weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if before is not None:
        vars(state).clear()
        vars(state).update(vars(before))
    elif not state.nested:
        state.absmax = scales


# The 4-bit layers of a model.
_layers: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def unpack_all(root: nn.Module) -> None:
    """Unpacks every 4-bit weight of a model that is about to be trained: gradients go through
    layers without an adapter, too."""
    found = _layers.get(root)
    if found is None:
        found = _layers[root] = [weakref.ref(m) for m in root.modules() if is_4bit(m)]
    for ref in found:
        layer = ref()
        if layer is not None:
            unpack(layer.weight)


def _packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _copied(state: Any) -> Any:
    """``copy.copy`` of an object that holds its attributes only, in a fifth of the time."""
    made = object.__new__(type(state))
    vars(made).update(vars(state))
    return made


class Dense:
    """Makes the values of a 4-bit layer's weight, (out_features, in_features), as they were when it
    was made: bitsandbytes packs a weight for inference, and moves it, by changing what it holds."""

    __slots__ = ("dtype", "held", "state")

    def __init__(self, base: Any) -> None:
        weight = base.weight
        self.held, self.dtype = weight.data, base.compute_dtype
        self.state = _copied(weight.quant_state)

    def packed(self) -> bool:
        """Whether the weight is packed for inference on a CPU."""
        return _packed(self.state)

    def __call__(self) -> Tensor:
        """The values as bitsandbytes' backward has them: rounded to the dtype of the weight that
        was quantized, then to the layer's dtype of products."""
        return self._values(self.state).to(self.dtype)

    def forward(self) -> Tensor:
        """As its forward has them: in the dtype of products at once."""
        if self.state.dtype == self.dtype:
            return self()
        state = _copied(self.state)
        state.dtype = self.dtype
        return self._values(state)

    @torch.no_grad()
    def _values(self, state: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.held.view(-1, 1), state)  # type: ignore[no-any-return]
