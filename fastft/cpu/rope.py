"""CPU launcher of ``rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu._supports import supports as supports


def fwd(
    outs: list[Tensor],
    xs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    half_tables: bool,
    backward: bool,
) -> None:
    """Writes the turned heads of each x; strides of all but the features are free."""
    if cos.dtype != torch.float32 and any(x.dtype != cos.dtype for x in xs):
        cos, sin = cos.float(), sin.float()
    table_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    rotary = cos.shape[-1] * (2 if half_tables else 1)
    for result, x in zip(outs, xs, strict=True):
        direct = result.dtype in (x.dtype, torch.float32)
        out = result if direct else torch.empty_like(result, dtype=torch.float32)
        native.module().rope(
            out.data_ptr(),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            [
                *x.shape, rotary, *x.stride()[:3], *out.stride()[:3], table_batch, cos.stride(1),
            ],
            interleaved,
            half_tables,
            backward,
            native.DTYPE_CODES[x.dtype],
            native.DTYPE_CODES[cos.dtype],
            native.DTYPE_CODES[out.dtype],
        )  # fmt: skip
        if not direct:
            result.copy_(out)
