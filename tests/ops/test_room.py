"""The pool that large results on a CPU come from (csrc/cpu/pool.cpp, fastft/ops/_room.py)."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft import native, ops
from fastft.ops import _room as room

F32, BF16 = torch.float32, torch.bfloat16
MIB = 1 << 20


# Of tensors that other tests of this process have left alive.
_elsewhere = 0


def stats() -> dict[str, int]:
    """Bytes beyond those: alive, the most of them, and held."""
    return {name: size - _elsewhere for name, size in native.module().pool_stats().items()}


@pytest.fixture(autouse=True)
def _own_pool() -> Iterator[None]:
    global _elsewhere
    before = room._Pool.used
    gc.collect()
    native.module().pool_trim()
    _elsewhere = native.module().pool_stats()["live"]
    room.use_pool(True)
    yield
    room.use_pool(before)
    native.module().pool_trim()


def block(mib: float, like: torch.Tensor | None = None) -> torch.Tensor:
    like = torch.empty(0) if like is None else like
    return room.new_empty(like, (int(mib * MIB) // 4,), F32)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_a_tensor_like_any_other(dtype: torch.dtype) -> None:
    t = room.new_empty(torch.empty(2, dtype=dtype), (300, 3, 1024))
    assert (t.shape, t.dtype, t.is_contiguous()) == ((300, 3, 1024), dtype, True)
    assert stats()["live"] >= t.numel() * t.element_size()
    t.fill_(1.5)
    leaf = t.detach().requires_grad_()
    (leaf.float() * 2).sum().backward()
    assert bool((leaf.grad == 2).all())
    assert t.data_ptr() % 64 == 0
    live = torch.empty(0, dtype=dtype).new_empty(t.shape).copy_(t)
    assert torch.equal(live, t)


def test_what_comes_back_is_handed_out_again() -> None:
    first, second = block(2), block(2)
    assert first.data_ptr() != second.data_ptr()
    place = first.data_ptr()
    view = first[10:20]
    del first
    assert block(2).data_ptr() != place  # a view keeps it
    del view
    assert block(2).data_ptr() == place
    # An eighth too large will do, more will not.
    assert block(1.8).data_ptr() == place
    assert block(1.5).data_ptr() != place
    del second
    assert stats()["live"] == 0


def test_no_more_is_held_than_was_alive_and_an_eighth() -> None:
    """Sizes that change leave nothing behind."""
    for size in (1, 2, 3, 5, 8, 13):
        held = [block(size) for _ in range(4)]
        found = native.module().pool_stats()
        assert found["mapped"] <= found["peak"] * 9 // 8
        del held
    assert stats()["mapped"] <= (4 * 13 * MIB + _elsewhere) * 9 // 8
    kept = block(1)
    kept.fill_(3)
    native.module().pool_trim()
    assert stats()["mapped"] == stats()["live"] == MIB
    assert bool((kept == 3).all())


def test_a_step_maps_nothing_after_the_first() -> None:
    def step() -> set[int]:
        held = [block(size) for size in (2, 6, 6, 2, 2)]
        return {t.data_ptr() for t in held}

    first, mapped = step(), stats()["mapped"]
    assert step() == first
    assert stats()["mapped"] == mapped


def test_freed_in_another_thread() -> None:
    held = [[block(1) for _ in range(8)] for _ in range(4)]
    live = stats()["live"]
    threads = [threading.Thread(target=own.clear) for own in held]
    for thread in threads:
        thread.start()
    fresh = [block(1) for _ in range(8)]
    for thread in threads:
        thread.join()
    assert stats()["live"] == live - 24 * MIB
    assert len({t.data_ptr() for t in fresh}) == 8


def test_a_capsule_nobody_took_gives_its_block_back() -> None:
    capsule = native.module().pool_tensor([MIB], [1], 0)
    assert stats()["live"] == 4 * MIB
    del capsule
    assert stats()["live"] == 0


def test_who_is_not_served() -> None:
    """Small ones, other dtypes and devices, fakes, deterministic runs; nobody where it is off."""
    held = stats()
    small = room.new_empty(torch.empty(0), (1000,))
    double = room.new_empty(torch.empty(0, dtype=torch.float64), (MIB,))
    meta = room.new_empty(torch.empty(0, device="meta"), (MIB,))
    with FakeTensorMode():
        fake = room.new_empty(torch.empty(0), (MIB,))
    torch.use_deterministic_algorithms(True)
    try:
        filled = block(4)
    finally:
        torch.use_deterministic_algorithms(False)
    room.use_pool(False)
    off = block(4)
    assert stats() == held
    assert bool(filled.isnan().all())
    assert (small.numel(), double.dtype, meta.device.type) == (1000, torch.float64, "meta")
    assert (type(fake) is torch.Tensor, off.numel()) == (False, MIB)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)], ids=str)
def test_strides_of_a_dense_tensor_are_kept(order: tuple[int, ...]) -> None:
    like = torch.empty(40, 30, 512).permute(order)
    got = room.empty_like(like, BF16)
    assert (got.shape, got.stride(), got.dtype) == (like.shape, like.stride(), BF16)
    assert not got._is_view()  # or autograd would refuse to change a function's result in place
    assert stats()["live"] > 0
    sliced = torch.empty(300, 2000)[:, :1000]
    assert room.empty_like(sliced).stride() == torch.empty_like(sliced).stride()
    wide = torch.empty(1, 1).expand(600, 600)
    assert room.empty_like(wide).stride() == torch.empty_like(wide).stride()


def test_operations_take_from_it() -> None:
    """Results and gradients of a fused operation are the pool's, and go back to it."""
    x, weight = torch.randn(600, 512, requires_grad=True), nn.Parameter(torch.ones(512))
    y = ops.rms_norm(x, weight, 1e-6)
    assert stats()["live"] >= y.numel() * 4
    y.backward(torch.ones_like(y))
    del y
    assert stats()["live"] == -(-x.numel() * 4 // 65536) * 65536
    x.grad = None
    assert stats()["live"] == 0


def test_what_autograd_and_copies_do_with_it() -> None:
    """A result may be changed in place, copied, shared and used in inference mode."""
    q, k = torch.randn(2, 300, 4, 64), torch.randn(2, 300, 2, 64)
    angles = torch.randn(1, 300, 64)
    leaf = q.requires_grad_()
    turned, _ = ops.rope(leaf.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())
    assert stats()["live"] > 0
    turned.mul_(2.0)
    turned.sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        t = block(1).fill_(2)
        assert t.is_inference()
    t = block(1).fill_(2)
    assert torch.equal(copy.deepcopy(t), t)
    assert bool((t.share_memory_() == 2).all())


def test_without_memory_torch_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"not enough memory|allocate memory"):
        room.new_empty(torch.empty(0), (1 << 60,))
    # And what the pool may hold does not grow by it.
    before = native.module().pool_stats()
    assert before["peak"] < 1 << 60
    assert room.new_empty(torch.empty(0), (MIB,)).numel() == MIB


def test_a_fork_does_not_wait_for_ever() -> None:
    """A child forked while another thread gives blocks back can use the pool."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            block(0.5)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                native.module().pool_tensor([MIB], [1], 0)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
