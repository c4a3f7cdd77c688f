"""``Ring``: states in pinned host memory, of which a piece at a time visits the device.

    host   state of piece k+1 ->|                        |-> state of piece k-1
    ring                  slot k+1      slot k        slot k-1
    main stream                         step of piece k

Two streams copy, one a direction, so that both directions of the bus are busy. What makes it safe:

* a piece comes into a slot behind what the main stream had launched, which has waited for the copy
  of the piece before it out of that slot;
* the main stream steps a piece behind its copy in, and the copy out goes behind that step;
* a step begins by waiting for all that the last one sent: no piece comes in before it went out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.streams import CudaEngine, Engine

__all__ = ["RING_BYTES", "SLOTS", "Ring", "new_ring"]

SLOTS = 3
# Bytes of state that visit the device at a time: enough for a bus to reach its rate.
PIECE_BYTES = 64 << 20
# What the slots take of it.
RING_BYTES = SLOTS * PIECE_BYTES

# (host bytes, bytes of a slot) of each copy of a piece.
Runs = Sequence[tuple[Tensor, Tensor]]


class Ring:
    """Slots of device memory, and what is on its way out of them."""

    piece_bytes = PIECE_BYTES

    def __init__(self, inward: Engine, outward: Engine, device: torch.device) -> None:
        self.inward, self.outward, self._device = inward, outward, device
        self._leaving: dict[int, Any] = {}
        self._last: Any = None
        self._slots: list[Tensor] = []

    def slots(self, size: int) -> list[Tensor]:
        """The slots, each of at least so many bytes."""
        if not self._slots or self._slots[0].numel() < size:
            self.begin()
            # Of states that grow, few sizes: whoever made its pieces in the old slots holds them.
            size = max(size, min(self.piece_bytes, 1 << size.bit_length()))
            self._slots = [
                torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(SLOTS)
            ]
        return self._slots

    def begin(self) -> None:
        """The main stream goes on behind all that was sent."""
        for event in self._leaving.values():
            self.outward.wait(event)
        self._leaving = {}

    def finish(self) -> None:
        """The host goes on behind all that was sent: states can be read."""
        if self._last is not None:
            self.outward.finish(self._last)

    def bring(self, slot: int, runs: Runs) -> Any:
        """Launches the copies of a piece into a slot; the event of their end."""
        event = None
        if slot in self._leaving:
            self.outward.wait(self._leaving.pop(slot))
        for host, here in runs:
            event = self.inward.copy(here, host)
        return event

    def send(self, slot: int, runs: Runs) -> None:
        """Launches the copies of a piece back."""
        for host, here in runs:
            self._leaving[slot] = self._last = self.outward.copy(host, here)


def new_ring(device: torch.device) -> Ring | None:
    """The ring of a device; None where host memory is its own."""
    if device.type != "cuda":
        return None
    return Ring(CudaEngine(device), CudaEngine(device), device)
