"""DoRA (weight-decomposed adapters) over a LoRA layer: the scale of its result, and its dropout."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastft import ops

if TYPE_CHECKING:
    from fastft.nn.plans import Plan

__all__ = ["dropped", "forget_norms", "scale_of"]

# By base layer: what tells the weight its norms were taken of, its storage (which, referred to, is
# the only one with its address, freed or not), and the norms.
_norms: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], StorageWeakRef, Tensor]] = (
    weakref.WeakKeyDictionary()
)


def forget_norms(layers: Iterable[Any]) -> None:
    """Norms of these layers' base weights are taken anew when they are next needed."""
    for layer in layers:
        _norms.pop(layer.base_layer, None)


def _frozen_norms(plan: Plan) -> Tensor | None:
    """Squared row norms of the base weight, taken once for as long as it is the same tensor and
    unchanged. A change in place through ``weight.data`` is one that torch does not count: PEFT
    makes such at merging and where an adapter's initialisation alters the base, and both forget
    the norms; whoever makes one besides calls ``restore`` and ``accelerate`` again."""
    weight = plan.parts[0].tensors()[0]
    if weight.requires_grad or torch.compiler.is_compiling() or weight.is_inference():
        return None
    storage = weight.untyped_storage()
    key = (storage._cdata, weight.storage_offset(), weight._version, weight.dtype, weight.shape)
    known = _norms.get(plan.base)
    if known is None or known[0] != key:
        with torch.inference_mode(False):
            norms = ops.squared_row_norms(plan.weight())
        known = _norms[plan.base] = (key, StorageWeakRef(storage), norms)
    return known[2]


def scale_of(plan: Plan) -> Tensor | None:
    """DoRA's magnitude over the norm of the adapted weight; None of a plain layer."""
    magnitude: Any = plan.magnitude()
    if magnitude is None:
        return None
    (parts,) = plan.parts
    adapter = (*parts.tensors()[1:], float(parts.scaling))
    norm = ops.dora_norm(plan.weight(), *adapter, _frozen_norms(plan))
    scale: Tensor = magnitude.weight.to(norm.dtype) / norm
    return scale


def dropped(plan: Plan, x: Tensor) -> Tensor:
    """PEFT's DoRA under dropout, where d = drop(x) takes the place of x in what is scaled, and x
    keeps its own in what is not:

        y = x W^T + bias + (scale - 1) d W^T + scale scaling d A^T B^T
          = scale (d W^T + scaling d A^T B^T) + bias + (x - d) W^T
    """
    (parts,) = plan.parts
    d = nn.functional.dropout(x, parts.dropout_p())
    weight, lora_a, lora_b = plan.weight(), *parts.tensors()[1:]
    (y,) = ops.lora_linear_siblings(
        d,
        [weight],
        [lora_a],
        [lora_b],
        scalings=[float(parts.scaling)],
        biases=[plan.bias()],
        scales=[scale_of(plan)],
    )
    rest = (x - d).reshape(-1, x.shape[-1])
    return torch.addmm(y.reshape(-1, y.shape[-1]), rest, weight.t()).view(y.shape)
