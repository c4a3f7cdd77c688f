"""What a proof of a LoRA layer over another package's product computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastft.nn.lora_product import fused_over, product_of
from fastft.nn.swap import original_of

__all__ = ["adapts_product", "dense_product", "tried"]


def adapts_product(module: nn.Module) -> bool:
    """Whether it is a LoRA layer over another package's product."""
    return fused_over(original_of(module)) is not None


def tried(module: Any) -> list[nn.Parameter]:
    """The parameters that a proof computes with: over another package's product the adapters."""
    if not adapts_product(module):
        return list(module.parameters())
    return [*module.lora_A.parameters(), *module.lora_B.parameters()]


@contextmanager
def dense_product(module: Any) -> Iterator[None]:
    """Inside, a random dense product stands for another package's: that one is the same on both
    sides, and what its first call does to a layer, none of this trial's may do."""
    if not adapts_product(module):
        yield
        return
    name, base = next(iter(module.lora_A)), product_of(module)
    device, width = module.lora_A[name].weight.device, module.lora_B[name].weight.shape[0]
    weight = torch.randn(width, module.in_features, device=device) / module.in_features**0.5
    before = {k: v for k, v in vars(base).items() if k == "forward"}
    base.forward = lambda x: nn.functional.linear(x, weight.to(x.dtype))
    try:
        yield
    finally:
        del base.forward
        vars(base).update(before)
