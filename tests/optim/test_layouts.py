"""Parameters as they lie in memory: with gaps, and with states that follow into another format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastft import optim
from tests.optim.pairs import ALL, gradients

BF16 = torch.bfloat16
KINDS = {**ALL, "Muon": optim.Muon}


@pytest.mark.parametrize("options", [{}, {"rounding": "compensated"}])
@pytest.mark.parametrize("name", KINDS)
def test_parameters_with_gaps_in_memory(name: str, options: dict[str, Any]) -> None:
    """What lies in the gaps is not theirs, and no more are the states of others."""
    torch.manual_seed(0)
    dtype = BF16 if options else torch.float32
    room = torch.randn(10, 9, dtype=dtype)
    before = room.clone()
    mine = [room[:, :5].requires_grad_(), torch.randn(20, 10, dtype=dtype, requires_grad=True)]
    theirs = [p.detach().contiguous().clone().requires_grad_() for p in mine]
    optimizers = [KINDS[name](params, lr=0.1, **options) for params in (mine, theirs)]
    for _ in range(3):
        gradients(mine, theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    assert torch.equal(room[:, 5:], before[:, 5:])
    assert not torch.equal(room[:, :5], before[:, :5])
