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


def _never(*_: Any) -> bool:
    return False


def _terms_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many terms each product of ``lora_linear`` takes along, from here on."""
    from fastft.cpu import lora_linear

    terms: list[int] = []

    def seen(*call: Any) -> None:
        terms.append(len(call[2]))
        launcher.product(*call)

    monkeypatch.setattr(lora_linear, "product", seen)
    return terms


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_lora_linear_takes_it(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, siblings with masks of their own: in one native call, in products that
    take the terms, and in passes apart, of which the first two give the same bits."""
    from fastft.cpu import lora_layers, lora_linear

    # The kernel runs on every instruction set; where it does not pay it is made to.
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    terms = _terms_taken(monkeypatch)
    call = Call(Shape(520, 64, (48, 32, 16), (8, 4, 16)), BF16, F32, True)
    outs = []
    ways = ((launcher.serves, launcher.serves), (_never, launcher.serves), (_never, _never))
    for at_once, in_products in ways:
        monkeypatch.setattr(lora_layers, "serves", at_once)
        monkeypatch.setattr(lora_linear, "serves", in_products)
        terms.clear()
        torch.manual_seed(3)
        outs.append(call.fused("cpu", [p] * 3))
        # Three outputs, then dx with the terms of all: one group, or one for each mask.
        assert terms == ([1, 1, 1, 3 if p else 1] if at_once is not in_products else [])
    for one, same, other in zip(*outs, strict=True):
        assert torch.equal(one, same)
        # The other way rounds twice: once before the term is added.
        assert relative_error(one, other.double()) <= 2 * torch.finfo(BF16).eps


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def _adapted(
    rows: int, depth: int, widths: tuple[int, ...], ranks: tuple[int, ...], owners: list[int]
) -> tuple[Any, ...]:
    """x, weights, As, Bs of the layers ``owners``, and gradients of the results."""
    lora_bs = [torch.randn(widths[i], r) for i, r in zip(owners, ranks, strict=True)]
    return (
        _draw(rows, depth),
        [_draw(n, depth) for n in widths],
        [torch.randn(r, depth) for r in ranks],
        lora_bs,
        [_draw(rows, n) for n in widths],
    )


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("adapters", [(0, 1, 2), (1,), ()])
def test_one_native_call_is_the_passes_whoever_wants_what(
    need_dx: bool, adapters: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters on a layer, one of three with dropout, and gradients that nobody asked for."""
    from fastft.cpu import lora_layers, lora_linear

    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    rows, depth, widths, ranks, owners = 520, 64, (48, 32), (8, 4, 3), [0, 0, 1]
    x, weights, lora_as, lora_bs, dys = _adapted(rows, depth, widths, ranks, owners)
    mask = torch.empty(rows, depth // 8, dtype=torch.uint8)
    lora_linear.dropout_mask(mask, torch.tensor([5]), 0.25)
    rest = (lora_as, lora_bs, [0.5, 2.0, 1.0], [None, mask, None], [0.0, 0.25, 0.0], owners)
    spans = [(0, rows)] * 3
    found = []
    for serves in (launcher.serves, _never):
        monkeypatch.setattr(lora_layers, "serves", serves)
        ys, ss = [torch.empty_like(dy) for dy in dys], [x.new_empty(rows, r) for r in ranks]
        lora_linear.fwd(ys, ss, x, weights, [_draw(48).zero_(), None], *rest, spans)
        dx = torch.empty_like(x) if need_dx else None
        das = [torch.empty_like(a) if j in adapters else None for j, a in enumerate(lora_as)]
        dbs = [torch.empty_like(b) if j in adapters else None for j, b in enumerate(lora_bs)]
        lora_linear.bwd(dx, das, dbs, dys, x, ss, weights, *rest, spans)
        found.append([*ys, *ss, dx, *das, *dbs])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("dropped", [False, True])
def test_of_adapters_with_rows_of_their_own_it_makes_the_frozen_products(
    dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed batch: some rows have an adapter, some none, and one layer has none at all."""
    from fastft.cpu import lora_linear

    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    terms = _terms_taken(monkeypatch)
    rows, depth, widths, ranks, owners = 600, 64, (48, 32, 16), (8, 4, 3), [0, 0, 1]
    spans = [(0, 200), (200, 590), (0, 200)]
    x, weights, lora_as, lora_bs, dys = _adapted(rows, depth, widths, ranks, owners)
    sizes = [stop - start for start, stop in spans]
    masks: list[Tensor | None] = [None] * 3
    if dropped:
        for j, n in enumerate(sizes):
            masks[j] = torch.empty(n, depth // 8, dtype=torch.uint8)
            lora_linear.dropout_mask(masks[j], torch.tensor([j]), 0.25)  # type: ignore[arg-type]
    rest = (lora_as, lora_bs, [0.5, 2.0, 1.0], masks, [0.25 * dropped] * 3, owners, spans)
    biases = [_draw(48), None, None]
    found = []
    for serves in (launcher.serves, _never):
        monkeypatch.setattr(lora_linear, "serves", serves)
        ys = [torch.empty_like(dy) for dy in dys]
        ss = [x.new_empty(n, r) for n, r in zip(sizes, ranks, strict=True)]
        lora_linear.fwd(ys, ss, x, weights, biases, *rest)
        dx = torch.empty_like(x)
        das, dbs = ([torch.empty_like(t) for t in of] for of in (lora_as, lora_bs))
        lora_linear.bwd(dx, das, dbs, dys, x, ss, weights, *rest)
        found.append([*ys, *ss, dx, *das, *dbs])
    assert terms == [0, 0, 0, 0]
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other.double()) <= 2 * torch.finfo(BF16).eps


def test_one_native_call_refuses_what_it_cannot_hold() -> None:
    c = native.module()
    layer = (0, 4, 4, 0, 0, 0, 0, 0)
    adapter = (0, 4, 0, 0, 0, 0, 0, True, 0, 1.0, 1.0)
    large, elsewhere = (0, 65, *adapter[2:]), (1, *adapter[1:])
    narrow = (*adapter[:7], False, *adapter[8:])
    for layers, adapters, words in (
        ([], [adapter], "no or too many layers"),
        ([layer] * (c.PRODUCT_PARTS + 1), [adapter], "no or too many layers"),
        ([layer], [], "no or too many layers or adapters"),
        ([layer], [large], "rank too large"),
        ([layer], [adapter] * 17, "no or too many"),
        ([layer], [(0, 33, *adapter[2:])] * 2, "rank too large"),
        ([layer], [elsewhere], "no such layer"),
        ([layer], [adapter, narrow], "two dtypes"),
        ([(0, 4, 3, *layer[3:])], [adapter], "odd depth"),
        ([(0, 4, 4, 0, 1, 1, 0, 0)], [adapter], "both scale and bias"),
        ([(0, 4, 4, 0, 0, 0, 1, 1)], [adapter], "needs a scale"),
        ([(0, 5, 4, 0, 0, 1, 1, 1)], [adapter], "dense gradients"),
    ):
        with pytest.raises(ValueError, match=words):
            c.lora_layers_backward(4, 4, 0, 1, layers, adapters, 1)


@pytest.mark.parametrize(("features", "layers"), [(33, 1), (64, 9)], ids=["odd", "nine layers"])
def test_what_one_native_call_does_not_take_runs_apart(
    features: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "vectors_multiply", lambda: True)
    call, ps = Call(Shape(520, features, (8,) * layers, (2,) * layers), BF16, F32, False), [0.0]
    got = call.fused("cpu", ps * layers)
    truth = call.plain(torch.float64, [None] * layers, ps * layers)
    for one, other in zip(got, truth, strict=True):
        assert relative_error(one, other) <= 4 * torch.finfo(BF16).eps
