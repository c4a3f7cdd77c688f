"""``Lion``: the sign of a momentum, with states in float32 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastft.optim._base import FusedOptimizer
from fastft.optim._eight_bit import EightBitStates

__all__ = ["Lion", "Lion8bit"]


class Lion(FusedOptimizer):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): 4 bytes of state a parameter.

        p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g

    Args:
        params: parameters or param groups; float32, bfloat16, float16 or float64.
        lr, betas, weight_decay: as in the paper; a learning rate 3 to 10 times below AdamW's.
        maximize: ascend.
        max_grad_norm, skip_nonfinite, rounding, seed, foreach, fused, capturable: see
            :class:`~fastft.optim.FusedOptimizer`.

    Raises:
        ArgumentError: a hyper-parameter out of range.
        DtypeError: sparse or complex parameters or gradients, at the step.
    """

    rule = "lion"
    state_names = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-4,
        betas: tuple[Any, Any] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """See the base."""
        return (group["lr"], *group["betas"], 0.0, group["weight_decay"], 0.0)


class Lion8bit(EightBitStates, Lion):
    """Lion with a block-wise 8-bit state, 1.02 bytes a parameter; its ``state_dict`` is that of
    ``bitsandbytes.optim.Lion8bit``. See :class:`AdamW8bit` for ``min_8bit_size``, ``saved_bits``
    and rounding."""

    state_names = ("state1",)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """As the base. bitsandbytes names one state alike in all its optimizers; SGD and Adagrad
        have no second beta there, RMSprop and Adagrad an eps."""
        super()._check_loaded(state_dict)
        theirs = (g for g in state_dict["param_groups"] if "state_bits" not in g and "betas" in g)
        if state_dict["state"] and any(g.get("eps") or not g["betas"][1] for g in theirs):
            self._refuse_loaded("that of another of bitsandbytes' optimizers")
