"""``fastft_kernels.glu`` against float64."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import glu as launcher

from tests.kernels.bounds import assert_as_accurate, poison
from tests.kernels.cases import GLU_CASES


@pytest.mark.parametrize("name", GLU_CASES)
def test_against_float64(name: str) -> None:
    case = GLU_CASES[name]
    inputs = case.inputs()
    shape = tuple(inputs.dy.shape)
    got = {key: poison(shape, case.dtype) for key in ("y", "d_gate", "d_up")}
    tensors = (inputs.gate, inputs.up, inputs.dy)
    before = [t.clone() for t in tensors]
    launcher.fwd(got["y"], inputs.gate, inputs.up, activation=case.activation)
    launcher.bwd(
        got["d_gate"], got["d_up"], inputs.dy, inputs.gate, inputs.up, activation=case.activation
    )
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    for key, value in got.items():
        assert_as_accurate(key, value, plain[key], truth[key])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old), "an input was written to"


def test_supports() -> None:
    assert launcher.supports("cpu", torch.bfloat16) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")
