"""LoRA over weights that only another package multiplies with: PEFT's results, all but the product
fused. Every class of PEFT's, over a module that multiplies as such packages do."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.errors import BackendError
from fastft.nn import call_counts
from fastft.nn.lora_product import FusedLoraProduct, product_of
from tests.patch.quantized import (
    BF16,
    EIGHT,
    EVERY,
    F16,
    F32,
    F64,
    Product,
    adapted,
    all_fused,
    assert_as_good,
    in_float64,
    run,
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    torch.manual_seed(0)
    monkeypatch.setattr(TorchaoLoraLinear, "_check_dtype_supported", lambda self: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def test_rows_of_a_product_whose_result_is_strided() -> None:
    """A mixed batch of few rows, whose terms are added run by run."""

    class Strided(Product):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)

    plain = adapted("hqq", ("default", "b")).q.eval()
    plain.base_layer.__class__ = Strided
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x, names = torch.randn(3, 5, 64), ["b", "default", "__base__"]
    with torch.no_grad():
        found = [layer(x, adapter_names=names) for layer in (fused, plain)]
    torch.testing.assert_close(*found)
    assert all_fused(fused)


class Around(nn.Module):
    """A product in another module."""

    def __init__(self, inner: Product) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("around", [False, True])
def test_who_looks_at_the_product_sees_it_alone(around: bool) -> None:
    """A hook keeps the base layer's result: nothing is added to it in place."""
    plain = adapted("hqq")
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    kept: list[Tensor] = []
    fused.q.base_layer.register_forward_hook(lambda m, args, y: kept.append(y))
    if around:
        fused.q.base_layer = Around(fused.q.base_layer)
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


@pytest.mark.parametrize("kind", ["gptq", "awq", "eetq", "inc"])
def test_a_result_that_its_package_may_keep_stays(kind: str) -> None:
    """Of packages that were never seen to run, and to which PEFT adds nothing in place."""
    plain = adapted(kind)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    x, product = torch.randn(3, 50, 64), product_of(fused.q)
    kept = type(product).forward(product, x).detach()
    before = kept.clone()
    product.__class__ = type("Keeps", (Product,), {"forward": lambda self, x: kept})
    with torch.no_grad():
        for _ in range(2):  # the same again: nothing was added to what is held
            torch.testing.assert_close(fused.q(x), plain.q(x))
    assert torch.equal(kept, before)


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


@pytest.mark.parametrize("change", ["weight", "in place", "adapter"])
def test_a_sibling_changed_after_the_first_has_run(change: str) -> None:
    """What was computed ahead is thrown away."""
    model = fastft.accelerate(adapted("awq"), strict=True)
    x = torch.randn(3, 50, 64)
    for _ in range(2):
        run(model, x, F32)

    def alter(*_: Any) -> None:
        if change == "weight":
            model.k.base_layer.qweight = torch.zeros_like(model.k.base_layer.qweight)
        elif change == "in place":
            model.k.base_layer.qweight.zero_()
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
