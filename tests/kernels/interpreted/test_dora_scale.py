"""``fastft_kernels.dora_scale`` against float64."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import dora_scale as launcher
from torch import Tensor

from tests.kernels.bounds import assert_as_accurate, poison
from tests.kernels.cases import DORA_CASES, DoraInputs


def _run(inputs: DoraInputs, *, need_scale: bool = True) -> dict[str, Tensor]:
    shape, dtype = tuple(inputs.z.shape), inputs.z.dtype
    got = {"y": poison(shape, dtype), "dz": poison(shape, dtype)}
    if need_scale:
        got["d_scale"] = poison((shape[1],))
    launcher.fwd(got["y"], inputs.z, inputs.scale, inputs.bias)
    launcher.bwd(got["dz"], got.get("d_scale"), inputs.dy, inputs.z, inputs.scale)
    return got


@pytest.mark.parametrize("name", DORA_CASES)
def test_against_float64(name: str) -> None:
    case = DORA_CASES[name]
    inputs = case.inputs()
    tensors = (inputs.z, inputs.scale, inputs.dy)
    before = [t.clone() for t in tensors]
    got = _run(inputs)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    for key, value in got.items():
        assert_as_accurate(key, value, plain[key], truth[key])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old), "an input was written to"


def test_a_frozen_scale_changes_nothing_else() -> None:
    inputs = DORA_CASES["several-splits-bf16"].inputs()
    whole, part = _run(inputs), _run(inputs, need_scale=False)
    assert set(whole) - set(part) == {"d_scale"}
    assert all(torch.equal(value, whole[key]) for key, value in part.items())


def test_supports() -> None:
    assert launcher.supports("cpu", torch.bfloat16) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")
