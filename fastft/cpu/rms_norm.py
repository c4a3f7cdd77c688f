"""CPU launcher of ``rms_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu._supports import supports as supports
from fastft.cpu.products import scratch


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
    native.module().rms_norm_forward(
        y.data_ptr(),
        rstd.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        native.address(residual),
        native.address(summed),
        *x.shape,
        eps,
        offset,
        round_first,
        native.DTYPE_CODES[x.dtype],
    )


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
    blocks = -(-rows // native.module().SUM_ROWS)
    partial = None
    if d_weight is not None:
        partial = scratch("norm_dw", (blocks, columns), torch.float32)
    native.module().rms_norm_backward(
        dx.data_ptr(),
        native.address(partial),
        dy.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        native.address(more),
        rows,
        columns,
        offset,
        native.DTYPE_CODES[x.dtype],
    )
    if d_weight is not None and partial is not None:
        d_weight.copy_(partial.sum(0))
