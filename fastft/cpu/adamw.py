"""CPU launcher of ``adamw``: one call for all tensors of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native


def supports(*, device_type: str, dtype: torch.dtype) -> str | None:
    """float32 and bfloat16 parameters."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"parameters in {dtype}; the CPU kernels take float32 and bfloat16"
    return None


def step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float,
    maximize: bool,
) -> None:
    """One step over all tensors; see :func:`fastft.ops.adamw` for the formula."""
    codes = native.DTYPE_CODES
    table = torch.tensor(
        [
            (
                p.data_ptr(),
                g.data_ptr(),
                m.data_ptr(),
                v.data_ptr(),
                p.numel(),
                codes[p.dtype],
                codes[g.dtype],
            )
            for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
        ],
        dtype=torch.int64,
    )
    native.module().adamw(
        table.data_ptr(),
        steps.data_ptr(),
        hyper.data_ptr(),
        len(params),
        max_norm,
        maximize,
        stats.data_ptr(),
    )
