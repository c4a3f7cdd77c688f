"""csrc/cuda/adafactor_step.cu run on the CPU: each thread of each block, by ``cuda_on_host.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastft import ops
from tests.kernels.cuda_on_host import build
from tests.kernels.factored_cases import FACTORED_CASES, SMALL, FactoredCase, assert_factored
from tests.kernels.step_cases import BF16, F32


class _Call(ctypes.Structure):
    """FactoredCall of csrc/include/fastft/adafactor.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "tensors", "count", "tile_tensor", "tiles", "line_tensor", "lines", "scratch",
            "partials", "hyper", "stats")),
        ("max_norm", ctypes.c_float), ("needs_norm", ctypes.c_int), ("seed", ctypes.c_uint64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("adafactor_step", tmp_path_factory.mktemp("cuda"), launches=5)


@pytest.fixture
def step(library: ctypes.CDLL) -> Callable[..., None]:
    ticket = torch.zeros(1, dtype=torch.int32)

    def run(
        tensors: ops.FactoredTensors,
        grads: list[Tensor],
        hyper: Tensor,
        stats: Tensor,
        *,
        max_norm: float,
        needs_norm: bool,
        seed: int,
    ) -> None:
        table, _ = tensors.table(grads)
        scratch, partials = (torch.full((n,), float("nan")) for n in tensors.scratch_sizes)
        work = (tensors.tile_tensor, tensors.line_tensor)
        places = tensors.call(table, *work, scratch, partials, hyper, stats)
        call = _Call(*places, max_norm, needs_norm, seed)
        status = library.fastft_adafactor_step_cuda(
            ctypes.c_int(0), ctypes.byref(call), ctypes.c_void_p(ticket.data_ptr()),
            ctypes.c_void_p(None),
        )  # fmt: skip
        assert status == 0
        assert int(ticket) == 0

    return run


@pytest.mark.parametrize("name", FACTORED_CASES)
def test_against_float64(name: str, step: Callable[..., None]) -> None:
    assert_factored(replace(FACTORED_CASES[name], shapes=SMALL), step)


@pytest.mark.parametrize("needs_norm", [True, False])
def test_a_step_that_is_skipped_changes_nothing(
    needs_norm: bool, step: Callable[..., None]
) -> None:
    state = FactoredCase(shapes=(((40, 30), F32, F32), ((9,), BF16, BF16))).make()
    if needs_norm:
        state.grads[0][-1, 2] = float("inf")
    else:
        state.stats[4] = 1.0
    before = state.copy()
    step(state.tensors, state.grads, state.hyper, state.stats, max_norm=0.0,
         needs_norm=needs_norm, seed=0)  # fmt: skip
    assert float(state.stats[2]) == 1.0
    for name, value in before.named().items():
        assert torch.equal(state.named()[name], value), name


def test_no_elements_at_all(step: Callable[..., None]) -> None:
    state = FactoredCase(shapes=(((0, 5), F32, F32), ((0,), F32, F32))).make()
    step(state.tensors, state.grads, state.hyper, state.stats, max_norm=1.0, needs_norm=True,
         seed=0)  # fmt: skip
    assert [float(s) for s in state.tensors.steps] == [1.0, 4.0]
    assert float(state.stats[0]) == 0.0
