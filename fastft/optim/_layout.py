"""How parameters and their states lie in memory: kernels take elements as they lie, and a block of
8-bit states is of neighbours there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastft.ops.optimizer_step import STATE_BLOCK
from fastft.optim._places import put
from fastft.optim._shards import like_param, local
from fastft.reference.optimizer_step import decode8, encode8

if TYPE_CHECKING:
    from fastft.optim._base import FusedOptimizer

__all__ = [
    "absmax_name",
    "coded",
    "decoded",
    "in_order",
    "lay_out",
    "order_of",
    "strides_of",
]


def order_of(param: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which a dense tensor lies in memory; None for the usual one."""
    if param.is_contiguous():
        return None
    strides = param.stride()
    order = tuple(sorted(range(param.dim()), key=lambda d: -strides[d]))
    return order if param.permute(order).is_contiguous() else None


def strides_of(param: Tensor) -> tuple[int, ...]:
    """Of the states: the parameter's, but for its gaps."""
    gaps = not param.is_contiguous() and order_of(param) is None
    return param.contiguous().stride() if gaps else param.stride()


def in_order(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """With its dimensions in an order."""
    return tensor if order is None else tensor.permute(order)


def absmax_name(state: str) -> str:
    """state1 -> absmax1: the key of the scales of an 8-bit state."""
    return "absmax" + state.removeprefix("state")


def decoded(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """What 8-bit codes stand for, in float32.

    The largest magnitude of a block stands for itself, also where it is negative (no code is -1),
    so that coding the values again gives the codes and scales back.
    """
    order = order_of(codes)
    flat = in_order(codes, order).contiguous()
    values = decode8(flat, absmax, signed, torch.float32)
    if signed:
        scales = absmax.repeat_interleave(STATE_BLOCK)[: flat.numel()].view_as(flat)
        values = torch.where(flat == 0, -scales, values)
    return values if order is None else values.permute([order.index(d) for d in range(len(order))])


def coded(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The other way: codes that lie as the values do, and the scales of their blocks."""
    order = order_of(values)
    codes, absmax = encode8(in_order(values, order).contiguous().float(), signed)
    if order is not None:
        codes = codes.permute([order.index(d) for d in range(len(order))])
    return codes, absmax


def lay_out(optimizer: FusedOptimizer, p: Tensor, strides: tuple[int, ...]) -> None:
    """States of a parameter that are there take these strides."""
    state, device = optimizer.state_of(p), local(p).device
    for number, name in enumerate((*optimizer.state_names, "compensation")):
        value = state.get(name)
        if value is None or value.shape != p.shape or local(value).stride() == strides:
            continue
        part, scale = local(value), absmax_name(name)
        is_coded = part.dtype == torch.uint8 and scale in state
        if is_coded:
            part = decoded(part, local(state[scale]), number == 0)
        laid = torch.empty_strided(part.shape, strides, dtype=part.dtype, device=part.device)
        laid.copy_(part)
        if is_coded:
            laid, scales = coded(laid, number == 0)
            state[scale] = put(optimizer, scale, scales, device)
        state[name] = put(optimizer, name, like_param(laid, p), device)
