"""rope, layer_norm, the norm of a residual stream and embeddings in Triton against float64."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import embedding, layer_norm, rope

from tests.kernels.block_cases import BLOCK_CASES
from tests.kernels.bounds import assert_as_accurate


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_against_float64(name: str) -> None:
    case = BLOCK_CASES[name]
    got, plain = case.results("triton"), case.results(None)
    truth = case.results(None, torch.float64)
    for key in case.names:
        assert got[key].dtype == plain[key].dtype
        assert_as_accurate(key, got[key], plain[key], truth[key])
        again = case.results("triton")[key]
        assert torch.equal(again, got[key]), "other bits the second time"


@pytest.mark.parametrize("launcher", [rope, layer_norm, embedding])
def test_supports(launcher: object) -> None:
    assert launcher.supports("cpu", torch.bfloat16) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")
