"""rope, layer_norm and the norm of a residual stream: the same cases by every CPU backend."""

from __future__ import annotations

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, native, ops
from fastft.reference import layer_norm as layer_norm_reference
from fastft.reference import rope as rope_reference
from tests.kernels.block_cases import BLOCK_CASES, BlockCase

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("name", BLOCK_CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(backend: str, name: str) -> None:
    case = BLOCK_CASES[name]
    if backend == "cpu" and case.dtype == F16:
        pytest.skip("the CPU kernels take float32 and bfloat16")
    with poisoned():
        got = case.results(backend)
    plain, truth = case.results(None), case.results(None, F64)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in plain.items()}
    values = [[found[n] for n in case.names] for found in (got, plain, truth)]
    assert_as_good_as_torch(case.names, *values, case.dtype)


@pytest.mark.parametrize("name", [n for n, c in BLOCK_CASES.items() if c.dtype != F16])
def test_compiled_whole_and_the_same(name: str) -> None:
    case = BLOCK_CASES[name]
    tensors = [t.to(case.dtype).requires_grad_() for t in case.draw()]

    def run(*given: Tensor) -> list[Tensor]:
        return case.run(list(given), "cpu")

    torch._dynamo.reset()  # each case compiles the same code
    expected = run(*tensors)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    pulls = [torch.randn_like(t) for t in expected]
    for a, b in zip(
        [*got, *torch.autograd.grad(got, tensors, pulls)],
        [*expected, *torch.autograd.grad(expected, tensors, pulls)],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


OPCHECK = {
    "rope_fwd": lambda: (*_heads(), True, False, False, F32, "cpu"),
    "layer_norm_fwd": lambda: (*_norm(), 1e-5, 0.0, False, "cpu"),
    "add_rms_norm_fwd": lambda: (
        torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True),
        torch.randn(8, requires_grad=True), 1e-5, 0.0, True, "cpu",
    ),
}  # fmt: skip


def _heads() -> tuple[Tensor, ...]:
    q, k = (torch.randn(2, h, 5, 8, requires_grad=True) for h in (3, 2))
    return q, k, torch.randn(1, 5, 8), torch.randn(1, 5, 8)


def _norm() -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, requires_grad=True) for s in ((5, 8), (8,), (8,)))


@pytest.mark.parametrize("name", OPCHECK)
def test_registered_operations_pass_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastft, name).default, OPCHECK[name]())


def test_second_derivatives_and_gradcheck() -> None:
    q, k = (torch.randn(1, h, 3, 4, dtype=F64, requires_grad=True) for h in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4, dtype=F64)
    assert torch.autograd.gradcheck(lambda q, k: ops.rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: ops.rope(q, k, cos, sin), (q, k))
    leaves = tuple(t.detach().to(F64).requires_grad_() for t in _norm())
    assert torch.autograd.gradcheck(ops.layer_norm, leaves)
    assert torch.autograd.gradgradcheck(ops.layer_norm, leaves)


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set(isa: str) -> None:
    c = native.module()
    x, weight, bias, dy = torch.randn(70, 67) + 3, torch.randn(67), torch.randn(67), None
    dy = torch.randn(70, 67)
    y, dx, mean, rstd = torch.empty(70, 67), torch.empty(70, 67), torch.empty(70), torch.empty(70)
    dw, db = torch.empty(3, 67), torch.empty(3, 67)
    addresses = [t.data_ptr() for t in (y, mean, rstd, x, weight, bias)]
    c.layer_norm_forward(*addresses, 70, 67, 1e-6, 1.0, False, 0, isa=isa)
    addresses = [t.data_ptr() for t in (dx, dw, db, dy, x, weight, mean, rstd)]
    c.layer_norm_backward(*addresses, 70, 67, 1.0, 0, isa=isa)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = layer_norm_reference.layer_norm(*leaves, 1e-6, 1.0)[0]
    gradients = torch.autograd.grad(truth, leaves, dy.double())
    found = (y, dx, dw.sum(0), db.sum(0))
    for got, expected in zip(found, (truth.detach(), *gradients), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    heads, out = torch.randn(2, 3, 5, 20), torch.empty(2, 3, 5, 20)
    cos, sin = torch.randn(2, 2, 5, 12)
    sizes = [*heads.shape, 12, *heads.stride()[:3], *out.stride()[:3], *cos.stride()[:2]]
    for interleaved in (False, True):
        for backward in (False, True):
            addresses = [t.data_ptr() for t in (out, heads, cos, sin)]
            c.rope(*addresses, sizes, interleaved, False, backward, 0, 0, 0, isa=isa)
            expected = rope_reference.rope(
                heads.double(), cos.double(), sin.double(), interleaved=interleaved,
                half_tables=False, backward=backward,
            )  # fmt: skip
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layer-norm-several-splits", "add-norm-bf16", "rope-bf16"])
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    case: BlockCase = BLOCK_CASES[name]
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(case.results("cpu"))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(found[0][n], found[1][n]) for n in case.names)


def test_rope_keeps_strides_and_writes_in_place_only_where_no_gradient_is_lost() -> None:
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


def test_empty() -> None:
    q, k, cos, sin = _heads()
    got = ops.rope(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0])
    assert got[0].shape == (2, 3, 0, 8)
    x, weight, bias = _norm()
    y = ops.layer_norm(x[:0], weight, bias)
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert not dw.any()


def _rejected() -> list[Rejected]:
    q, k, cos, sin = (t.detach() for t in _heads())
    x, w, b = (t.detach() for t in _norm())

    def rope(**change: object) -> object:
        given = {"query": q, "key": k, "cos": cos, "sin": sin, **change}
        return lambda: ops.rope(**given)  # type: ignore[arg-type]

    cases = [
        ("rope dtype", rope(key=k.bfloat16()), errors.DtypeError, ["key", "float32"]),
        ("rope dims", rope(query=q[0]), errors.ShapeError, ["query", "(batch, heads"]),
        ("rope tokens", rope(key=k[:, :, :4]), errors.ShapeError, ["key", "(2, 2, 4, 8)"]),
        ("rope table", rope(cos=cos[:, :4]), errors.ShapeError, ["cos", "2 or 1, 5"]),
        ("rope odd", rope(cos=cos[..., :3]), errors.ShapeError, ["cos", "even"]),
        ("rope sin", rope(sin=sin[..., :4]), errors.ShapeError, ["sin", "the shape of cos"]),
        ("rope device", rope(sin=sin.to("meta")), errors.DeviceError, ["sin", "meta"]),
        ("rope gradient", rope(cos=cos.clone().requires_grad_()), errors.ArgumentError,
         ["cos", "gradient"]),
        ("norm dtype", lambda: ops.layer_norm(x, w.bfloat16(), b), errors.DtypeError, ["weight"]),
        ("norm shape", lambda: ops.layer_norm(x, w, b[:4]), errors.ShapeError, ["bias", "(8,)"]),
        ("norm eps", lambda: ops.layer_norm(x, w, b, -1.0), errors.ArgumentError, ["eps"]),
        ("residual", lambda: ops.rms_norm(x, w, residual=x[:2]), errors.ShapeError,
         ["residual", "(5, 8)"]),
    ]  # fmt: skip
    return [Rejected(*case) for case in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
