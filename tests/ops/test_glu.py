from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor
from torch.nn import functional

from fastft import errors, native, ops
from fastft.ops._remade import remaking
from fastft.ops.glu import ACTIVATIONS
from fastft.reference import glu as reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(1, 1), (3, 5), (1, 4097), (7, 33), (2, 3, 17), (64, 1536), (5,)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        (4 * torch.randn(shape)).to(dtype).requires_grad_(),
        torch.randn(shape).to(dtype).requires_grad_(),
        torch.randn(shape).to(dtype),
    )


def outputs(y: Tensor, gate: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, (gate, up), dy)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    gate, up, dy = inputs(shape, dtype)

    def eager(dtype: torch.dtype) -> list[Tensor]:
        g, u = (t.detach().to(dtype).requires_grad_() for t in (gate, up))
        return outputs(reference.glu(g, u, activation), g, u, dy.to(dtype))

    with poisoned():
        got = outputs(ops.glu(gate, up, activation, backend=backend), gate, up, dy)
    assert_as_good_as_torch(["y", "d_gate", "d_up"], got, eager(dtype), eager(F64), dtype)
    assert {t.dtype for t in got} == {dtype}


# activation(x) / x, without the cancellation at -x that torch's own have in float64 too.
_SHARES = {
    "silu": torch.sigmoid,
    "gelu": lambda x: torch.special.erfc(-x / 2**0.5) / 2,
    "gelu_tanh": lambda x: torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set_everywhere_on_the_line(isa: str, activation: str) -> None:
    """Value and slope at every magnitude, each within a relative error: the tails too."""
    gate = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-90.0, -0.0, 90.0, 1e-20])])
    up, dy, out = torch.ones(4005), torch.ones(4005), torch.empty(4005)
    d_gate, d_up = torch.empty(4005), torch.empty(4005)
    code = ACTIVATIONS.index(activation)
    rows = (1, 4005, 4005, 4005, code, 0)
    c = native.module()
    c.glu_forward(out.data_ptr(), gate.data_ptr(), up.data_ptr(), *rows, isa=isa)
    again = torch.empty(4005)
    c.glu_backward(
        *(t.data_ptr() for t in (d_gate, d_up, dy, gate, up)), *rows, again.data_ptr(), isa=isa
    )  # fmt: skip
    assert torch.equal(again, out)
    wide = gate.double().requires_grad_()
    value = wide * _SHARES[activation](wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    value = value.detach()
    # Each is a product of at most six rounded float32 factors, one of them exp of an argument
    # whose own rounding (|x|^2 / 2 up to 87) weighs 87 half ulps.
    rtol = 100 * torch.finfo(F32).eps
    torch.testing.assert_close(out.double(), value, rtol=rtol, atol=1e-30)
    torch.testing.assert_close(d_up, out, rtol=0, atol=0)
    # A slope crosses zero near x = -1: there its two terms cancel.
    torch.testing.assert_close(d_gate.double(), slope, rtol=rtol, atol=4e-7)


def test_not_finite_stays_not_finite() -> None:
    gate = torch.tensor([float("nan"), float("inf"), 1.0])
    y = ops.glu(gate, torch.tensor([1.0, 1.0, float("nan")]))
    assert y.isnan().tolist() == [True, False, True]
    assert y[1].item() == float("inf")


def test_halves_of_one_tensor_and_other_strides() -> None:
    both = torch.randn(6, 2, 34, requires_grad=True)
    gate, up = both.chunk(2, -1)
    (got,) = torch.autograd.grad(ops.glu(gate, up).sum(), both)
    (expected,) = torch.autograd.grad((functional.silu(gate) * up).sum(), both)
    torch.testing.assert_close(got, expected)
    gate, up = torch.randn(9, 5).t(), torch.randn(9, 5).t()
    torch.testing.assert_close(ops.glu(gate, up), functional.silu(gate) * up)
    dy = torch.randn(5).expand(9, 5).t()
    gate, up = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    (got,) = torch.autograd.grad(ops.glu(gate, up), gate, dy)
    (expected,) = torch.autograd.grad(functional.silu(gate) * up, gate, dy)
    torch.testing.assert_close(got, expected)


def test_empty() -> None:
    gate = torch.empty(0, 8, requires_grad=True)
    ops.glu(gate, torch.empty(0, 8)).sum().backward()
    assert gate.grad.shape == (0, 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative(activation: str) -> None:
    gate, up, _ = inputs((3, 4), F64)
    assert torch.autograd.gradgradcheck(lambda g, u: ops.glu(g, u, activation), (gate, up))


def _into_a_lora_layer(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """gate, up and the tensors of a LoRA layer that reads their product; the layer's dy."""
    shapes = ((2, 6, 8), (2, 6, 8), (5, 8), (2, 8), (5, 2))
    drawn = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return drawn, torch.randn(2, 6, 5).to(dtype)


def _layer(product: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ops.lora_linear(product, weight.detach(), a, b, scaling=0.5)


def _adding(product: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same, the frozen product from elsewhere."""
    frozen = torch.nn.functional.linear(product, weight.detach())
    return ops.lora_add(frozen, product, a, b, scaling=0.5, overwrite=True)


LAYERS = pytest.mark.parametrize("layer_of", [_layer, _adding], ids=["linear", "add"])
Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@LAYERS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_lora_layer_makes_the_product_again_to_the_same_bits(
    dtype: torch.dtype, layer_of: Layer
) -> None:
    (gate, up, *layer), dy = _into_a_lora_layer(dtype)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    asked = (gate, up, *layer[1:])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product = ops.glu(gate, up)
        with remaking(product, (gate, up), ops.glu):
            y = layer_of(product, *layer)
    assert product.data_ptr() not in kept
    got = torch.autograd.grad(y, asked, dy)
    expected = torch.autograd.grad(layer_of(ops.glu(gate, up), *layer), asked, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_another_tensor_is_kept() -> None:
    (gate, up, *layer), dy = _into_a_lora_layer(F32)
    product = ops.glu(gate, up)
    with remaking(product, (gate, up), ops.glu):
        y = _layer(product * 2, *layer)
    (da,) = torch.autograd.grad(y, layer[1], dy)
    value = 2 * product.detach().reshape(-1, 8)
    torch.testing.assert_close(da, 0.5 * (dy.reshape(-1, 5) @ layer[2]).t() @ value)


@LAYERS
def test_second_derivative_through_a_product_made_again(layer_of: Layer) -> None:
    (gate, up, *layer), _ = _into_a_lora_layer(F32)
    asked = [gate, up, *layer[1:]]

    def second(product: Tensor, make: Callable[..., Tensor] | None) -> list[Tensor]:
        with nullcontext() if make is None else remaking(product, (gate, up), make):
            y = layer_of(product, *layer)
        first = torch.autograd.grad(y.square().sum(), asked, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), asked))

    again, plain = second(ops.glu(gate, up), ops.glu), second(reference.glu(gate, up, "silu"), None)
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_registered_operation_passes_opcheck_and_compiles() -> None:
    gate, up, dy = inputs((3, 5), F32)
    torch.library.opcheck(torch.ops.fastft.glu_fwd.default, (gate, up, "silu", "cpu"))
    detached = (dy, gate.detach(), up.detach(), "silu", "cpu")
    torch.library.opcheck(torch.ops.fastft.glu_bwd.default, detached)

    def run(gate: Tensor, up: Tensor) -> Tensor:
        return ops.glu(gate, up) * 2

    expected = torch.autograd.grad(run(gate, up), (gate, up), dy)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(gate, up), (gate, up), dy)
    torch.testing.assert_close(got, expected)


def _rejected() -> list[Rejected]:
    gate = torch.randn(4, 6)

    def call(**change: object) -> object:
        given = {"gate": gate, "up": gate, **change}
        return lambda: ops.glu(**given)  # type: ignore[arg-type]

    cases = [
        ("no tensor", {"up": [1]}, errors.DtypeError, ["up", "torch.Tensor"]),
        ("integers", {"gate": gate.int()}, errors.DtypeError, ["gate", "float32", "int32"]),
        ("dtype", {"up": gate.bfloat16()}, errors.DtypeError, ["up", "float32", "bfloat16"]),
        ("shape", {"up": gate[:3]}, errors.ShapeError, ["up", "(4, 6)", "(3, 6)"]),
        ("device", {"up": gate.to("meta")}, errors.DeviceError, ["up", "meta"]),
        ("activation", {"activation": "gelu_tan"}, errors.ArgumentError, ["silu", "gelu_tanh"]),
        ("backend", {"backend": "cpuu"}, errors.ArgumentError, ["backend", "'cpu'"]),
    ]
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
