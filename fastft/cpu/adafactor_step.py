"""CPU launcher of ``adafactor_step``: one call for all tensors of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.optimizer_step import supports

__all__ = ["step", "supports"]


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
    scratch, partials = (
        torch.empty(size, dtype=torch.float32, device="cpu") for size in tensors.scratch_sizes
    )
    work = (tensors.tile_tensor, tensors.line_tensor)
    places = tensors.call(table, *work, scratch, partials, hyper, stats)
    native.module().adafactor_step(places, max_norm, needs_norm, seed, isa=isa)
