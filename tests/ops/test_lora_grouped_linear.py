from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, ops
from fastft.reference import lora_grouped_linear as reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ["y", "dx", "da", "db"]


@dataclass(frozen=True)
class Case:
    """Rows of each group, features, rank; the layouts that Transformers and PEFT have."""

    sizes: tuple[int, ...]
    in_features: int
    out_features: int
    r: int
    transposed: bool = False
    interleaved: bool = False


CASES = [
    Case((5,), 8, 12, 2),
    Case((0, 7, 0, 13, 1), 45, 29, 3, interleaved=True),
    Case((64, 0, 200), 96, 130, 16, transposed=True, interleaved=True),
    Case((0, 0), 8, 8, 1),
]


def inputs(case: Case, dtype: torch.dtype, adapter: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, a, b, ends, dy; the strides of weight and b as the case has them."""
    rows, groups = sum(case.sizes), len(case.sizes)
    k, n, r = case.in_features, case.out_features, case.r
    weight = torch.randn(groups, n, k) / k**0.5
    if case.transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    b = torch.randn(groups, n, r) / r**0.5
    if case.interleaved:
        b = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    ends = torch.tensor(case.sizes).cumsum(0).to(torch.int32)
    a = torch.randn(groups, r, k) / k**0.5
    return (
        torch.randn(rows, k).to(dtype),
        weight.to(dtype),
        a.to(adapter),
        b.to(adapter),
        ends,
        torch.randn(rows, n).to(dtype),
    )


def run(call: object, x: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = call(*leaves)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def truth(given: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    x, weight, a, b, ends, dy = (t.to(dtype) if t.is_floating_point() else t for t in given)
    return run(
        lambda x, a, b: reference.lora_grouped_linear(x, weight, a, b, ends, 0.7), x, a, b, dy
    )


@pytest.mark.parametrize(
    ("dtype", "adapter"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(
    backend: str, case: Case, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    given = inputs(case, dtype, adapter)
    x, weight, a, b, ends, dy = given

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_grouped_linear(x, weight, a, b, ends, scaling=0.7, backend=backend)

    with poisoned():
        got = run(fused, x, a, b, dy)
    assert [g.dtype for g in got] == [dtype, dtype, adapter, adapter]
    assert_as_good_as_torch(NAMES, got, truth(given, dtype), truth(given, F64), dtype)


def test_is_lora_linear_of_each_group() -> None:
    x, weight, a, b, ends, _ = inputs(CASES[1], F32, F32)
    y = ops.lora_grouped_linear(x, weight, a, b, ends, scaling=0.7)
    start = 0
    for e, stop in enumerate(ends.tolist()):
        expected = ops.lora_linear(x[start:stop], weight[e], a[e], b[e], scaling=0.7)
        torch.testing.assert_close(y[start:stop], expected, rtol=1e-5, atol=1e-5)
        start = stop


def test_gradients_of_gradients() -> None:
    x, weight, a, b, ends, _ = inputs(CASES[1], F64, F64)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_grouped_linear(x, weight, a, b, ends, scaling=0.7)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_registered_operations_pass_opcheck_and_compile() -> None:
    x, weight, a, b, ends, dy = inputs(CASES[1], F32, F32)
    s = torch.randn(x.shape[0], 3)
    trained = [t.clone().requires_grad_() for t in (x, a, b)]
    arguments = (trained[0], weight, trained[1], trained[2], ends, 0.7, "cpu")
    torch.library.opcheck(torch.ops.fastft.lora_grouped_linear_fwd.default, arguments)
    backward = (dy, x, s, weight, a, b, ends, 0.7, "cpu")
    torch.library.opcheck(torch.ops.fastft.lora_grouped_linear_bwd.default, backward)

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_grouped_linear(x, weight, a, b, ends, scaling=0.7).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, x, a, b, dy), run(call, x, a, b, dy), strict=True):
        torch.testing.assert_close(got, expected)


def _rejected() -> list[Rejected]:
    x, weight, a, b, ends, _ = inputs(Case((2, 3), 6, 5, 2), F32, F32)

    def call(**change: object) -> object:
        given = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "ends": ends, "scaling": 1.0}
        return lambda: ops.lora_grouped_linear(**{**given, **change})  # type: ignore[arg-type]

    cases = [
        ("weight bf16", {"weight": weight.bfloat16()}, errors.DtypeError, ["weight", "bfloat16"]),
        ("adapters differ", {"lora_b": b.bfloat16()}, errors.DtypeError, ["lora_b"]),
        ("ends int64", {"ends": ends.long()}, errors.DtypeError, ["ends", "int32", "int64"]),
        ("x 3-d", {"x": x[None]}, errors.ShapeError, ["x", "(rows, in_features)"]),
        ("weight 2-d", {"weight": weight[0]}, errors.ShapeError, ["weight", "three dimensions"]),
        ("groups", {"lora_a": a[:1]}, errors.ShapeError, ["lora_a", "(groups, r, in)"]),
        ("out", {"lora_b": b[:, :4]}, errors.ShapeError, ["lora_b", "(groups, out, r)"]),
        ("ends", {"ends": ends[:1]}, errors.ShapeError, ["ends", "(groups,)"]),
        ("ends short", {"ends": ends - 1}, errors.ArgumentError, ["ends", "up to 5", "[1, 4]"]),
        ("ends back", {"ends": ends.flip(0)}, errors.ArgumentError, ["ends", "[5, 2]"]),
        ("trained", {"weight": weight.clone().requires_grad_()}, errors.ArgumentError,
         ["weight", "frozen"]),
        ("scaling", {"scaling": float("nan")}, errors.ArgumentError, ["scaling", "finite"]),
        ("meta", {"ends": ends.to("meta")}, errors.DeviceError, ["ends", "meta"]),
        ("backend", {"backend": "triton"}, errors.BackendError, ["triton"]),
    ]  # fmt: skip
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
