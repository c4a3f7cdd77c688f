"""What torch makes where nothing is said, dtype and device, says nothing of a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import optim
from fastft.reference.optimizer_step import dynamic_map
from tests.optim.pairs import ALL

KINDS: dict[str, Any] = {
    **ALL,
    "Muon": optim.Muon,
    "flat": lambda p, **more: optim.AdamW8bit(p, flat=True, rounding="nearest", **more),
    "reference": optim.AdamWBF16,
}


@contextmanager
def _default(what: Any) -> Iterator[None]:
    """A dtype or a device; maps are made anew in it."""
    dynamic_map.cache_clear()
    if isinstance(what, torch.dtype):
        torch.set_default_dtype(what)
    else:
        torch.set_default_device(what)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        dynamic_map.cache_clear()


def _run(name: str, default: Any) -> Any:
    torch.manual_seed(0)
    # In float64 the reference runs, in both.
    made = [torch.randn(70, 100, dtype=torch.bfloat16), torch.randn(5, 3, dtype=torch.float32)]
    made = [*made, torch.randn(2, 2, dtype=torch.float64)] if name == "reference" else made
    params = [p.requires_grad_() for p in made]
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    with _default(default):
        optimizer = KINDS[name](params, lr=1e-2, max_grad_norm=1.0)
        for step in range(4):
            for p, g in zip(params, gradients[step], strict=True):
                p.grad = g
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return params, optimizer.state_dict()["state"], optimizer.grad_norm


def _same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        one, two = list(one.values()), list(two.values())
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, (list, tuple)):
        for x, y in zip(one, two, strict=True):
            _same(x, y)
    else:
        assert one == two


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
@pytest.mark.parametrize("name", KINDS)
def test_steps_and_states_are_the_same(name: str, default: Any) -> None:
    plain = _run(name, torch.float32)
    _same(_run(name, default), plain)
