"""``AdamW``: torch's optimizer with the step as one fused call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.errors import ArgumentError, DtypeError

__all__ = ["AdamW"]

_WHERE = "fastft.optim.AdamW"


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, float32 states, the whole step in one call.

    A drop-in for ``torch.optim.AdamW``: param groups, schedulers, closures and ``state_dict``
    (its keys and layout, so each loads the other's) are torch's. The formula stands in
    :mod:`fastft.ops.adamw`.

    Args:
        params: parameters or param groups; float32, bfloat16 or (GPU) float16.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        max_grad_norm: clip the global norm of all gradients of the step at this, inside the
            step; None where the trainer clips already.

    A step whose gradient norm is not finite changes no parameter and no state; it is counted in
    ``skipped_steps``. ``grad_norm`` is the norm of the last step.

    Raises:
        ArgumentError: a hyper-parameter out of range.
        DtypeError: sparse or complex parameters or gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        maximize: bool = False,
    ) -> None:
        for name, value, valid, expected in (
            ("lr", lr, lr >= 0, ">= 0"),
            ("betas", betas, all(0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
            ("eps", eps, eps >= 0, ">= 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "> 0"),
        ):
            if not valid:
                raise ArgumentError(_WHERE, name, expected=expected, got=repr(value))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self.max_grad_norm = max_grad_norm
        super().__init__(params, defaults)  # type: ignore[arg-type]
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._stats: dict[tuple[torch.device, bool], Tensor] = {}

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradients, 0-dim float32, over all devices."""
        norms = [s[0].cpu() for s in self._stats.values()]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a norm that was not finite; reads the device."""
        return max((int(s[2].item()) for s in self._stats.values()), default=0)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what it does not know.
        own = {"max_grad_norm": self.max_grad_norm, "_stats": self._stats}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batches = {}
        self.__dict__.setdefault("_stats", {})
        self.__dict__.setdefault("max_grad_norm", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; also takes the state of ``torch.optim.AdamW`` without amsgrad."""
        for group in state_dict.get("param_groups", []):
            if group.get("amsgrad"):
                raise ArgumentError(
                    _WHERE, "amsgrad", expected="False", got="True", remedy="It is not offered."
                )
        super().load_state_dict(state_dict)
        # torch casts loaded states to the parameter's dtype; the saved tensors are float32.
        by_index = state_dict["state"]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            saved = by_index.get(index, {})
            for key, value in self.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.dtype != torch.float32:
                    self.state[p][key] = saved[key].to(value.device, torch.float32, copy=True)
        self._batches = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        split = list(self._members())
        limits = [self.max_grad_norm or 0.0] if len(split) == 1 else self._shared_limits(split)
        for (device, maximize, members), limit in zip(split, limits):
            key = (hash((device, maximize)), *(id(p) for p, _ in members))
            batch = self._batches.get(key)
            if batch is None:
                self._batches = {k: b for k, b in self._batches.items() if k[0] != key[0]}
                batch = self._batches[key] = _Batch(self, [p for p, _ in members], device)
            batch.set_hyper([group for _, group in members])
            ops.adamw(
                batch.params,
                [p.grad.contiguous() for p in batch.params],  # type: ignore[union-attr]
                batch.exp_avgs,
                batch.exp_avg_sqs,
                batch.steps,
                batch.hyper,
                self._stat(device, maximize),
                max_norm=limit,
                maximize=maximize,
            )
        return loss

    def _stat(self, device: torch.device, maximize: bool) -> Tensor:
        return self._stats.setdefault((device, maximize), torch.zeros(3, device=device))

    def _shared_limits(self, split: list[Any]) -> list[float]:
        """For parameters of several devices or directions, which need a call each: the clip of
        each call that makes its coefficient the one of the norm over all; none of them runs, and
        the list is empty, when that norm is not finite. Waits for the devices."""
        norms = [
            float(torch.nn.utils.get_total_norm([p.grad for p, _ in members]))
            for _, _, members in split
        ]
        total = math.hypot(*norms)
        if not math.isfinite(total):
            for (device, maximize, _), norm in zip(split, norms):
                stat = self._stat(device, maximize)
                stat[0] = norm
                stat[2] += 1
            return []
        if self.max_grad_norm is None or total <= self.max_grad_norm:
            return [0.0] * len(split)
        coefficient = self.max_grad_norm / (total + 1e-6)
        return [coefficient * (norm + 1e-6) for norm in norms]

    def _members(
        self,
    ) -> Iterable[tuple[torch.device, bool, list[tuple[Tensor, dict[str, Any]]]]]:
        """The parameters with a gradient and their groups, by device and direction."""
        split: dict[tuple[torch.device, bool], list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.is_complex():
                    raise DtypeError(
                        _WHERE,
                        "grad",
                        expected="dense real gradients",
                        got="sparse" if p.grad.is_sparse else str(p.dtype),
                    )
                split.setdefault((p.device, bool(group["maximize"])), []).append((p, group))
        for (device, maximize), members in split.items():
            yield device, maximize, members


class _Batch:
    """The tensors of one call, gathered once: states, step counts and hyper-parameters."""

    def __init__(self, optimizer: AdamW, params: list[Tensor], device: torch.device) -> None:
        self.params = params
        fresh = [p for p in params if not optimizer.state[p]]
        # One arena for all new states: one allocation, and neighbours in memory.
        arena = torch.zeros(2 * sum(p.numel() for p in fresh), device=device)
        offset = 0
        for p in fresh:
            state = optimizer.state[p]
            state["step"] = torch.zeros((), device=device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = arena[offset : offset + p.numel()].view(p.shape)
                offset += p.numel()
        states = [optimizer.state[p] for p in params]
        self.exp_avgs = [s["exp_avg"] for s in states]
        self.exp_avg_sqs = [s["exp_avg_sq"] for s in states]
        # The kernel counts the steps of all tensors in one vector; the states hold views of it.
        self.steps = torch.stack(
            [torch.as_tensor(s["step"], dtype=torch.float32, device=device) for s in states]
        )
        for state, view in zip(states, self.steps.unbind(), strict=True):
            state["step"] = view
        self.hyper = torch.zeros(len(params), 5, device=device)
        self._values: list[tuple[float, ...]] = []

    def set_hyper(self, groups: list[dict[str, Any]]) -> None:
        """Writes lr, betas, eps and weight decay of each tensor, where they changed."""
        rows = {
            id(g): (float(g["lr"]), *g["betas"], float(g["eps"]), float(g["weight_decay"]))
            for g in groups
        }
        values = [rows[id(g)] for g in groups]
        if values != self._values:
            self._values = values
            self.hyper.copy_(torch.tensor(values, dtype=torch.float32), non_blocking=True)
