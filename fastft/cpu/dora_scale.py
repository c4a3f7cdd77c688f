"""CPU launcher of ``dora_scale``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu import thin
from fastft.cpu._supports import supports as supports
from fastft.cpu.products import scratch


def fwd(y: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Writes y (rows, columns); scale is float32."""
    native.module().dora_scale_forward(
        y.data_ptr(),
        z.data_ptr(),
        scale.data_ptr(),
        native.address(bias),
        *z.shape,
        native.DTYPE_CODES[z.dtype],
    )


def bwd(dz: Tensor, d_scale: Tensor | None, dy: Tensor, z: Tensor, scale: Tensor) -> None:
    """Writes dz, and d_scale where it is wanted."""
    rows, columns = z.shape
    partial = None
    if d_scale is not None:
        blocks = -(-rows // native.module().SUM_ROWS)
        partial = scratch("d_scale", (blocks, columns), torch.float32)
    native.module().dora_scale_backward(
        dz.data_ptr(),
        native.address(partial),
        dy.data_ptr(),
        z.data_ptr(),
        scale.data_ptr(),
        rows,
        columns,
        native.DTYPE_CODES[z.dtype],
    )
    if d_scale is not None and partial is not None:
        d_scale.copy_(partial.sum(0))


def norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, squared_rows: Tensor
) -> Tensor | None:
    """||W + scaling B A|| of every row, from the squared norms of W in float64; None where torch's
    own operations serve."""
    r = lora_a.shape[0]
    if not thin.serves(weight.dtype, r) or lora_a.shape[1] != weight.shape[1]:
        return None
    wanted = (torch.float32, torch.float32, torch.float64)
    if tuple(t.dtype for t in (lora_a, lora_b, squared_rows)) != wanted:
        return None
    if lora_b.shape != (len(weight), r) or squared_rows.shape != (len(weight),):
        return None
    if not all(t.is_contiguous() for t in (weight, lora_a, lora_b, squared_rows)):
        return None
    rows, depth = weight.shape
    cross = scratch("dora_cross", (rows, r), weight.dtype)
    thin.shrink(cross, weight, lora_a, None, 1.0)
    found = lora_a.new_empty(rows)
    native.module().dora_norm(
        *(t.data_ptr() for t in (found, squared_rows, cross, lora_a, lora_b)),
        rows,
        depth,
        r,
        scaling,
        scratch("dora_gram", (r * r,), torch.float32).data_ptr(),
    )
    return found
