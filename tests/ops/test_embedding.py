from __future__ import annotations

import pytest
import torch
from block import as_good_as_torch, compiled_and_the_same, same_bits_for_any_number_of_threads
from harness import Rejected, assert_rejected
from torch import Tensor

from fastft import errors, native, ops

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

test_as_good_as_torch = as_good_as_torch("embedding")
test_compiled_whole_and_the_same = compiled_and_the_same("embedding")
test_same_bits = same_bits_for_any_number_of_threads("embedding-few-rows-for-many-tokens")


def test_a_token_that_is_everywhere_keeps_its_gradient() -> None:
    """Where torch, adding in bfloat16, stops at 256 times a number."""
    weight = torch.zeros(3, 4, dtype=BF16, requires_grad=True)
    ops.embedding(torch.ones(1000, dtype=torch.int64), weight).sum().backward()
    assert weight.grad[1].tolist() == [1000.0] * 4
    assert not weight.grad[[0, 2]].any()


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set(isa: str) -> None:
    ids, dy, got = torch.randint(20, (300,)), torch.randn(300, 600), torch.zeros(20, 600)
    ordered, order = ids.sort(stable=True)
    addresses = (t.data_ptr() for t in (got, dy, order, ordered))
    native.module().embedding_backward(*addresses, 300, 600, 4, 0, isa=isa)
    kept = dy.masked_fill((ids == 4)[:, None], 0)
    expected = torch.zeros(20, 600, dtype=F64).index_add_(0, ids, kept.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_empty_int32_strides_and_accumulation() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    ops.embedding(torch.empty(0, 2, dtype=torch.int64), weight).sum().backward()
    assert not weight.grad.any()
    ids = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    for _ in range(2):
        y = ops.embedding(ids.t(), weight)
        y.backward(torch.ones(3, 2, 2).permute(2, 1, 0))
    assert weight.grad[:, 0].tolist() == [2.0, 2.0, 0.0, 4.0, 0.0]


def test_registered_operation_passes_opcheck() -> None:
    weight, ids = torch.randn(7, 3, requires_grad=True), torch.tensor([[0, 3], [3, 1]])
    torch.library.opcheck(torch.ops.fastft.embedding_fwd.default, (ids, weight, 1, "cpu"))


def test_second_derivative() -> None:
    weight = torch.randn(5, 3, dtype=F64, requires_grad=True)
    ids = torch.tensor([0, 3, 3, 1])

    def run(weight: Tensor) -> Tensor:
        return ops.embedding(ids, weight, padding_idx=1)

    # Of padding's row numbers say there is a gradient, and the operation says there is none.
    chosen = torch.ones(5, 1, dtype=F64).index_fill(0, torch.tensor([1]), 0.0)

    def without_padding(weight: Tensor) -> Tensor:
        return run(weight * chosen).square()

    assert torch.autograd.gradcheck(without_padding, weight)
    assert torch.autograd.gradgradcheck(without_padding, weight)


def _rejected() -> list[Rejected]:
    ids, weight = torch.tensor([0, 1]), torch.randn(3, 4)

    def call(*args: object, **more: object) -> object:
        return lambda: ops.embedding(*args, **more)  # type: ignore[arg-type]

    return [
        Rejected("no tensor", call([0], weight), errors.DtypeError, ("ids",)),
        Rejected("float ids", call(ids.float(), weight), errors.DtypeError, ("ids", "int64")),
        Rejected("integer weight", call(ids, weight.int()), errors.DtypeError, ("weight",)),
        Rejected("a vector", call(ids, weight[0]), errors.ShapeError, ("weight", "(4,)")),
        Rejected("meta", call(ids.to("meta"), weight), errors.DeviceError, ("ids",)),
        Rejected(
            "no row", call(ids, weight, padding_idx=3), errors.ArgumentError, ("padding_idx", "3")
        ),
        Rejected(
            "backend", call(ids, weight, backend="cudda"), errors.ArgumentError, ("cudda", "cuda")
        ),
    ]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
