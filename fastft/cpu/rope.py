"""CPU launcher of ``rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native


def supports(*, device_type: str, dtype: torch.dtype) -> str | None:
    """float32 and bfloat16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype}; the CPU kernels take float32 and bfloat16"
    return None


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
