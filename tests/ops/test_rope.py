from __future__ import annotations

import pytest
import torch
from block import as_good_as_torch, compiled_and_the_same, same_bits_for_any_number_of_threads
from harness import Rejected, assert_rejected
from torch import Tensor

from fastft import errors, native, ops
from fastft.reference import rope as reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

test_as_good_as_torch = as_good_as_torch("rope")
test_compiled_whole_and_the_same = compiled_and_the_same("rope")
test_same_bits = same_bits_for_any_number_of_threads("rope-bf16")


def _heads() -> tuple[Tensor, ...]:
    q, k = (torch.randn(2, h, 5, 8, requires_grad=True) for h in (3, 2))
    return q, k, torch.randn(1, 5, 8), torch.randn(1, 5, 8)


def test_registered_operation_passes_opcheck() -> None:
    facts = (True, False, False, F32, "cpu")
    torch.library.opcheck(torch.ops.fastft.rope_fwd.default, (*_heads(), *facts))


def test_second_derivatives_and_gradcheck() -> None:
    q, k = (torch.randn(1, h, 3, 4, dtype=F64, requires_grad=True) for h in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4, dtype=F64)
    assert torch.autograd.gradcheck(lambda q, k: ops.rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: ops.rope(q, k, cos, sin), (q, k))


def test_without_gradients() -> None:
    heads = _heads()
    with torch.no_grad():
        got = ops.rope(*heads)
    for a, b in zip(got, ops.rope(*heads), strict=True):
        assert torch.equal(a, b)


def test_inplace_compiled_whole() -> None:
    q, k, cos, sin = (t.detach() for t in _heads())
    own = q.clone(), k.clone()
    compiled = torch.compile(lambda q, k: ops.rope(q, k, cos, sin, inplace=True), fullgraph=True)
    compiled(*own)
    for got, expected in zip(own, ops.rope(q, k, cos, sin), strict=True):
        assert torch.equal(got, expected)


def test_inplace_over_an_expanded_tensor_is_refused() -> None:
    q, k, cos, sin = (t.detach() for t in _heads())
    with pytest.raises(errors.ArgumentError, match="expanded"):  # heads would be turned twice
        ops.rope(q, k[:, :1].expand(-1, 2, -1, -1), cos, sin, inplace=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reached", [0, 1])
def test_what_no_gradient_reaches_has_none(reached: int, create_graph: bool) -> None:
    q, k, cos, sin = _heads()
    every = torch.autograd.grad(
        [y.sum() for y in ops.rope(q, k, cos, sin)], (q, k), create_graph=create_graph
    )
    got = torch.autograd.grad(
        ops.rope(q, k, cos, sin)[reached].sum(), (q, k), create_graph=create_graph,
        allow_unused=True,
    )  # fmt: skip
    assert got[1 - reached] is None
    assert torch.equal(got[reached], every[reached])


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_instruction_set(isa: str, interleaved: bool, backward: bool) -> None:
    heads, out = torch.randn(2, 3, 5, 20), torch.empty(2, 3, 5, 20)
    cos, sin = torch.randn(2, 2, 5, 12)
    sizes = [*heads.shape, 12, *heads.stride()[:3], *out.stride()[:3], *cos.stride()[:2]]
    addresses = [t.data_ptr() for t in (out, heads, cos, sin)]
    native.module().rope(*addresses, sizes, interleaved, False, backward, 0, 0, 0, isa=isa)
    expected = reference.rope(
        heads.double(), cos.double(), sin.double(), interleaved=interleaved, half_tables=False,
        backward=backward,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_it_keeps_strides_and_writes_in_place_only_where_no_gradient_is_lost() -> None:
    q, k, cos, sin = (t.detach() for t in _heads())
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    expected = ops.rope(q, k, cos, sin)
    assert expected[0].stride() == q.stride()
    own = (q.clone(), k.clone())
    got = ops.rope(*own, cos, sin, inplace=True)
    assert got[0] is own[0]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    apart = torch.randn(2, 3, 5, 16)[..., ::2]  # features that are not next to each other
    want = ops.rope(apart, k, cos, sin)[0]
    ops.rope(apart, k.clone(), cos, sin, inplace=True)
    torch.testing.assert_close(apart, want)
    with pytest.raises(errors.ArgumentError, match="no gradient"):
        ops.rope(q.requires_grad_(), k, cos, sin, inplace=True)
    half = ops.rope(q.bfloat16(), k.bfloat16(), cos, sin, out_dtype=BF16)
    assert half[0].dtype == BF16


def test_written_in_place_says_so() -> None:
    q, k, cos, sin = (t.detach() for t in _heads())
    w = torch.ones_like(q).requires_grad_()
    y = (q * w).sum()
    ops.rope(q, k, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("table", [F32, BF16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("out", [F32, BF16, torch.float16, F64, None], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dtypes(dtype: torch.dtype, out: torch.dtype | None, table: torch.dtype) -> None:
    q, k, cos, sin = (t.detach() for t in _heads())
    heads = [t.to(dtype).requires_grad_() for t in (q, k)]
    tables = [t.to(table) for t in (cos, sin)]
    found = ops.rope(*heads, *tables, out_dtype=out)
    expected = [
        reference.rope(t.double(), *(t.double() for t in tables), interleaved=False,
                       half_tables=False)
        for t in heads
    ]  # fmt: skip
    into = out or torch.promote_types(dtype, table)
    eps = max(torch.finfo(t).eps for t in (into, F64 if table == F64 else F32))
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == into
        assert ((got.double() - want).abs() <= 4 * eps * want.abs().clamp(min=1)).all()
    gradients = torch.autograd.grad(found, heads, [torch.ones_like(t) for t in found])
    assert [g.dtype for g in gradients] == [dtype, dtype]


def test_empty() -> None:
    q, k, cos, sin = _heads()
    got = ops.rope(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0])
    assert got[0].shape == (2, 3, 0, 8)


def _rejected() -> list[Rejected]:
    q, k, cos, sin = (t.detach() for t in _heads())

    def call(**change: object) -> object:
        given = {"query": q, "key": k, "cos": cos, "sin": sin, **change}
        return lambda: ops.rope(**given)  # type: ignore[arg-type]

    cases = [
        ("dtype", {"key": k.bfloat16()}, errors.DtypeError, ["key", "float32"]),
        ("dims", {"query": q[0]}, errors.ShapeError, ["query", "(batch, heads"]),
        ("tokens", {"key": k[:, :, :4]}, errors.ShapeError, ["key", "(2, 2, 4, 8)"]),
        ("table", {"cos": cos[:, :4]}, errors.ShapeError, ["cos", "2 or 1, 5"]),
        ("odd", {"cos": cos[..., :3]}, errors.ShapeError, ["cos", "even"]),
        ("sin", {"sin": sin[..., :4]}, errors.ShapeError, ["sin", "the shape of cos"]),
        ("device", {"sin": sin.to("meta")}, errors.DeviceError, ["sin", "meta"]),
        ("gradient", {"cos": cos.clone().requires_grad_()}, errors.ArgumentError,
         ["cos", "gradient"]),
    ]  # fmt: skip
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
