"""``dora_scale`` in Triton: columns scaled in float32, bias added; the gradient of the scale is
summed in two stages of fixed shape, without atomics."""

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
def _dora_scale_forward_kernel(
    y_ptr,  # (rows, columns), as z
    z_ptr,
    scale_ptr,  # float32 (columns,)
    bias_ptr,  # (columns,)
    columns,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * columns
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    z = tl.load(z_ptr + begin + lanes, mask=inside).to(tl.float32)
    y = z * tl.load(scale_ptr + lanes, mask=inside)
    if HAS_BIAS:
        y += tl.load(bias_ptr + lanes, mask=inside).to(tl.float32)
    tl.store(y_ptr + begin + lanes, y, mask=inside)


@triton.jit
def _dora_scale_backward_kernel(
    dz_ptr,  # (rows, columns), as dy and z
    partial_ptr,  # float32 (splits, columns)
    dy_ptr,
    z_ptr,
    scale_ptr,  # float32 (columns,)
    rows,
    columns,
    rows_per_split,
    BLOCK: tl.constexpr,
):
    """dz = dy scale for the rows of one split, and their sum of dy z."""
    split = tl.program_id(1)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    scale = tl.load(scale_ptr + lanes, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    first = split * rows_per_split
    for row in range(first, tl.minimum(first + rows_per_split, rows)):
        at = tl.cast(row, tl.int64) * columns + lanes
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += dy * z
        tl.store(dz_ptr + at, dy * scale, mask=inside)
    tl.store(partial_ptr + split.to(tl.int64) * columns + lanes, total, mask=inside)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype}"
    return supports_device(device_type)


def fwd(y: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Writes y (rows, columns); scale is float32."""
    rows, columns = z.shape
    block = config.for_device(z.device).elementwise
    with device_guard(z):
        _dora_scale_forward_kernel[(rows, triton.cdiv(columns, block.block))](
            y, z, scale, z if bias is None else bias, columns, HAS_BIAS=bias is not None,
            BLOCK=block.block, **block.launch.options(),
        )  # fmt: skip


def bwd(dz: Tensor, d_scale: Tensor | None, dy: Tensor, z: Tensor, scale: Tensor) -> None:
    """Writes dz, and d_scale where it is wanted."""
    rows, columns = z.shape
    sums = config.for_device(z.device).norm
    block = sums.weight
    splits = triton.cdiv(rows, sums.rows_per_split)
    with device_guard(z):
        partial = torch.empty((splits, columns), dtype=torch.float32, device=z.device)
        _dora_scale_backward_kernel[(triton.cdiv(columns, block.block), splits)](
            dz, partial, dy, z, scale, rows, columns, sums.rows_per_split, BLOCK=block.block,
            **block.launch.options(),
        )  # fmt: skip
        if d_scale is not None:
            d_scale.copy_(partial.sum(0))
