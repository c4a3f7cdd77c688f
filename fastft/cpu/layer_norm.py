"""CPU launcher of ``layer_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu._supports import supports as supports
from fastft.cpu.products import scratch


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
    addresses = [native.address(t) for t in (y, mean, rstd, x, weight, bias)]
    native.module().layer_norm_forward(
        *addresses, *x.shape, eps, offset, round_first, native.DTYPE_CODES[x.dtype]
    )


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
    blocks = -(-rows // native.module().SUM_ROWS)
    partial = [
        None if wanted is None else scratch(name, (blocks, columns), torch.float32)
        for name, wanted in (("norm_dw", d_weight), ("norm_db", d_bias))
    ]
    addresses = [native.address(t) for t in (dx, *partial, dy, x, weight, mean, rstd)]
    native.module().layer_norm_backward(
        *addresses, rows, columns, offset, native.DTYPE_CODES[x.dtype]
    )
    for out, sums in zip((d_weight, d_bias), partial, strict=True):
        if out is not None and sums is not None:
            out.copy_(sums.sum(0))
