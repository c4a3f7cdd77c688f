"""Copies between a device and pinned host memory, on a stream beside the main one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaEngine", "Engine"]


class Engine(Protocol):
    """Two streams of a device and its host memory; a main and a side stream in order each."""

    def host_buffer(self, size: int) -> Tensor:
        """Pinned bytes."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Launches a copy of bytes on the side stream, behind all that the main stream has launched
        so far; returns its event."""

    def wait(self, event: Any) -> None:
        """The main stream goes on behind the event."""

    def finish(self, event: Any) -> None:
        """The host goes on behind the event."""


class CudaEngine:
    """The engine of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()
