"""``lora_grouped_linear`` on GPUs: the vendor's grouped product for the frozen matrices and for the
low-rank ones, so nothing as large as a stack of matrices is made and the host never waits for the
groups' sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from fastft_kernels._common import device_guard, supports_device

__all__ = ["bwd", "fwd", "supports"]


def supports(
    device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype, r: int
) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype != torch.bfloat16:
        return f"the grouped product takes bfloat16, not {dtype}"
    if adapter_dtype not in (torch.float32, dtype):
        return f"adapters must be float32 or {dtype}, not {adapter_dtype}"
    if r % 8:
        return f"the grouped product needs a rank that is a multiple of 8, not {r}"
    return supports_device(device_type)


def _dense(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """PEFT keeps the experts of B interleaved; the product wants whole rows. Small to copy."""
    return stack.to(dtype).contiguous()


def fwd(
    y: Tensor,
    s: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
) -> None:
    """Writes y (M, N) and s = x A^T (M, r), of each group's rows with its matrices."""
    a, b = _dense(lora_a, x.dtype), _dense(lora_b, x.dtype)
    with device_guard(x):
        s.copy_(grouped_mm(x, a.transpose(1, 2), offs=ends))
        y.copy_(grouped_mm(x, weight.transpose(1, 2), offs=ends))
        y.add_(grouped_mm(s, b.transpose(1, 2), offs=ends), alpha=scaling)


def bwd(
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
) -> None:
    """Writes dx (M, K), da (E, r, K), db (E, N, r); None is not wanted."""
    a, b = _dense(lora_a, x.dtype), _dense(lora_b, x.dtype)
    with device_guard(x):
        ds = grouped_mm(dy, b, offs=ends).mul_(scaling)
        if dx is not None:
            dx.copy_(grouped_mm(dy, weight, offs=ends))
            dx.add_(grouped_mm(ds, a, offs=ends))
        if da is not None:
            da.copy_(grouped_mm(ds.t(), x, offs=ends))
        if db is not None:
            db.copy_(grouped_mm(dy.t(), s, offs=ends)).mul_(scaling)
