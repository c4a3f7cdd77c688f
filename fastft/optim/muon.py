"""``Muon``: momentum whose matrices are orthogonalized, for 2-D parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.errors import ArgumentError
from fastft.ops.optimizer_step import launcher_of
from fastft.optim._base import FusedOptimizer
from fastft.optim._batch import Part
from fastft.optim._matrix import MatrixBatch, MatrixOptimizer, own_state

__all__ = ["Muon", "orthogonalize"]

_WHERE = "fastft.optim.Muon"
_GRAM_STEPS = 5
ADJUSTMENTS = ("original", "match_rms_adamw", "spectral_unclamped")


class _Momenta(MatrixBatch):
    """The momenta of the parameters of one device, and what is to be orthogonalized: matrices of
    one shape and group in one stack each.

    Attributes:
        written: statistics of the write.
    """

    own_states = ("momentum_buffer",)

    def _dense(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        return list(tensors)  # of the parameters it asks for no more than their shapes

    def _lay_out(self, optimizer: Any, keys: list[tuple[int, int]]) -> None:
        self.written = ops.new_stats(self._params[0].device)
        self._stacks: dict[tuple[Any, ...], list[int]] = {}
        for i, p in enumerate(self._params):
            self._stacks.setdefault((p.shape, p.dtype, self._group_of[i]), []).append(i)
        device = self._params[0].device
        steps = torch.zeros(len(self._params), dtype=torch.float32, device=device).unbind()
        buffers = [
            own_state(state, "momentum_buffer", p, tuple(p.shape))
            for state, p in zip(self._states, self._params, strict=True)
        ]
        self.tensors = ops.StepTensors("muon", self._moves(), steps, [buffers])
        self.launcher = launcher_of(self.tensors)
        self._give_back()

    def _give_back(self) -> None:
        self._made: list[Tensor] = []
        self.tensors.params = []

    def row(self, optimizer: FusedOptimizer, group: dict[str, Any]) -> tuple[Any, ...]:
        """See the base."""
        sign = -1.0 if group["maximize"] else 1.0
        return (0.0, group["momentum"], 0.0, 0.0, 0.0, float(group["nesterov"]), sign)

    def run(
        self, optimizer: FusedOptimizer, grads: list[Tensor], stats: Tensor, needs_norm: bool
    ) -> None:
        """Brings the momenta to this step."""
        self.tensors.params = self._moves()
        super().run(optimizer, grads, stats, needs_norm)

    def _moves(self) -> list[Tensor]:
        """Room for what is orthogonalized of each parameter, side by side in its stack."""
        moves: list[Tensor] = [torch.empty(0)] * len(self._params)
        self._made = []
        for (shape, dtype, _), members in self._stacks.items():
            wide = torch.promote_types(dtype, torch.float32)
            stack = torch.empty((len(members), *shape), dtype=wide, device=self.written.device)
            self._made.append(stack)
            for i, move in zip(members, stack.unbind(), strict=True):
                moves[i] = move
        return moves

    def orthogonalized(self) -> list[Tensor]:
        """The update of each parameter; the room is given back."""
        made: list[Tensor] = [torch.empty(0)] * len(self._params)
        for members, stack in zip(self._stacks.values(), self._made, strict=True):
            rows, columns = stack.shape[1:]
            group = self._groups[self._group_of[members[0]]]
            factor = _adjustment(group["adjust_lr_fn"], rows, columns)
            turned = orthogonalize(
                stack, group["ns_coefficients"], group["ns_steps"], group["eps"], factor
            )
            # Over what it was made of: the updates of all wait for one write.
            for i, update in zip(members, stack.copy_(turned).unbind(), strict=True):
                made[i] = update
        self._give_back()
        return made


def _adjustment(kind: str | None, rows: int, columns: int) -> float:
    """What an orthogonalized matrix is multiplied by."""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / max(columns, 1)
    return math.sqrt(ratio if kind == "spectral_unclamped" else max(1, ratio))


class Muon(MatrixOptimizer):
    """Muon, a drop-in for ``torch.optim.Muon``; 4 bytes of state a parameter.

        m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m (Nesterov) or m;  O = orthogonalize(u)
        p <- p - lr (f O + wd p), with f by adjust_lr_fn:
            "original" (or None):   sqrt(max(1, rows / columns))
            "match_rms_adamw":      0.2 sqrt(max(rows, columns))
            "spectral_unclamped":   sqrt(rows / columns), in torch since 2.14

    Matrices of one shape are orthogonalized together. Thin ones, as LoRA's are, through their Gram
    matrix in float32: r x r products instead of r x n ones, see :func:`orthogonalize`.

    Args:
        params: 2-D parameters or param groups of them; give the others to AdamW.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            ``torch.optim.Muon``.
        maximize: ascend.
        max_grad_norm, skip_nonfinite, rounding, seed: see :class:`~fastft.optim.FusedOptimizer`.

    Momentum, clip and check are one call over all matrices, the write another; between them are
    products.

    Raises:
        ArgumentError: a hyper-parameter out of range, a parameter that is no matrix or is sharded.
        RefusedError: sparse or complex parameters or gradients, at the step.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    state_sets = (frozenset(("momentum_buffer",)),)
    # Two of a set: of its momenta, and of the write.
    kept_batches = 2 * FusedOptimizer.kept_batches

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
                self.param_groups.pop()
                raise ArgumentError(
                    _WHERE, "params", expected="matrices", got=f"shape {tuple(p.shape)}",
                    remedy="Muon only supports 2D parameters; use AdamW for the others.",
                )  # fmt: skip

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Of the write, which takes the orthogonalized matrix for a gradient."""
        return (group["lr"], 0.0, 0.0, 0.0, group["weight_decay"], 0.0)

    def row(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The momentum has the sign already."""
        return (*self.hyper(group), 1.0)

    def _batches_of(self, part: Part) -> list[Any]:
        momenta = self._batch(part.device, part.params, part.groups, _Momenta)
        return [momenta, *super()._batches_of(part)]

    def _run(self, part: Part, needs_norm: bool) -> None:
        stats = self._stats_of(part.device)
        momenta, write = part.batches
        momenta.run(self, part.ready, stats, needs_norm)
        # A step that is left out is not written either.
        momenta.written[4] = stats[1] == 0
        write.run(self, write.grads(momenta.orthogonalized(), self), momenta.written, False)


def orthogonalize(
    matrices: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    factor: float = 1.0,
) -> Tensor:
    """The nearest matrix with orthogonal rows (or columns), about: Newton and Schulz's iteration

        X <- a X + (b X X^T + c (X X^T)^2) X, from X / max(|X|, eps)

    Args:
        matrices: (batch, rows, columns) float32; scaled in place.
        coefficients: a, b, c.
        steps: how many.
        eps: the least norm.
        factor: what the result is multiplied by.

    Returns:
        float32 of the same shape; singular values between about 0.7 and 1.2, times the factor.

    Where one side is at least twice the other, all steps run on the Gram matrix G = X X^T of the
    shorter one, for X_k = P_k X_0 with P_(k+1) = Q_k P_k, G_(k+1) = Q_k G_k Q_k and
    Q_k = a I + b G_k + c G_k^2: two products with the long side instead of two a step. In float32:
    G squares the condition. Others are iterated in bfloat16, as their authors do.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    rows, columns = x.shape[1:]
    least: Any = eps
    if x.numel():
        # Squares of what is beyond 1e19 are beyond float32: first by the largest element.
        largest = torch.maximum(x.amax((1, 2), True), -x.amin((1, 2), True))
        x.div_(largest.clamp_(min=torch.finfo(x.dtype).tiny))
        least = eps / largest
    scale = 1 / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=least)
    if 2 * rows <= columns:
        eye = torch.eye(rows, dtype=x.dtype, device=x.device).expand(len(x), rows, rows)
        # What rounding leaves of a singular G's zeros grows by a^2 a step: begin anew after a few.
        for first in range(0, steps, _GRAM_STEPS):
            gram, total = (x @ x.mT) * scale.square(), eye
            for _ in range(min(_GRAM_STEPS, steps - first)):
                q = a * eye + b * gram + c * (gram @ gram)
                total, gram = q @ total, q @ gram @ q
            ends = first + _GRAM_STEPS >= steps
            x, scale = (total * (scale * factor if ends else scale)) @ x, torch.ones_like(scale)
    else:
        y = torch.empty_like(x, dtype=torch.bfloat16)
        torch.mul(x, scale, out=y)
        for _ in range(steps):
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        x = y.to(matrices.dtype).mul_(factor)
    return x.mT if tall else x
