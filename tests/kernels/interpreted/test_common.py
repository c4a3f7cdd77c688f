"""What every launcher needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastft_kernels._common import device_guard


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_another_gpu_is_made_the_current_one(
    monkeypatch: pytest.MonkeyPatch, index: int, entered: list[int]
) -> None:
    seen: list[int] = []

    class Device:
        def __init__(self, device: Any) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            seen.append(self.index)

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    device = torch.device("cuda", index)
    tensor: Any = SimpleNamespace(is_cuda=True, device=device, get_device=lambda: index)
    with device_guard(tensor):
        pass
    assert seen == entered
