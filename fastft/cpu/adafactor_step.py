"""CPU launcher of ``adafactor_step``: one call for all tensors of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import native

__all__ = ["step", "supports"]


def supports(*, device_type: str, dtype: torch.dtype, **facts: object) -> str | None:
    """All roundings for float32, bfloat16 and float16."""
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
    """One step over all tensors; see :func:`fastft.ops.adafactor_step` for the formulas."""
    table, _ = tensors.table(grads)
    scratch, partials = (torch.empty(size, dtype=torch.float32) for size in tensors.scratch_sizes)
    tiles, lines = tensors.tile_tensor, tensors.line_tensor
    places = [table.data_ptr(), len(grads)]
    places += [tiles.data_ptr(), tiles.numel(), lines.data_ptr(), lines.numel()]
    places += [t.data_ptr() for t in (scratch, partials, hyper, stats)]
    native.module().adafactor_step(places, max_norm, needs_norm, seed, isa=isa)
