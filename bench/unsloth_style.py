"""A peer written here: the way of LoRA that Unsloth publishes, which no package offers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BetaOneLora"]


class BetaOneLora(torch.autograd.Function):
    """Library products that add to what is there (beta = 1), adapters in the layer's dtype,
    siblings in one function, S = x A^T made again in the backward, no dropout.

    apply(x, scaling, n, W_1.., A_1.., B_1..) -> y_1, .., y_n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, n: int, *tensors: Tensor) -> Any:
        ctx.save_for_backward(x, *tensors)
        ctx.scaling, ctx.n = scaling, n
        ys = []
        for w, a, b in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True):
            y = x @ w.t()
            y.addmm_(x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scaling)
            ys.append(y)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        n, scaling = ctx.n, ctx.scaling
        das, dbs, dx = [], [], None
        for dy, w, a, b in zip(dys, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True):
            narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
            ds = dy @ narrow_b
            das.append((ds.t() @ x).mul_(scaling).to(a.dtype))
            dbs.append((dy.t() @ (x @ narrow_a.t())).mul_(scaling).to(b.dtype))
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(ds, narrow_a, alpha=scaling)
        return dx, None, None, *[None] * n, *das, *dbs
