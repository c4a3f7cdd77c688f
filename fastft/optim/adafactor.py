"""``Adafactor``: second moments of matrices as a row and a column."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastft import ops
from fastft.errors import ArgumentError
from fastft.ops.adafactor_step import factored_launcher_of
from fastft.optim._matrix import MatrixBatch, MatrixOptimizer, own_state

__all__ = ["Adafactor"]


class _FactoredBatch(MatrixBatch):
    """Parameters of one device with their moments, made where there are none."""

    own_states = ("row_var", "col_var", "variance")

    def _lay_out(self, optimizer: Any, keys: list[tuple[int, int]]) -> None:
        rows: list[Tensor | None] = []
        columns = []
        for p, state in zip(self._params, self._states, strict=True):
            if p.dim() > 1:
                rows.append(own_state(state, "row_var", p, (*p.shape[:-1], 1)))
                columns.append(own_state(state, "col_var", p, (*p.shape[:-2], 1, p.shape[-1])))
            else:
                rows.append(None)
                columns.append(own_state(state, "variance", p, tuple(p.shape)))
        self.tensors = ops.FactoredTensors(
            self._params,
            [s["step"] for s in self._states],
            rows,
            columns,
            self._dense([s.get("compensation") for s in self._states]),
            optimizer.rounding,
            [key for key, _ in keys],
        )
        self.launcher = factored_launcher_of(self.tensors)


class Adafactor(MatrixOptimizer):
    """Adafactor, a drop-in for ``torch.optim.Adafactor``; (rows + columns) * 4 bytes of state a
    matrix, 4 bytes a parameter of a vector.

        R <- lerp(R, mean_columns g^2, t^decay);  C <- lerp(C, mean_rows g^2, t^decay)
        U = g / sqrt(R C / mean R);  U <- U / max(1, rms(U) / d)
        p <- p (1 - lr wd) - max(eps2, rms(p)) min(lr, 1 / sqrt t) U

    Args:
        params: parameters or param groups; float32, bfloat16, float16 or float64.
        lr, beta2_decay, eps, d, weight_decay, maximize: as in ``torch.optim.Adafactor``.
        max_grad_norm, skip_nonfinite, rounding, seed: see :class:`~fastft.optim.FusedOptimizer`.

    States are float32 whatever the parameters' dtype. A step is one call over all tensors.

    Raises:
        ArgumentError: a hyper-parameter out of range, a sharded parameter.
        RefusedError: sparse or complex parameters or gradients, at the step.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235.
    """

    batch = _FactoredBatch
    state_sets = (frozenset(("row_var", "col_var")), frozenset(("variance",)))

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

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """lr, weight decay, d, the two eps and the decay of a group; see ops.adafactor_step."""
        eps1, eps2 = group["eps"]
        first = -1.0 if eps1 is None else eps1
        return (group["lr"], group["weight_decay"], group["d"], first, eps2, group["beta2_decay"])
