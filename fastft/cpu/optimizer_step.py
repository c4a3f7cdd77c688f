"""CPU launcher of ``optimizer_step``: one call for all tensors of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import native

__all__ = ["step", "supports"]


def supports(*, device_type: str, dtype: torch.dtype, **facts: object) -> str | None:
    """All rules, states and roundings for float32, bfloat16 and float16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype not in native.DTYPE_CODES:
        return f"parameters in {dtype}; the CPU kernels take float32, bfloat16 and float16"
    return None


def step(
    tensors: Any,
    grads: list[Tensor],
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float,
    needs_norm: bool,
    seed: int,
    isa: str = "",
) -> None:
    """One step over all tensors; see :func:`fastft.ops.optimizer_step` for the formulas."""
    table, _ = tensors.table(grads)
    native.module().optimizer_step(
        tensors.rule_code,
        table.data_ptr(),
        len(grads),
        hyper.data_ptr(),
        stats.data_ptr(),
        max_norm,
        needs_norm,
        seed,
        isa=isa,
    )
