"""Frozen weights of layers that share an input, laid out as one buffer with room for their adapters
(``accelerate(pack_weights=True)``).

It happens once, when the layers that share an input are known: between two forwards. A layer's
weight stays the parameter it was and becomes a view. What needs the weight as it was (merging,
``restore``) takes it out again.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastft import ops
from fastft.ops._checks import autocast_dtype

if TYPE_CHECKING:
    from fastft.nn.plans import Plan

__all__ = ["pack", "packed", "packs", "shared_storages", "unpack", "wanted"]

# Models that asked for it.
wanted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# By base layer, beside it and not in it: a copy or a saved layer carries none. Siblings hold the
# same one.
_held: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def packed(layer: Any) -> bool:
    """Whether the layer's weight is, still, a view of a packed buffer."""
    return _packed(layer.base_layer)


def _packed(base: Any) -> bool:
    held = _held.get(base)
    return held is not None and any(
        base.weight.data_ptr() == view.data_ptr() for view in held.weights
    )


def packs(layer: Any, plan: Plan | str, shared: Container[int]) -> bool:
    """Whether one product can serve the layer: plain LoRA of one adapter on a dense frozen weight
    that is the layer's own. shared: addresses of storages that several parameters have."""
    if isinstance(plan, str) or len(plan.parts) != 1 or plan.spans is not None:
        return False
    weight = layer.base_layer.weight
    return (
        type(layer.base_layer) is nn.Linear
        and plan.parts[0].variant is None
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.is_contiguous()
        and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        and weight.device.type != "meta"
        and weight.untyped_storage().data_ptr() not in shared
        # Under autocast float32 weights are cast at each call, and no view is passed on.
        and not (weight.dtype == torch.float32 and autocast_dtype(weight.device.type) is not None)
    )


def shared_storages(model: nn.Module) -> set[int]:
    """Addresses of the storages that more than one parameter lies in."""
    seen: set[int] = set()
    shared: set[int] = set()
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type != "meta":
            address = parameter.untyped_storage().data_ptr()
            (shared if address in seen else seen).add(address)
    return shared


@torch.inference_mode(False)
@torch.no_grad()
def pack(layers: Sequence[Any], plans: Sequence[Plan | str], shared: Container[int]) -> None:
    """Packs the weights of layers that share an input, in the order they are called; nothing where
    one of them cannot be, they differ in dtype, or the backend has no use for it."""
    if not all(packs(layer, plan, shared) for layer, plan in zip(layers, plans, strict=True)):
        return
    weights = [layer.base_layer.weight for layer in layers]
    adapters = [plan.parts[0].a.weight for plan in plans]  # type: ignore[union-attr]
    if len({(w.dtype, w.device) for w in weights}) > 1 or len({a.dtype for a in adapters}) > 1:
        return
    held = ops.lay_out_weights(weights, [a.shape[0] for a in adapters], adapters[0].dtype)
    if held is None:
        return
    for layer, weight, view in zip(layers, weights, held.weights, strict=True):
        weight.data = view
        _held[layer.base_layer] = held


@torch.inference_mode(False)
@torch.no_grad()
def unpack(modules: Iterable[Any]) -> None:
    """Gives packed layers among the modules, PEFT's or the base layers themselves, dense weights of
    their own again, the same bits."""
    for module in modules:
        base = module._modules.get("base_layer", module)
        if _packed(base):
            base.weight.data = base.weight.data.contiguous()
        _held.pop(base, None)
