"""``fastft_kernels.linear_cross_entropy`` against float64, in the loop over slabs of fastft.ops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastft_kernels import config
from fastft_kernels import linear_cross_entropy as launcher
from torch import Tensor

from fastft import ops
from tests.kernels.bounds import assert_as_accurate
from tests.kernels.cases import (
    DIVERGENCE_CASES,
    IGNORED,
    LOSS_CASES,
    LossCase,
    LossInputs,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KEYS = ("loss", "d_hidden", "d_weight")


def _inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, bias: bool):
    return LossCase(tokens, hidden, vocabulary, dtype, bias, 7).inputs()


def _run(
    inputs: LossInputs,
    *,
    chunk: int = 7,
    need_h: bool = True,
    need_w: bool = True,
    ignore_index: int = IGNORED,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    hidden = inputs.hidden.detach().requires_grad_(need_h)
    weight = inputs.weight.detach().requires_grad_(need_w)
    given = {"ignore_index": ignore_index, "backend": "triton", "chunk": chunk}
    given |= inputs.options()
    if scale is None:
        loss, accuracy = ops.linear_cross_entropy(
            hidden, weight, inputs.labels, reduction="sum", return_accuracy=True, **given
        )
        results = {"loss": loss.detach()[None], "accuracy": accuracy}
    else:
        losses = ops.linear_cross_entropy(hidden, weight, inputs.labels, reduction="none", **given)
        loss = (losses * scale).sum()
        results = {"loss": loss.detach()[None], "losses": losses.detach()}
    if need_h or need_w:
        leaves = [t for t, need in ((hidden, need_h), (weight, need_w)) if need]
        found = iter(torch.autograd.grad(loss, leaves))
        if need_h:
            results["d_hidden"] = next(found)
        if need_w:
            results["d_weight"] = next(found)
    return results


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "each-token"])
@pytest.mark.parametrize("name", LOSS_CASES)
def test_against_float64(name: str, weighted: bool) -> None:
    case = LOSS_CASES[name]
    inputs = case.inputs()
    tensors = (inputs.hidden, inputs.weight, inputs.bias, inputs.labels, inputs.class_weight)
    before = [None if t is None else t.clone() for t in tensors]
    scale = torch.linspace(0.5, 1.5, case.tokens) if weighted else None
    actual = _run(inputs, chunk=case.chunk, scale=scale)
    plain, truth = inputs.autograd(case.dtype, scale), inputs.autograd(torch.float64, scale)
    for key in KEYS:
        rounded_to = case.dtype if key == "loss" else None
        assert_as_accurate(key, actual[key], plain[key], truth[key], rounded_to)
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor, old), "an input was written to"
    if not weighted:
        counted = int((inputs.labels != IGNORED).sum())
        assert round(float(actual["accuracy"]) * counted) == inputs.n_correct()


@pytest.mark.parametrize("from_logits", [False, True], ids=["from-hidden", "from-logits"])
@pytest.mark.parametrize("name", DIVERGENCE_CASES)
def test_divergences_against_float64(name: str, from_logits: bool) -> None:
    case = DIVERGENCE_CASES[name]
    inputs = case.inputs()
    actual = inputs.through_op("triton", from_logits)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    for key in KEYS:
        rounded_to = case.dtype if key == "loss" else None
        assert_as_accurate(key, actual[key], plain[key], truth[key], rounded_to)


def test_probabilities_and_statistics_are_the_references() -> None:
    inputs = _inputs(9, 12, 4500, F32, True)
    hidden, weight = inputs.hidden, inputs.weight
    target = torch.softmax(torch.randn(9, 4500), -1)
    for options in ({}, {"label_smoothing": 0.2, "class_weight": torch.rand(4500)}):
        got, expected = (
            ops.linear_cross_entropy(hidden, weight, target, backend=backend, chunk=4, **options)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(got, expected)
    (_, got), (_, expected) = (
        ops.linear_cross_entropy(
            hidden, weight, inputs.labels, softcap=3.0, backend=backend, return_statistics=True
        )
        for backend in ("triton", "reference")
    )
    for own, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=2e-6)


def test_the_gradient_of_the_entropy_is_the_references() -> None:
    inputs = _inputs(9, 12, 4500, F32, True)
    found = []
    for backend in ("triton", "reference"):
        hidden = inputs.hidden.detach().requires_grad_()
        losses, statistics = ops.linear_cross_entropy(
            hidden,
            inputs.weight,
            inputs.labels,
            softcap=3.0,
            reduction="none",
            return_statistics=True,
            backend=backend,
        )
        objective = (statistics.entropy * torch.linspace(-1, 1, 9)).sum() + losses.sum()
        found.append(torch.autograd.grad(objective, hidden)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_counts(tokens: int) -> None:
    inputs = _inputs(tokens, 8, 50, F32, True)
    ignored = dataclasses.replace(inputs, labels=torch.full_like(inputs.labels, IGNORED))
    found = _run(ignored)
    assert not any(found[key].any() for key in KEYS)


@pytest.mark.parametrize(("need_h", "need_w"), [(False, False), (True, False), (False, True)])
def test_only_what_is_wanted(need_h: bool, need_w: bool) -> None:
    inputs = _inputs(10, 8, 50, F32, False)
    full, part = _run(inputs), _run(inputs, need_h=need_h, need_w=need_w)
    assert ("d_hidden" in part, "d_weight" in part) == (need_h, need_w)
    for key, value in part.items():
        assert torch.equal(value, full[key]), key


def test_another_ignore_index() -> None:
    inputs = _inputs(10, 8, 50, F32, False)
    labels = torch.where(inputs.labels == 3, 4, inputs.labels)
    expected = _run(dataclasses.replace(inputs, labels=labels))
    moved = torch.where(labels == IGNORED, 3, labels)
    found = _run(dataclasses.replace(inputs, labels=moved), ignore_index=3)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_the_lowest_of_equal_logits_is_the_prediction() -> None:
    inputs = _inputs(3, 4, 6000, F32, False)
    block = config.for_device(torch.device("cpu")).cross_entropy.block_v
    weight = torch.zeros(6000, 4)
    # Equal ones in one lane (a block apart), in others, before and after.
    weight[[7, block - 1, block, block + 7]] = 1.0
    accuracies = [
        float(
            _run(
                dataclasses.replace(
                    inputs, hidden=torch.ones(3, 4), weight=weight, labels=torch.full((3,), label)
                )
            )["accuracy"]
        )
        for label in (7, block + 7, 0)
    ]
    assert accuracies == [1.0, 0.0, 0.0]


def test_infinite_logits() -> None:
    inputs = _inputs(4, 8, 50, F32, False)
    inputs.bias = torch.zeros(50)
    inputs.bias[10:] = float("-inf")
    inputs.labels = torch.arange(4)
    actual, truth = _run(inputs, need_w=False), inputs.autograd(torch.float64)
    for key in ("loss", "d_hidden"):
        torch.testing.assert_close(actual[key].double(), truth[key], rtol=1e-4, atol=1e-5)


def test_same_inputs_same_bits() -> None:
    inputs = _inputs(20, 30, 500, BF16, True)
    first, second = _run(inputs), _run(inputs)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_supports() -> None:
    assert launcher.supports("cpu", BF16) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_scaled_rounds_once(dtype: torch.dtype, each: bool) -> None:
    columns = config.ARCHS[90].scaled.block + 3  # more than a program's
    gradient, scale = torch.randn(5, columns), torch.rand(5 if each else 1)
    out = torch.empty(5, columns, dtype=dtype)
    launcher.scaled(out, gradient, scale)
    assert torch.equal(out, (gradient * scale[:, None]).to(dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_an_upstream_gradient_that_is_one_number_seen_as_many(dtype: torch.dtype) -> None:
    inputs = _inputs(13, 24, 40, dtype, False)
    found = []
    for reduction in ("none", "sum"):
        hidden = inputs.hidden.detach().requires_grad_()
        losses = ops.linear_cross_entropy(
            hidden, inputs.weight.detach(), inputs.labels, reduction=reduction, backend="triton"
        )
        found.append(torch.autograd.grad(losses.sum() / 3, hidden)[0])
    assert torch.equal(*found)
