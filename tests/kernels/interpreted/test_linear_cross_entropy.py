"""``fastft_kernels.linear_cross_entropy`` against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastft_kernels import config
from fastft_kernels import linear_cross_entropy as launcher
from torch import Tensor

from tests.kernels.bounds import assert_as_accurate, poison
from tests.kernels.cases import IGNORED, LOSS_CASES, LossCase, LossInputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _inputs(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    case = LossCase(tokens, hidden, vocabulary, dtype, bias, 1).inputs()
    return case.hidden, case.weight, case.bias, case.labels


def _run(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk: int = 7,
    need_h: bool = True,
    need_w: bool = True,
    ignore_index: int = IGNORED,
) -> dict[str, Tensor]:
    d_hidden = poison(tuple(h.shape), h.dtype) if need_h else None
    d_weight = poison(tuple(weight.shape)) if need_w else None
    losses, correct = poison((h.shape[0],)), poison((1,), torch.int64)
    launcher.fwd(
        losses, correct, d_hidden, d_weight, h, weight, bias, labels,
        ignore_index=ignore_index, chunk=chunk,
    )  # fmt: skip
    results = {"losses": losses, "loss": losses.sum(0, keepdim=True), "correct": correct}
    if d_hidden is not None:
        results["d_hidden"] = d_hidden
    if d_weight is not None:
        results["d_weight"] = d_weight
    return results


@pytest.mark.parametrize("name", LOSS_CASES)
def test_against_float64(name: str) -> None:
    case = LOSS_CASES[name]
    inputs = case.inputs()
    tensors = (inputs.hidden, inputs.weight, inputs.bias, inputs.labels)
    before = [None if t is None else t.clone() for t in tensors]
    actual = _run(*tensors, chunk=case.chunk)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    for key in ("loss", "d_hidden", "d_weight"):
        rounded_to = case.dtype if key == "loss" else None
        assert_as_accurate(key, actual[key], plain[key], truth[key], rounded_to)
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor, old), "an input was written to"
    assert int(actual["correct"]) == inputs.n_correct()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compaction_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(20, 30, 500, dtype, True)
    everything = _run(*inputs)
    arch = config.for_device(torch.device("cpu"))
    loss = dataclasses.replace(arch.cross_entropy, compact_flops=0.0, d_weight_rows=64)
    monkeypatch.setitem(
        config.ARCHS, arch.capability, dataclasses.replace(arch, cross_entropy=loss)
    )
    compacted = _run(*inputs)
    assert torch.equal(everything["d_hidden"], compacted["d_hidden"])
    assert torch.equal(everything["losses"], compacted["losses"])
    for key in ("d_hidden", "losses"):
        assert not compacted[key][inputs[3] == IGNORED].any()
    assert int(everything["correct"]) == int(compacted["correct"])
    for key in ("loss", "d_weight"):  # the chunks' borders, so the order of sums, move
        torch.testing.assert_close(everything[key], compacted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_counts(tokens: int, compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compact:
        arch = config.for_device(torch.device("cpu"))
        loss = dataclasses.replace(arch.cross_entropy, compact_flops=0.0)
        monkeypatch.setitem(
            config.ARCHS, arch.capability, dataclasses.replace(arch, cross_entropy=loss)
        )
    h, weight, bias, labels = _inputs(tokens, 8, 50, F32, True)
    for value in _run(h, weight, bias, torch.full_like(labels, IGNORED)).values():
        assert not value.any()


@pytest.mark.parametrize(("need_h", "need_w"), [(False, False), (True, False), (False, True)])
def test_only_what_is_wanted(need_h: bool, need_w: bool) -> None:
    inputs = _inputs(10, 8, 50, F32, False)
    full, part = _run(*inputs), _run(*inputs, need_h=need_h, need_w=need_w)
    assert ("d_hidden" in part, "d_weight" in part) == (need_h, need_w)
    for key, value in part.items():
        assert torch.equal(value, full[key]), key


def test_another_ignore_index() -> None:
    h, weight, bias, labels = _inputs(10, 8, 50, F32, False)
    moved = torch.where(labels == IGNORED, 3, torch.where(labels == 3, 4, labels))
    labels = torch.where((labels != IGNORED) & (labels == 3), 4, labels)
    expected = _run(h, weight, bias, labels)
    for key, value in _run(h, weight, bias, moved, ignore_index=3).items():
        assert torch.equal(value, expected[key]), key


def test_the_lowest_of_equal_logits_is_the_prediction() -> None:
    h, weight = torch.ones(3, 4), torch.zeros(6000, 4)
    block = config.for_device(torch.device("cpu")).cross_entropy.block_v
    # Equal ones in one lane (a block apart), in others, before and after.
    weight[[7, block - 1, block, block + 7]] = 1.0
    correct = [
        int(_run(h, weight, None, torch.full((3,), i))["correct"]) for i in (7, block + 7, 0)
    ]
    assert correct == [3, 0, 0]


def test_a_label_outside_the_vocabulary_is_nan_not_a_stray_read() -> None:
    h, weight, bias, labels = _inputs(4, 8, 50, F32, True)
    for label in (50, 10**12, -1):
        labels[0] = label
        assert bool(torch.isnan(_run(h, weight, bias, labels)["loss"]).all())


def test_infinite_logits() -> None:
    h, weight, _, labels = _inputs(4, 8, 50, F32, False)
    bias = torch.zeros(50)
    bias[10:] = float("-inf")
    labels = torch.arange(4)
    actual = _run(h, weight, bias, labels, need_w=False)
    truth = LossInputs(h, weight, bias, labels).autograd(torch.float64)
    torch.testing.assert_close(actual["loss"].double(), truth["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual["d_hidden"].double(), truth["d_hidden"], rtol=1e-4, atol=1e-5)
    each = torch.nn.functional.cross_entropy(h @ weight.t() + bias, labels, reduction="none")
    torch.testing.assert_close(actual["losses"], each, rtol=1e-5, atol=1e-5)


def test_same_inputs_same_bits() -> None:
    inputs = _inputs(20, 30, 500, BF16, True)
    first, second = _run(*inputs), _run(*inputs)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_supports() -> None:
    assert launcher.supports("cpu", BF16, True) is None
    assert "float64" in (launcher.supports("cpu", torch.float64, False) or "")
