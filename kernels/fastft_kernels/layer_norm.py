"""``layer_norm`` in Triton: a program a row, forward and backward in float32.

Rows are walked as in ``rms_norm``. The gradients of weight and bias, wanted only where norms are
trained, are summed in two stages of fixed shape: no atomics, the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device

__all__ = ["bwd", "fwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _load(ptr, lanes, columns):
    return tl.load(ptr + lanes, mask=lanes < columns, other=0.0).to(tl.float32)


@triton.jit
def _store_normed(
    y_row, weight_ptr, bias_ptr, x, mean, rstd, lanes, columns, offset,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """(x - mean) rstd (weight + offset) + bias."""
    y = (x - mean) * rstd
    if ROUND_FIRST:
        y = y.to(y_row.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        y *= _load(weight_ptr, lanes, columns) + offset
    if HAS_BIAS:
        y += _load(bias_ptr, lanes, columns)
    tl.store(y_row + lanes, y, mask=lanes < columns)


@triton.jit
def _layer_norm_forward_kernel(
    y_ptr,  # (rows, columns), as x
    mean_ptr,  # float32 (rows,)
    rstd_ptr,  # float32 (rows,)
    x_ptr,
    weight_ptr,  # (columns,)
    bias_ptr,  # (columns,)
    columns,
    eps,
    offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    WHOLE: tl.constexpr,  # columns <= BLOCK
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    x_row = x_ptr + row.to(tl.int64) * columns
    y_row = y_ptr + row.to(tl.int64) * columns
    lanes = tl.arange(0, BLOCK)
    # The squares are about the mean: nothing cancels.
    if WHOLE:
        x = _load(x_row, lanes, columns)
        mean = tl.sum(x, 0) / columns
        centred = tl.where(lanes < columns, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / columns + eps)
        _store_normed(
            y_row, weight_ptr, bias_ptr, x, mean, rstd, lanes, columns, offset,
            HAS_WEIGHT, HAS_BIAS, ROUND_FIRST,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            total += _load(x_row, start + lanes, columns)
        mean = tl.sum(total, 0) / columns
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            x = _load(x_row, start + lanes, columns)
            centred = tl.where(start + lanes < columns, x - mean, 0.0)
            squares += centred * centred
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / columns + eps)
        for start in range(0, columns, BLOCK):
            x = _load(x_row, start + lanes, columns)
            _store_normed(
                y_row, weight_ptr, bias_ptr, x, mean, rstd, start + lanes, columns, offset,
                HAS_WEIGHT, HAS_BIAS, ROUND_FIRST,
            )  # fmt: skip
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _scaled(dy_row, weight_ptr, lanes, columns, offset, HAS_WEIGHT: tl.constexpr):
    """dy (weight + offset)."""
    g = _load(dy_row, lanes, columns)
    if HAS_WEIGHT:
        g *= _load(weight_ptr, lanes, columns) + offset
    return g


@triton.jit
def _layer_norm_backward_kernel(
    dx_ptr,  # (rows, columns), as dy and x
    dy_ptr,
    x_ptr,
    weight_ptr,  # (columns,)
    mean_ptr,  # float32 (rows,)
    rstd_ptr,  # float32 (rows,)
    columns,
    offset,
    HAS_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,  # columns <= BLOCK
    BLOCK: tl.constexpr,
):
    """dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy (weight + offset)."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * columns
    x_row, dy_row, dx_row = x_ptr + begin, dy_ptr + begin, dx_ptr + begin
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        x = _load(x_row, lanes, columns)
        g = _scaled(dy_row, weight_ptr, lanes, columns, offset, HAS_WEIGHT)
        mean_g = tl.sum(g, 0) / columns
        slope = tl.sum(g * (x - mean), 0) * rstd * rstd / columns
        dx = rstd * (g - mean_g - (x - mean) * slope)
        tl.store(dx_row + lanes, dx, mask=lanes < columns)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            x = _load(x_row, start + lanes, columns)
            g = _scaled(dy_row, weight_ptr, start + lanes, columns, offset, HAS_WEIGHT)
            total += g
            products += g * (x - mean)
        mean_g = tl.sum(total, 0) / columns
        slope = tl.sum(products, 0) * rstd * rstd / columns
        for start in range(0, columns, BLOCK):
            x = _load(x_row, start + lanes, columns)
            g = _scaled(dy_row, weight_ptr, start + lanes, columns, offset, HAS_WEIGHT)
            dx = rstd * (g - mean_g - (x - mean) * slope)
            tl.store(dx_row + start + lanes, dx, mask=start + lanes < columns)


@triton.jit
def _layer_norm_weight_kernel(
    dw_ptr,  # float32 (splits, columns)
    db_ptr,  # float32 (splits, columns)
    dy_ptr,  # (rows, columns), as x
    x_ptr,
    mean_ptr,  # float32 (rows,)
    rstd_ptr,  # float32 (rows,)
    rows,
    columns,
    rows_per_split,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of dy xhat and of dy over the rows of one split, for a block of columns."""
    split = tl.program_id(1)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    first = split * rows_per_split
    for row in range(first, tl.minimum(first + rows_per_split, rows)):
        at = tl.cast(row, tl.int64) * columns + lanes
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            of_weight += dy * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        of_bias += dy
    to = split.to(tl.int64) * columns + lanes
    if WEIGHT:
        tl.store(dw_ptr + to, of_weight, mask=inside)
    if BIAS:
        tl.store(db_ptr + to, of_bias, mask=inside)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype}"
    return supports_device(device_type)


def fwd(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    offset: float,
    round_first: bool,
) -> None:
    """Writes y (rows, columns), mean and rstd (rows)."""
    block = config.for_device(x.device).norm.row(x.shape[1])
    with device_guard(x):
        _layer_norm_forward_kernel[(x.shape[0],)](
            y, mean, rstd, x, x if weight is None else weight, x if bias is None else bias,
            x.shape[1], eps, offset, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            ROUND_FIRST=round_first, WHOLE=x.shape[1] <= block.block, BLOCK=block.block,
            **block.launch.options(),
        )  # fmt: skip


def bwd(
    dx: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    offset: float,
) -> None:
    """Writes dx, and d_weight and d_bias summed in float32 where they are wanted."""
    rows, columns = x.shape
    norm = config.for_device(x.device).norm
    block = norm.row(columns)
    with device_guard(x):
        _layer_norm_backward_kernel[(rows,)](
            dx, dy, x, x if weight is None else weight, mean, rstd, columns, offset,
            HAS_WEIGHT=weight is not None, WHOLE=columns <= block.block, BLOCK=block.block,
            **block.launch.options(),
        )  # fmt: skip
        if d_weight is None and d_bias is None:
            return
        splits = triton.cdiv(rows, norm.rows_per_split)
        partial = torch.empty((2, splits, columns), dtype=torch.float32, device=x.device)
        _layer_norm_weight_kernel[(triton.cdiv(columns, norm.weight.block), splits)](
            partial[0], partial[1], dy, x, mean, rstd, rows, columns, norm.rows_per_split,
            WEIGHT=d_weight is not None, BIAS=d_bias is not None, BLOCK=norm.weight.block,
            **norm.weight.launch.options(),
        )  # fmt: skip
        for out, sums in zip((d_weight, d_bias), partial, strict=True):
            if out is not None:
                out.copy_(sums.sum(0))
