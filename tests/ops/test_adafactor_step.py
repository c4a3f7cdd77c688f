from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import Rejected, assert_rejected

from fastft import errors, native, ops
from fastft.cpu import adafactor_step as cpu
from fastft.ops.adafactor_step import LINES
from tests.kernels.factored_cases import (
    BF16,
    F32,
    FACTORED_CASES,
    FactoredCase,
    assert_factored,
)

ISAS = native.build_info()["instruction_sets_usable"]
BACKENDS = ["cpu", "reference"]


def _step(state: Any, **options: Any) -> None:
    ops.adafactor_step(state.tensors, state.grads, state.hyper, state.stats, **options)


def test_the_binary_and_the_tables_agree() -> None:
    native_module = native.module()
    tensors = FACTORED_CASES["adafactor"].make()
    table, changed = tensors.tensors.table(tensors.grads)
    assert table.shape[1] == native_module.FACTORED_COLUMNS
    assert native_module.FACTORED_LINES == LINES
    assert changed
    assert not tensors.tensors.table(tensors.grads)[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FACTORED_CASES)
def test_against_float64(name: str, isa: str) -> None:
    assert_factored(FACTORED_CASES[name], functools.partial(cpu.step, isa=isa))


def test_the_cases_have_several_tiles_and_lines() -> None:
    """Or nothing would see how tiles meet."""
    state = FACTORED_CASES["adafactor"].make().tensors
    tiles, lines = state.tile_tensor.bincount(), state.line_tensor.bincount()
    assert tiles[0] == 9
    assert int(tiles[9]) == 2  # a vector
    assert tiles[4] == 0
    assert lines[1] == 4  # 2,500 rows and 16 columns
    assert lines[5] == 12  # 6 matrices


@pytest.mark.parametrize("name", ["adafactor-clip", "adafactor-stochastic"])
def test_the_same_bits_whatever_the_threads(name: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = FACTORED_CASES[name].make()
        _step(state, seed=3)
        results.append({**state.named(), "stats": state.stats})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing_and_are_counted(backend: str, poison: float) -> None:
    state = FACTORED_CASES["adafactor"].make()
    state.grads[0][3, 17] = poison
    before = state.copy()
    for _ in range(2):
        _step(state, backend=backend)
    for key, value in before.named().items():
        assert torch.equal(state.named()[key], value), key
    assert state.stats[2].item() == 2
    assert state.stats[1].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scales_and_infinities_found_elsewhere(backend: str) -> None:
    case = FactoredCase(shapes=(((40, 300), F32, F32), ((9,), F32, F32)), max_norm=1.0)
    plain, scaled = case.make(), case.make()
    scaled.grads = [g * 1024 for g in scaled.grads]
    scaled.stats[3] = 1 / 1024
    for state in (plain, scaled):
        _step(state, max_norm=1.0, backend=backend)
    for key, value in plain.named().items():
        torch.testing.assert_close(scaled.named()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    before = scaled.copy()
    scaled.stats[4] = 1.0
    _step(scaled, needs_norm=False, backend=backend)
    assert scaled.stats[2].item() == 1
    assert all(torch.equal(scaled.named()[k], v) for k, v in before.named().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_without_any_gradient_stay_where_they_are(backend: str) -> None:
    """Their variance is zero, and so is eps1 squared in float32 where eps1 is 1e-30."""
    state = FactoredCase(shapes=(((6, 40), F32, F32),), eps1=1e-30).make()
    for moment in (state.tensors.rows[0], state.tensors.columns[0]):
        assert moment is not None
        moment.zero_()
    state.grads[0][2] = 0.0
    before = state.tensors.params[0].clone()
    _step(state, backend=backend)
    after = state.tensors.params[0]
    assert bool(after.isfinite().all())
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[3], before[3])


def test_moments_are_of_the_clipped_gradient() -> None:
    state = FactoredCase(shapes=(((4, 8), F32, F32),)).make()
    state.tensors.steps[0].zero_()  # the first step: rate 1
    _step(state, max_norm=0.5)
    norm = state.grads[0].norm()
    clipped = state.grads[0] * 0.5 / (norm + 1e-6)
    row = state.tensors.rows[0]
    assert row is not None
    torch.testing.assert_close(row, clipped.square().mean(1, keepdim=True))


def _made(**changes: Any) -> ops.FactoredTensors:
    given: dict[str, Any] = {
        "params": [torch.zeros(4, 6)],
        "steps": [torch.zeros(())],
        "rows": [torch.zeros(4, 1)],
        "columns": [torch.zeros(1, 6)],
    }
    return ops.FactoredTensors(**{**given, **changes})


@pytest.mark.parametrize(
    "case",
    [
        Rejected("no rows of a matrix", lambda: _made(rows=[None]), errors.ShapeError,
                 ["rows", "a tensor of a matrix"]),
        Rejected("rows of a vector",
                 lambda: _made(params=[torch.zeros(6)], columns=[torch.zeros(6)]),
                 errors.ShapeError, ["rows", "None of a vector"]),
        Rejected("columns of another shape", lambda: _made(columns=[torch.zeros(6)]),
                 errors.ShapeError, ["columns", "(1, 6)", "(6,)"]),
        Rejected("moments in bfloat16", lambda: _made(rows=[torch.zeros(4, 1, dtype=BF16)]),
                 errors.DtypeError, ["rows", "float32", "bfloat16"]),
        Rejected("moments that are a view", lambda: _made(rows=[torch.zeros(4, 3)[:, :1]]),
                 errors.ShapeError, ["rows", "contiguous"]),
        Rejected("fewer moments", lambda: _made(rows=[]), errors.ShapeError,
                 ["params", "as many of each"]),
        Rejected("another gradient", lambda: ops.adafactor_step(
            _made(), [torch.zeros(6, 4)], torch.zeros(1, 7), ops.new_stats(torch.device("cpu"))),
            errors.ShapeError, ["adafactor_step", "grads", "(4, 6)"]),
        Rejected("a clip without a norm", lambda: ops.adafactor_step(
            _made(), [torch.zeros(4, 6)], torch.zeros(1, 7), ops.new_stats(torch.device("cpu")),
            max_norm=1.0, needs_norm=False), errors.ArgumentError, ["needs_norm", "True"]),
    ],
    ids=lambda c: c.name,
)  # fmt: skip
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
