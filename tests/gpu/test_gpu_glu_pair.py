"""A gated unit's backward that makes dS and dB of the layers before it, at a model's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastft_kernels import _lora_glu, border, ways
from fastft_kernels import lora_linear as launcher

from tests.gpu.conftest import REHEARSAL
from tests.gpu.test_gpu_ops import median_ms
from tests.kernels.bounds import relative_errors
from tests.kernels.glu_pair_cases import BF16, F16, F32, NAMES, Block

pytestmark = pytest.mark.gpu

KERNEL = pytest.mark.parametrize("kernel", ["triton/lora_linear"])
LARGE: dict[str, Any] = {} if REHEARSAL else {"width": 5632, "rows": 2050, "features": 2048}


def _made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What units' backwards leave from here on; not those that leave nothing."""
    seen: list[Any] = []
    usual = launcher.glu_bwd

    def glu_bwd(*args: Any, **kwargs: Any) -> Any:
        found = usual(*args, **kwargs)
        seen.extend([] if found is None else [found])
        return found

    monkeypatch.setattr(launcher, "glu_bwd", glu_bwd)
    return seen


@KERNEL
@pytest.mark.parametrize("way", ["expand", "border"])
@pytest.mark.parametrize(
    ("activation", "r", "dtype", "adapter"),
    [("silu", 16, BF16, F32), ("gelu", 12, F16, F16), ("gelu_tanh", 3, BF16, BF16)],
)
def test_glu_pair(
    kernel: str, activation: str, r: int, dtype: torch.dtype, adapter: torch.dtype, way: str,
    device: torch.device, observed: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    block = Block((r, r), dtype=dtype, adapter=adapter, device=device, **{"width": 144, **LARGE})
    held = border.make(block.weights, [r, r]) if way == "border" else None
    if held is not None:
        block.weights = held.weights
    made = _made(monkeypatch)
    with ways.force(way):
        got = block.fused(activation)
    assert [m.left is not None for m in made] == [way == "border"]
    block.check(got, activation)
    truth = block.plain(activation, torch.float64)
    for name, value, exact in zip(NAMES, got, truth, strict=True):
        observed.saw(name, relative_errors(value, exact)[0])


@KERNEL
@pytest.mark.parametrize("way", ["expand", "border"])
def test_glu_pair_time(
    kernel: str, way: str, gpu: torch.device, observed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit and layers, forward and backward, of Llama-3-8B: as one pass and as two."""
    block = Block((16, 16), 14336, rows=8190, features=4096, device=gpu)
    held = border.make(block.weights, [16, 16]) if way == "border" else None
    if held is not None:
        block.weights = held.weights
    with ways.force(way):
        for label in ("one pass", "two"):
            name = f"gate, up and unit of Llama-3-8B, {way}, {label}"
            with monkeypatch.context() as own:
                made = _made(own)
                block.fused("silu")
            assert len(made) == (1 if label == "one pass" else 0)
            observed.time_ms[name] = median_ms(lambda: block.fused("silu"))
            monkeypatch.setattr(_lora_glu, "_pays", lambda *_: False)
