"""``Adafactor``: second moments of matrices as a row and a column."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._matrix import MatrixOptimizer

__all__ = ["Adafactor"]


class Adafactor(MatrixOptimizer):
    """Adafactor, a drop-in for ``torch.optim.Adafactor``; (rows + columns) * 4 bytes of state a
    matrix, 4 bytes a parameter of a vector.

        R <- lerp(R, mean_columns g^2, t^decay);  C <- lerp(C, mean_rows g^2, t^decay)
        U = g / sqrt(R C / mean R);  U <- U / max(1, rms(U) / d)
        p <- p (1 - lr wd) - max(eps2, rms(p)) min(lr, 1 / sqrt t) U

    Args:
        params: parameters or param groups; float32, bfloat16, float16 or float64.
        lr, beta2_decay, eps, d, weight_decay, maximize: as in ``torch.optim.Adafactor``.
        max_grad_norm, skip_nonfinite, rounding, seed: see :class:`~fastft.optim.FusedOptimizer`;
            the host waits once a step for the norm where either of the first two asks for it.

    States are float32 whatever the parameters' dtype.

    Raises:
        ArgumentError: a hyper-parameter out of range, a sharded parameter.
        RefusedError: sparse or complex parameters or gradients, at the step.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        for name, value, valid, text in (
            ("beta2_decay", beta2_decay, beta2_decay <= 0, "beta2_decay should be <= 0"),
            ("eps", eps[0], eps[0] is None or eps[0] >= 0, "epsilon1 should be >= 0"),
            ("eps", eps[1], eps[1] >= 0, "epsilon2 should be >= 0"),
            ("d", d, d >= 1, "Clipping threshold d should be >= 1"),
        ):
            if not valid:
                raise ArgumentError(
                    "fastft.optim.Adafactor", name, expected="a value in range", got=repr(value),
                    remedy=f"{text}.",
                )  # fmt: skip
        # Not numbers that must be positive.
        self._more = {"beta2_decay": beta2_decay, "eps": eps}
        defaults = {"lr": lr, "d": d, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)

    def updates(
        self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
    ) -> list[Tensor]:
        """See the base."""
        return [self._update(*each) for each in zip(params, grads, groups, strict=True)]

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        state = self._own_state(p, g)
        if not p.numel():
            return torch.zeros_like(g)
        step = state["step"].to(g.dtype) + 1  # counted by the write
        eps1 = torch.finfo(p.dtype).eps if group["eps"][0] is None else group["eps"][0]
        rate = step ** group["beta2_decay"]
        if g.dim() > 1:
            row, column = state["row_var"], state["col_var"]
            square = g.square()
            row.lerp_(square.mean(-1, keepdim=True), rate)
            column.lerp_(square.mean(-2, keepdim=True), rate)
            variance = row * column / row.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            state["variance"].lerp_(g.square(), rate)
            variance = state["variance"].clone()
        update = variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(g)
        size = torch.linalg.vector_norm(p, dtype=g.dtype) / p.numel() ** 0.5
        lr = group["lr"]
        # Over lr, which the write multiplies by: min(lr, 1 / sqrt t) / lr.
        share = (1 / (step.sqrt() * lr)).clamp(max=1.0)
        clip = (torch.linalg.vector_norm(update) / (p.numel() ** 0.5 * group["d"])).clamp(min=1.0)
        return update.mul_(size.clamp(min=group["eps"][1]) * share / clip)

    def _own_state(self, p: Tensor, g: Tensor) -> Any:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), device=p.device)
        if g.dim() > 1:
            wanted = {"row_var": (*g.shape[:-1], 1), "col_var": (*g.shape[:-2], 1, g.shape[-1])}
        else:
            wanted = {"variance": tuple(g.shape)}
        for name, shape in wanted.items():
            found = state.get(name)
            if found is None:
                state[name] = g.new_zeros(shape)
            elif found.dtype != g.dtype or found.device != g.device:
                state[name] = found.to(g.device, g.dtype)
        if state["step"].device != p.device:
            state["step"] = state["step"].to(p.device)
        return state
