"""``Muon``: momentum whose matrices are orthogonalized, for 2-D parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._matrix import MatrixOptimizer

__all__ = ["Muon", "orthogonalize"]

_WHERE = "fastft.optim.Muon"
_GRAM_STEPS = 5
ADJUSTMENTS = ("original", "match_rms_adamw")


class Muon(MatrixOptimizer):
    """Muon, a drop-in for ``torch.optim.Muon``; 4 bytes of state a parameter.

        m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m (Nesterov) or m;  O = orthogonalize(u)
        p <- p - lr (f O + wd p), f = sqrt(max(1, rows / columns)) or 0.2 sqrt(max(rows, columns))

    Matrices of one shape are orthogonalized together. Thin ones, as LoRA's are, through their Gram
    matrix in float32: r x r products instead of r x n ones, see :func:`orthogonalize`.

    Args:
        params: 2-D parameters or param groups of them; give the others to AdamW.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            ``torch.optim.Muon``.
        maximize: ascend.
        max_grad_norm, skip_nonfinite, rounding, seed: see :class:`~fastft.optim.FusedOptimizer`;
            the host waits once a step for the norm where either of the first two asks for it.

    Raises:
        ArgumentError: a hyper-parameter out of range, a parameter that is no matrix or is sharded.
        RefusedError: sparse or complex parameters or gradients, at the step.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUSTMENTS:
            raise ArgumentError(
                _WHERE, "adjust_lr_fn", expected=" or ".join(ADJUSTMENTS), got=repr(adjust_lr_fn),
                remedy=f"Adjust learning rate function {adjust_lr_fn} is not supported.",
            )  # fmt: skip
        if not 0 < ns_steps < 100 or len(ns_coefficients) != 3:
            raise ArgumentError(
                _WHERE, "ns_steps", expected="1 to 99, and three coefficients",
                got=f"{ns_steps}, {ns_coefficients!r}",
            )  # fmt: skip
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "eps": eps,
            "ns_steps": ns_steps,
            "maximize": maximize,
        }
        # Not numbers that must be positive.
        self._more = {"ns_coefficients": ns_coefficients, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; refuses what is no matrix."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim != 2:
                raise ArgumentError(
                    _WHERE, "params", expected="matrices", got=f"shape {tuple(p.shape)}",
                    remedy="Muon only supports 2D parameters; use AdamW for the others.",
                )  # fmt: skip

    def updates(
        self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
    ) -> list[Tensor]:
        """See the base."""
        together: dict[tuple[Any, ...], list[int]] = {}
        moves = []
        for i, (p, g, group) in enumerate(zip(params, grads, groups, strict=True)):
            buffer = self._momentum(p, g)
            buffer.lerp_(g, 1 - group["momentum"])
            moves.append(g.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
            key = (p.shape, p.device, id(group))
            together.setdefault(key, []).append(i)
        made: list[Tensor] = [torch.empty(0)] * len(params)
        for members in together.values():
            group = groups[members[0]]
            stacked = torch.stack([moves[i] for i in members])
            turned = orthogonalize(
                stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            rows, columns = stacked.shape[1:]
            if group["adjust_lr_fn"] == "match_rms_adamw":
                factor = 0.2 * math.sqrt(max(rows, columns))
            else:
                factor = math.sqrt(max(1, rows / columns))
            for i, update in zip(members, (turned * factor).unbind(), strict=True):
                made[i] = update
        return made

    def _momentum(self, p: Tensor, g: Tensor) -> Tensor:
        state = self.state[p]
        found = state.get("momentum_buffer")
        if found is None or found.dtype != g.dtype or found.device != g.device:
            fresh = torch.zeros_like(g) if found is None else found.to(g.device, g.dtype)
            state["momentum_buffer"] = found = fresh
        return found  # type: ignore[no-any-return]


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The nearest matrix with orthogonal rows (or columns), about: Newton and Schulz's iteration

        X <- a X + (b X X^T + c (X X^T)^2) X, from X / max(|X|, eps)

    Args:
        matrices: (batch, rows, columns) float32.
        coefficients: a, b, c.
        steps: how many.
        eps: the least norm.

    Returns:
        float32 of the same shape; singular values between about 0.7 and 1.2.

    Where one side is at least twice the other, all steps run on the Gram matrix G = X X^T of the
    shorter one, for X_k = P_k X_0 with P_(k+1) = Q_k P_k, G_(k+1) = Q_k G_k Q_k and
    Q_k = a I + b G_k + c G_k^2: two products with the long side instead of two a step. In float32:
    G squares the condition. Others are iterated in bfloat16, as their authors do.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    rows, columns = x.shape[1:]
    if 2 * rows <= columns:
        eye = torch.eye(rows, dtype=x.dtype, device=x.device).expand(len(x), rows, rows)
        # What rounding leaves of a singular G's zeros grows by a^2 a step: begin anew after a few.
        for first in range(0, steps, _GRAM_STEPS):
            gram, total = x @ x.mT, eye
            for _ in range(min(_GRAM_STEPS, steps - first)):
                q = a * eye + b * gram + c * (gram @ gram)
                total, gram = q @ total, q @ gram @ q
            x = total @ x
    else:
        y = x.to(torch.bfloat16)
        for _ in range(steps):
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        x = y.to(matrices.dtype)
    return x.mT if tall else x
