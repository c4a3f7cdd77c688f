"""States in bfloat16, rounded at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import errors, optim
from fastft.reference.optimizer_step import random_bits
from tests.ops.harness import Rejected, assert_rejected

F32, BF16 = torch.float32, torch.bfloat16


def parameter(dtype: torch.dtype, size: int = 5000) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    p = torch.randn(size, generator=generator).to(dtype).requires_grad_()
    p.grad = torch.randn(size, generator=generator).to(dtype)
    return p


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "kind", [optim.AdamW, optim.Lion, lambda p, **more: optim.SGD(p, momentum=0.9, **more)]
)
def test_every_state_is_bfloat16(kind: Any, dtype: torch.dtype) -> None:
    p = parameter(dtype)
    optimizer = kind([p], lr=1e-3, state_bits=16)
    optimizer.step()
    states = [v for k, v in optimizer.state[p].items() if k != "step"]
    assert states
    assert {v.dtype for v in states} == {BF16}


def test_adamwbf16_keeps_four_bytes_and_kahan_float32() -> None:
    for options, expected in (({}, BF16), ({"state_bits": 32}, F32), ({"kahan": True}, F32)):
        p = parameter(BF16)
        optimizer = optim.AdamWBF16([p], lr=1e-3, **options)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == expected
        assert optimizer.state[p]["exp_avg_sq"].dtype == expected


def test_a_group_may_say_otherwise() -> None:
    p, table = parameter(BF16), parameter(BF16)
    optimizer = optim.AdamWBF16([{"params": [p]}, {"params": [table], "state_bits": 32}], lr=1e-3)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == BF16
    assert optimizer.state[table]["exp_avg"].dtype == F32


def test_torchs_state_of_a_bfloat16_model_goes_both_ways() -> None:
    p, q = parameter(BF16), parameter(BF16)
    theirs, ours = torch.optim.AdamW([p], lr=1e-3), optim.AdamWBF16([q], lr=1e-3)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[q][name], theirs.state[p][name])
        assert ours.state[q][name].dtype == BF16
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.state[p]["exp_avg_sq"], ours.state[q]["exp_avg_sq"])
    theirs.step()


def test_second_moments_shrink_as_to_nearest_they_cannot() -> None:
    """b2 = 0.999 takes a thousandth away, a quarter of bfloat16's spacing: on average it goes."""
    p, q = parameter(BF16, 65536), parameter(BF16, 65536)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    ours, theirs = optim.AdamWBF16([p], lr=0.0), torch.optim.AdamW([q], lr=0.0)
    ours.step()
    theirs.step()
    for x in (p, q):
        x.grad = torch.zeros_like(x)
    for _ in range(200):
        ours.step()
        theirs.step()
    start = 1e-3
    assert float(theirs.state[q]["exp_avg_sq"].float().mean()) > 0.99 * start
    mean = float(ours.state[p]["exp_avg_sq"].float().mean())
    # 200 roundings of at most half a spacing's deviation, 2^-8, over 65,536 elements: 1e-4 of it.
    assert mean / (start * 0.999**200) == pytest.approx(1, abs=2e-3)


def test_a_parameter_and_its_states_draw_apart() -> None:
    drawn = [random_bits(512, 5, 1, 2, 3, state) for state in range(3)]
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    both = torch.stack(drawn).double()
    assert float(torch.corrcoef(both).triu(1).abs().max()) < 5 / 512**0.5


def test_flat_states_are_float32_whatever_was_loaded() -> None:
    p, q = parameter(BF16), parameter(BF16)
    saved = optim.AdamWBF16([p], lr=1e-3)
    saved.step()
    flat = optim.AdamWBF16([q], lr=1e-3, rounding="nearest", flat=True)
    flat.load_state_dict(saved.state_dict())
    flat.step()
    state = flat.state[q]
    assert state["exp_avg"].dtype == F32
    assert int(state["step"]) == 2


def test_a_state_that_is_missing_is_as_those_that_are_there() -> None:
    p = parameter(BF16)
    optimizer = optim.AdamWBF16([p], lr=1e-3)
    optimizer.state[p]["exp_avg"] = torch.zeros(5000)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].dtype == F32


def _rejected() -> list[Rejected]:
    def make(kind: Any, **more: Any) -> Any:
        return lambda: kind([parameter(BF16)], lr=1e-3, **more)

    def group(kind: Any, bits: int, **more: Any) -> Any:
        matrix = torch.zeros(8, 8, requires_grad=True)
        return lambda: kind([{"params": [matrix], "state_bits": bits}], lr=1e-3, **more)

    refused, said = errors.ArgumentError, "state_bits"
    return [
        Rejected("schedule-free", make(optim.ScheduleFreeAdamW, state_bits=16),
                 refused, [said, "expected 32"]),
        Rejected("schedule-free, 8", make(optim.ScheduleFreeAdamW, state_bits=8),
                 refused, [said, "expected 32"]),
        Rejected("adafactor", make(optim.Adafactor, state_bits=16), refused, [said, "expected 32"]),
        Rejected("8 without codes", make(optim.AdamW, state_bits=8), refused, [said, "16 or 32"]),
        Rejected("flat", make(optim.AdamW, state_bits=16, flat=True),
                 refused, ["flat", "state_bits=16"]),
        Rejected("flat group", group(optim.AdamW, 16, flat=True),
                 refused, [said, "expected 32", "group"]),
        Rejected("a group", group(optim.ScheduleFreeAdamW, 16), refused, [said, "expected 32"]),
        Rejected("a group of Muon", group(optim.Muon, 16), refused, [said, "expected 32"]),
    ]  # fmt: skip


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
