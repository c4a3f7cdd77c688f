"""Copies between a device and pinned host memory, on a stream beside the main one."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from fastft.errors import FastftError

__all__ = ["CudaEngine", "Engine"]


class Engine(Protocol):
    """Two streams of a device and its host memory; a main and a side stream in order each."""

    def host_buffer(self, size: int) -> Tensor:
        """Pinned bytes."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in such memory."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Launches a copy of bytes on the side stream, behind all that the main stream has launched
        so far; returns its event."""

    def wait(self, event: Any) -> None:
        """The main stream goes on behind the event."""

    def finish(self, event: Any) -> None:
        """The host goes on behind the event."""


# From this size on memory is pinned where it lies: torch's own allocator of pinned memory rounds up
# to powers of two.
_ROUNDED = 1 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def _unpin(address: int, device: torch.device) -> None:
    """Before memory goes; a copy of the engine's device may still be on its way."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


class CudaEngine:
    """The engine of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def host_buffer(self, size: int) -> Tensor:
        if size < _ROUNDED:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        with torch.cuda.device(self._device):
            status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, _PORTABLE))
        if status:
            raise FastftError(
                "fastft", "host memory", expected=f"{size} bytes that can be pinned",
                got=f"CUDA error {status}",
                remedy="Free host memory, or raise the limit on locked memory (ulimit -l).",
            )  # fmt: skip
        storage = buffer.untyped_storage()
        ends = weakref.finalize(storage, _unpin, buffer.data_ptr(), self._device)
        ends.atexit = False
        return buffer

    def holds(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()
