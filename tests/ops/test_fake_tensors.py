"""Tensors without memory of their own: operations on fake ones give fake results and gradients,
as torch's own do, instead of reading from address 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastft import errors, losses, ops

BF16 = torch.bfloat16


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def labels() -> Tensor:
    return torch.zeros(600, dtype=torch.int64)


def experts(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    ends = torch.tensor([3, 7], dtype=torch.int32)
    return ops.lora_grouped_linear(x, torch.zeros(2, 32, 16, dtype=BF16), a, b, ends, scaling=0.5)


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ops.lora_linear(x, w, a, b, scaling=0.5, dropout_p=0.1)


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ops.lora_add(y, x, a, b, scaling=0.5, dropout_p=0.1, overwrite=True)


def dora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    scales = [ops.dora_norm(w, a, b, 0.5)]
    return ops.lora_linear_siblings(x, [w], [a], [b], scalings=[0.5], scales=scales)[0]


def rotated(q: Tensor, k: Tensor) -> Tensor:
    q, k = ops.rope(q, k, torch.zeros(1, 5, 16), torch.zeros(1, 5, 16))
    return torch.cat([q, k], 1)


def loss(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, labels(), reduction="sum")


OF_LORA = [(600, 16), (32, 16), (4, 16), (32, 4)]
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (ops.rms_norm, [(3, 16), (16,)]),
    "layer_norm": (ops.layer_norm, [(3, 16), (16,), (16,)]),
    "glu": (ops.glu, [(3, 16), (3, 16)]),
    "embedding": (lambda w: ops.embedding(labels(), w), [(9, 16)]),
    "rope": (rotated, [(2, 4, 5, 16), (2, 2, 5, 16)]),
    "attention": (ops.scaled_dot_product_attention, [(2, 4, 5, 16)] * 3),
    "lora": (lora, OF_LORA),
    "dora": (dora, OF_LORA),
    "lora_add": (added, [(600, 32), (600, 16), (4, 16), (32, 4)]),
    "experts": (experts, [(7, 16), (2, 4, 16), (2, 32, 4)]),
    "loss": (loss, [(600, 16), (32, 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str) -> None:
    function, shapes = CASES[name]

    def run() -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
        inputs = [leaf(*shape) for shape in shapes]
        y = function(*inputs)
        return inputs, y, torch.autograd.grad(y.sum(), inputs)

    with FakeTensorMode():
        inputs, y, gradients = run()
    _, plain, _ = run()
    assert isinstance(y, FakeTensor)
    assert (y.shape, y.stride(), y.dtype) == (plain.shape, plain.stride(), plain.dtype)
    for x, dx in zip(inputs, gradients, strict=True):
        assert (dx.shape, dx.dtype) == (x.shape, x.dtype)


def test_outside_their_mode() -> None:
    with FakeTensorMode():
        x, weight = leaf(3, 16), leaf(16)
    assert isinstance(ops.rms_norm(x, weight), FakeTensor)


ONE_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "lora_a": lambda t: lora(leaf(600, 16), leaf(32, 16), t[:4, :16], leaf(32, 4)),
    "bias": lambda t: ops.lora_linear(
        leaf(600, 16), leaf(32, 16), leaf(4, 16), leaf(32, 4), scaling=0.5, bias=t[0]
    ),
    "loss": lambda t: ops.linear_cross_entropy(leaf(600, 16), leaf(32, 16), labels(), bias=t[0]),
    "mask": lambda t: ops.scaled_dot_product_attention(
        *(leaf(2, 4, 32, 16) for _ in range(3)), t[None, None] > 0
    ),
    "teacher": lambda t: ops.linear_divergence(leaf(32, 16), leaf(32, 16), t),
    "distillation": lambda t: ops.linear_divergence(
        leaf(32, 16), leaf(32, 16), torch.zeros(32, 32), bias=t[0]
    ),
}


@pytest.mark.parametrize("name", ONE_OF)
def test_one_among_others_is_refused(name: str) -> None:
    with FakeTensorMode():
        fake = torch.zeros(32, 32, dtype=BF16)
    with pytest.raises((AssertionError, errors.ArgumentError), match=r"FakeTensor|with memory"):
        ONE_OF[name](fake)


def test_distillation_of_logits_that_exist() -> None:
    with FakeTensorMode():
        student, teacher = leaf(3, 32), leaf(3, 32)
        loss = losses.distillation_loss(student, teacher)
        assert torch.autograd.grad(loss, student)[0].shape == (3, 32)
    compiled = torch.compile(losses.distillation_loss, fullgraph=True, backend="eager")
    logits = torch.randn(3, 32), torch.randn(3, 32)
    assert torch.equal(compiled(*logits), losses.distillation_loss(*logits))


def test_distillation_says_that_it_cannot() -> None:
    with FakeTensorMode():
        x, weight, teacher = leaf(3, 16), leaf(32, 16), leaf(3, 32)
        with pytest.raises(errors.ArgumentError, match="with memory"):
            ops.linear_divergence(x, weight, teacher.detach())
