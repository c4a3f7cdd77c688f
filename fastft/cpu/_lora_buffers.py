"""Operands of LoRA's products on the CPU, in this thread's buffers where they have to be made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.products import scratch

__all__ = ["dropped", "keep", "narrow", "row_slices", "scatter", "stacked", "thin_side"]

# Bytes of x dropped at a time: half of a common second-level cache.
_SLICE_BYTES = 1 << 19


def row_slices(rows: int, columns: int, itemsize: int) -> list[slice]:
    size = max(16, _SLICE_BYTES // max(1, columns * itemsize))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def dropped(x: Tensor, mask: Tensor) -> Tensor:
    """x * mask for a slice of rows, in this thread's buffer; 1 / (1 - p) is left to the product."""
    out = scratch("dropped", tuple(x.shape), x.dtype)
    native.module().dropout_apply(
        out.data_ptr(),
        x.data_ptr(),
        mask.data_ptr(),
        x.shape[0],
        x.shape[1],
        native.DTYPE_CODES[x.dtype],
    )
    return out


def narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in dtype, in this thread's buffer where it has to be cast."""
    if tensor.dtype == dtype:
        return tensor
    return scratch(name, tuple(tensor.shape), dtype).copy_(tensor)


def keep(mask: Tensor | None, p: float) -> float:
    return 1.0 if mask is None else 1.0 / (1.0 - p)


def thin_side(ss: list[Tensor]) -> Tensor:
    """Room for all columns of ss next to each other; the one there is, if it is dense."""
    if len(ss) == 1 and ss[0].is_contiguous():
        return ss[0]
    return scratch("s_all", (ss[0].shape[0], sum(s.shape[1] for s in ss)), ss[0].dtype)


def scatter(
    parts: Sequence[Tensor | None], whole: Tensor, dim: int, sizes: list[int] | None = None
) -> None:
    """Copies the shares of ``whole`` along ``dim`` into the parts that are there."""
    if len(parts) == 1 and parts[0] is whole:
        return
    sizes = sizes or [part.shape[dim] for part in parts if part is not None]
    for part, share in zip(parts, whole.split(sizes, dim), strict=True):
        if part is not None:
            part.copy_(share)


def stacked(tensors: list[Tensor], dtype: torch.dtype, name: str = "a_all") -> Tensor:
    """All rows in one dense matrix of dtype, in the buffer of that name where it is made."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return narrow(name, tensors[0], dtype)
    ranks = [t.shape[0] for t in tensors]
    out = scratch(name, (sum(ranks), tensors[0].shape[1]), dtype)
    for part, tensor in zip(out.split(ranks), tensors, strict=True):
        part.copy_(tensor)
    return out
