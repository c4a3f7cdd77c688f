"""Parameters as they lie in memory: with gaps, and with states that follow into another format."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import optim
from fastft.optim._places import decoded
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


def _moment(optimizer: Any, p: Tensor) -> Tensor:
    state = optimizer.state[p]
    return decoded(state["state1"], state["absmax1"], True)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_blocks_of_8_bit_states_follow_the_memory(
    first: torch.memory_format, flat: bool, name: str
) -> None:
    """Rows and columns apart by decades: the scale of another block is wrong by as much."""
    torch.manual_seed(0)
    gradient = torch.randn(16, 64, 3, 3) * torch.logspace(-4, 0, 64).view(1, 64, 1, 1)
    gradient *= torch.logspace(0, -3, 16).view(16, 1, 1, 1)
    then = torch.channels_last if first == torch.contiguous_format else torch.contiguous_format
    p = torch.zeros(16, 64, 3, 3).to(memory_format=first).requires_grad_()
    optimizer = ALL[name]([p], lr=0.0)
    for _ in range(5):
        p.grad = torch.empty_like(p).copy_(gradient)
        optimizer.step()
    before = _moment(optimizer, p)
    p.grad, p.data = None, p.data.to(memory_format=then)
    if flat:
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = ALL[name]([p], lr=0.0, flat=True, rounding="nearest")
        optimizer.load_state_dict(saved)
    p.grad = torch.empty_like(p).copy_(gradient)
    optimizer.step()
    beta = optimizer.param_groups[0]["betas"][-1 if name == "Lion8bit" else 0]
    error = (_moment(optimizer, p) - (beta * before + (1 - beta) * gradient)).abs()
    # Codes of the upper decades are 0.1 of themselves apart, and these are rounded twice.
    assert float((error / before.abs()).median()) < 0.05


def test_8_bit_states_of_the_same_order_keep_their_bits() -> None:
    torch.manual_seed(0)
    p = torch.randn(16, 256, 1, 1, requires_grad=True)
    optimizer = optim.AdamW8bit([p], lr=0.0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = torch.full_like(p, float("nan"))  # skipped
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[p].items())


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_flat_8_bit_states_resume_to_the_same_bits(name: str) -> None:
    """What fills up the last block stands for nothing."""

    def run(resumes: bool) -> Tensor:
        torch.manual_seed(0)
        p, gradient = torch.randn(70, 131, requires_grad=True), torch.randn(70, 131)

        def make() -> Any:
            return ALL[name]([p], lr=1e-2, rounding="nearest", flat=True)

        optimizer = make()
        for step in range(8):
            if step == 4 and resumes:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make()
                optimizer.load_state_dict(saved)
            # Moments shrink from here on; what filled up the block would be its largest.
            p.grad = gradient if step < 4 else -gradient
            optimizer.step()
        return p.detach().clone()

    assert torch.equal(run(False), run(True))
