"""Two optimizers on the same parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import optim

__all__ = ["ALL", "gradients", "models", "same"]

F32 = torch.float32
SHAPES = [(3,), (1000, 17), (1,), (0,), (5, 5), (40001,)]

ALL: dict[str, Any] = {
    "AdamW": optim.AdamW,
    "AdamW8bit": optim.AdamW8bit,
    "AdamWBF16": optim.AdamWBF16,
    "Lion": optim.Lion,
    "Lion8bit": optim.Lion8bit,
    "SGD": lambda params, **more: optim.SGD(params, **{"momentum": 0.9, **more}),
    "ScheduleFreeAdamW": optim.ScheduleFreeAdamW,
    "Adafactor": optim.Adafactor,
}


def models(dtype: torch.dtype = F32, name: str = "") -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    # torch's Adafactor divides by the size of an empty tensor.
    shapes = [s for s in SHAPES if s != (0,) or name != "Adafactor"]
    mine = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    return mine, [p.detach().clone().requires_grad_() for p in mine]


def gradients(mine: list[Tensor], theirs: list[Tensor], skip: int | None = None) -> None:
    for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
        p.grad = None if i == skip else torch.randn_like(p)
        q.grad = None if i == skip else p.grad.clone()  # type: ignore[union-attr]


def same(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 4e-6) -> None:
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
