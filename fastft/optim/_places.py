"""Where states lie: on the parameters' device, in pinned host memory, or in memory that the driver
pages between the two. And how: as the parameter's elements do."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft import native
from fastft.errors import ArgumentError, BackendError
from fastft.ops.optimizer_step import STATE_BLOCK
from fastft.optim._shards import is_sharded, like_param, local
from fastft.reference.optimizer_step import decode8, encode8

if TYPE_CHECKING:
    from fastft.optim._base import FusedOptimizer
    from fastft.optim._saved import SavedState

__all__ = [
    "PLACES",
    "absmax_name",
    "check_place",
    "coded",
    "decoded",
    "in_order",
    "is_home",
    "lay_out",
    "new_memory",
    "order_of",
    "put",
    "strides_of",
]

PLACES = ("device", "host", "paged")


def new_memory(optimizer: SavedState, place: str, device: torch.device, size: int) -> Tensor:
    """Zeroed bytes in a place, for parameters on ``device``."""
    ring = optimizer.ring_of(device) if place == "host" else None
    if ring is not None:
        return ring.inward.host_buffer(size).zero_()
    paged = place == "paged" and device.type == "cuda"
    pool = torch.cuda.use_mem_pool(_paged_pool(device.index)[0], device) if paged else nullcontext()
    with pool:
        return torch.zeros(size, dtype=torch.uint8, device=device)


@functools.cache
def _paged_pool(index: int) -> tuple[Any, Any]:
    """torch's pool of managed memory on a device, and the allocator that it needs alive."""
    if not native.available() or not native.build_info().get("cuda"):
        raise BackendError(
            "fastft.optim", "states", expected="a build with CUDA for paged states",
            got="one without", remedy="Build where nvcc is found, or use states='host'.",
        )  # fmt: skip
    allocator = torch.cuda.memory.CUDAPluggableAllocator(
        native.module().__file__, "fastft_managed_malloc", "fastft_managed_free"
    )
    with torch.cuda.device(index):
        return torch.cuda.MemPool(allocator.allocator()), allocator


def check_place(optimizer: SavedState, params: Sequence[Tensor]) -> None:
    """Refuses shards whose states would be in host memory: a DTensor is on its mesh's device.

    Raises:
        ArgumentError: one of them.
    """
    for p in params:
        if is_sharded(p) and optimizer.ring_of(local(p).device) is not None:
            raise ArgumentError(
                optimizer._where, "states", expected="'device' or 'paged' for sharded parameters",
                got="'host'", remedy="FSDP2 has its own: CPUOffloadPolicy.",
            )  # fmt: skip


def _place(optimizer: SavedState, name: str) -> str:
    """Of a state; step counts stay beside the parameter."""
    return "device" if name == "step" else optimizer.states


def is_home(optimizer: SavedState, name: str, part: Tensor, device: torch.device) -> bool:
    """Whether a state of a parameter on ``device`` is where this optimizer keeps it; managed memory
    looks like the device's."""
    ring = optimizer.ring_of(device) if _place(optimizer, name) == "host" else None
    if ring is None:
        return part.device == device
    return not part.numel() or (part.device.type == "cpu" and ring.inward.holds(part))


def put(optimizer: SavedState, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A copy of a state, where this optimizer keeps it, with its strides."""
    part = local(value)
    if not part.numel() or not torch.ops.aten.is_non_overlapping_and_dense(part):
        part = part.contiguous()
    memory = new_memory(optimizer, _place(optimizer, name), device, part.nbytes)
    own = memory.view(part.dtype).as_strided(part.shape, part.stride()).copy_(part)
    return like_param(own, value) if is_sharded(value) else own


# How: kernels take elements as they lie in memory, where blocks of 8-bit states are of neighbours.


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
