"""Adafactor on a GPU against float64; and no optimizer waits for the device, inside a CUDA graph or
out of it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import native, ops, optim
from tests.gpu.test_gpu_ops import median_ms
from tests.kernels.bounds import relative_errors
from tests.kernels.factored_cases import FACTORED_CASES, FactoredCase, assert_factored
from tests.kernels.step_cases import BF16, F32

pytestmark = pytest.mark.gpu

KERNEL = pytest.mark.parametrize("kernel", ["cuda/adafactor_step"])
LARGE = (
    ((4096, 11008), BF16, BF16), ((16, 14336), F32, F32), ((14336, 16), F32, F32),
    ((100_003,), F32, F32), ((8, 1024, 513), BF16, BF16),
)  # fmt: skip
MAKERS = {
    "Adafactor": functools.partial(optim.Adafactor, rounding="stochastic"),
    "Muon": functools.partial(optim.Muon, rounding="stochastic"),
    "AdamWBF16": optim.AdamWBF16,
    "AdamW8bit": functools.partial(optim.AdamW8bit, rounding="stochastic"),
}


@pytest.fixture
def built(gpu: torch.device) -> torch.device:
    if not native.build_info().get("cuda"):
        pytest.skip("built without CUDA")
    return gpu


def _step(tensors: Any, grads: Any, hyper: Any, stats: Any, **more: Any) -> None:
    ops.adafactor_step(tensors, grads, hyper, stats, backend="cuda", **more)


@KERNEL
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", FACTORED_CASES)
def test_adafactor_step(
    kernel: str, name: str, large: bool, built: torch.device, observed: Any
) -> None:
    case = FACTORED_CASES[name]
    if large:
        case = replace(case, shapes=LARGE)
    found = assert_factored(case, _step, built)
    for key, truth in found["truth"].items():
        if key.startswith("p"):
            error = relative_errors(found["own"][key], truth.double())[0]
            observed.error["p"] = max(observed.error.get("p", 0.0), error)


@KERNEL
def test_step_time(kernel: str, built: torch.device, observed: Any) -> None:
    shapes = [((16, 4096), F32, F32), ((4096, 16), F32, F32)] * 224
    for label, own in (
        ("448 adapters", shapes),
        ("4096x14336 bf16", [((4096, 14336), BF16, BF16)]),
    ):
        state = FactoredCase(shapes=own).make(built)
        run = functools.partial(_step, state.tensors, state.grads, state.hyper, state.stats)
        observed.time_ms[label] = median_ms(run)
        assert observed.time_ms[label] > 0


def _model(device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(512, 384), (16, 384), (512, 16), (512, 384)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, BF16)) for s in shapes]


def _gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = drawn
        else:
            p.grad.copy_(drawn)


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_waits_for_the_gpu(name: str, built: torch.device) -> None:
    params = _model(built)
    optimizer = MAKERS[name](params, max_grad_norm=1.0)
    _gradients(params, 0)
    optimizer.step()
    for step in range(1, 4):
        _gradients(params, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MAKERS)
def test_captured(name: str, built: torch.device) -> None:
    """A graph replays steps: the bits of as many eager ones."""

    def run(capture: bool) -> list[Tensor]:
        params = _model(built)
        optimizer = MAKERS[name](params, max_grad_norm=1.0, capturable=True, seed=3)
        for step in range(2):
            _gradients(params, step)
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if capture:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(2, 5):
            _gradients(params, step)
            if capture:
                graph.replay()
            else:
                optimizer.step()
        torch.cuda.synchronize()
        return [p.detach().clone() for p in params]

    for eager, graphed in zip(run(False), run(True), strict=True):
        assert torch.equal(eager, graphed)
