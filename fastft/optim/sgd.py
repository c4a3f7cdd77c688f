"""``SGD`` with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastft.errors import ArgumentError
from fastft.optim._base import FusedOptimizer

__all__ = ["SGD"]


class SGD(FusedOptimizer):
    """Stochastic gradient descent, a drop-in for ``torch.optim.SGD``; its momentum is float32.

        g <- g + wd p;  m <- mu m + (1 - dampening) g (first step: m <- g)
        p <- p - lr m, with Nesterov's momentum p <- p - lr (g + mu m)

    Args:
        params: parameters or param groups; float32, bfloat16, float16 or float64.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        max_grad_norm, skip_nonfinite, rounding, seed, foreach, fused, capturable: see
            :class:`~fastft.optim.FusedOptimizer`.

    Raises:
        ArgumentError: a hyper-parameter out of range, Nesterov's momentum without one.
        DtypeError: sparse or complex parameters or gradients, at the step.
    """

    rule = "sgd"
    state_names = ("momentum_buffer",)
    state_sets = (frozenset(state_names), frozenset())

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ArgumentError(
                "fastft.optim.SGD", "nesterov", expected="a momentum and no dampening",
                got=f"momentum {momentum}, dampening {dampening}",
                remedy="Nesterov momentum requires a momentum and zero dampening.",
            )  # fmt: skip
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """See the base."""
        nesterov = 1.0 if group["nesterov"] else 0.0
        dampening = group["dampening"] if group["momentum"] else 0.0
        return (group["lr"], group["momentum"], dampening, 0.0, group["weight_decay"],
                nesterov)  # fmt: skip

    def n_states(self, group: dict[str, Any]) -> int:
        """One with momentum."""
        return int(bool(group["momentum"]))
