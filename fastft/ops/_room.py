"""Room for results: torch's, or on a CPU, for large ones, memory that is handed out again.

The pool (csrc/cpu/pool.cpp) holds what a training step asks for over and over, so that nothing is
mapped, cleared and unmapped again, and no more is resident than was alive at once, and an eighth.
``fastft.accelerate`` turns it on for models on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fastft import native

__all__ = ["empty_like", "new_empty", "trim", "use_pool"]

# Smaller results come from the C library's heap, which is quick and tight there.
_LEAST = 1 << 18
_PLAIN = (Tensor, nn.Parameter)


class _Pool:
    used = False


def use_pool(used: bool) -> None:
    """Whether large results on a CPU come from the pool, where there is a compiled module."""
    _Pool.used = used and native.available()


def trim() -> None:
    """Returns what the pool holds for later to the system."""
    if native.available():
        native.module().pool_trim()


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``."""
    dtype = dtype or like.dtype
    if _Pool.used and like.device.type == "cpu" and type(like) in _PLAIN:
        size = dtype.itemsize
        for length in shape:
            size *= length
        code = native.DTYPE_CODES.get(dtype)
        # Deterministic runs fill what torch has not initialised.
        if size >= _LEAST and code is not None and not torch.are_deterministic_algorithms_enabled():
            return from_dlpack(native.module().pool_tensor(shape, code))
    return like.new_empty(shape, dtype=dtype)


def empty_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like(like, dtype=dtype)``: the strides of a dense tensor are kept."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    laid = like.permute(order)
    if not _Pool.used or not laid.is_contiguous():
        return torch.empty_like(like, dtype=dtype)
    back = [order.index(d) for d in range(like.dim())]
    return new_empty(like, laid.shape, dtype).permute(back)
