"""``fastft_kernels.optimizer_step`` against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from fastft_kernels import multi_tensor
from fastft_kernels import optimizer_step as launcher

from tests.kernels.step_cases import BF16, F32, STEP_CASES, StepCase, StepState, assert_step

ADAMW = [n for n, c in STEP_CASES.items() if (c.rule, c.state_bits, c.rounding)
         == ("adamw", 32, "nearest")]  # fmt: skip


def _step(state: StepState, max_norm: float = 0.0, needs_norm: bool = True) -> None:
    launcher.step(
        state.tensors, state.grads, state.hyper, state.stats,
        max_norm=max_norm, needs_norm=needs_norm, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ADAMW)
def test_against_float64(name: str) -> None:
    assert_step(STEP_CASES[name], launcher.step)


def test_first_step_bias_correction_keeps_its_digits() -> None:
    """1 - 0.999^1 in float32 is off by 1e-5: the very first update would be off by 7e-6."""
    from fastft.reference import optimizer_step as reference

    own = StepCase("adamw", shapes=((64, F32, F32),)).make()
    own.hyper[:, 2] = 0.999
    t = own.tensors
    for tensor in (*t.params, *t.states[0], *t.states[1], *t.steps):
        tensor.zero_()
    truth = own.copy(torch.float64)
    _step(own)
    reference.step(
        truth.tensors, truth.grads, truth.hyper.double(), truth.stats,
        max_norm=0.0, needs_norm=True, seed=0,
    )  # fmt: skip
    torch.testing.assert_close(t.params[0].double(), truth.tensors.params[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 4])
def test_a_norm_that_is_not_finite_skips_the_step(bad: float, where: int) -> None:
    state = STEP_CASES["adamw"].make()
    state.grads[where][-1] = bad
    before = state.copy()
    for count in (1, 2):
        _step(state, 1.0)
        assert float(state.stats[2]) == count
        assert not bool(torch.isfinite(state.stats[0]))
        assert float(state.stats[1]) == 0.0
    for name, value in before.named().items():
        assert torch.equal(state.named()[name], value), name
    state.grads[where][-1] = 0.0
    _step(state, 1.0)
    assert float(state.stats[2]) == 2.0, "a step that is taken is not counted as skipped"
    assert not torch.equal(state.tensors.params[0], before.tensors.params[0])


def test_loss_scales_and_infinities_found_elsewhere() -> None:
    plain, scaled = STEP_CASES["adamw"].make(), STEP_CASES["adamw"].make()
    scaled.stats[3] = 0.25
    plain.grads = [g * 0.25 for g in plain.grads]
    _step(plain)
    _step(scaled)
    for name, value in plain.named().items():
        torch.testing.assert_close(scaled.named()[name], value, rtol=1e-5, atol=1e-6)
    before = scaled.copy()
    scaled.stats[4] = 1.0
    _step(scaled, needs_norm=False)
    assert float(scaled.stats[2]) == 1.0
    assert all(torch.equal(scaled.named()[n], v) for n, v in before.named().items())


def test_tensors_that_start_anywhere() -> None:
    case = StepCase("adamw", shapes=((301, F32, F32), (50, BF16, BF16)))
    aligned, odd = case.make(), case.make()
    odd.grads = [torch.cat([g[:1], g])[1:] for g in odd.grads]
    assert all(g.data_ptr() % 16 for g in odd.grads)
    _step(aligned, 1.0)
    _step(odd, 1.0)
    for name, value in aligned.named().items():
        assert torch.equal(value, odd.named()[name]), name


def test_new_addresses_are_seen_and_tables_kept_while_they_stay() -> None:
    state, moving = STEP_CASES["adamw"].make(), STEP_CASES["adamw"].make()
    for _ in range(3):
        moving.grads = [g.clone() for g in state.grads]
        _step(state)
        _step(moving)
    for name, value in state.named().items():
        assert torch.equal(value, moving.named()[name]), name
    table, changed = state.tensors.table(state.grads)
    assert not changed
    moved = [g.clone() for g in state.grads]
    assert state.tensors.table(moved)[1]
    chunks = multi_tensor.chunks_for(state.tensors, moved, 64, 9)
    assert multi_tensor.chunks_for(state.tensors, state.grads, 64, 9) is chunks
    assert chunks.count == sum(-(-g.numel() // 64) for g in moved)
    assert sum(group.n_chunks for group in chunks.groups) == chunks.count
    assert table.shape == (len(moved), 12)


def test_same_inputs_same_bits() -> None:
    first, second = STEP_CASES["adamw"].make(), STEP_CASES["adamw"].make()
    _step(first, 1.0)
    _step(second, 1.0)
    assert all(torch.equal(v, second.named()[k]) for k, v in first.named().items())


def test_supports() -> None:
    assert launcher.supports("cpu", F32) is None
    assert "float64" in (launcher.supports("cpu", torch.float64) or "")
    assert "lion" in (launcher.supports("cpu", F32, rule="lion") or "")
    assert "8-bit" in (launcher.supports("cpu", F32, state_bits=8) or "")
