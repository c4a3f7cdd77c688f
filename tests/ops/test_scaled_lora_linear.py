"""``lora_linear_siblings`` with scales (DoRA): along in the native call, or a pass of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned, relative_error
from torch import Tensor

from fastft import backends, errors, native, ops
from fastft.cpu import product as launcher
from fastft.reference import dora_scale, lora_linear

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@dataclass
class Call:
    """Layers (out_features, rank, scaled, biased) over x (rows, features)."""

    rows: int
    features: int
    layers: tuple[tuple[int, int, bool, bool], ...]
    dtype: torch.dtype = BF16
    adapter: torch.dtype = F32
    seed: int = 0
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        k = self.features
        self.x = draw(self.rows, k).to(self.dtype)
        self.weights = [(draw(n, k) * k**-0.5).to(self.dtype) for n, *_ in self.layers]
        self.lora_as = [(draw(r, k) * k**-0.5).to(self.adapter) for _, r, *_ in self.layers]
        self.lora_bs = [(draw(n, r) * r**-0.5).to(self.adapter) for n, r, *_ in self.layers]
        wide = torch.promote_types(self.dtype, F32)
        scales = [draw(n).abs().add(0.5).to(wide) for n, *_ in self.layers]
        self.scales = [
            s if layer[2] else None for s, layer in zip(scales, self.layers, strict=True)
        ]
        self.biases = [draw(layer[0]).to(self.dtype) if layer[3] else None for layer in self.layers]
        self.dys = [draw(self.rows, n).to(self.dtype) for n, *_ in self.layers]

    def leaves(self) -> list[Tensor]:
        scales = [s for s in self.scales if s is not None]
        return [self.x, *self.lora_as, *self.lora_bs, *scales]

    def fused(self, backend: str | None = "cpu") -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves()]
        x, lora_as, lora_bs, scales = self._apart(leaves)
        ys = ops.lora_linear_siblings(
            x,
            self.weights,
            lora_as,
            lora_bs,
            scalings=[0.5] * len(self.layers),
            biases=self.biases,
            scales=scales,
            backend=backend,
        )
        return [*ys, *torch.autograd.grad(ys, leaves, self.dys)]

    def plain(self, dtype: torch.dtype | None) -> list[Tensor]:
        """The formula in torch's own operations, in dtype or that of each input."""
        leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in self.leaves()]
        x, lora_as, lora_bs, scales = self._apart(leaves)
        ys = []
        for i, weight in enumerate(self.weights):
            w = weight.to(x.dtype)
            y = lora_linear.lora_linear(x, w, None, lora_as[i], lora_bs[i], 0.5, None, 0.0)
            bias = self.biases[i]
            bias = None if bias is None else bias.to(x.dtype)
            scale = scales[i]
            if scale is not None:
                y = dora_scale.dora_scale(y, scale, bias)
            elif bias is not None:
                y = y + bias
            ys.append(y)
        return [*ys, *torch.autograd.grad(ys, leaves, [dy.to(x.dtype) for dy in self.dys])]

    def _apart(
        self, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
        n = len(self.layers)
        own = iter(leaves[1 + 2 * n :])
        scales = [None if s is None else next(own) for s in self.scales]
        return leaves[0], leaves[1 : 1 + n], leaves[1 + n : 1 + 2 * n], scales


ALONG = {
    "one layer": Call(520, 64, ((48, 8, True, False),)),
    "siblings, one without": Call(530, 40, ((48, 8, True, False), (34, 3, False, True))),
    "all siblings": Call(520, 66, ((130, 16, True, False),) * 3),
    "adapters in bfloat16": Call(520, 64, ((70, 5, True, False),), adapter=BF16),
    "depth of several panels": Call(515, 1602, ((64, 4, True, False),)),
}
APART = {
    "bias": Call(520, 64, ((48, 8, True, True),)),
    "odd width": Call(520, 64, ((47, 8, True, False),)),
    "few rows": Call(31, 64, ((48, 8, True, False), (16, 2, False, False))),
    "rank above the native call's": Call(520, 128, ((96, 80, True, False),)),
    "float32": Call(33, 20, ((24, 4, True, False), (17, 3, True, True)), dtype=F32),
}


def _native(call: Call) -> bool:
    """Whether the scales go along in the native call: one node makes the scaled results."""
    x = call.x.clone().requires_grad_()
    scalings = [0.5] * len(call.layers)
    ys = ops.lora_linear_siblings(
        x, call.weights, call.lora_as, call.lora_bs, scalings=scalings, biases=call.biases,
        scales=call.scales,
    )  # fmt: skip
    return {type(y.grad_fn).__name__ for y in ys} == {"LoraLinearBackward"}


@pytest.mark.parametrize("name", [*ALONG, *APART])
def test_as_good_as_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernels run on every instruction set; where they do not pay they are made to.
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call = {**ALONG, **APART}[name]
    if native.build_info()["native_bfloat16"]:
        assert _native(call) is (name in ALONG)
    with poisoned():
        got = call.fused()
    plain, truth = call.plain(None), call.plain(F64)
    names = [str(i) for i in range(len(got))]
    assert_as_good_as_torch(names, got, plain, truth, call.dtype)
    assert [t.dtype for t in got] == [t.dtype for t in plain]


def test_reference_backend_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody else's: of the pass for the scale, too."""
    seen: list[str] = []
    select = backends.select

    def watched(*args: Any, **facts: Any) -> Any:
        found = select(*args, **facts)
        seen.append(found[0])
        return found

    monkeypatch.setattr(backends, "select", watched)
    call = APART["float32"]
    for got, want in zip(call.fused("reference"), call.plain(None), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert set(seen) == {"reference"}


@pytest.mark.parametrize("least", [0.0, 1e-35])
def test_a_scale_of_nothing_has_its_gradient(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result, from which the backward reads, is zero then; and a scale of zero is where a
    pruned column stays only as long as nothing pulls at it."""
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call = Call(520, 64, ((48, 8, True, False), (32, 4, False, False)))
    scale = call.scales[0]
    assert scale is not None
    scale[[3, 47]] = least
    got, truth = call.fused()[-1], call.plain(F64)[-1]
    assert relative_error(got, truth) <= 4 * torch.finfo(BF16).eps
    for n in (3, 47):
        assert abs(float(got[n] - truth[n])) <= 0.05 * float(truth.abs().max())


def test_results_may_be_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of any linear layer; OLMo clamps its queries. Of two layers one result is changed,
    through a view."""
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call = ALONG["all siblings"]
    want = call.fused()
    leaves = [t.detach().clone().requires_grad_() for t in call.leaves()]
    x, lora_as, lora_bs, scales = call._apart(leaves)
    ys = ops.lora_linear_siblings(
        x, call.weights, lora_as, lora_bs, scalings=[0.5] * 3, biases=call.biases, scales=scales
    )
    kept = ys[1].detach().clone()
    ys[1].view(2, -1, 130)[1:].mul_(2.0)
    dys = [dy.clone() for dy in call.dys]
    dys[1][260:] /= 2  # halved and doubled: the gradient of before
    got = [*ys, *torch.autograd.grad(ys, leaves, dys)]
    assert torch.equal(ys[1][:260], kept[:260])
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        if i != 1:
            assert relative_error(one, other.double()) <= 2 * torch.finfo(BF16).eps, i


def test_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call, threads = ALONG["siblings, one without"], torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(call.fused())
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call = ALONG["one layer"]
    y, _, da, _, d_scale = call.fused()
    (scale,) = call.scales
    assert scale is not None
    for wanted in ("scale", "a"):
        tensors = {"a": call.lora_as[0].clone(), "scale": scale.clone()}
        tensors[wanted].requires_grad_()
        (other,) = ops.lora_linear_siblings(
            call.x, call.weights, [tensors["a"]], call.lora_bs, scalings=[0.5],
            scales=[tensors["scale"]],
        )  # fmt: skip
        assert torch.equal(other.detach(), y)
        (got,) = torch.autograd.grad(other, [tensors[wanted]], call.dys)
        assert torch.equal(got, {"a": da, "scale": d_scale}[wanted])


def test_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call = ALONG["one layer"]
    (own,) = call.scales
    assert own is not None
    found = []
    for dtype in (BF16, F64):
        x, scale = call.x.to(dtype).requires_grad_(), own.to(torch.promote_types(dtype, F32))
        scale.requires_grad_()
        adapter = [t.to(scale.dtype) for t in (*call.lora_as, *call.lora_bs)]
        (y,) = ops.lora_linear_siblings(
            x, [call.weights[0].to(dtype)], adapter[:1], adapter[1:], scalings=[0.5],
            scales=[scale],
        )  # fmt: skip
        (dx,) = torch.autograd.grad(y, [x], call.dys[0].to(dtype), create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), [scale])
        found.append(second)
    assert relative_error(found[0], found[1]) <= 8 * torch.finfo(BF16).eps


def _rejected() -> list[Rejected]:
    def call(scales: object) -> object:
        own = APART["few rows"]
        return lambda: ops.lora_linear_siblings(
            own.x, own.weights, own.lora_as, own.lora_bs, scalings=[1.0, 1.0],
            scales=scales,  # type: ignore[arg-type]
        )  # fmt: skip

    wide = torch.ones(48)
    cases = [
        ("one for two layers", [wide], errors.ShapeError, ["2 scales", "1"]),
        ("no tensor", [1.0, None], errors.DtypeError, ["scale", "torch.Tensor"]),
        ("narrow", [wide.to(BF16), None], errors.DtypeError, ["scale", "float32", "bfloat16"]),
        ("shape", [wide[:47], None], errors.ShapeError, ["scale", "(48,)", "(47,)"]),
        ("device", [wide.to("meta"), None], errors.DeviceError, ["scale", "meta"]),
    ]
    return [Rejected(n, call(s), error, words) for n, s, error, words in cases]  # type: ignore[arg-type]


@pytest.mark.parametrize("case", _rejected(), ids=lambda case: case.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
