"""Norms and gated MLPs written another way: found, proved and right, or left with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Llama4TextConfig, T5Config
from transformers.models.llama4.modeling_llama4 import Llama4TextMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

import fastft

F32, BF16 = torch.float32, torch.bfloat16


def t5(rate: float, dtype: torch.dtype = F32) -> Any:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=48, feed_forward_proj="gated-gelu", dropout_rate=rate)
    return nn.Sequential(T5DenseGatedActDense(config)).to(dtype)


def adapted(model: nn.Module, names: list[str], rate: float = 0.0) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names, lora_dropout=rate))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **found}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], eps: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        error = (got[name].double() - value.double()).norm() / value.double().norm()
        # A handful of roundings each way, as in patch/proofs.py, and one gradient through another.
        assert float(error) <= 4 * eps + 4 * torch.finfo(F32).eps * 48**0.5, name


def report(model: nn.Module, kind: str) -> Any:
    (found,) = (m for m in fastft.explain(model).modules if m.kind == kind)
    return found


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("lora", [False, True])
def test_t5_s_gated_mlp_drops_what_it_dropped(lora: bool, rate: float, dtype: torch.dtype) -> None:
    """The same masks from the same seed, in training; none in evaluation."""
    plain = t5(rate, dtype)
    if lora:
        plain = adapted(plain, ["wi_0", "wi_1", "wo"])
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, 40, 32).to(dtype)
    for training in (True, False):
        for model in (plain, fused):
            model.train(training)
        for _ in range(2):
            got = trained(fused, x)
        assert_close(got, trained(plain, x), torch.finfo(dtype).eps)
    found = report(fused, "glu")
    assert (found.fused, found.fused_calls, found.fallback_calls) == (True, 4, {})
    dropout = next(m for m in fused.modules() if type(m) is nn.Dropout)
    assert dropout.p == rate


def test_t5_s_last_projection_in_float32() -> None:
    """As Transformers loads T5 in float16: what goes in is cast, which is T5's own to do."""
    plain = t5(0.1, BF16)
    plain[0].wo.float()
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(3, 5, 32).to(BF16)
    got, expected = trained(fused, x), trained(plain, x)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert got["y"].dtype == F32
    assert report(fused, "glu").fallback_calls == {"mixed dtypes": 1}


def test_t5_s_gated_mlp_under_autocast() -> None:
    plain = t5(0.3)
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(3, 40, 32)
    with torch.autocast("cpu", BF16):
        assert_close(trained(fused, x), trained(plain, x), torch.finfo(BF16).eps)
    assert report(fused, "glu").fallback_calls == {}


def test_t5_s_gated_mlp_compiles_without_a_graph_break() -> None:
    fused = fastft.accelerate(t5(0.1)).eval()
    x = torch.randn(2, 40, 32)
    compiled = torch.compile(fused[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))


class _DropsLater(T5DenseGatedActDense):
    """The parts of T5's, the dropout elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.wo(self.act(self.wi_0(x)) * self.wi_1(x)))
        return y


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_dropout_in_another_place_is_seen_at_any_rate(rate: float) -> None:
    model = t5(rate)
    model[0].__class__ = _DropsLater
    fastft.accelerate(model)
    found = report(model, "glu")
    assert not found.fused
    assert found.reason.startswith("verification: relative difference")
    assert model[0].dropout.p == rate


@pytest.mark.parametrize("lora", [False, True])
def test_llama_4_s_shared_expert(lora: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Llama4TextMLP(Llama4TextConfig(hidden_size=32, intermediate_size=48)))
    if lora:
        plain = adapted(plain, ["gate_proj", "up_proj", "down_proj"])
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, 40, 32)
    for _ in range(2):
        got = trained(fused, x)
    assert_close(got, trained(plain, x), 0.0)
    found = report(fused, "glu")
    assert (found.fused, found.fused_calls, found.fallback_calls) == (True, 2, {})


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_torch_s_rms_norm_without_an_epsilon(dtype: torch.dtype) -> None:
    """Small inputs, of which the epsilon makes most, large ones and zeros."""
    plain = nn.Sequential(nn.RMSNorm(48)).to(dtype)
    nn.init.normal_(plain[0].weight)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    for scale in (1.0, 1e-2, 1e-3, 1e-4):
        x = (scale * torch.randn(40, 48)).to(dtype)
        x[3] = 0
        got, expected = trained(fused, x), trained(plain, x)
        for name, value in expected.items():
            error = (got[name].double() - value.double()).norm() / value.double().norm()
            assert float(error) <= 4 * torch.finfo(dtype).eps, (scale, name)
    found = report(fused, "norm")
    assert (found.fused, found.fused_calls, found.fallback_calls) == (True, 4, {})
    compiled = torch.compile(fused[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))


class _OtherEpsilon(nn.RMSNorm):
    """Says one epsilon and uses another."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def test_an_epsilon_that_is_not_used_is_seen() -> None:
    model = fastft.accelerate(nn.Sequential(_OtherEpsilon(48, eps=1e-6), _OtherEpsilon(48)))
    reasons = {m.reason for m in fastft.explain(model).modules}
    assert reasons == {"_OtherEpsilon computes no RMS norm we know"}
