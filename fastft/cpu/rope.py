"""CPU launcher of ``rope``."""

from __future__ import annotations

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
    table_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    rotary = cos.shape[-1] * (2 if half_tables else 1)
    for out, x in zip(outs, xs, strict=True):
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
