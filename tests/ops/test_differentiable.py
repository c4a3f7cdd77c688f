"""Derivatives that no kernel has: second ones, and gradients of a batch of upstream ones, of the
operations whose backward only scales what the forward left, against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastft import errors, ops

F64 = torch.float64
LABELS = torch.tensor([1, 9, -100, 0, 4])
SOME = torch.rand(11, dtype=F64, generator=torch.Generator().manual_seed(0))


def draw(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes)


def cross_entropy(**options: Any) -> Callable[..., Any]:
    """Of hidden states, head, bias and an adapter."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Any:
        found = ops.linear_cross_entropy(
            hidden, weight, LABELS, bias=bias, lora_a=a, lora_b=b, scaling=0.5, **options
        )
        return (found[0], found[1].entropy) if options.get("return_statistics") else found

    return run


def tied(weight: Tensor) -> Tensor:
    """Hidden states that are made of the head."""
    ids = LABELS.clamp(min=0)
    return ops.linear_cross_entropy(torch.tanh(weight[ids]), weight, ids)


def normed(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return ops.rms_norm(x, weight, residual=residual)


OF_A_HEAD = [(5, 8), (11, 8), (11,), (2, 8), (11, 2)]
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "mean": (cross_entropy(), OF_A_HEAD),
    "each": (cross_entropy(reduction="none"), OF_A_HEAD),
    "entropy": (cross_entropy(return_statistics=True), OF_A_HEAD),
    "all options": (
        cross_entropy(
            softcap=3.0, logit_scale=1.2, z_loss=0.1, label_smoothing=0.1, class_weight=SOME
        ),
        OF_A_HEAD,
    ),
    "tied": (tied, [(11, 8)]),
    "norm of a sum": (normed, [(3, 8), (3, 8), (8,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_and_batches_of_gradients(name: str) -> None:
    run, shapes = CASES[name]
    inputs = draw(*shapes)
    assert gradcheck(run, inputs, check_batched_grad=True)
    assert gradgradcheck(run, inputs, check_batched_grad=True)


def test_a_divergence_has_no_second_derivatives_and_says_so() -> None:
    hidden, weight = draw((5, 8), (11, 8))
    teacher = torch.randn(5, 11, dtype=F64)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_divergence(hidden, weight, teacher)

    assert gradcheck(run, (hidden, weight), check_batched_grad=True)
    with pytest.raises(errors.ArgumentError, match="create_graph=True"):
        torch.autograd.grad(run(hidden, weight), hidden, create_graph=True)


def test_a_part_of_a_head_has_no_second_derivatives_and_says_so() -> None:
    hidden, weight = draw((5, 8), (11, 8))
    part = ops.Shard(0, 11, None)
    loss = ops.linear_cross_entropy(hidden, weight, LABELS, shard=part)
    with pytest.raises(errors.ArgumentError, match=r"shard.*create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_checkpoint_gives_saved_tensors_once() -> None:
    hidden, weight = draw((5, 8), (11, 8))

    def run(hidden: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, LABELS)

    want = torch.autograd.grad(run(hidden), (hidden, weight))
    loss = torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want, strict=True):
        assert torch.equal(a, b)


def rotated(x: Tensor) -> Tensor:
    heads, table = x.view(1, 2, -1, 8), torch.ones(1, x.numel() // 16, 8, dtype=x.dtype)
    return ops.rope(heads, heads, table, table)[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.rms_norm(x, x[0]),
        lambda x: ops.rms_norm(torch.ones(4, 8), x[0]),
        lambda x: ops.layer_norm(x),
        lambda x: ops.layer_norm(torch.ones(4, 8), x[0]),
        lambda x: ops.glu(x, x),
        rotated,
        lambda x: ops.linear_cross_entropy(x, torch.ones(9, 8), torch.zeros(4, dtype=torch.int64)),
        lambda x: ops.linear_divergence(x, torch.ones(9, 8), torch.zeros(4, 9)),
    ],
)
def test_a_tangent_is_never_lost_in_silence(function: Callable[[Tensor], Tensor]) -> None:
    """Forward-mode AD goes on under ``no_grad``."""
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(4, 8), torch.ones(4, 8))
        with pytest.raises(NotImplementedError, match="jvp"):
            function(x)
