"""csrc/cuda/optimizer_step.cu run on the CPU: each thread of each block, by ``cuda_on_host.h``.

The compiler proves that the kernel can run; this proves what it computes, with no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastft_kernels.multi_tensor import chunks_for
from torch import Tensor

from fastft import native, ops
from fastft.cuda.optimizer_step import usual_first
from tests.kernels.cuda_on_host import build
from tests.kernels.step_cases import BF16, F16, F32, SEED, STEP_CASES, assert_step

# Small chunks: many blocks' worth of borders from few elements.
CHUNK = 512


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("optimizer_step", tmp_path_factory.mktemp("cuda"), launches=2)


@pytest.fixture
def step(library: ctypes.CDLL) -> Callable[..., None]:
    def run(
        tensors: ops.StepTensors,
        grads: list[Tensor],
        hyper: Tensor,
        stats: Tensor,
        *,
        max_norm: float,
        needs_norm: bool,
        seed: int,
    ) -> None:
        chunks = chunks_for(tensors, grads, CHUNK, 0)
        table, _ = tensors.table(grads)
        usual = 0
        tensor, part = chunks.tensor, chunks.part
        if tensors.state_bits == 8 and tensors.rule in ("adamw", "lion"):
            (tensor, part), usual = usual_first(tensors, CHUNK)

        def pointer(tensor: Tensor) -> ctypes.c_void_p:
            return ctypes.c_void_p(tensor.data_ptr())

        integer, real = ctypes.c_int64, ctypes.c_float
        codes = np.array(native.module().dynamic8_words(), np.uint32)
        status = library.fastft_optimizer_step_cuda(
            ctypes.c_int(0), ctypes.c_int(tensors.rule_code), pointer(table), integer(len(grads)),
            pointer(tensor), pointer(part), integer(chunks.count), integer(usual), integer(CHUNK),
            ctypes.c_void_p(codes.ctypes.data), pointer(chunks.partials), pointer(chunks.tickets),
            pointer(hyper), pointer(stats), real(max_norm), ctypes.c_int(needs_norm),
            ctypes.c_uint64(seed), ctypes.c_void_p(None),
        )  # fmt: skip
        assert status == 0

    return run


# Emulated threads are slow: tensors of little more than a chunk.
SMALL = ((1301, F32, F32), (5, BF16, BF16), (0, F32, F32), (1, F32, F32), (512, F32, F32),
         (77, BF16, F32), (63, F16, F16), (4097, BF16, BF16))  # fmt: skip


@pytest.mark.parametrize("name", STEP_CASES)
def test_against_float64(name: str, step: Callable[..., None]) -> None:
    assert_step(replace(STEP_CASES[name], shapes=SMALL), step)


@pytest.mark.parametrize("name", ["adamw-8bit-stochastic", "lion-8bit"])
def test_the_cpu_s_own_codes_and_random_bits(name: str, step: Callable[..., None]) -> None:
    """One seed, one run: on a CPU, on a GPU, or begun on the one and resumed on the other."""
    gpu, cpu = (replace(STEP_CASES[name], shapes=SMALL).make() for _ in range(2))
    options = {"max_norm": 0.0, "needs_norm": True, "seed": SEED}
    step(gpu.tensors, gpu.grads, gpu.hyper, gpu.stats, **options)
    ops.optimizer_step(cpu.tensors, cpu.grads, cpu.hyper, cpu.stats, backend="cpu", **options)
    differ = total = 0
    for lists in (lambda t: [t.params], lambda t: t.states):
        for mine, theirs in zip(lists(gpu.tensors), lists(cpu.tensors), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                if a.dtype in (torch.uint8, BF16):
                    differ, total = differ + int((a != b).sum()), total + a.numel()
    # The compilers contract other products into one rounding: a border is crossed here and there.
    assert total > 8000
    assert differ <= 8


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adamw-8bit-stochastic", "lion-8bit"])
def test_tensors_of_usual_codes_alone(
    name: str, max_norm: float, step: Callable[..., None]
) -> None:
    """Their kernel is then the last: it counts the step and says what was decided."""
    shapes = tuple(shape for shape in SMALL if shape[1:] == (BF16, BF16))
    assert_step(replace(STEP_CASES[name], shapes=shapes, max_norm=max_norm), step)


def test_tensors_of_usual_codes_come_first() -> None:
    state = replace(STEP_CASES["adamw-8bit-stochastic"], shapes=SMALL).make()
    chunks = chunks_for(state.tensors, state.grads, CHUNK, 0)
    state.tensors.table(state.grads)
    (tensor, part), usual = usual_first(state.tensors, CHUNK)
    assert tensor.tolist()[:usual] == [1, *[7] * 9]
    assert part.tolist()[:usual] == [0, *range(9)]
    pairs = set(zip(chunks.tensor.tolist(), chunks.part.tolist(), strict=True))
    assert set(zip(tensor.tolist(), part.tolist(), strict=True)) == pairs
    assert len(tensor) == chunks.count


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_skips_the_step(bad: float, step: Callable[..., None]) -> None:
    state = replace(STEP_CASES["adamw-clip"], shapes=SMALL).make()
    state.grads[0][-1] = bad
    before = state.copy()
    step(
        state.tensors, state.grads, state.hyper, state.stats, max_norm=1.0, needs_norm=True, seed=0
    )
    assert float(state.stats[2]) == 1.0
    assert float(state.stats[1]) == 0.0
    for name, value in before.named().items():
        assert torch.equal(state.named()[name], value), name


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_tensors_that_start_anywhere(name: str, step: Callable[..., None]) -> None:
    aligned = replace(STEP_CASES[name], shapes=((301, F32, F32), (50, BF16, BF16))).make()
    odd = aligned.copy()
    old = odd.tensors

    def shift(tensors: Any) -> list[Any]:
        return [None if t is None else torch.cat([t[:1], t])[1:] for t in tensors]

    odd.tensors = ops.StepTensors(
        old.rule, shift(old.params), old.steps, [shift(s) for s in old.states],
        [shift(a) for a in old.absmax], keys=old.keys, offsets=old.offsets,
    )  # fmt: skip
    odd.grads = shift(odd.grads)
    for state in (aligned, odd):
        step(state.tensors, state.grads, state.hyper, state.stats, max_norm=0.0, needs_norm=True,
             seed=0)  # fmt: skip
    for key, value in aligned.named().items():
        torch.testing.assert_close(odd.named()[key], value, rtol=1e-6, atol=1e-7)
