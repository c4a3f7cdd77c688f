"""Norms and rotary embeddings through the ``kernels`` package."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import nn as fused
from tests.integration import tiny

module = importlib.import_module("fastft.nn.kernel_mapping")
kernels = pytest.importorskip("kernels", reason="the kernels package is not installed")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of fastft ran."""
    seen: list[str] = []
    normed, turned = module.normed, module.fused_rope

    def norm(*args: Any) -> Tensor:
        seen.append("norm")
        return normed(*args)

    def rope(original: Any, facts: Any) -> Any:
        run = turned(original, facts)

        def apply(*args: Any, **kwargs: Any) -> Any:
            seen.append("rope")
            return run(*args, **kwargs)

        return apply

    monkeypatch.setattr(module, "normed", norm)
    monkeypatch.setattr(module, "fused_rope", rope)
    return seen


def _kernelized(model: nn.Module, mode: Any) -> None:
    with kernels.use_kernel_mapping(fused.kernel_mapping()):
        kernels.kernelize(model, mode=mode)


def _decorated(original: type[nn.Module]) -> type[nn.Module]:
    """The class as Transformers declares it where it finds a ``kernels`` that it knows."""
    made = type(original.__name__, (original,), {})
    return kernels.use_kernel_forward_from_hub("RMSNorm")(made)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_either_convention(family: str, dtype: torch.dtype, ran: list[str]) -> None:
    model = tiny.ARCHITECTURES[family].build().to(dtype)
    original = type(model.model.norm)
    for layer in model.modules():
        if type(layer) is original:
            layer.__class__ = _decorated(original)
            torch.nn.init.normal_(layer.weight)
    inputs = {**tiny.inputs(family), "labels": None}
    expected = model(**inputs).logits
    _kernelized(model, kernels.Mode.TRAINING)
    got = model(**inputs).logits
    assert ran.count("norm") >= 3
    bound = 32 * torch.finfo(dtype).eps
    off = (got - expected).detach().norm() / expected.detach().norm()
    assert float(off) < bound
    got.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_what_is_no_such_norm_runs_its_own_code(ran: list[str]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states * self.weight + 3

    made = nn.Sequential(_decorated(Odd)())
    _kernelized(made, kernels.Mode.TRAINING)
    assert torch.equal(made(torch.ones(2, 8)), torch.full((2, 8), 4.0))
    assert not ran


def test_a_model_that_will_be_compiled_keeps_its_code(ran: list[str]) -> None:
    model = tiny.ARCHITECTURES["llama"].build()
    norm = model.model.norm
    norm.__class__ = _decorated(type(norm))
    _kernelized(model, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    model(**tiny.inputs("llama"))
    assert not ran


def test_rotary_embeddings(ran: list[str]) -> None:
    from transformers.models.llama import modeling_llama

    function = getattr(modeling_llama.apply_rotary_pos_emb, "__wrapped__", None)
    function = function or modeling_llama.apply_rotary_pos_emb
    if isinstance(function, nn.Module):  # Transformers has made it one already
        function = type(function).forward.__get__(function)

    class Holder(nn.Module):
        pass

    made = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(_plain(function))
    holder = Holder()
    holder.rotary = made() if isinstance(made, type) else made
    holder.scale = nn.Parameter(torch.ones(1))
    _kernelized(holder, kernels.Mode.TRAINING)
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8)
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for options in ({}, {"unsqueeze_dim": 2}):
        heads = (q, k) if not options else (q.transpose(1, 2), k.transpose(1, 2))
        for got, expected in zip(
            holder.rotary(*heads, cos, sin, **options),
            _plain(function)(*heads, cos, sin, **options),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
    assert ran == ["rope", "rope"]


def _plain(function: Any) -> Any:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> Any:
        return function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply_rotary_pos_emb
