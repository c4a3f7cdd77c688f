"""The CPU's product with LoRA's terms in its sums (csrc/cpu/product.inc) by itself, and what takes
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import relative_error
from test_lora_linear import Call, Shape
from torch import Tensor

from fastft import native
from fastft.cpu import product as launcher
from fastft.reference import lora_linear as reference

F32, BF16 = torch.float32, torch.bfloat16
ID = str


@dataclass(frozen=True)
class Case:
    """rows, cols of out; depths of the parts, ranks of the terms."""

    rows: int
    cols: int
    depths: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    p: float = 0.0
    bias: bool = False
    transposed: bool = True


CASES = [
    Case(1, 1, (2,), (1,)),
    Case(7, 45, (6,), (5,), bias=True),
    Case(130, 100, (66,), (16,), p=0.3),
    # Several parts and terms, each with a mask; the backward of siblings.
    Case(67, 70, (32, 8, 40), (3, 16), p=0.2, transposed=False),
    Case(40, 130, (34,), (64, 1), bias=True, transposed=False),
    # Rows that meet in the cache and are copied; more depth than a panel holds at a time.
    Case(140, 33, (1024, 2), (8,)),
    Case(20, 65, (3100, 10), (4,), p=0.5, transposed=False),
    # No term; more panels than are packed at a time, by two threads.
    Case(20, 1500, (1600,)),
    # Several blocks of rows for several threads, and rows that are copied by each.
    Case(300, 130, (66,), (16,), p=0.1, bias=True),
    Case(300, 96, (1024, 64), (4, 3), transposed=False),
]


def _operands(case: Case, adapter: torch.dtype) -> tuple[list[Tensor], ...]:
    # Left sides are columns of wider tensors: rows are not next to each other.
    lefts = [torch.randn(case.rows, d + 2).to(BF16)[:, :d] for d in case.depths]
    lefts = [t.contiguous() if t.shape[1] == 1024 else t for t in lefts]
    rights = [(torch.randn(case.cols, d) / d**0.5).to(BF16) for d in case.depths]
    thin = [torch.randn(case.rows, r).to(BF16) for r in case.ranks]
    wide = [torch.randn(case.cols, r).to(adapter) for r in case.ranks]
    if not case.transposed:
        rights, wide = ([t.t().contiguous() for t in ts] for ts in (rights, wide))
    kept = [torch.rand(case.rows, case.cols) >= case.p for _ in case.ranks]
    return lefts, rights, thin, wide, kept


def _exact(case: Case, operands: tuple[list[Tensor], ...], bias: Tensor | None) -> Tensor:
    lefts, rights, thin, wide, kept = operands

    def product(left: Tensor, right: Tensor) -> Tensor:
        right = right.to(BF16).double()
        return left.double() @ (right.t() if case.transposed else right)

    out = sum(product(*pair) for pair in zip(lefts, rights, strict=True))
    for s, b, mask in zip(thin, wide, kept, strict=True):
        out = out + 0.7 * mask * product(s, b)
    assert isinstance(out, Tensor)
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("adapter", [F32, BF16], ids=ID)
@pytest.mark.parametrize("case", CASES, ids=ID)
def test_every_instruction_set(case: Case, adapter: torch.dtype) -> None:
    """Against float64 of the operands as they are multiplied: one rounding, float32 sums; any
    thread count with the same bits, on poisoned memory, and no write past a row's end."""
    operands = _operands(case, adapter)
    lefts, rights, thin, wide, kept = operands
    bias = torch.randn(case.cols).to(BF16) if case.bias else None
    masks = [reference.pack_mask(k) if case.p else None for k in kept]
    parts = [
        (left.data_ptr(), left.stride(0), left.shape[1], right.data_ptr(), case.transposed)
        for left, right in zip(lefts, rights, strict=True)
    ]
    terms = [
        (s.data_ptr(), s.shape[1], b.data_ptr(), adapter == F32, case.transposed,
         0 if mask is None else mask.data_ptr(), 0.7)
        for s, b, mask in zip(thin, wide, masks, strict=True)
    ]  # fmt: skip
    exact = _exact(case, operands, bias)
    bound = torch.finfo(BF16).eps + sum(case.depths) ** 0.5 * torch.finfo(F32).eps
    c, pitch = native.module(), case.cols + 3
    for isa in native.build_info()["instruction_sets_usable"]:
        found = []
        for threads in (1, 2, 3):
            work = (parts, terms, threads)
            words = c.product_scratch(case.rows, case.cols, *work, isa=isa)
            room = torch.full((words + 8,), float("nan"))
            room[-8:] = 7
            out = torch.full((case.rows, pitch), 7.0, dtype=BF16)
            at_bias = 0 if bias is None else bias.data_ptr()
            size = (case.rows, case.cols, at_bias)
            c.product(out.data_ptr(), pitch, *size, *work, room.data_ptr(), isa=isa)
            assert bool((room[-8:] == 7).all()), isa
            assert bool((out[:, case.cols :] == 7).all()), isa
            found.append(out[:, : case.cols])
        assert all(torch.equal(found[0], other) for other in found[1:]), isa
        assert relative_error(found[0], exact) <= bound, isa


def test_what_no_kernel_was_built_for_is_refused() -> None:
    c = native.module()
    part, term = (0, 2, 2, 0, True), (0, 65, 0, False, True, 0, 1.0)
    for parts, terms, words in (
        ([(0, 3, 3, 0, True)], [], "odd depth"),
        ([(0, 0, 0, 0, True)], [], "or of none"),
        ([part] * (c.PRODUCT_PARTS + 1), [], "too many parts"),
        ([], [], "no part"),
        ([part], [term], "rank too large"),
    ):
        with pytest.raises(ValueError, match=words):
            c.product_scratch(4, 4, parts, terms, 1)


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, rows enough, even depths, dense rows, and no matrix units."""
    x, w = torch.randn(600, 64).to(BF16), torch.randn(48, 64).to(BF16)
    bias = torch.randn(48)
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    assert launcher.serves(600, [x], [w], bias.to(BF16))
    assert not launcher.serves(600, [x], [w], bias)
    assert not launcher.serves(600, [x.float()], [w.float()])
    assert not launcher.serves(100, [x[:100]], [w])
    assert not launcher.serves(600, [x[:, :63]], [w[:, :63]])
    assert not launcher.serves(600, [x.t().contiguous().t()], [w])
    assert not launcher.serves(600, [x[:1].expand(600, 64)], [w])
    assert not launcher.serves(600, [x, x[:, :0]], [w, w[:, :0]])
    monkeypatch.undo()
    monkeypatch.setattr(launcher, "has_matrix_units", lambda: True)
    launcher.vectors_multiply.cache_clear()
    assert not launcher.serves(600, [x], [w])
    launcher.vectors_multiply.cache_clear()


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_lora_linear_takes_it(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, siblings with masks of their own: the numbers of the passes apart."""
    from fastft.cpu import lora_linear

    # The kernel runs on every instruction set; where it does not pay it is made to.
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    terms: list[int] = []

    def seen(*call: Any) -> None:
        terms.append(len(call[2]))
        launcher.product(*call)

    monkeypatch.setattr(lora_linear, "product", seen)
    call = Call(Shape(520, 64, (48, 32, 16), (8, 4, 16)), BF16, F32, True)
    outs = []
    for serves in (launcher.serves, lambda *_: False):
        monkeypatch.setattr(lora_linear, "serves", serves)
        torch.manual_seed(3)
        outs.append(call.fused("cpu", [p] * 3))
    # Three outputs, then dx with the terms of all: one group, or one for each mask.
    assert terms == [1, 1, 1, 3 if p else 1]
    for one, other in zip(*outs, strict=True):
        # The other way rounds twice: once before the term is added.
        assert relative_error(one, other.double()) <= 2 * torch.finfo(BF16).eps
