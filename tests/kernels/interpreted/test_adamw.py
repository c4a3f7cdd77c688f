"""``fastft_kernels.adamw`` against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastft_kernels import adamw as launcher
from fastft_kernels import multi_tensor

from fastft.reference import adamw as reference
from tests.kernels.bounds import assert_as_accurate
from tests.kernels.cases import ADAMW_TENSORS as MIXED
from tests.kernels.cases import AdamWState as State

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _step(state: State, module: Any, max_norm: float = 0.0, maximize: bool = False) -> None:
    module.step(*state.arguments(), max_norm=max_norm, maximize=maximize)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_against_float64(max_norm: float, maximize: bool) -> None:
    start = State.make(MIXED)
    own, plain, truth = start.copy(), start.copy(), start.copy(torch.float64)
    for _ in range(2):
        _step(own, launcher, max_norm, maximize)
        _step(plain, reference, max_norm, maximize)
        _step(truth, reference, max_norm, maximize)
    for name, value in own.tensors().items():
        assert_as_accurate(name, value, plain.tensors()[name], truth.tensors()[name])
    torch.testing.assert_close(own.stats.double(), truth.stats, rtol=1e-6, atol=0)
    for name, value in start.tensors().items():
        if name[0] in "gh":
            assert torch.equal(own.tensors()[name], value), f"{name} was written to"


def test_first_step_bias_correction_keeps_its_digits() -> None:
    """1 - 0.999^1 in float32 is off by 1e-5: the very first update would be off by 7e-6."""
    start = State.make([(64, F32, F32)])
    for tensor in (*start.params, *start.exp_avgs, *start.exp_avg_sqs, start.steps):
        tensor.zero_()
    own, truth = start.copy(), start.copy(torch.float64)
    _step(own, launcher)
    _step(truth, reference)
    torch.testing.assert_close(own.params[0].double(), truth.params[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 4])
def test_a_norm_that_is_not_finite_skips_the_step(bad: float, where: int) -> None:
    state = State.make(MIXED)
    state.grads[where][-1] = bad
    before = state.copy()
    for count in (1, 2):
        _step(state, launcher, 1.0)
        assert float(state.stats[2]) == count
        assert not bool(torch.isfinite(state.stats[0]))
        assert float(state.stats[1]) == 0.0
    for name, value in before.tensors().items():
        assert torch.equal(state.tensors()[name], value) or name == f"g{where}", name
    state.grads[where][-1] = 0.0
    _step(state, launcher, 1.0)
    assert float(state.stats[2]) == 2.0, "a step that is taken is not counted as skipped"
    assert not torch.equal(state.params[0], before.params[0])


def test_tensors_that_start_anywhere() -> None:
    aligned = State.make([(301, F32, F32), (50, BF16, BF16)])
    odd = aligned.copy()
    for group in odd.lists():
        for i, tensor in enumerate(group):
            group[i] = torch.cat([tensor[:1], tensor])[1:]
            assert group[i].data_ptr() % 16
    _step(aligned, launcher, 1.0)
    _step(odd, launcher, 1.0)
    for name, value in aligned.tensors().items():
        assert torch.equal(value, odd.tensors()[name]), name


def test_new_addresses_are_seen() -> None:
    """Gradients move from step to step: the table must follow, and only then."""
    state, moving = State.make(MIXED), State.make(MIXED)
    for _ in range(3):
        moving.grads = [g.clone() for g in state.grads]
        _step(state, launcher)
        _step(moving, launcher)
    for name, value in state.tensors().items():
        assert torch.equal(value, moving.tensors()[name]), name


def test_the_plan_is_kept_while_addresses_stay() -> None:
    state = State.make([(100, F32, F32), (7, BF16, F32)])
    plans = [multi_tensor.plan_for(*state.lists(), 64) for _ in range(2)]
    assert plans[0] is plans[1]
    table = plans[0].addresses
    assert multi_tensor.plan_for(*state.lists(), 64).addresses is table
    state.grads[1] = state.grads[1].clone()
    assert multi_tensor.plan_for(*state.lists(), 64).addresses is not table
    assert plans[0].n_chunks == 3
    assert [(g.first_chunk, g.n_chunks) for g in plans[0].groups] == [(0, 2), (2, 1)]


def test_plans_do_not_pile_up() -> None:
    for size in range(1, 30):
        multi_tensor.plan_for(*State.make([(size, F32, F32)]).lists(), 64)
    assert len(multi_tensor._plans) <= 8


def test_no_tensors() -> None:
    state = State.make([])
    _step(state, launcher, 1.0)
    assert state.stats.tolist() == [0.0, 1.0, 0.0]


def test_same_inputs_same_bits() -> None:
    first, second = State.make(MIXED), State.make(MIXED)
    _step(first, launcher, 1.0)
    _step(second, launcher, 1.0)
    assert all(torch.equal(v, second.tensors()[k]) for k, v in first.tensors().items())


def test_supports() -> None:
    assert launcher.supports("cpu", F32) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")
