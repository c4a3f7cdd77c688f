"""Backwards as torch operations: second derivatives, batches of gradients. What each input has is
its own share, also where it depends on another or is it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastft import ops

TOKENS, WIDTH = 5, 8


def _heads(x: Tensor) -> Tensor:
    return x.view(1, 2, TOKENS, WIDTH // 2)


def _attention(x: Tensor, fused: bool) -> Tensor:
    heads = _heads(x)
    if fused:
        return ops.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    scores = (heads @ heads.mT / heads.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ heads


def _lora(x: Tensor, fused: bool) -> Tensor:
    """Two layers with one A, which depends on x."""
    a = x[:3].tanh()
    weight = torch.eye(WIDTH, dtype=x.dtype).flip(0)
    bs = [weight[:, :3] + 1, weight[:, 2:5] - 2]
    if fused:
        ys = ops.lora_linear_siblings(x, [weight] * 2, [a, a], bs, scalings=[0.5, 2.0])
        return torch.cat(ys)
    return torch.cat([x @ weight.t() + s * (x @ a.t()) @ b.t() for s, b in zip((0.5, 2.0), bs)])


def _lora_add(x: Tensor, fused: bool) -> Tensor:
    """Two layers whose results depend on x, with one A that does."""
    a, ys = x[:3].tanh(), [x.sin(), x.exp()]
    bs = [torch.eye(WIDTH)[:, :3] + 1, torch.eye(WIDTH)[:, 2:5] - 2]
    if fused:
        return torch.cat(ops.lora_add_siblings(ys, x, [a, a], bs, scalings=[0.5, 2.0]))
    return torch.cat([y + s * (x @ a.t()) @ b.t() for y, s, b in zip(ys, (0.5, 2.0), bs)])


def _dora(x: Tensor, fused: bool) -> Tensor:
    scale = x.mean(0)
    return ops.dora_scale(x, scale, scale) if fused else x * scale + scale


def _grouped(x: Tensor, fused: bool) -> Tensor:
    """Two experts of which A depends on x."""
    weight = torch.stack([torch.eye(WIDTH, dtype=x.dtype), 2 * torch.eye(WIDTH, dtype=x.dtype)])
    a, b = torch.stack([x[:2], x[2:4]]).tanh(), weight[:, :, :2] - 1
    ends = torch.tensor([2, TOKENS], dtype=torch.int32)
    if fused:
        return ops.lora_grouped_linear(x, weight, a, b, ends, scaling=0.5)
    parts = zip((x[:2], x[2:]), weight, a, b, strict=True)
    return torch.cat([p @ w.t() + 0.5 * (p @ i.t()) @ o.t() for p, w, i, o in parts])


def _add_rms_norm(x: Tensor, fused: bool) -> Tensor:
    residual, weight = x.tanh(), x.mean(0)
    if fused:
        y, total = ops.rms_norm(x, weight, 1e-6, residual=residual)
    else:
        total = x + residual
        y = functional.rms_norm(total, (WIDTH,), weight, 1e-6)
    return torch.cat([y, total.sin()])


def _rope(x: Tensor, fused: bool) -> Tensor:
    heads = _heads(x)
    angle = torch.arange(TOKENS * 2, dtype=x.dtype).view(1, TOKENS, 2).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    if fused:
        return torch.cat(ops.rope(heads, heads.tanh(), cos, sin))
    both = torch.cat([heads, heads.tanh()])
    first, second = both.chunk(2, -1)
    return both * cos + torch.cat([-second, first], -1) * sin


CASES: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "glu": lambda x, fused: ops.glu(x, x.tanh()) if fused else functional.silu(x) * x.tanh(),
    "glu of one": lambda x, fused: ops.glu(x, x) if fused else functional.silu(x) * x,
    "attention": _attention,
    "rms_norm": lambda x, fused: (
        ops.rms_norm(x, x.mean(0), 1e-6)
        if fused
        else functional.rms_norm(x, (WIDTH,), x.mean(0), 1e-6)
    ),
    "add_rms_norm": _add_rms_norm,
    "layer_norm": lambda x, fused: (
        ops.layer_norm(x, x.mean(0), x.sum(0))
        if fused
        else functional.layer_norm(x, (WIDTH,), x.mean(0), x.sum(0))
    ),
    "rope": _rope,
    "lora_linear": _lora,
    "lora_add": _lora_add,
    "dora_scale": _dora,
    "lora_grouped_linear": _grouped,
    "embedding": lambda x, fused: (ops.embedding if fused else functional.embedding)(
        torch.tensor([1, 0, 1]), x.sin()
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Callable[[Tensor, bool], Tensor]:
    return CASES[request.param]


def draw() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()


def assert_as(got: Tensor, expected: Tensor) -> None:
    """float32 sums of a few dozen terms, once and in another order."""
    bound = 100 * torch.finfo(torch.float32).eps * expected.norm()
    assert (got - expected).norm() <= bound


def test_first_and_second_derivative(case: Callable[[Tensor, bool], Tensor]) -> None:
    def both(fused: bool) -> tuple[Tensor, Tensor]:
        x = draw()
        y = case(x, fused)
        first = torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0]
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    for got, expected in zip(both(True), both(False), strict=True):
        assert_as(got, expected)


def test_a_batch_of_gradients(case: Callable[[Tensor, bool], Tensor]) -> None:
    def jacobian(fused: bool) -> Tensor:
        x = draw()
        y = case(x, fused).flatten()[:6]
        batch: Any = torch.eye(6)
        return torch.autograd.grad(y, x, batch, is_grads_batched=True)[0]

    assert_as(jacobian(True), jacobian(False))


def test_a_sibling_with_nothing_trained() -> None:
    x, weight = torch.randn(4, 6), torch.randn(6, 6)
    a, b = [torch.randn(2, 6) for _ in range(2)], [torch.randn(6, 2) for _ in range(2)]
    a[0].requires_grad_()
    ys = ops.lora_linear_siblings(x, [weight] * 2, a, b, scalings=[1.0, 1.0])
    (got,) = torch.autograd.grad(ys[0].sum(), a[0], create_graph=True)
    assert_as(got, (x.t() @ torch.ones(4, 6) @ b[0]).t())
