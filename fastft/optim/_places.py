"""Where states lie: on the parameters' device, in pinned host memory, or in memory that the driver
pages between the two."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft import native
from fastft.errors import BackendError
from fastft.optim._shards import like_param, local

if TYPE_CHECKING:
    from fastft.optim._saved import SavedState

__all__ = ["PLACES", "home", "new_memory", "put"]

PLACES = ("device", "host", "paged")


def new_memory(optimizer: SavedState, place: str, device: torch.device, size: int) -> Tensor:
    """Zeroed bytes in a place, for parameters on ``device``."""
    ring = optimizer.ring_of(device) if place == "host" else None
    if ring is not None:
        return ring.inward.host_buffer(size).zero_()
    if place == "paged" and device.type == "cuda":
        with torch.cuda.use_mem_pool(_paged_pool(device.index)):
            return torch.zeros(size, dtype=torch.uint8, device=device)
    return torch.zeros(size, dtype=torch.uint8, device=device)


@functools.cache
def _paged_pool(index: int) -> Any:
    """torch's pool of managed memory on a device."""
    if not native.available() or not native.build_info().get("cuda"):
        raise BackendError(
            "fastft.optim", "states", expected="a build with CUDA for paged states",
            got="one without", remedy="Build where nvcc is found, or use states='host'.",
        )  # fmt: skip
    allocator = torch.cuda.memory.CUDAPluggableAllocator(
        native.module().__file__, "fastft_managed_malloc", "fastft_managed_free"
    )
    with torch.cuda.device(index):
        return torch.cuda.MemPool(allocator.allocator())


def home(optimizer: SavedState, name: str, device: torch.device) -> tuple[str, torch.device]:
    """The place of a state of a parameter on ``device``, and the device that torch says it is on.
    Step counts stay beside the parameter."""
    if name == "step" or optimizer.states == "device":
        return "device", device
    if optimizer.states == "host" and optimizer.ring_of(device) is not None:
        return "host", torch.device("cpu")
    return optimizer.states, device


def put(optimizer: SavedState, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A copy of a state, where this optimizer keeps it, with its strides."""
    part = local(value)
    if not part.numel() or not torch.ops.aten.is_non_overlapping_and_dense(part):
        part = part.contiguous()
    memory = new_memory(optimizer, home(optimizer, name, device)[0], device, part.nbytes)
    own = memory.view(part.dtype).as_strided(part.shape, part.stride()).copy_(part)
    return like_param(own, value)
