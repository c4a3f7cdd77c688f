"""CPU launcher of ``embedding``."""

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


def bwd(d_weight: Tensor, dy: Tensor, order: Tensor, ids: Tensor, *, padding: int) -> None:
    """Writes the sums of dy's rows into those of d_weight that have a token."""
    native.module().embedding_backward(
        *(t.data_ptr() for t in (d_weight, dy, order, ids)),
        *dy.shape,
        padding,
        native.DTYPE_CODES[dy.dtype],
    )
