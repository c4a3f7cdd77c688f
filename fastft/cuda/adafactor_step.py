"""CUDA launcher of ``adafactor_step``: five launches for all tensors."""

from __future__ import annotations

from typing import Any

import torch
from fastft_kernels.multi_tensor import table_for, upload
from torch import Tensor

from fastft import native
from fastft.cuda.optimizer_step import supports

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
) -> None:
    """One step over all tensors, in place; see :func:`fastft.ops.adafactor_step`.

    Nothing waits for the GPU: tables go up through pinned memory, and only when they change.
    """
    with torch.cuda.device(tensors.device):
        tables = tensors.launcher_tables
        if "work" not in tables:
            ticket = torch.zeros(1, dtype=torch.int32, device=tensors.device)
            work = (tensors.tile_tensor, tensors.line_tensor)
            tables["work"] = (*(upload(t, tensors.device) for t in work), ticket)
        *work, ticket = tables["work"]
        scratch, partials = (
            torch.empty(size, dtype=torch.float32, device=tensors.device)
            for size in tensors.scratch_sizes
        )
        table = table_for(tensors, grads)
        places = tensors.call(table, *work, scratch, partials, hyper, stats)
        native.module().adafactor_step_cuda(
            torch.cuda.current_device(), places, ticket.data_ptr(), max_norm, needs_norm, seed,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
