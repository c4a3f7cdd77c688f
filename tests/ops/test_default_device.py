"""A default device other than the tensors' own (``torch.set_default_device``) changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft import ops
from fastft.cpu import products
from fastft.nn.norm import norm_facts
from fastft.nn.rope import facts_of

ROWS, WIDTH, R = 600, 64, 4
BF16, F32 = torch.bfloat16, torch.float32


def leaf(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, device="cpu").to(dtype).requires_grad_()


def lora(dtype: torch.dtype, p: float) -> tuple[Tensor, list[Tensor]]:
    x, a, b = leaf(ROWS, WIDTH, dtype=dtype), leaf(R, WIDTH), leaf(WIDTH, R)
    weight = leaf(WIDTH, WIDTH, dtype=dtype).detach()
    return ops.lora_linear(x, weight, a, b, scaling=0.5, dropout_p=p), [x, a, b]


def dora(_: torch.dtype, bias: float) -> tuple[Tensor, list[Tensor]]:
    x, a, b = leaf(ROWS, WIDTH, dtype=BF16), leaf(R, WIDTH), leaf(WIDTH, R)
    weight = leaf(WIDTH, WIDTH, dtype=BF16).detach()
    scale = (leaf(WIDTH) / ops.dora_norm(weight, a, b, 0.5)).detach().requires_grad_()
    (y,) = ops.lora_linear_siblings(x, [weight], [a], [b], scalings=[0.5], scales=[scale])
    if bias:
        y = y.add_(bias)  # changed: the gradient of the scale is made of the products
    return y, [x, a, b, scale]


def norm(dtype: torch.dtype, _: float) -> tuple[Tensor, list[Tensor]]:
    x, weight = leaf(ROWS, WIDTH, dtype=dtype), leaf(WIDTH, dtype=dtype)
    return ops.rms_norm(x, weight), [x, weight]


def attention(dtype: torch.dtype, _: float) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (leaf(1, 2, 16, 8, dtype=dtype) for _ in range(3))
    return ops.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]


def loss(dtype: torch.dtype, _: float) -> tuple[Tensor, list[Tensor]]:
    x, weight = leaf(ROWS, WIDTH, dtype=dtype), leaf(WIDTH, WIDTH, dtype=dtype)
    labels = torch.randint(WIDTH, (ROWS,), device="cpu")
    return ops.linear_cross_entropy(x, weight, labels), [x, weight]


def distillation(dtype: torch.dtype, _: float) -> tuple[Tensor, list[Tensor]]:
    x, weight, teacher = (leaf(WIDTH, WIDTH, dtype=dtype) for _ in range(3))
    return ops.linear_divergence(x, weight, teacher.detach()), [x, weight]


Make = Callable[[torch.dtype, float], tuple[Tensor, list[Tensor]]]
CASES: list[tuple[Make, torch.dtype, float]] = [
    (lora, BF16, 0.0), (lora, F32, 0.1), (dora, BF16, 0.0), (dora, BF16, 1.0), (norm, F32, 0.0),
    (attention, F32, 0.0), (attention, BF16, 0.0), (loss, F32, 0.0), (loss, BF16, 0.0),
    (distillation, F32, 0.0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_buffers() -> Iterator[None]:
    products._scratch.buffers.clear()
    yield
    products._scratch.buffers.clear()


@pytest.mark.parametrize(("make", "dtype", "number"), CASES)
def test_operations(make: Make, dtype: torch.dtype, number: float) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        y, inputs = make(dtype, number)
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    with torch.device("meta"):
        got = run()
    products._scratch.buffers.clear()
    for g, e in zip(got, run(), strict=True):
        assert torch.equal(g, e)


def test_conventions_are_found() -> None:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

        return turned(q), turned(k)

    module = nn.RMSNorm(WIDTH, eps=1e-6)
    with torch.device("meta"):
        facts, found = norm_facts(module), facts_of("rotary", rotary)
    assert found is not None
    assert (facts, found) == (norm_facts(module), facts_of("rotary", rotary))


def test_an_optimizer_steps() -> None:
    def run() -> Tensor:
        p = torch.linspace(-1, 1, 5000, device="cpu").requires_grad_()
        optimizer = fastft.optim.AdamW8bit([p], lr=1e-2, max_grad_norm=1.0)
        for _ in range(3):
            p.grad = p.detach().sin()
            optimizer.step()
        return p.detach()

    with torch.device("meta"):
        got = run()
    assert torch.equal(got, run())
