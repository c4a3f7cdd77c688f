"""``fastft_kernels.rms_norm`` against float64."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import rms_norm as launcher
from torch import Tensor

from tests.kernels.bounds import assert_as_accurate, poison
from tests.kernels.cases import NORM_CASES, NormInputs


def _run(inputs: NormInputs, *, need_dw: bool = True) -> dict[str, Tensor]:
    x, dtype = inputs.x, inputs.x.dtype
    got = {"y": poison(tuple(x.shape), dtype), "rstd": poison((x.shape[0],))}
    got["dx"] = poison(tuple(x.shape), dtype)
    if need_dw:
        got["dw"] = poison((x.shape[1],), dtype)
    launcher.fwd(
        got["y"], got["rstd"], x, inputs.weight,
        eps=inputs.eps, offset=inputs.offset, round_first=inputs.round_first,
    )  # fmt: skip
    launcher.bwd(
        got["dx"], got.get("dw"), inputs.dy, x, inputs.weight, got["rstd"], offset=inputs.offset
    )
    return got


@pytest.mark.parametrize("name", NORM_CASES)
def test_against_float64(name: str) -> None:
    case = NORM_CASES[name]
    inputs = case.inputs()
    tensors = (inputs.x, inputs.weight, inputs.dy)
    before = [t.clone() for t in tensors]
    got = _run(inputs)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    for key, value in got.items():
        assert_as_accurate(key, value, plain[key], truth[key])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old), "an input was written to"


def test_a_frozen_weight_changes_nothing_else() -> None:
    inputs = NORM_CASES["several-splits"].inputs()
    whole, part = _run(inputs), _run(inputs, need_dw=False)
    assert set(whole) - set(part) == {"dw"}
    assert all(torch.equal(value, whole[key]) for key, value in part.items())


def test_supports() -> None:
    assert launcher.supports("cpu", torch.bfloat16) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")
