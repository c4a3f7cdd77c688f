"""``ScheduleFreeAdamW``: AdamW that needs no learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._base import FusedOptimizer

__all__ = ["ScheduleFreeAdamW"]


class ScheduleFreeAdamW(FusedOptimizer):
    """Schedule-free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682), as its authors
    implement it: 8 bytes of state a parameter.

    While training the parameters are y, where gradients are taken. Call ``eval()`` before
    evaluation or saving, which puts the average x in their place, and ``train()`` after it.

    Args:
        params: parameters or param groups; float32, bfloat16, float16 or float64.
        lr: learning rate, constant after the warm-up; 1 to 10 times AdamW's under a schedule.
        betas, eps, weight_decay: as in AdamW; the decay is that of y.
        warmup_steps: over which the learning rate rises linearly.
        r: steps weigh t^r in the average.
        weight_lr_power: and as the largest learning rate so far to this power.
        max_grad_norm, skip_nonfinite, rounding, seed, foreach, fused: see
            :class:`~fastft.optim.FusedOptimizer`. Steps that are skipped count in t.
        capturable: refused: the host counts the weights of the average.

    Raises:
        ArgumentError: a hyper-parameter out of range, capturable, or ``step()`` after ``eval()``.
        DtypeError: sparse or complex parameters or gradients, at the step.
    """

    rule = "schedule_free"
    state_names = ("z", "exp_avg_sq")
    beside = frozenset("y")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0025,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        where = "fastft.optim.ScheduleFreeAdamW"
        if betas[0] == 0:
            raise ArgumentError(
                where, "betas", expected="beta1 above 0", got=repr(betas),
                remedy="The average is taken by beta1.",
            )  # fmt: skip
        if options.get("capturable"):
            raise ArgumentError(
                where, "capturable", expected="False", got="True",
                remedy="The host counts the weights of the average, which a graph would repeat.",
            )  # fmt: skip
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
            "k": 0,
            "lr_max": 0.0,
            "weight_sum": 0.0,
            "scheduled_lr": 0.0,
            "weight": 0.0,
            "train_mode": True,
        }
        super().__init__(params, defaults, **options)

    def before_step(self) -> None:
        """The weight of this step in the average."""
        for group in self.param_groups:
            if not group["train_mode"]:
                raise ArgumentError(
                    self._where, "step", expected="train() before it", got="eval()",
                    remedy="Call optimizer.train() when training goes on.",
                )  # fmt: skip
            group["k"] += 1
            warm = min(1.0, group["k"] / group["warmup_steps"]) if group["warmup_steps"] else 1.0
            group["scheduled_lr"] = lr = float(group["lr"]) * warm
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            group["weight"] = weight / group["weight_sum"] if group["weight_sum"] else 0.0

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """See the base."""
        return (group["scheduled_lr"], *group["betas"], group["eps"], group["weight_decay"],
                group["weight"])  # fmt: skip

    def fresh_state(self, name: str, state: Tensor, param: Tensor) -> None:
        """z starts where the parameters are."""
        if name == "z":
            state.copy_(param)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts x, the average, in the parameters' place; y is kept in the state."""
        self.wait_for_states()
        for group, p, state in self._with_state(training=True):
            state["y"] = p.detach().clone()
            beta1 = float(group["betas"][0])
            z = state["z"].to(p.device)
            x = torch.lerp(p.to(z.dtype), z, 1 - 1 / beta1)
            p.copy_(x)

    @torch.no_grad()
    def train(self) -> None:
        """Puts y back, bit for bit."""
        for _, p, state in self._with_state(training=False):
            p.copy_(state.pop("y"))

    def _with_state(self, training: bool) -> Iterator[tuple[dict[str, Any], Tensor, Any]]:
        """The parameters of groups that are in this mode, whose groups change to the other."""
        for group in self.param_groups:
            if group["train_mode"] == training:
                group["train_mode"] = not training
                for p in group["params"]:
                    if "z" in self.state[p]:
                        yield group, p, self.state[p]
