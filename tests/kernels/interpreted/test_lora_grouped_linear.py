"""``fastft_kernels.lora_grouped_linear`` against float64; torch's grouped product runs on CPUs."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import lora_grouped_linear as launcher
from torch import Tensor

from fastft.reference import lora_grouped_linear as reference
from tests.kernels.bounds import assert_as_accurate, poison

F32, BF16 = torch.float32, torch.bfloat16
SIZES = (0, 24, 1, 0, 40)


def _inputs(transposed: bool, adapter: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    groups, rows, k, n, r = len(SIZES), sum(SIZES), 32, 48, 8
    weight = (torch.randn(groups, n, k) / 6).to(BF16)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    return {
        "x": torch.randn(rows, k).to(BF16),
        "weight": weight,
        "lora_a": (torch.randn(groups, r, k) / 6).to(adapter),
        "lora_b": (torch.randn(n, r, groups) / 3).to(adapter).permute(2, 0, 1),
        "ends": torch.tensor(SIZES).cumsum(0).to(torch.int32),
    }


def _autograd(given: dict[str, Tensor], dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = {k: t if k == "ends" else t.to(dtype).detach() for k, t in given.items()}
    leaves = [wide[k].requires_grad_() for k in ("x", "lora_a", "lora_b")]
    y = reference.lora_grouped_linear(**wide, scaling=0.5)
    gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
    return {"y": y.detach(), **dict(zip(("dx", "da", "db"), gradients, strict=True))}


def _run(given: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    rows = dy.shape[0]
    y, s = poison(tuple(dy.shape), BF16), poison((rows, 8), BF16)
    launcher.fwd(y, s, *given.values(), 0.5)
    dx = poison(tuple(given["x"].shape), BF16)
    da, db = (poison(tuple(given[k].shape), given[k].dtype) for k in ("lora_a", "lora_b"))
    x, *rest = given.values()
    launcher.bwd(dx, da, db, dy, x, s, *rest, 0.5)
    return {"y": y, "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter", [F32, BF16])
def test_against_float64(adapter: torch.dtype, transposed: bool) -> None:
    given = _inputs(transposed, adapter)
    dy = torch.randn(sum(SIZES), 48).to(BF16)
    actual = _run(given, dy)
    plain, truth = _autograd(given, dy, BF16), _autograd(given, dy, torch.float64)
    for key, value in actual.items():
        assert_as_accurate(key, value, plain[key], truth[key])
    assert not actual["da"][0].any(), "a group without rows has no gradient"
    again = _run(given, dy)
    assert all(torch.equal(value, again[key]) for key, value in actual.items())


def test_supports() -> None:
    assert launcher.supports("cpu", BF16, F32, 16) is None
    assert "multiple of 8" in (launcher.supports("cpu", BF16, F32, 4) or "")
    assert "float32" in (launcher.supports("cpu", F32, F32, 16) or "")
