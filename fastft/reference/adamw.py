"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
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
    total = sum(
        (g.to(torch.float64).square().sum().to(stats.device) for g in grads),
        torch.zeros((), dtype=torch.float64, device=stats.device),
    )
    norm = total.sqrt()
    stats[0] = norm
    if not bool(torch.isfinite(stats[0])):
        stats[1] = 0.0
        stats[2] += 1.0
        return
    coefficient = min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm > 0 else 1.0
    stats[1] = coefficient
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        lr, beta1, beta2, eps, weight_decay = hyper[i].tolist()
        steps[i] += 1
        t = steps[i].item()
        gradient = g.to(m.dtype) * (-coefficient if maximize else coefficient)
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        p.copy_((p.to(m.dtype) * (1 - lr * weight_decay)).sub_(update, alpha=lr))
