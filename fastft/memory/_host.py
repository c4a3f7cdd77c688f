"""Tensors parked in host memory between forward and backward: a pool of pinned buffers, one side
stream, and events that keep every read behind its write.

The order that makes it safe:

* a copy to the host waits for what the main stream had launched before it (the tensor is written);
* the main stream waits for that copy before the tensor's memory is given back, ``window`` copies
  later, so that a copy runs beside the next layer and memory is still freed in order;
* a copy back is launched one layer early, into memory that the main stream allocated, after what
  the main stream had launched then (whoever had that memory before is done with it);
* the main stream waits for the copy back before the tensor is used;
* copies in both directions share one stream, so a host buffer is free for the next copy as soon as
  the copy out of it is launched.

Any dtype, bit for bit: bytes are copied, strides are kept.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.streams import Engine

__all__ = ["HostRing", "MetaRing", "Parked"]


@dataclass(eq=False)
class Parked:
    """One tensor in host memory; when this is freed, its host buffer serves another.

    Attributes:
        place: its number in the order of parking: the backward asks from the last to the first.
        host: its bytes. size, stride, dtype, device: of the tensor.
    """

    place: int
    host: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class HostRing:
    """Parks tensors and brings them back.

    Args:
        engine: the device's streams.
        window: how many parked tensors may still hold device memory while they are copied.
        ahead: how many tensors are copied back before they are asked for.
    """

    def __init__(self, engine: Engine, window: int = 2, ahead: int = 1) -> None:
        self._engine, self._window, self._ahead = engine, window, ahead
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        # By place: device memory that is being copied into, and the event of the copy.
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._parked: weakref.WeakValueDictionary[int, Parked] = weakref.WeakValueDictionary()
        self._count = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned memory, in use or waiting for use."""
        used = sum(p.host.numel() for p in self._parked.values())
        return used + sum(size * len(buffers) for size, buffers in self._free.items())

    def park(self, tensor: Tensor) -> Parked:
        """Launches the copy to the host; the tensor is held until the main stream may free it."""
        self._drop_coming()
        tensor = tensor.detach()
        if not _dense(tensor):
            tensor = tensor.contiguous()
        size = tensor.nbytes
        buffers = self._free[_rounded(size)]
        whole = buffers.pop() if buffers else self._engine.host_buffer(_rounded(size))
        host = whole[:size]
        try:
            self._leaving.append((tensor, self._engine.copy(host, _bytes(tensor))))
        except BaseException:
            buffers.append(whole)
            raise
        while len(self._leaving) > self._window:
            self._release()
        facts = (tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype, tensor.device)
        parked = Parked(self._count, host, *facts)
        # Copies out of a buffer and into it are in one stream: it is free once nobody asks for it.
        weakref.finalize(parked, self._gone, self._count, buffers, whole)
        self._parked[self._count] = parked
        self._count += 1
        return parked

    def _release(self) -> None:
        """The main stream waits for the oldest copy, and its tensor is let go."""
        _, event = self._leaving.popleft()
        self._engine.wait(event)

    def _gone(self, place: int, buffers: list[Tensor], whole: Tensor) -> None:
        """Nobody will ask for it: a copy on its way back ends before its memory is freed."""
        coming = self._coming.pop(place, None)
        if coming is not None:
            self._engine.wait(coming[1])
        buffers.append(whole)

    def _drop_coming(self) -> None:
        """What a backward that broke off would have fetched: copied into before it is freed."""
        for _, event in self._coming.values():
            self._engine.wait(event)
        self._coming.clear()

    def fetch(self, parked: Parked) -> Tensor:
        """The tensor, on its device again; those before it start on their way back."""
        while self._leaving:  # the backward has begun
            self._release()
        self._bring(parked)
        for place in range(parked.place - 1, parked.place - 1 - self._ahead, -1):
            before = self._parked.get(place)
            if before is not None:
                self._bring(before)
        flat, event = self._coming.pop(parked.place)
        self._engine.wait(event)
        return flat.view(parked.dtype).as_strided(parked.size, parked.stride)

    def _bring(self, parked: Parked) -> None:
        """Launches the copy back, where it is not on its way."""
        if parked.place not in self._coming:
            flat = torch.empty(parked.host.numel(), dtype=torch.uint8, device=parked.device)
            self._coming[parked.place] = (flat, self._engine.copy(flat, parked.host))


class MetaRing:
    """Of meta tensors: nothing is copied, all is counted, what is on its way among it.

    Attributes:
        host_bytes: bytes that are parked.
    """

    def __init__(self, window: int = 2, ahead: int = 1) -> None:
        self.host_bytes = 0
        self._window, self._ahead = window, ahead
        self._leaving: deque[Tensor] = deque()
        self._coming: dict[int, Tensor] = {}
        self._parked: weakref.WeakValueDictionary[int, Parked] = weakref.WeakValueDictionary()
        self._count = 0

    def park(self, tensor: Tensor) -> Parked:
        """The tensor's facts; it is let go as the ring lets it go."""
        self._coming.clear()
        size = tensor.nbytes
        facts = (tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype, tensor.device)
        parked = Parked(self._count, torch.empty(0), *facts)
        self.host_bytes += size
        weakref.finalize(parked, self._gone, self._count, size)
        self._parked[self._count] = parked
        self._count += 1
        self._leaving.append(tensor.detach())
        while len(self._leaving) > self._window:
            self._leaving.popleft()
        return parked

    def _gone(self, place: int, size: int) -> None:
        self.host_bytes -= size
        self._coming.pop(place, None)

    def fetch(self, parked: Parked) -> Tensor:
        """A tensor of those facts, and room for those before it."""
        self._leaving.clear()
        for place in range(parked.place, parked.place - 1 - self._ahead, -1):
            before = parked if place == parked.place else self._parked.get(place)
            if before is not None and place not in self._coming:
                self._coming[place] = torch.empty_strided(
                    before.size, before.stride, dtype=before.dtype, device=before.device
                )
        return self._coming.pop(parked.place)


def _rounded(size: int) -> int:
    """Up to an eighth more, so that steps of varying lengths share their buffers."""
    step = max(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def _dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _bytes(tensor: Tensor) -> Tensor:
    """A dense tensor's memory, in the order it lies there."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
