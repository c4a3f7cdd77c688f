"""Autocast leaves float64 as it is, and so do fused modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastft
from tests.integration import tiny


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_float64_model_under_autocast(name: str) -> None:
    plain: Any = tiny.peft_model(name).double()
    fused = fastft.accelerate(copy.deepcopy(plain))
    found = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**tiny.inputs(name))
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([out.loss.detach(), out.logits.detach() + 0, *grads])
    for got, expected in zip(found[1], found[0], strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_float64_convolution_under_autocast() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    plain: Any = get_peft_model(nn.Sequential(nn.Conv2d(8, 6, 1)), config).double()
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x))
