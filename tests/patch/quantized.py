"""Layers that only another package multiplies with, stood in for by one of these tests, beneath
each class that PEFT has for such layers."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

import fastft

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Against float64: each side rounds S, terms and sums a few times, in another order.
FACTOR = 4.0


class _Multiply(torch.autograd.Function):
    """x W^T of codes, whose result is a view made here, as those of such packages mostly are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: float) -> Tensor:
        ctx.codes, ctx.scale = codes, scale
        flat = x.reshape(-1, x.shape[-1]) @ (codes.to(x.dtype) * scale).t()
        return flat.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ (ctx.codes.to(dy.dtype) * ctx.scale), None, None


class Product(nn.Module):
    """A frozen layer in 8 bits that computes in the dtype of its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max().item() / 127
        codes = (linear.weight.detach().float() / self.scale).round().to(torch.int8)
        self.register_buffer("qweight", codes)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = _Multiply.apply(x, self.qweight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> nn.Linear:
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        made.weight.data = self.qweight.double() * self.scale
        if self.bias is not None:
            made.bias.data = self.bias.double()
        return made.double().requires_grad_(False)


class Owned(Product):
    """One whose result PEFT may change in place, as it does with AQLM's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone()


# Whose PEFT class exists only beside its package: what that is asked for.
STUBS = {
    "eetq": ["eetq"],
    "hqq": ["hqq", "hqq.core", "hqq.core.quantize"],
    "inc": ["neural_compressor"],
}


@functools.cache
def peft_class(kind: str) -> Any:
    """PEFT's class of this kind; where its package is absent, made with a stand-in for it."""
    module, name = KINDS[kind].rsplit(".", 1)
    spec: Any = importlib.util.find_spec(f"peft.tuners.lora.{module}")
    packages = STUBS.get(kind, [])
    if not packages or importlib.util.find_spec(packages[0]) is not None:
        return getattr(importlib.import_module(spec.name), name)
    with pytest.MonkeyPatch.context() as patched:
        stub: Any = types.ModuleType("stub")
        stub.EetqLinear = stub.HQQLinear = Product
        for package in packages:
            patched.setitem(sys.modules, package, stub)
        patched.setattr(f"peft.import_utils.is_{kind}_available", lambda: True)
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    return getattr(made, name)


KINDS = {
    "8bit": "bnb.Linear8bitLt",
    "gptq": "gptq.GPTQLoraLinear",
    "awq": "awq.AwqLoraLinear",
    "hqq": "hqq.HqqLoraLinear",
    "eetq": "eetq.EetqLoraLinear",
    "aqlm": "aqlm.AqlmLoraLinear",
    "inc": "inc.IncLoraLinear",
    "torchao": "torchao.TorchaoLoraLinear",
}
EVERY = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            kind == "8bit" and importlib.util.find_spec("bitsandbytes") is None,
            reason="bitsandbytes is not installed",
        ),
    )
    for kind in KINDS
]
# Whose forward takes adapter_names, and whose classes can be merged.
EIGHT = EVERY[0]


class Two(nn.Module):
    """Siblings and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.o = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


def adapted(kind: str, names: tuple[str, ...] = ("default",), **options: Any) -> Any:
    """The siblings and their successor as PEFT's layers of this kind, adapters random."""
    torch.manual_seed(0)
    model, made = Two(), peft_class(kind)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    config = LoraConfig(**settings)
    for name, child in list(model.named_children()):
        base = (Owned if kind == "aqlm" else Product)(child)
        layer = made(base, names[0], config=config, r=config.r, lora_alpha=8)
        for other in names[1:]:
            layer.update_layer(other, r=3, lora_alpha=6, config=config)
        layer.requires_grad_(False)
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(True)
        setattr(model, name, layer)
    return model


def in_float64(model: Any) -> Any:
    wide = copy.deepcopy(model)
    for name, layer in list(wide.named_children()):
        made = PeftLinear(layer.base_layer.dense(), "none", config=LoraConfig(r=1), r=1)
        for attribute in ("lora_A", "lora_B", "scaling", "lora_dropout", "lora_bias"):
            setattr(made, attribute, getattr(layer, attribute))
        made._active_adapter = layer._active_adapter
        setattr(wide, name, made.double())
    return wide


def run(model: Any, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients; the second call of siblings is one operation."""
    for _ in range(2):
        model.zero_grad()
        own = x.to(dtype, copy=True).requires_grad_()
        y = model(own)
        (y.to(F64) * torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape)).sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [y.detach(), own.grad, *trained]  # type: ignore[list-item]


def assert_as_good(got: Any, theirs: Any, truth: Any, dtype: torch.dtype) -> None:
    for one, other, exact in zip(got, theirs, truth, strict=True):
        assert one.dtype == other.dtype
        floor = torch.finfo(dtype).eps * exact.norm()
        bound = FACTOR * max((other.to(F64) - exact).norm(), floor)
        assert (one.to(F64) - exact).norm() <= bound


def all_fused(model: nn.Module) -> bool:
    reports = [r for r in fastft.explain(model).modules if r.kind == "lora"]
    return bool(reports) and all(r.fused and not r.fallback_calls for r in reports)


def assert_merged_as_peft(fused: Any, plain: Any) -> None:
    """Merged and unmerged again, both models hold the same, and the reason is said meanwhile."""
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (fused, plain):
            getattr(model, change)()
        states = [m.state_dict() for m in (fused, plain)]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        reasons = {r.reason for r in fastft.explain(fused).modules if r.kind == "lora"}
        assert reasons == {None if change[0] == "u" else "adapter merged into the base"}
