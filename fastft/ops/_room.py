"""Room for results: torch's, or on a CPU, for large ones, memory that is handed out again.

The pool (csrc/cpu/pool.cpp) holds what a training step asks for over and over, so that nothing is
mapped, cleared and unmapped again; it holds no more than what of its own was alive at once, and an
eighth. ``fastft.accelerate`` turns it on, for the process, where a model is on a CPU. Its tensors
cannot be resized.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fastft import native

__all__ = ["empty_like", "looked_at", "new_empty", "pooled", "trim", "use_pool"]

# Smaller results come from the C library's heap, which is quick and tight there.
_LEAST = 1 << 18
_PLAIN = (Tensor, nn.Parameter)


class _Pool:
    used = False


class _Thread(threading.local):
    see: Callable[[Tensor], None] | None = None


_thread = _Thread()


def use_pool(used: bool) -> None:
    """Whether large results on a CPU come from the pool, where there is a compiled module."""
    _Pool.used = used and native.available()


@contextmanager
def pooled() -> Iterator[None]:
    """The pool is on within."""
    before = _Pool.used
    use_pool(True)
    try:
        yield
    finally:
        _Pool.used = before


@contextmanager
def looked_at(see: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, ``see`` is given the results on meta of this thread that stand for the pool's."""
    before, _thread.see = _thread.see, see
    try:
        yield
    finally:
        _thread.see = before


def trim() -> None:
    """Returns what the pool and, with glibc, the heap hold for later to the system."""
    if native.available():
        native.module().pool_trim()


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``."""
    if _served(like):
        strides, step = [], 1
        for length in reversed(shape):
            strides.append(step)
            step *= length
        found = _from_pool(shape, strides[::-1], step, dtype or like.dtype)
        if found is not None:
            return found
    return _shown(like.new_empty(shape, dtype=dtype))


def empty_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like(like, dtype=dtype)``: the strides of a dense tensor are kept."""
    if _served(like) and _is_dense(like):
        found = _from_pool(like.shape, like.stride(), like.numel(), dtype or like.dtype)
        if found is not None:
            return found
    return _shown(torch.empty_like(like, dtype=dtype))


def _shown(result: Tensor) -> Tensor:
    see = _thread.see
    if see is not None and result.is_meta and result.nbytes >= _LEAST:
        see(result)
    return result


def _served(like: Tensor) -> bool:
    """Whether results like this one may be the pool's: no subclass, no fake, no other device."""
    return _Pool.used and type(like) in _PLAIN and like.device.type == "cpu"


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements, in some order of its dimensions, are next to each other."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _from_pool(
    shape: Sequence[int], strides: Sequence[int], count: int, dtype: torch.dtype
) -> Tensor | None:
    """A tensor of the pool; None where torch's will do."""
    code = native.DTYPE_CODES.get(dtype)
    # Deterministic runs fill what torch has not initialised.
    if (
        count * dtype.itemsize < _LEAST
        or code is None
        or torch.are_deterministic_algorithms_enabled()
    ):
        return None
    capsule = native.module().pool_tensor(shape, strides, code)
    # Without memory torch's own error says so, in the words that others look for.
    return None if capsule is None else from_dlpack(capsule)
