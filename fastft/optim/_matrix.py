"""What optimizers of whole matrices share: products and sums are torch's, the write is one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._base import FusedOptimizer
from fastft.optim._shards import global_norm, is_sharded

__all__ = ["MatrixOptimizer"]


class MatrixOptimizer(FusedOptimizer):
    """Makes an update U of each gradient and writes p <- p - lr (U + wd p) over all tensors at
    once, rounding as the base does. With a clip, or a check of the norm, the host waits for the
    norm once a step. The norm is over all parameters; sharded ones are refused, for their rows
    and columns lie apart."""

    rule = "sgd"
    state_names = ()

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        super().__init__(params, defaults, **options)
        for name, only in (("flat", False), ("capturable", False), ("states", "device")):
            if options.get(name, only) != only:
                raise ArgumentError(
                    self._where, name, expected=repr(only), got=repr(options[name]),
                    remedy="Matrices and their states stay whole, and the host waits for a norm.",
                )  # fmt: skip

    def updates(
        self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
    ) -> list[Tensor]:
        """U of each parameter, float32 or wider; states are made and kept here."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """See the base."""
        return (group["lr"], 0.0, 0.0, 0.0, group["weight_decay"], 0.0)

    def row(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """U has the sign already."""
        return (*self.hyper(group), 1.0)

    def apply_step(
        self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
    ) -> None:
        """See the base."""
        for p, g in zip(params, grads, strict=True):
            self.refuse(p, g)
            if is_sharded(p):
                raise ArgumentError(
                    self._where, "params", expected="whole tensors", got="a sharded one",
                    remedy="Keep these parameters out of FSDP, or use AdamW.",
                )  # fmt: skip
        if not params:
            return
        device = params[0].device
        stats = self._stats_of(device)
        scale = self._inverse_scale(device)
        found = getattr(self, "found_inf", None)
        grads = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
        if isinstance(scale, Tensor):
            grads = [g * scale.to(g.device) for g in grads]
        if self.max_grad_norm is not None or self.skip_nonfinite or found is not None:
            norm = global_norm(grads).to(device)
            stats[0] = norm
            if not bool(norm.isfinite()) or (found is not None and float(found) > 0):
                stats[2] += 1
                return
            if self.max_grad_norm is not None:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                grads = [g * clip.to(g.device) for g in grads]
        self._norm_is_global = True
        signed = [-g if group.get("maximize") else g for g, group in zip(grads, groups)]
        made = self.updates(params, signed, groups)
        self.write(params, made, groups)
