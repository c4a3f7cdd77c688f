"""The CPU's product along its depth (csrc/cpu/deep_product.inc), and the loss that takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import relative_error

from fastft import native, ops
from fastft.cpu import linear_cross_entropy as loss_parts
from fastft.cpu import product as launcher

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("rows", "cols", "depth"),
    [
        (1, 1, 1),
        (7, 45, 3),  # no whole tile, odd depth
        (131, 70, 1025),  # two blocks of rows, a pair more than a stretch of the depth
        (40, 200, 2048),  # one block for several threads: columns are shared out
        (300, 64, 2503),
    ],
)
def test_every_instruction_set(rows: int, cols: int, depth: int) -> None:
    """Against float64: one rounding, float32 sums; any thread count with the same bits, on poisoned
    memory, and no write past a row's or the scratch's end."""
    # Columns of a wider tensor: its rows are not next to each other.
    left = torch.randn(rows, depth + 3).to(BF16)[:, :depth]
    right = (torch.randn(depth, cols) / depth**0.5).to(BF16)
    exact = left.double() @ right.double()
    bound = torch.finfo(BF16).eps + depth**0.5 * torch.finfo(F32).eps
    c, pitch = native.module(), cols + 3
    for isa in native.build_info()["instruction_sets_usable"]:
        found = []
        for threads in (1, 2, 3):
            words = c.deep_product_scratch(rows, cols, threads, isa=isa)
            room = torch.full((words + 8,), float("nan"))
            room[-8:] = 7
            out = torch.full((rows, pitch), 7.0, dtype=BF16)
            of_left = (left.data_ptr(), left.stride(0), depth)
            at_out = (out.data_ptr(), pitch, rows, cols)
            c.deep_product(*at_out, *of_left, right.data_ptr(), threads, room.data_ptr(), isa=isa)
            assert bool((room[-8:] == 7).all()), isa
            assert bool((out[:, cols:] == 7).all()), isa
            found.append(out[:, :cols])
        assert all(torch.equal(found[0], other) for other in found[1:]), isa
        assert relative_error(found[0], exact) <= bound, isa


def test_no_rows_and_no_depth() -> None:
    c = native.module()
    c.deep_product(0, 0, 0, 8, 0, 0, 4, 0, 1, 0)
    with pytest.raises(ValueError, match="no depth"):
        c.deep_product(0, 0, 4, 8, 0, 0, 0, 0, 1, 0)


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 throughout, dense rows, and no matrix units."""
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    out, left, right = (torch.randn(4, n, dtype=F32).to(BF16) for n in (4, 9, 4))
    right = right.new_zeros(9, 4)
    assert launcher.serves_deep(out, left, right)
    assert launcher.serves_deep(out, left[:, :5], right[:5])
    assert not launcher.serves_deep(out.float(), left, right)
    assert not launcher.serves_deep(out, left.float(), right)
    assert not launcher.serves_deep(out, left, right.float())
    assert not launcher.serves_deep(out, left.t().contiguous().t(), right)
    assert not launcher.serves_deep(out, left, right.t().contiguous().t())
    assert not launcher.serves_deep(out.t(), left, right)
    assert not launcher.serves_deep(out, left[:, :0], right[:0])
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: False)
    assert not launcher.serves_deep(out, left, right)


def test_the_loss_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an odd vocabulary: the gradient is the library's product's, up to that one rounding."""
    hidden = torch.randn(50, 32).to(BF16).requires_grad_()
    weight, labels = torch.randn(101, 32).to(BF16), torch.randint(101, (50,))
    monkeypatch.setattr(loss_parts, "native_bfloat16", lambda: True)  # slabs in bfloat16
    calls: list[int] = []

    def counted(*tensors: Any) -> None:
        calls.append(1)
        launcher.deep_product(*tensors)

    monkeypatch.setattr(loss_parts, "deep_product", counted)
    found = []
    for served in (True, False):
        monkeypatch.setattr(launcher, "vectors_multiply", lambda served=served: served)
        loss = ops.linear_cross_entropy(hidden, weight, labels, backend="cpu")
        found.append(torch.autograd.grad(loss, hidden)[0])
    assert len(calls) == -(-50 // 16)  # slabs of 16 tokens, of the first run alone
    assert relative_error(found[0], found[1].double()) <= torch.finfo(BF16).eps
