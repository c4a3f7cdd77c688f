"""``rms_norm`` in Triton: a program a row, or several short ones, in float32.

A row that fits stays in registers; a longer one is walked twice, the second time from cache. The
weight's gradient, wanted only where norms are trained, is summed in two stages of fixed shape: no
atomics, the same bits each time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._launch import KEPT, Prepared, cdiv

__all__ = ["bwd", "fwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _row_block(x_ptr, residual_ptr, at, inside, RESIDUAL: tl.constexpr):
    """x, or x + residual rounded as it is kept: the norm is of that."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _normed(y_ptr, weight_ptr, x, rstd, at, columns_at, columns, inside, offset,
            ROUND_FIRST: tl.constexpr):  # fmt: skip
    """Stores x rstd (weight + offset)."""
    weight = tl.load(weight_ptr + columns_at, mask=columns_at < columns, other=0.0)
    normed = x * rstd[:, None]
    if ROUND_FIRST:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, normed * (weight.to(tl.float32) + offset), mask=inside)


@triton.jit
def _rms_norm_forward_kernel(
    y_ptr,  # (rows, columns), as x
    rstd_ptr,  # float32 (rows,)
    x_ptr,
    weight_ptr,  # (columns,)
    residual_ptr,  # as x
    summed_ptr,  # as x
    rows,
    columns,
    eps,
    offset,
    RESIDUAL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    WHOLE: tl.constexpr,  # columns <= BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    begin = row.to(tl.int64)[:, None] * columns
    lanes = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        inside = there & (lanes < columns)
        x = _row_block(x_ptr, residual_ptr, begin + lanes, inside, RESIDUAL)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / columns + eps)
        if RESIDUAL:
            tl.store(summed_ptr + begin + lanes, x, mask=inside)
        _normed(
            y_ptr, weight_ptr, x, rstd, begin + lanes, lanes, columns, inside, offset, ROUND_FIRST
        )
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            inside = there & (start + lanes < columns)
            at = begin + start + lanes
            x = _row_block(x_ptr, residual_ptr, at, inside, RESIDUAL)
            if RESIDUAL:
                tl.store(summed_ptr + at, x, mask=inside)
            squares += x * x
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / columns + eps)
        for start in range(0, columns, BLOCK):
            inside = there & (start + lanes < columns)
            at = begin + start + lanes
            # Added again: another thread may have stored the sum.
            x = _row_block(x_ptr, residual_ptr, at, inside, RESIDUAL)
            _normed(
                y_ptr, weight_ptr, x, rstd, at, start + lanes, columns, inside, offset, ROUND_FIRST
            )
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _scaled(dy_ptr, weight_ptr, at, columns_at, columns, inside, offset):
    """dy (weight + offset)."""
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns_at, mask=columns_at < columns, other=0.0)
    return dy * (weight.to(tl.float32) + offset)


@triton.jit
def _store_dx(dx_ptr, more_ptr, scaled, x, rstd, mean, at, inside, MORE: tl.constexpr):
    dx = rstd[:, None] * (scaled - x * mean[:, None])
    if MORE:
        dx += tl.load(more_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx, mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    dx_ptr,  # (rows, columns), as dy and x
    dy_ptr,
    x_ptr,
    weight_ptr,  # (columns,)
    rstd_ptr,  # float32 (rows,)
    more_ptr,  # as dx
    rows,
    columns,
    offset,
    MORE: tl.constexpr,
    WHOLE: tl.constexpr,  # columns <= BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = rstd (g - xhat mean(g xhat)), plus more, g = dy (weight + offset)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    begin = row.to(tl.int64)[:, None] * columns
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    lanes = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        inside = there & (lanes < columns)
        at = begin + lanes
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scaled = _scaled(dy_ptr, weight_ptr, at, lanes, columns, inside, offset)
        mean = tl.sum(scaled * x, 1) * rstd * rstd / columns
        _store_dx(dx_ptr, more_ptr, scaled, x, rstd, mean, at, inside, MORE)
    else:
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            inside = there & (start + lanes < columns)
            at = begin + start + lanes
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            scaled = _scaled(dy_ptr, weight_ptr, at, start + lanes, columns, inside, offset)
            products += scaled * x
        mean = tl.sum(products, 1) * rstd * rstd / columns
        for start in range(0, columns, BLOCK):
            inside = there & (start + lanes < columns)
            at = begin + start + lanes
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            scaled = _scaled(dy_ptr, weight_ptr, at, start + lanes, columns, inside, offset)
            _store_dx(dx_ptr, more_ptr, scaled, x, rstd, mean, at, inside, MORE)


@triton.jit
def _rms_norm_weight_kernel(
    partial_ptr,  # float32 (splits, columns)
    dy_ptr,  # (rows, columns), as x
    x_ptr,
    rstd_ptr,  # float32 (rows,)
    rows,
    columns,
    rows_per_split,
    BLOCK: tl.constexpr,
):
    """Sum of dy xhat over the rows of one split, for a block of columns."""
    split = tl.program_id(1)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    total = tl.zeros((BLOCK,), tl.float32)
    first = split * rows_per_split
    for row in range(first, tl.minimum(first + rows_per_split, rows)):
        at = tl.cast(row, tl.int64) * columns + lanes
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += dy * x * tl.load(rstd_ptr + row)
    tl.store(partial_ptr + split.to(tl.int64) * columns + lanes, total, mask=inside)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype}"
    return supports_device(device_type)


def fwd(
    y: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    summed: Tensor | None = None,
    *,
    eps: float,
    offset: float,
    round_first: bool,
) -> None:
    """Writes y (rows, columns) and rstd (rows); with a residual, of summed = x + residual, which
    it writes too."""
    adds = residual is not None and summed is not None
    launch = _forward_launch(x.device, *x.shape, eps, offset, round_first, adds)
    with device_guard(x):
        if residual is not None and summed is not None:
            launch(y, rstd, x, weight, residual, summed)
        else:
            launch(y, rstd, x, weight)


@functools.lru_cache(maxsize=KEPT)
def _forward_launch(
    device: torch.device,
    rows: int,
    columns: int,
    eps: float,
    offset: float,
    round_first: bool,
    adds: bool,
) -> Prepared:
    block = config.for_device(device).norm.row(columns)
    return Prepared(
        _rms_norm_forward_kernel, (cdiv(rows, block.rows),),
        (0, 1, 2, 3, 4, 5) if adds else (0, 1, 2, 3, 2, 2), (rows, columns, eps, offset),
        RESIDUAL=adds, ROUND_FIRST=round_first, WHOLE=columns <= block.block, ROWS=block.rows,
        BLOCK=block.block, **block.launch.options(),
    )  # fmt: skip


def bwd(
    dx: Tensor,
    d_weight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    more: Tensor | None = None,
    *,
    offset: float,
) -> None:
    """Writes dx, plus ``more`` where given, and d_weight summed in float32 where it is wanted."""
    rows, columns = x.shape
    with device_guard(x):
        launch = _backward_launch(x.device, rows, columns, offset, more is not None)
        launch(dx, dy, x, weight, rstd, *(() if more is None else (more,)))
        if d_weight is None:
            return
        norm = config.for_device(x.device).norm
        splits = triton.cdiv(rows, norm.rows_per_split)
        partial = torch.empty((splits, columns), dtype=torch.float32, device=x.device)
        _rms_norm_weight_kernel[(triton.cdiv(columns, norm.weight.block), splits)](
            partial, dy, x, rstd, rows, columns, norm.rows_per_split, BLOCK=norm.weight.block,
            **norm.weight.launch.options(),
        )  # fmt: skip
        d_weight.copy_(partial.sum(0))


@functools.lru_cache(maxsize=KEPT)
def _backward_launch(
    device: torch.device, rows: int, columns: int, offset: float, adds: bool
) -> Prepared:
    block = config.for_device(device).norm.row(columns)
    return Prepared(
        _rms_norm_backward_kernel, (cdiv(rows, block.rows),), (0, 1, 2, 3, 4, 5 if adds else 1),
        (rows, columns, offset),
        MORE=adds, WHOLE=columns <= block.block, ROWS=block.rows, BLOCK=block.block,
        **block.launch.options(),
    )  # fmt: skip
