from __future__ import annotations

import pytest
import torch
from block import as_good_as_torch, compiled_and_the_same, same_bits_for_any_number_of_threads
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, native, ops
from fastft.reference import rms_norm as reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(1, 1), (3, 5), (1, 4097), (33, 64), (2, 3, 17), (130, 576), (9,)]
# (offset, round_first)
CONVENTIONS = {"llama": (0.0, True), "olmo2": (0.0, False), "gemma": (1.0, False)}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = (torch.randn(shape) * torch.rand(*shape[:-1], 1).mul(8).exp()).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(shape).to(dtype)


def outputs(y: Tensor, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize("create_graph", [False, True])
def test_of_a_sum_what_no_gradient_reaches_has_none(create_graph: bool) -> None:
    x, weight, dy = inputs((3, 5), F32)
    residual = torch.randn(3, 5, requires_grad=True)
    tensors = (x, residual, weight)
    _, summed = ops.rms_norm(x, weight, residual=residual)
    options = {"create_graph": create_graph, "allow_unused": True}
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, weight, residual=residual)[1], summed)
    dx, d_residual, d_weight = torch.autograd.grad(summed * 2, tensors, dy, **options)
    assert d_weight is None
    assert torch.equal(dx, 2 * dy)
    assert torch.equal(d_residual, 2 * dy)
    y, _ = ops.rms_norm(x, weight, residual=residual)
    got = torch.autograd.grad(y, tensors, dy, **options)
    plain, _ = reference.rms_norm(x + residual, weight, 1e-6, 0.0, True)
    for g, e in zip(got, torch.autograd.grad(plain, tensors, dy), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, convention: str
) -> None:
    x, weight, dy = inputs(shape, dtype)
    offset, round_first = CONVENTIONS[convention]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        x_, w_ = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        y, _ = reference.rms_norm(x_, w_, 1e-5, offset, round_first)
        return outputs(y, x_, w_, dy.to(dtype))

    with poisoned():
        y = ops.rms_norm(x, weight, 1e-5, offset=offset, round_first=round_first, backend=backend)
        got = outputs(y, x, weight, dy)
    assert_as_good_as_torch(["y", "dx", "dw"], got, eager(dtype), eager(F64), dtype)
    assert {t.dtype for t in got} == {dtype}


test_of_a_residual_stream = as_good_as_torch("rms_norm")
test_of_a_residual_stream_compiled = compiled_and_the_same("rms_norm")
test_same_bits_of_a_residual_stream = same_bits_for_any_number_of_threads("add-norm-bf16")


def test_the_residual_operation_passes_opcheck() -> None:
    tensors = [torch.randn(s, requires_grad=True) for s in ((5, 8), (5, 8), (8,))]
    facts = (1e-5, 0.0, True, "cpu")
    torch.library.opcheck(torch.ops.fastft.add_rms_norm_fwd.default, (*tensors, *facts))


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set(isa: str) -> None:
    x, weight, dy = (t.detach() for t in inputs((70, 67), F32))
    y, rstd, dx, dw = torch.empty(70, 67), torch.empty(70), torch.empty(70, 67), torch.empty(3, 67)
    c = native.module()
    assert c.SUM_ROWS == 32
    c.rms_norm_forward(
        *(t.data_ptr() for t in (y, rstd, x, weight)), 0, 0, 70, 67, 1e-6, 1.0, False, 0, isa=isa
    )
    c.rms_norm_backward(
        *(t.data_ptr() for t in (dx, dw, dy, x, weight, rstd)), 0, 70, 67, 1.0, 0, isa=isa
    )
    x_, w_ = x.double().requires_grad_(), weight.double().requires_grad_()
    truth, _ = reference.rms_norm(x_, w_, 1e-6, 1.0, False)
    gradients = torch.autograd.grad(truth, (x_, w_), dy.double())
    for got, expected in zip((y, dx, dw.sum(0)), (truth.detach(), *gradients), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_same_bits_for_any_number_of_threads() -> None:
    x, weight, dy = inputs((300, 65), F32)

    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return outputs(ops.rms_norm(x, weight), x, weight, dy)
        finally:
            torch.set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_frozen_weight_gets_nothing_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.cpu import rms_norm as launcher

    wanted: list[object] = []
    original = launcher.bwd

    def spy(dx: Tensor, dw: Tensor | None, *rest: Tensor, **kw: float) -> None:
        wanted.append(dw)
        original(dx, dw, *rest, **kw)

    monkeypatch.setattr(launcher, "bwd", spy)
    x, weight, dy = inputs((4, 8), F32)
    weight.requires_grad_(False)
    ops.rms_norm(x, weight).backward(dy)
    assert wanted == [None]
    assert weight.grad is None


def test_strides_scalars_empty_and_not_finite() -> None:
    x, weight, _ = (t.detach() for t in inputs((6, 10), F32))
    torch.testing.assert_close(
        ops.rms_norm(x.t().contiguous().t(), weight), ops.rms_norm(x, weight), rtol=0, atol=0
    )
    empty = torch.empty(0, 10, requires_grad=True)
    ops.rms_norm(empty, weight).sum().backward()
    assert empty.grad.shape == (0, 10)
    x[2, 3] = float("nan")
    y = ops.rms_norm(x, weight)
    assert y.isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert torch.equal(ops.rms_norm(torch.zeros(2, 10), weight), torch.zeros(2, 10))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_second_derivative(offset: float) -> None:
    x, weight, _ = inputs((3, 4), F64)
    assert torch.autograd.gradgradcheck(lambda x, w: ops.rms_norm(x, w, offset=offset), (x, weight))


def test_registered_operation_passes_opcheck_and_compiles() -> None:
    x, weight, dy = inputs((3, 5), F32)
    facts = (1e-6, 0.0, True, "cpu")
    torch.library.opcheck(torch.ops.fastft.rms_norm_fwd.default, (x, weight, *facts))
    saved = (dy, x.detach(), weight.detach(), torch.ones(3), 0.0, True, "cpu")
    torch.library.opcheck(torch.ops.fastft.rms_norm_bwd.default, saved)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight) * 2

    expected = torch.autograd.grad(run(x, weight), (x, weight), dy)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight), dy)
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), run(x, weight))


def _rejected() -> list[Rejected]:
    x, w = torch.randn(4, 6), torch.randn(6)

    def call(**change: object) -> object:
        given = {"x": x, "weight": w, **change}
        return lambda: ops.rms_norm(**given)  # type: ignore[arg-type]

    cases = [
        ("no tensor", {"x": [1]}, errors.DtypeError, ["x", "torch.Tensor"]),
        ("integers", {"x": x.int()}, errors.DtypeError, ["x", "float32", "int32"]),
        ("dtype", {"weight": w.bfloat16()}, errors.DtypeError, ["weight", "float32", "bfloat16"]),
        ("scalar", {"x": torch.tensor(1.0)}, errors.ShapeError, ["x", "scalar"]),
        ("shape", {"weight": w[:5]}, errors.ShapeError, ["weight", "(6,)", "(5,)"]),
        ("device", {"weight": w.to("meta")}, errors.DeviceError, ["weight", "meta"]),
        ("eps", {"eps": -1.0}, errors.ArgumentError, ["eps", "at least 0", "-1.0"]),
        ("residual", {"residual": x[:2]}, errors.ShapeError, ["residual", "the shape of x"]),
        ("eps nan", {"eps": float("nan")}, errors.ArgumentError, ["eps", "nan"]),
    ]
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
