"""What a step leaves to be seen: versions of parameters, and nothing where it was refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import errors, optim
from tests.optim.pairs import ALL

KINDS = {**ALL, "Muon": optim.Muon}


def _params(count: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 8, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "how"),
    [(n, how) for n in KINDS for how in ("plain", "flat", "in backward")
     if how != "flat" or n not in ("Adafactor", "Muon")],
)  # fmt: skip
def test_autograd_sees_that_parameters_changed(name: str, how: str) -> None:
    params = _params()
    optimizer = KINDS[name](params, rounding="nearest", flat=how == "flat")
    if how == "in backward":
        optim.StepInBackward(optimizer)
    else:
        sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()  # what flat lays out anew is no change
    graph = [(p * p).sum() for p in params]
    before = [p._version for p in params]
    sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(p._version > version for p, version in zip(params, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph[0].backward()


def test_schedule_free_swaps_are_seen() -> None:
    (p,) = _params(1)
    optimizer = optim.ScheduleFreeAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    for swap in (optimizer.eval, optimizer.train):
        before = p._version
        swap()
        assert p._version > before


@pytest.mark.parametrize("name", KINDS)
def test_a_refused_step_counts_for_nothing(name: str) -> None:
    params = _params()
    optimizer = KINDS[name](params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()))
    params[1].grad = torch.ones(6, 8).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert str((params, optimizer.state_dict())) == str(before)


@pytest.mark.parametrize("name", KINDS)
def test_a_held_gradient_that_no_backward_reached_steps_once(name: str) -> None:
    """And once it counts: schedule-free's weights go by steps."""
    (one, plain), (two, released) = ((p, KINDS[name](p, lr=0.1)) for p in (_params(), _params()))
    release = optim.StepInBackward(released)
    for params, held in ((one, None), (two, release)):
        loss = params[0].sum() * 2
        if held is None:
            loss.backward()
            continue
        with held.accumulating():
            loss.backward()
    for params, optimizer in ((one, plain), (two, released)):
        for _ in range(2):
            params[1].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    tolerance = 1e-3 if name == "Muon" else 1e-6  # bfloat16, in stacks of others
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
    counts: list[Any] = [o.param_groups[0].get("k") for o in (plain, released)]
    assert counts[0] == counts[1]


def _double(p: Tensor) -> None:
    p.grad = None
    p.grad_dtype = torch.float64
    p.grad = torch.ones(6, 8, dtype=torch.float64)


def _moved(p: Tensor) -> None:
    """Larger, with the gradient it had."""
    p.grad = torch.ones(6, 8)
    p.data = torch.zeros(1 << 20)


def _there_and_back(p: Tensor) -> None:
    p.data = torch.zeros(5)
    p.grad = torch.ones(5)
    p.data = torch.ones(6, 8)


def _reshaped(p: Tensor) -> None:
    """The states have the old shape."""
    p.grad, p.data = None, p.data.t().contiguous()
    p.grad = torch.ones(8, 6)


def _expanded(p: Tensor) -> None:
    """One row, eight times."""
    p.data = torch.ones(6, 1).expand(6, 8)
    p.grad = torch.ones(6, 8)


@pytest.mark.parametrize("change", [_double, _moved, _there_and_back, _reshaped, _expanded])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_that_do_not_fit_are_refused(name: str, change: Any) -> None:
    params = _params()
    optimizer = KINDS[name](params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    change(params[1])
    before = copy.deepcopy([p.detach() for p in params])
    with pytest.raises(errors.FastftError, match=r"shape|float64|strides"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_may_be_a_view_with_its_sign_turned(name: str) -> None:
    (p,), (q,) = _params(1), _params(1)
    p.grad = torch._neg_view(torch.ones(6, 8))
    q.grad = -torch.ones(6, 8)
    for x in (p, q):
        KINDS[name]([x]).step()
    assert torch.equal(p, q)
