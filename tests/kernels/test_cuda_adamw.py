"""csrc/cuda/adamw.cu run on the CPU: every thread of every block, through ``cuda_on_host.h``.

The compiler proves that the kernel can run; this proves what it computes, with no GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fastft_kernels.multi_tensor import plan_for

from fastft.reference import adamw as reference
from tests.kernels.bounds import assert_as_accurate
from tests.kernels.cases import BF16, F16, F32, AdamWState

ROOT = Path(__file__).resolve().parents[2]
# Small chunks: many blocks' worth of borders from few elements.
CHUNK = 96
TENSORS = [
    (301, F32, F32), (5, BF16, BF16), (0, F32, F32), (1, F32, F32), (96, F32, F32),
    (77, BF16, F32), (63, F16, F16), (8, F16, F32),
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda")
    text = (ROOT / "csrc/cuda/adamw.cu").read_text()
    text = text.replace("#include <cuda_runtime.h>", '#include "cuda_on_host.h"')
    # kernel<<<blocks, threads, 0, queue>>>(args) is no C++.
    text, launches = re.subn(
        r"(\w+)<<<(\w+), (\w+), 0, queue>>>\(", r"host::launch(\1, \2, \3, ", text
    )
    assert launches == 3
    source, out = folder / "adamw.cpp", folder / "adamw.so"
    source.write_text(text)
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread"]
    command += [f"-I{Path(__file__).parent}", f"-I{ROOT / 'csrc/include'}"]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    if "unrecognized" in done.stderr or "barrier: No such file" in done.stderr:
        pytest.skip(f"{compiler} knows no C++20")
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(out))


def _step(
    library: ctypes.CDLL, state: AdamWState, max_norm: float = 0.0, maximize: bool = False
) -> None:
    plan = plan_for(*state.lists(), CHUNK)
    assert plan.addresses is not None

    def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def integer(value: int) -> ctypes.c_int64:
        return ctypes.c_int64(value)

    tables = (plan.addresses, plan.sizes, plan.dtypes, plan.chunk_tensor, plan.chunk_part)
    status = library.fastft_adamw_cuda(
        ctypes.c_int(0), *map(pointer, tables),
        integer(len(state.params)), integer(plan.n_chunks), integer(CHUNK),
        *map(pointer, (plan.partials, plan.scalars, state.steps, state.hyper, state.stats)),
        ctypes.c_float(max_norm), ctypes.c_int(maximize), ctypes.c_void_p(None),
    )  # fmt: skip
    assert status == 0


@pytest.mark.parametrize(("max_norm", "maximize"), [(0.0, False), (1.0, True), (1e6, False)])
def test_against_float64(library: ctypes.CDLL, max_norm: float, maximize: bool) -> None:
    own = AdamWState.make(TENSORS)
    plain, truth = own.copy(), own.copy(torch.float64)
    for _ in range(2):
        _step(library, own, max_norm, maximize)
        for state in (plain, truth):
            reference.step(*state.arguments(), max_norm=max_norm, maximize=maximize)  # type: ignore[arg-type]
    for name, value in own.tensors().items():
        assert_as_accurate(name, value, plain.tensors()[name], truth.tensors()[name])
    torch.testing.assert_close(own.stats.double(), truth.stats, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_skips_the_step(library: ctypes.CDLL, bad: float) -> None:
    state = AdamWState.make(TENSORS)
    state.grads[0][-1] = bad
    before = state.copy()
    _step(library, state, 1.0)
    assert float(state.stats[2]) == 1.0
    assert float(state.stats[1]) == 0.0
    for name, value in before.tensors().items():
        assert torch.equal(state.tensors()[name], value) or name == "g0", name


def test_tensors_that_start_anywhere(library: ctypes.CDLL) -> None:
    aligned = AdamWState.make([(101, F32, F32), (50, BF16, BF16)])
    odd = aligned.copy()
    for group in odd.lists():
        for i, tensor in enumerate(group):
            group[i] = torch.cat([tensor[:1], tensor])[1:]
    _step(library, aligned)
    _step(library, odd)
    for name, value in aligned.tensors().items():
        torch.testing.assert_close(odd.tensors()[name], value, rtol=1e-6, atol=1e-7)
