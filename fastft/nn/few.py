"""Few rows without gradients, as in generation. A fused call saves passes over its tensors, of
which there is little here, and costs its host more than a few calls of the library; what runs those
counts as fused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastft.nn.dora import scale_of
from fastft.ops._checks import autocast_dtype

if TYPE_CHECKING:
    from fastft.nn.plans import Parts, Plan

__all__ = ["few_rows", "lora_linear", "takes"]

# Forward alone, on a CPU, in bfloat16: from 256 rows on the fused call is the quicker one.
_MOST = 128


def few_rows(layer: nn.Module, x: Tensor) -> bool:
    """Whether these are so few, and no gradients are recorded; never in a compiled graph.

    The forward of a reentrant checkpoint records none either, and its recompute must have the same
    bits: a layer in training mode is asked for one token a sample.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.numel() <= _MOST * x.shape[-1]
        and (not layer.training or (x.dim() == 3 and x.shape[1] == 1))
    )


def takes(layer: nn.Module, plan: Plan, x: Tensor) -> bool:
    """Whether this call of a LoRA layer is :func:`lora_linear`."""
    if not few_rows(layer, x):
        return False
    return autocast_dtype(x.device.type) is None and not any(p.dropout_p() for p in plan.parts)


def lora_linear(plan: Plan, x: Tensor) -> Tensor:
    """y = scale * (x W^T + scaling * x A^T B^T) + bias, rounded as PEFT rounds; scale: DoRA's."""
    scale, bias = scale_of(plan), plan.bias()
    y = plan.frozen(x, bias if scale is None else None)
    if plan.spans is None:
        for parts in plan.parts:
            _add(y, parts, x)
    else:
        rows, flat = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for k, start, stop in plan.spans:
            _add(rows[start:stop], plan.parts[k], flat[start:stop])
    if scale is not None:
        y.mul_(scale)
        y = y if bias is None else y.add_(bias)
    return y


def _add(y: Tensor, parts: Parts, x: Tensor) -> None:
    """y += scaling * x A^T B^T."""
    a, b = parts.adapter()
    y.add_(linear(linear(x.to(a.dtype), a), b), alpha=float(parts.scaling))
