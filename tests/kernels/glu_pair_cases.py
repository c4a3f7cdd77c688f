"""A gated unit over two LoRA layers: declared once, proved interpreted and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.ops.lora_linear import lora_linear_siblings
from fastft.reference import glu as glu_reference
from tests.kernels.bounds import assert_as_accurate

__all__ = ["NAMES", "SCALINGS", "Block"]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALINGS = (0.5, 2.0)
NAMES = ("dx", "da0", "da1", "db0", "db1")


class Block:
    """x, two layers with an adapter each, and a gradient of their unit's result."""

    def __init__(
        self,
        r: tuple[int, int] = (16, 16),
        width: int = 144,
        dtype: torch.dtype = BF16,
        adapter: torch.dtype = F32,
        rows: int = 75,
        features: int = 40,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator) / 6).to(device, of)

        self.x = draw(5, rows // 5, features).requires_grad_()
        self.weights = [draw(width, features) for _ in range(2)]
        self.a = [draw(n, features, of=adapter).requires_grad_() for n in r]
        self.b = [draw(width, n, of=adapter).requires_grad_() for n in r]
        self.dy = draw(5, rows // 5, width)

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.a, *self.b]

    def unit(self, activation: str, gate_first: bool = True) -> Tensor:
        ys = lora_linear_siblings(
            self.x, self.weights, self.a, self.b, scalings=SCALINGS, backend="triton"
        )
        gate, up = ys if gate_first else reversed(ys)
        return ops.glu(gate, up, activation, backend="triton")

    def fused(self, activation: str, gate_first: bool = True) -> tuple[Tensor, ...]:
        y = self.unit(activation, gate_first)
        return torch.autograd.grad(y, self.leaves(), self.dy)

    def plain(self, activation: str, dtype: torch.dtype, gate_first: bool = True) -> Any:
        """By torch, in ``dtype``; gradients of the adapters in float32 where these are."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves()]
        x, a, b = leaves[0], leaves[1:3], leaves[3:]
        ys = [
            x @ w.to(dtype).t() + s * (x @ a_.t() @ b_.t())
            for w, a_, b_, s in zip(self.weights, a, b, SCALINGS, strict=True)
        ]
        gate, up = ys if gate_first else reversed(ys)
        y = glu_reference.glu(gate, up, activation)
        return torch.autograd.grad(y, leaves, self.dy.to(dtype))

    def check(self, got: Any, activation: str, gate_first: bool = True) -> None:
        own = self.plain(activation, self.x.dtype, gate_first)
        truth = self.plain(activation, torch.float64, gate_first)
        for name, value, plain, exact in zip(NAMES, got, own, truth, strict=True):
            assert_as_accurate(name, value, plain, exact)
