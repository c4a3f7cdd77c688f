from __future__ import annotations

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, native, ops
from fastft.ops.dora_scale import squared_row_norms
from fastft.reference import dora_scale as reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(1, 1), (3, 5), (1, 4097), (33, 64), (2, 3, 17), (130, 576), (9,)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], Tensor]:
    leaves = [torch.randn(shape).to(dtype), torch.rand(shape[-1]).double().add(0.5)]
    leaves[1] = leaves[1].to(torch.promote_types(dtype, F32))
    if bias:
        leaves.append(torch.randn(shape[-1]).to(dtype))
    return [t.requires_grad_() for t in leaves], torch.randn(shape).to(dtype)


def outputs(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    leaves, dy = inputs(shape, dtype, bias)

    def eager(dtype: torch.dtype) -> list[Tensor]:
        own = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y = own[0] * own[1]
        return outputs(y + own[2] if bias else y, own, dy.to(dtype))

    with poisoned():
        got = outputs(ops.dora_scale(*leaves, backend=backend), leaves, dy)
    names = ["y", "dz", "d_scale", "d_bias"][: len(got)]
    assert_as_good_as_torch(names, got, eager(dtype), eager(F64), dtype)
    assert [t.dtype for t in got[:3]] == [dtype, dtype, F32]


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set(isa: str) -> None:
    (z, scale, bias), dy = inputs((70, 67), F32, True)
    y, dz, parts = torch.empty(70, 67), torch.empty(70, 67), torch.empty(3, 67)
    c = native.module()
    c.dora_scale_forward(*(t.data_ptr() for t in (y, z, scale, bias)), 70, 67, 0, isa=isa)
    c.dora_scale_backward(*(t.data_ptr() for t in (dz, parts, dy, z, scale)), 70, 67, 0, isa=isa)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(y, z * scale + bias, **close)
    torch.testing.assert_close(dz, dy * scale, **close)
    total = (dy.double() * z.double()).sum(0)
    torch.testing.assert_close(parts.sum(0).double(), total, rtol=1e-5, atol=1e-5)


def test_a_scale_that_bfloat16_cannot_hold_is_not_lost() -> None:
    """A training step changes it by less than a unit in bfloat16's last place."""
    z = torch.full((1, 4), 256.0, dtype=BF16)
    scale = torch.tensor([1.0, 1.003, 0.997, 1.0039])
    assert ops.dora_scale(z, scale).tolist() == [[256.0, 256.0, 255.0, 256.0]]
    z = torch.full((1, 4), 255.0, dtype=BF16)
    assert ops.dora_scale(z, scale).tolist() == [[255.0, 256.0, 254.0, 256.0]]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_norm_is_that_of_the_whole_matrix(dtype: torch.dtype) -> None:
    adapter = dtype if dtype == F64 else F32
    weight = torch.randn(40, 30).to(dtype)
    a, b = torch.randn(4, 30, dtype=adapter), torch.randn(40, 4, dtype=adapter)
    truth = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    got = ops.dora_norm(weight, a, b, 0.7)
    assert got.dtype == adapter
    assert not got.requires_grad
    # The cross term is a product in the weight's dtype: one rounding of a part of the sum.
    torch.testing.assert_close(got.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=0)
    kept = ops.dora_norm(weight, a, b, 0.7, squared_row_norms(weight))
    assert torch.equal(kept, got)
    # B = 0, where training starts: the norm of the frozen matrix itself.
    start = ops.dora_norm(weight, a, torch.zeros_like(b), 0.7)
    torch.testing.assert_close(start.double(), weight.double().norm(dim=1), rtol=1e-6, atol=0)
    # An adapter that undoes its row leaves rounding, no NaN.
    undone = ops.dora_norm(a[:4].to(dtype), a, -torch.eye(4, dtype=adapter), 1.0)
    assert bool(torch.isfinite(undone).all())


def test_norm_of_other_dtypes_and_shapes_is_left_to_torch() -> None:
    weight, a, b = torch.randn(40, 32).to(BF16), torch.randn(4, 32), torch.randn(40, 4)
    expected = ops.dora_norm(weight, a, b, 0.7)
    close = {"rtol": 0.02, "atol": 0.0}
    torch.testing.assert_close(ops.dora_norm(weight, a, b.to(BF16), 0.7), expected, **close)
    known = squared_row_norms(weight).float()
    torch.testing.assert_close(ops.dora_norm(weight, a, b, 0.7, known), expected, **close)
    with pytest.raises(RuntimeError):
        ops.dora_norm(weight, a, b[:39], 0.7)


def test_frozen_scale_empty_and_strides() -> None:
    (z, scale), dy = inputs((4, 6), F32, False)
    scale.requires_grad_(False)
    ops.dora_scale(z, scale).backward(dy)
    torch.testing.assert_close(z.grad, dy * scale)
    empty = torch.empty(0, 6, requires_grad=True)
    scale.requires_grad_()
    ops.dora_scale(empty, scale).sum().backward()
    assert torch.equal(scale.grad, torch.zeros(6))
    strided = torch.randn(6, 4).t()
    torch.testing.assert_close(ops.dora_scale(strided, scale), strided * scale)


def test_second_derivative() -> None:
    leaves, _ = inputs((3, 4), F64, True)
    assert torch.autograd.gradgradcheck(ops.dora_scale, leaves)


def test_registered_operation_passes_opcheck_and_compiles() -> None:
    leaves, dy = inputs((3, 5), F32, True)
    z, scale, bias = leaves
    frozen = bias.detach()
    torch.library.opcheck(torch.ops.fastft.dora_scale_fwd.default, (z, scale, frozen, "cpu"))
    saved = (dy, z.detach(), scale.detach(), True, "cpu")
    torch.library.opcheck(torch.ops.fastft.dora_scale_bwd.default, saved)
    expected = outputs(ops.dora_scale(*leaves), leaves, dy)
    compiled = torch.compile(ops.dora_scale, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled(*leaves), leaves, dy), expected)
    torch.testing.assert_close(reference.dora_scale(z, scale, bias), expected[0])


def _rejected() -> list[Rejected]:
    z, scale = torch.randn(4, 6), torch.ones(6)

    def call(**change: object) -> object:
        given = {"z": z, "scale": scale, **change}
        return lambda: ops.dora_scale(**given)  # type: ignore[arg-type]

    cases = [
        ("no tensor", {"z": [1]}, errors.DtypeError, ["z", "torch.Tensor"]),
        ("integers", {"z": z.int()}, errors.DtypeError, ["z", "float32", "int32"]),
        ("narrow scale", {"scale": scale.bfloat16()}, errors.DtypeError, ["scale", "float32"]),
        ("scalar", {"z": torch.tensor(1.0)}, errors.ShapeError, ["z", "scalar"]),
        ("shape", {"scale": scale[:5]}, errors.ShapeError, ["scale", "(6,)", "(5,)"]),
        ("bias", {"bias": scale[:5]}, errors.ShapeError, ["bias", "(6,)", "(5,)"]),
        ("bias dtype", {"bias": scale.double()}, errors.DtypeError, ["bias", "float32"]),
        ("device", {"scale": scale.to("meta")}, errors.DeviceError, ["scale", "meta"]),
    ]
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)


def test_a_fresh_adapter_leaves_the_norm_as_it_is_to_the_last_bit() -> None:
    weight, a, b = torch.randn(300, 200), torch.randn(8, 200), torch.zeros(300, 8)
    assert torch.equal(ops.dora_norm(weight, a, b, 2.0), torch.linalg.norm(weight, dim=1))
