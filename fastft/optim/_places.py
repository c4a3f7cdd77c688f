"""Where states lie: on the parameters' device, in pinned host memory, or in memory that the driver
pages between the two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft import native
from fastft.errors import ArgumentError, BackendError
from fastft.optim._shards import is_sharded, like_param, local

if TYPE_CHECKING:
    from fastft.optim._saved import SavedState

__all__ = ["PLACES", "check_place", "is_home", "new_memory", "put"]

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
