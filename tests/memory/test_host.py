"""The host ring on a device that is late: copies happen as late as the events allow, freed memory
is poisoned, and still every tensor comes back bit for bit."""

from __future__ import annotations

import ctypes
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastft.memory._host import HostRing, MetaRing

POISON = 0xAB


class LateEngine:
    """Two streams of which nothing runs before it must. The main stream's work is what the test
    does at once, in the order in which it "launches" it; the side stream's copies wait in a queue.

    A copy runs when somebody waits for its event, or at random. Its source and target are looked at
    only then: whoever freed or overwrote them too early is found out.
    """

    def __init__(self, seed: int) -> None:
        self.queue: list[tuple[int, Callable[[], None]]] = []
        self.launched = 0
        self.random = random.Random(seed)
        self.pinned: list[Tensor] = []

    def host_buffer(self, size: int) -> Tensor:
        self.pinned.append(torch.full((size,), POISON, dtype=torch.uint8))
        return self.pinned[-1]

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in [
            t.untyped_storage().data_ptr() for t in self.pinned
        ]

    def copy(self, target: Tensor, source: Tensor) -> int:
        storages = weakref.ref(target.untyped_storage()), weakref.ref(source.untyped_storage())
        places = target.data_ptr(), source.data_ptr(), target.numel()

        def run() -> None:
            assert all(storage() is not None for storage in storages), "memory freed under a copy"
            ctypes.memmove(*places)

        self.launched += 1
        self.queue.append((self.launched, run))
        if self.random.random() < 0.3:
            self.run_until(self.queue[self.random.randrange(len(self.queue))][0])
        return self.launched

    def wait(self, event: int) -> None:
        self.run_until(event)

    def finish(self, event: int) -> None:
        self.run_until(event)

    def run_until(self, event: int) -> None:
        while self.queue and self.queue[0][0] <= event:
            self.queue.pop(0)[1]()


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for i in range(9):
        x = torch.randn(4, 6, 8, generator=generator)
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[i % 4]
        x = x.to(dtype)
        made.append((x, x.transpose(0, 1), x[:, ::2], torch.isnan(x))[i % 4])
    made[0][0, 0, 0] = float("nan")
    return made


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("window", "ahead"), [(2, 1), (1, 0), (4, 3)])
def test_everything_comes_back_bit_for_bit(seed: int, window: int, ahead: int) -> None:
    engine = LateEngine(seed)
    ring = HostRing(engine, window, ahead)
    for step in range(3):
        parked, expected = [], []
        for tensor in tensors(seed + step):
            expected.append((bits(tensor), tensor.stride(), tensor.dtype, tensor.shape))
            parked.append(ring.park(tensor.clone(memory_format=torch.preserve_format)))
        while parked:
            held = parked.pop()
            got = ring.fetch(held)
            want, stride, dtype, shape = expected.pop()
            assert bits(got) == want
            assert got.dtype == dtype
            assert got.shape == shape
            if len(set(stride)) == len(stride) and got.numel() == 4 * 6 * 8:
                assert got.stride() == stride
            del held, got
    assert len(engine.pinned) == 9, "buffers of one step serve the next"


def test_a_second_backward_over_a_retained_graph() -> None:
    ring = HostRing(LateEngine(1))
    held = [ring.park(t) for t in tensors(0)]
    first = [bits(ring.fetch(p)) for p in reversed(held)]
    again = [bits(ring.fetch(p)) for p in reversed(held)]
    assert first == again == [bits(t) for t in reversed(tensors(0))]


def test_a_forward_without_backward_leaves_nothing() -> None:
    engine = LateEngine(2)
    ring = HostRing(engine)
    for _ in range(4):
        held = [ring.park(t) for t in tensors(3)]
        ring.fetch(held[-1])  # and it breaks off
        del held
    assert len(engine.pinned) == 9
    held = [ring.park(t) for t in tensors(5)]
    assert [bits(ring.fetch(p)) for p in reversed(held)] == [bits(t) for t in reversed(tensors(5))]


def test_two_graphs_alive_at_once() -> None:
    ring = HostRing(LateEngine(3))
    first, second = ([ring.park(t) for t in tensors(seed)] for seed in (1, 2))
    assert [bits(ring.fetch(p)) for p in first] == [bits(t) for t in tensors(1)]
    assert [bits(ring.fetch(p)) for p in reversed(second)] == [
        bits(t) for t in reversed(tensors(2))
    ]


def test_the_meta_ring_counts() -> None:
    ring = MetaRing()
    x = torch.empty(4, 8, device="meta").t()
    held = ring.park(x)
    assert ring.host_bytes == 128
    assert ring.fetch(held).stride() == x.stride()
    del held
    assert ring.host_bytes == 0


def test_the_meta_ring_holds_what_the_ring_would() -> None:
    """Device memory of what is on its way: two that leave, one that comes before its time."""
    ring = MetaRing()
    made = [torch.empty(4, device="meta") for _ in range(5)]
    alive = [weakref.ref(t.untyped_storage()) for t in made]
    held = [ring.park(t) for t in made]
    del made
    assert [ref() is not None for ref in alive] == [False, False, False, True, True]
    ring.fetch(held[4])
    assert not any(ref() is not None for ref in alive)
    assert list(ring._coming) == [3]
    ring.fetch(held[3])
    assert list(ring._coming) == [2]
    del held
    assert not ring._coming
