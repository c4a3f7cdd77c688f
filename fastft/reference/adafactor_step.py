"""Adafactor in plain torch; the formulas stand in :mod:`fastft.ops.adafactor_step`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.reference.optimizer_step import close_param, decide, open_param

__all__ = ["step", "supports"]


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
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
) -> None:
    """One step over all tensors; ``tensors`` is what ``fastft.ops.FactoredTensors`` holds."""
    scale = decide(grads, stats, max_norm, needs_norm)
    if scale is None:
        return
    for i, (p, grad) in enumerate(zip(tensors.params, grads, strict=True)):
        tensors.steps[i].add_(1)
        if not p.numel():
            continue
        t = tensors.steps[i].item()
        lr, weight_decay, threshold, eps1, eps2, decay, sign = (float(v) for v in hyper[i])
        if eps1 < 0:
            eps1 = torch.finfo(p.dtype).eps
        value = open_param(tensors, i)
        g = grad.to(value.dtype) * scale
        variance = _variance(tensors.rows[i], tensors.columns[i], g.square(), t**decay, eps1)
        least = max(eps1 * eps1, torch.finfo(torch.float32).tiny)
        update = variance.clamp(min=least).rsqrt() * (g * sign)
        size = max(eps2, _rms(value)) * min(lr, t**-0.5) / max(1.0, _rms(update) / threshold)
        close_param(tensors, i, value * (1 - lr * weight_decay) - update * size, seed)


def _variance(
    row: Tensor | None, column: Tensor, square: Tensor, rate: float, eps1: float
) -> Tensor:
    """Of each element; the moments are brought to this step."""
    if row is None:
        column.lerp_(square, rate)
        return column.clone()
    row.lerp_(square.mean(-1, keepdim=True), rate)
    column.lerp_(square.mean(-2, keepdim=True), rate)
    return row / row.mean(-2, keepdim=True).clamp(min=eps1) * column


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
