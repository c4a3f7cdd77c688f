"""LoRA over weights that only another package multiplies with: PEFT's results, product aside fused.

Every class of PEFT's stands over a module of this test, which multiplies as such packages do; those
whose package is here stand over its own layers, too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft import memory
from fastft.errors import BackendError
from fastft.nn import call_counts
from fastft.nn.lora_product import FusedLoraProduct

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
def _class(kind: str) -> Any:
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


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    torch.manual_seed(0)
    monkeypatch.setattr(TorchaoLoraLinear, "_check_dtype_supported", lambda self: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    model, made = Two(), _class(kind)
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


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", EVERY)
def test_results_and_gradients(kind: str, dtype: torch.dtype) -> None:
    plain = adapted(kind)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    assert not any(m.calls for m in fused.modules() if isinstance(m, Product)), "in its proof"
    x = torch.randn(3, 50, 64)
    found = [run(m, x, d) for m, d in ((fused, dtype), (plain, dtype), (in_float64(plain), F64))]
    assert_as_good(*found, dtype)
    assert all_fused(fused)
    reports = {r.name: (r.fused_calls, r.siblings) for r in fastft.explain(fused).modules}
    assert reports == {"q": (2, 2), "k": (2, 2), "o": (2, 1)}
    assert {m.calls for m in fused.modules() if isinstance(m, Product)} == {2}
    classes = [type(m) for m in plain.modules()]
    assert [type(m) for m in fastft.restore(fused).modules()] == classes
    again = run(fused, x, dtype)
    assert all(map(torch.equal, again, found[1]))


@pytest.mark.parametrize(
    "options", [{"lora_bias": True}, {"use_rslora": True, "r": 7}], ids=["biases", "rslora"]
)
@pytest.mark.parametrize("kind", ["gptq", "awq", EIGHT])
def test_options(kind: str, options: dict[str, Any]) -> None:
    plain = adapted(kind, **options)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, 50, 64)
    found = [run(m, x, d) for m, d in ((fused, BF16), (plain, BF16), (in_float64(plain), F64))]
    assert_as_good(*found, BF16)


@pytest.mark.parametrize("kind", EVERY)
def test_several_adapters(kind: str) -> None:
    plain = adapted(kind, ("default", "b"))
    for layer in plain.children():
        layer.set_adapter(["default", "b"])
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, 50, 64)
    found = [run(m, x, d) for m, d in ((fused, BF16), (plain, BF16), (in_float64(plain), F64))]
    assert_as_good(*found, BF16)
    assert all_fused(fused)


@pytest.mark.parametrize("rows", [40, 1])
@pytest.mark.parametrize("kind", EVERY)
def test_mixed_batches(kind: str, rows: int) -> None:
    """Each sample as through its adapter alone; PEFT has them at inference, and of some classes."""
    plain = adapted(kind, ("default", "b"))
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True).eval()
    names = ["b", "default", "default", "__base__"]
    for model in (plain, fused):
        for layer in model.children():
            layer.set_adapter(["default", "b"])
    x = torch.randn(4, rows, 64)

    def alone(i: int, name: str) -> Tensor:
        for layer in plain.children():
            layer.enable_adapters(name != "__base__")
            if name != "__base__":
                layer.set_adapter(name)
        return plain(x[i : i + 1])

    want = torch.cat([alone(i, name) for i, name in enumerate(names)])
    for mode in (contextlib.nullcontext, torch.no_grad):
        with mode(), fastft.mixed_batch(fused, names):
            for _ in range(2):
                got = fused(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all_fused(fused)
    if kind in ("8bit", "hqq", "inc", "torchao"):
        plain.q.enable_adapters(True)
        with torch.no_grad():
            y = fused.q(x, adapter_names=names)
        torch.testing.assert_close(y, plain.q(x, adapter_names=names), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_dropout(kind: str) -> None:
    """Elements are dropped as often as asked, and gradients know which."""
    p, n = 0.3, 64
    model = adapted(kind, r=n, lora_dropout=p, lora_alpha=n)
    layer = fastft.accelerate(model, strict=True).q.train()
    layer.base_layer.qweight.zero_()
    layer.base_layer.bias.data.zero_()
    layer.scaling["default"] = 1.0
    layer.lora_A.default.weight.data = torch.eye(n)
    layer.lora_B.default.weight.data = torch.eye(96)[:, :n].contiguous()
    x = torch.rand(500, n).add(1).requires_grad_()
    y = layer(x)[:, :n]
    kept = y.detach() != 0
    # Five standard deviations of a binomial, and p in units of 2^-16.
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * sigma + 2**-16
    torch.testing.assert_close(y, x * kept / (1 - p))
    dx, da = torch.autograd.grad(y.sum(), (x, layer.lora_A.default.weight))
    torch.testing.assert_close(dx, kept / (1 - p))
    torch.testing.assert_close(da, (x * kept / (1 - p)).sum(0).expand(n, n), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.eval()(x)[:, :n], x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["awq", EIGHT])
def test_checkpointing_gives_the_same_bits(kind: str, reentrant: bool) -> None:
    model = fastft.accelerate(adapted(kind, lora_dropout=0.3)).train()
    x = torch.randn(3, 50, 64, dtype=BF16, requires_grad=True)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        for _ in range(2):
            torch.manual_seed(3)
            model.zero_grad()
            x.grad = None
            y = call(x)
            y.float().square().sum().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        return [y.detach(), x.grad, *trained]  # type: ignore[list-item]

    want = gradients(model)
    got = gradients(lambda t: checkpoint(model, t, use_reentrant=reentrant))  # type: ignore[return-value]
    assert all(map(torch.equal, got, want))
    assert all_fused(model)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", EVERY)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    """Of a CPU: results in the product's dtype, terms in autocast's."""
    plain = adapted(kind)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, 50, 64)
    with torch.autocast("cpu", dtype=BF16):
        found = [run(m, x, dtype) for m in (fused, plain)]
    assert_as_good(*found, run(in_float64(plain), x, F64), BF16)
    assert all_fused(fused)


@pytest.mark.parametrize("kind", EVERY)
def test_autocast_of_a_gpu_widens_what_peft_widens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT asks for that of a GPU only, wherever the layer is."""
    plain = adapted(kind)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    for model in (plain, fused):
        model.q.base_layer.register_forward_hook(lambda m, args, y: y.to(F16))
    x = torch.randn(3, 50, 64)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device)
    got, want = fused.q(x), plain.q(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("kind", EVERY)
def test_inference(kind: str, rows: int, mode: Any) -> None:
    plain = adapted(kind, lora_dropout=0.5)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, rows, 64)
    with mode():
        got = [m.eval()(x) for m in (fused, fused, plain)]
    torch.testing.assert_close(got[0], got[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0], got[1])
    assert all_fused(fused)


def test_who_looks_at_the_product_sees_it_alone() -> None:
    """A hook keeps the base layer's result: nothing is added to it in place."""
    plain = adapted("awq")
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    kept: list[Tensor] = []
    fused.q.base_layer.register_forward_hook(lambda m, args, y: kept.append(y))
    x = torch.randn(3, 50, 64)
    torch.testing.assert_close(fused(x), plain(x))
    assert torch.equal(kept[0], plain.q.base_layer(x))
    # And without: in place, no second result of that size is made.
    with torch.no_grad():
        made: list[Tensor] = []
        multiply = type(fused.o.base_layer).forward
        x = torch.randn(3, 50, 96)
        y = multiply(fused.o.base_layer, x)
        fused.o.base_layer.__class__ = type(
            "Seen", (Product,), {"forward": lambda self, x: made.append(y) or y}
        )
        assert fused.o(x).data_ptr() == y.data_ptr()


def test_siblings_of_other_kinds_compute_alone() -> None:
    """A dense layer beside others': there is no operation for both."""
    plain = adapted("gptq")
    dense = PeftLinear(nn.Linear(64, 96), "default", config=LoraConfig(r=4), r=4, lora_alpha=8)
    dense.lora_B.default.weight.data.normal_()
    plain.k = dense
    for order in ("qk", "kq"):
        if order == "kq":
            plain.q, plain.k = plain.k, plain.q
        fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
        x = torch.randn(3, 50, 64)
        found = [run(m, x, F32) for m in (fused, plain)]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        ran = [m.calls for model in (fused, plain) for m in model.modules() if hasattr(m, "calls")]
        assert len(set(ran)) == 1, "each product once a call"


@pytest.mark.parametrize("change", ["weight", "adapter"])
def test_a_sibling_changed_after_the_first_has_run(change: str) -> None:
    """What was computed ahead is thrown away."""
    model = fastft.accelerate(adapted("awq"), strict=True)
    x = torch.randn(3, 50, 64)
    for _ in range(2):
        run(model, x, F32)

    def alter(*_: Any) -> None:
        if change == "weight":
            model.k.base_layer.qweight = torch.zeros_like(model.k.base_layer.qweight)
        else:
            model.k.lora_B.default.weight.data.zero_()
            model.k.lora_A.default.weight.data.zero_()
            model.k.scaling["default"] = 0.0

    handle = model.q.register_forward_hook(alter)
    got = model(x)
    handle.remove()
    assert torch.equal(got, model(x))


def test_reasons() -> None:
    """What is PEFT's is counted with its reason."""
    model = fastft.accelerate(adapted("awq"))
    layer = model.q
    x = torch.randn(3, 50, 64)

    def reasons(expected: str, *args: Any, **kwargs: Any) -> Tensor:
        fastft.nn.reset_call_counts()
        y = layer(*args, **kwargs)
        assert dict(call_counts(layer).fallback) == {expected: 1}
        return y

    layer.enable_adapters(False)
    assert torch.equal(reasons("adapters disabled", x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.double()
    assert reasons("no fused backend for this device and dtype", x.double()).dtype == F64
    layer.float()
    with torch.autocast("cpu", dtype=BF16):
        reasons("mixed dtypes", x.double())
    layer.lora_A.half(), layer.lora_B.half()
    reasons("mixed dtypes", x)
    layer.float()
    layer.lora_dropout["default"] = nn.AlphaDropout(0.1)
    reasons("dropout of another kind", x)
    layer.lora_dropout["default"] = nn.Identity()
    layer.lora_A.default.register_forward_hook(lambda *_: None)
    reasons("hooks on the adapter", x)
    strict = fastft.accelerate(adapted("awq"), strict=True)
    strict.q.enable_adapters(False)
    with pytest.raises(BackendError, match="adapters disabled"):
        strict.q(x)


def test_variants_are_pefts() -> None:
    model = of_8_bits(Two())
    options = {"r": 4, "target_modules": ["q", "k", "o"], "use_dora": True}
    plain = get_peft_model(model, LoraConfig(**options))
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(3, 50, 64)
    assert torch.equal(fused(x), plain(x))
    reason = "LoRA variant over another package's product"
    assert dict(call_counts(fused.base_model.model.q).fallback) == {reason: 1}
    assert {r.reason for r in fastft.explain(fused).modules if r.kind == "lora"} == {reason}


@pytest.mark.parametrize("kind", EVERY)
def test_compiled(kind: str) -> None:
    """Fused as well: the operation is a registered one."""
    model = fastft.accelerate(adapted(kind), strict=True)
    x = torch.randn(3, 50, 64, requires_grad=True)
    compiled = torch.compile(lambda t: model.q(t), backend="aot_eager")
    found = [(y := call(x), *torch.autograd.grad(y.sum(), x)) for call in (compiled, model.q)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives() -> None:
    plain = adapted("torchao")
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(3, 50, 64, requires_grad=True)

    def penalty(model: Any) -> list[Tensor]:
        adapters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(x).square().mean(), adapters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), adapters))

    for got, want in zip(penalty(fused), penalty(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_copies_and_pickles() -> None:
    fused = fastft.accelerate(adapted("gptq"), strict=True)
    x = torch.randn(3, 50, 64)
    want = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(other.q, FusedLoraProduct)
        assert torch.equal(other(x), want)
    assert list(fused.state_dict()) == list(adapted("gptq").state_dict())


# Layers of packages that are here.


def of_8_bits(model: nn.Module, threshold: float = 6.0) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name == "lm_head":
                continue
            sizes = child.in_features, child.out_features, child.bias is not None
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
            weight = child.weight.detach().clone()
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            made.bias = child.bias
            setattr(parent, name, made.to("cpu"))
    model.is_loaded_in_8bit = True  # what PEFT asks for
    return model


def of_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def of_hqq(model: nn.Module) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    dtype = next(model.parameters()).dtype
    for name, child in list(model.named_children()):
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
        made = hqq.HQQLinear(child, config, compute_dtype=dtype, device="cpu")
        setattr(model, name, made)
    return model


PACKAGES = {"8bit": of_8_bits, "torchao": of_torchao, "hqq": of_hqq}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("package", PACKAGES)
def test_layers_of_packages(package: str, dtype: torch.dtype) -> None:
    """Against PEFT over the same layer: the products have errors of their own, the same on both."""
    base = PACKAGES[package](Two().to(dtype))
    options = {"r": 4, "target_modules": ["q", "k", "o"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**options))
    x = torch.randn(3, 50, 64)
    want = run(model, x, dtype)
    fastft.accelerate(model, strict=True)
    got = run(model, x, dtype)
    # As in test_results_and_gradients, but products of 8 bits after a rounding jump by a code.
    bound = 16 * torch.finfo(dtype).eps
    if (package, dtype) == ("8bit", F32):
        bound = 16 * torch.finfo(F16).eps
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()
    assert all_fused(model)
    assert {r.siblings for r in fastft.explain(model).modules if r.kind == "lora"} == {1, 2}
    fastft.restore(model)
    assert all(map(torch.equal, run(model, x, dtype), want))


IDS = torch.arange(4, 84).view(2, 40)


def tiny_llama(**config: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    torch.manual_seed(0)
    model = of_8_bits(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(BF16))
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(model, LoraConfig(**options, init_lora_weights=False))


def steps(model: Any) -> list[Tensor]:
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_a_model_in_8_bits() -> None:
    plain = tiny_llama()
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    found = [m(input_ids=IDS, labels=IDS).loss for m in (fused, plain)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    assert all_fused(fused)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = [m.eval().generate(input_ids=IDS[:1, :6], **options) for m in (fused, plain)]
    assert torch.equal(*tokens)
    assert all_fused(fused)
    held = io.BytesIO()
    torch.save(fused, held)
    held.seek(0)
    want = fused(input_ids=IDS, labels=IDS).loss
    assert torch.equal(torch.load(held, weights_only=False)(input_ids=IDS, labels=IDS).loss, want)
    classes = [type(m) for m in plain.modules()]
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (fused, plain):
            getattr(model, change)()
        states = [m.state_dict() for m in (fused, plain)]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        reasons = {r.reason for r in fastft.explain(fused).modules if r.kind == "lora"}
        assert reasons == {None if change[0] == "u" else "adapter merged into the base"}
    assert [type(m) for m in fastft.restore(fused).modules()] == classes


@pytest.mark.parametrize("policy", ["lora", "attention", "full", "offload"])
def test_policies_change_no_bit(policy: str) -> None:
    want = steps(fastft.accelerate(tiny_llama(lora_dropout=0.3)).train())
    model = fastft.accelerate(tiny_llama(lora_dropout=0.3)).train()
    got = steps(memory.checkpoint(model, policy))
    assert all(map(torch.equal, got, want))
    assert all_fused(model)


def test_patch_peft_makes_fused_layers() -> None:
    fastft.patch_peft()
    try:
        model = tiny_llama()
    finally:
        fastft.unpatch_peft()
    model(input_ids=IDS, labels=IDS)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert call_counts(layer).fused == 1
    plain = type(tiny_llama().base_model.model.model.layers[0].mlp.up_proj)
    assert (plain.__module__, plain.__name__) == ("peft.tuners.lora.bnb", "Linear8bitLt")
    assert type(layer) is not plain
