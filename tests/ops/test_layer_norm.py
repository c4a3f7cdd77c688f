from __future__ import annotations

import pytest
import torch
from block import as_good_as_torch, compiled_and_the_same, same_bits_for_any_number_of_threads
from harness import Rejected, assert_rejected
from torch import Tensor

from fastft import errors, native, ops
from fastft.reference import layer_norm as reference

F64 = torch.float64

test_as_good_as_torch = as_good_as_torch("layer_norm")
test_compiled_whole_and_the_same = compiled_and_the_same("layer_norm")
test_same_bits = same_bits_for_any_number_of_threads("layer-norm-several-splits")


def _norm() -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, requires_grad=True) for s in ((5, 8), (8,), (8,)))


def test_it_is_torchs() -> None:
    x, weight, bias = _norm()
    expected = torch.nn.functional.layer_norm(x, (8,), weight, bias)
    torch.testing.assert_close(ops.layer_norm(x, weight, bias), expected)
    torch.testing.assert_close(ops.layer_norm(x), torch.nn.functional.layer_norm(x, (8,)))


def test_registered_operation_passes_opcheck() -> None:
    facts = (1e-5, 0.0, False, "cpu")
    torch.library.opcheck(torch.ops.fastft.layer_norm_fwd.default, (*_norm(), *facts))


def test_second_derivatives_and_gradcheck() -> None:
    leaves = tuple(t.detach().to(F64).requires_grad_() for t in _norm())
    assert torch.autograd.gradcheck(ops.layer_norm, leaves)
    assert torch.autograd.gradgradcheck(ops.layer_norm, leaves)


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set(isa: str) -> None:
    c = native.module()
    x, dy, weight, bias = torch.randn(70, 67) + 3, torch.randn(70, 67), *torch.randn(2, 67)
    y, dx, mean, rstd = torch.empty(70, 67), torch.empty(70, 67), torch.empty(70), torch.empty(70)
    dw, db = torch.empty(3, 67), torch.empty(3, 67)
    addresses = [t.data_ptr() for t in (y, mean, rstd, x, weight, bias)]
    c.layer_norm_forward(*addresses, 70, 67, 1e-6, 1.0, False, 0, isa=isa)
    addresses = [t.data_ptr() for t in (dx, dw, db, dy, x, weight, mean, rstd)]
    c.layer_norm_backward(*addresses, 70, 67, 1.0, 0, isa=isa)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = reference.layer_norm(*leaves, 1e-6, 1.0)[0]
    gradients = torch.autograd.grad(truth, leaves, dy.double())
    found = (y, dx, dw.sum(0), db.sum(0))
    for got, expected in zip(found, (truth.detach(), *gradients), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_empty() -> None:
    x, weight, bias = _norm()
    y = ops.layer_norm(x[:0], weight, bias)
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert not dw.any()


def _rejected() -> list[Rejected]:
    x, w, b = (t.detach() for t in _norm())

    def call(**change: object) -> object:
        given = {"x": x, "weight": w, "bias": b, **change}
        return lambda: ops.layer_norm(**given)  # type: ignore[arg-type]

    cases = [
        ("dtype", {"weight": w.bfloat16()}, errors.DtypeError, ["weight", "float32"]),
        ("shape", {"bias": b[:4]}, errors.ShapeError, ["bias", "(8,)"]),
        ("scalar", {"x": torch.tensor(1.0)}, errors.ShapeError, ["x", "scalar"]),
        ("device", {"bias": b.to("meta")}, errors.DeviceError, ["bias", "meta"]),
        ("eps", {"eps": -1.0}, errors.ArgumentError, ["eps", "-1.0"]),
    ]
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
