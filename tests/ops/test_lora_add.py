"""LoRA's terms on a result that is given: as good as plain torch, in place, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, ops
from fastft.ops import _lora_linear_call
from fastft.ops._lora_linear_call import new_dropout_mask
from fastft.reference import lora_linear as reference
from tests.kernels.cases import LORA_CASES, LoraInputs

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = [*LORA_CASES]


def products(case: LoraInputs) -> list[Tensor]:
    """What the frozen layers give, apart from x's graph."""
    return [torch.nn.functional.linear(case.x, w) for w in case.weights]


def run(case: LoraInputs, ys: list[Tensor], **options: object) -> dict[str, Tensor]:
    """Results and gradients of ``lora_add_siblings``; those of the ys are the dys themselves."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_()

    x, lora_as = leaf(case.x), [leaf(a) for a in case.lora_as]
    lora_bs, given = [leaf(b) for b in case.lora_bs], [leaf(y) for y in ys]
    # Results of an operation: leaves are never written to.
    outs = ops.lora_add_siblings(
        [y * 1 for y in given], x, lora_as, lora_bs, scalings=case.scalings,
        dropout_ps=case.ps, owners=case.owners, spans=case.spans, **options,
    )  # fmt: skip
    n = len(case.owners)
    names = ["dx", *(f"da{i}" for i in range(n)), *(f"db{i}" for i in range(n))]
    gradients = torch.autograd.grad(outs, [*given, x, *lora_as, *lora_bs], case.dys)
    for d_y, dy in zip(gradients, case.dys):
        assert torch.equal(d_y, dy)
    found = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return found | dict(zip(names, gradients[len(ys) :], strict=True))


def plain(case: LoraInputs, ys: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula in torch's own operations: float64 for the truth."""

    def leaves(tensors: list[Tensor]) -> list[Tensor]:
        return [t.detach().to(dtype).requires_grad_() for t in tensors]

    (x,), lora_as, lora_bs = leaves([case.x]), leaves(case.lora_as), leaves(case.lora_bs)
    outs = [y.to(dtype) for y in ys]
    for j, (owner, (start, stop)) in enumerate(zip(case.owners, case.spans, strict=True)):
        facts = (case.scalings[j], case.masks[j], case.ps[j])
        term = reference.lora_term(x[start:stop], lora_as[j], lora_bs[j], *facts)
        around = (0, 0, start, x.shape[0] - stop)
        outs[owner] = outs[owner] + torch.nn.functional.pad(term, around)
    dys = [dy.to(dtype) for dy in case.dys]
    gradients = torch.autograd.grad(outs, [x, *lora_as, *lora_bs], dys)
    n = len(case.owners)
    names = ["dx", *(f"da{i}" for i in range(n)), *(f"db{i}" for i in range(n))]
    found = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return found | dict(zip(names, gradients, strict=True))


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[LoraInputs], None]:
    """Makes the operation draw the masks of a case."""

    def use(case: LoraInputs) -> None:
        given = iter([m for m in case.masks if m is not None])
        monkeypatch.setattr(_lora_linear_call, "new_dropout_mask", lambda *_: next(given))

    return use


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_as_good_as_torch(
    backend: str, name: str, overwrite: bool, masks: Callable[[LoraInputs], None]
) -> None:
    case = LORA_CASES[name].inputs()
    masks(case)
    dtype = case.x.dtype
    with poisoned():
        got = run(case, products(case), backend=backend, overwrite=overwrite)
    own, truth = (plain(case, products(case), kind) for kind in (dtype, F64))
    order = list(got)
    expected = [[t[k] for k in order] for t in (own, truth)]
    assert_as_good_as_torch(order, [got[k] for k in order], *expected, dtype)
    assert all(got[k].dtype == (case.lora_as[0].dtype if k[0] == "d" and k != "dx" else dtype)
               for k in order)  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_in_place_or_apart_the_same_bits(backend: str) -> None:
    case = LORA_CASES["siblings-bf16"].inputs()
    found = []
    for overwrite in (False, True, True):
        torch.manual_seed(3)
        found.append(run(case, products(case), backend=backend, overwrite=overwrite))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
        assert torch.equal(value, found[2][key]), key


def arguments(rows: int = 6, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    x, a, b = torch.randn(rows, 8), torch.randn(2, 8), torch.randn(5, 2)
    return torch.randn(rows, 5, dtype=dtype), x.to(dtype), a, b


def test_where_the_result_lies() -> None:
    y, x, a, b = arguments()
    want = y + 0.5 * (x @ a.t()) @ b.t()
    apart = ops.lora_add(y, x, a, b, scaling=0.5)
    torch.testing.assert_close(apart, want)
    assert apart.data_ptr() != y.data_ptr()
    # What is part of something, strided, a leaf that is trained, or twice there, is left as it is.
    base = torch.randn(12, 5)
    for other in (
        base[:6],
        torch.randn(5, 6).t(),
        y.clone().requires_grad_(),
        torch.randn(1, 5).expand(6, 5),
    ):
        before = other.detach().clone()
        got = ops.lora_add(other, x, a, b, scaling=0.5, overwrite=True)
        assert torch.equal(other, before)
        assert got.data_ptr() != other.data_ptr()
        torch.testing.assert_close(got, before + 0.5 * (x @ a.t()) @ b.t())
    twice = ops.lora_add_siblings([y, y], x, [a, a], [b, -b], scalings=[0.5, 0.5], overwrite=True)
    torch.testing.assert_close(twice[0] + twice[1], 2 * y)
    square = torch.randn(6, 8)
    before = square.clone()
    for autocast in (False, True):  # which copies x
        with torch.autocast("cpu", BF16, enabled=autocast):
            ops.lora_add(square, square, a, torch.randn(8, 2), scaling=0.5, overwrite=True)
        assert torch.equal(square, before), "x itself"
    frozen = torch.nn.Parameter(torch.randn(6, 5), requires_grad=False)
    before = frozen.clone()
    ops.lora_add(frozen, x, a, b, scaling=0.5, overwrite=True)
    assert torch.equal(frozen, before), "a module's parameter"
    assert ops.lora_add(y, x, a, b, scaling=0.5, overwrite=True).data_ptr() == y.data_ptr()
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_result_of_inference_mode_does_not_end_the_gradients(dtype: torch.dtype) -> None:
    _, x, a, b = arguments()
    with torch.inference_mode():
        y = torch.randn(6, 5).to(dtype)
    b.requires_grad_()
    result = ops.lora_add(y, x, a, b, scaling=0.5, overwrite=True)
    (got,) = torch.autograd.grad(result.sum(), b)
    torch.testing.assert_close(got, 0.5 * (x @ a.t()).sum(0).expand(5, 2))


def test_who_has_saved_a_result_is_told_that_it_is_gone() -> None:
    y, x, a, b = arguments()
    root = y.exp().requires_grad_()
    saved = root.exp()  # whose backward reads it
    result = ops.lora_add(saved, x, a, b, scaling=0.5, overwrite=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_view_made_within_a_function_of_another(overwrite: bool) -> None:
    """As bitsandbytes' and gptqmodel's functions return: torch lets nobody change it in place."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)  # type: ignore[attr-defined]
            return (x.reshape(-1, 8) @ w.t()).reshape(*x.shape[:-1], 5)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None]:
            (w,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return dy @ w, None

    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    y = ops.lora_add(Product.apply(x, w), x, a, b, scaling=0.5, overwrite=overwrite)
    want = x @ w.t() + 0.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(y, want)
    found = [torch.autograd.grad(t.square().sum(), (x, a, b)) for t in (y, want)]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("y_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
def test_a_result_of_another_dtype(x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    y, x, a, b = arguments()
    y, x = y.to(y_dtype), x.to(x_dtype).requires_grad_()
    term = 0.5 * (x.double() @ a.double().t()) @ b.double().t()
    want = y.double() + term
    got = ops.lora_add(y, x, a, b, scaling=0.5, overwrite=True)
    assert (got.dtype, got.data_ptr()) == (y_dtype, y.data_ptr())
    # S and the terms are rounded to x's dtype, the sum to y's.
    eps = 2 * torch.finfo(x_dtype).eps + torch.finfo(y_dtype).eps
    assert (got.double() - want).norm() <= eps * (term.norm() + want.norm())
    got.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == x_dtype


@pytest.mark.parametrize("adapter", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("y_dtype", [F32, BF16], ids=str)
def test_autocast(y_dtype: torch.dtype, adapter: torch.dtype) -> None:
    """The terms run in autocast's dtype, whatever the others', and y's is the result's."""
    y, x, a, b = arguments()
    y, a, b = y.to(y_dtype), a.to(adapter).requires_grad_(), b.to(adapter).requires_grad_()
    linear = torch.nn.functional.linear
    with torch.autocast("cpu", dtype=BF16):
        got = ops.lora_add(y, x, a, b, scaling=0.5)
        want = y + (linear(linear(x, a), b) * 0.5).to(y_dtype)
    assert got.dtype == y_dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=6e-2)
    for t, other in zip(*(torch.autograd.grad(r.float().sum(), (a, b)) for r in (got, want))):
        assert t.dtype == adapter
        torch.testing.assert_close(t, other, rtol=2e-2, atol=6e-2)


def test_second_derivatives_and_gradcheck() -> None:
    shapes = ((4, 5), (4, 6), (2, 6), (5, 2))
    leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]

    def function(*t: Tensor) -> Tensor:
        return ops.lora_add(*t, scaling=0.7)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_what_no_gradient_reaches_has_none() -> None:
    """As in PEFT: an optimizer would take zeros for a step."""
    y, x, a, b = arguments()
    leaves = [t.clone().requires_grad_() for t in (a, a, b, b)]
    first, second = ops.lora_add_siblings([y, y], x, leaves[:2], leaves[2:], scalings=[1.0, 1.0])
    second.sum().backward(retain_graph=True)
    assert [t.grad is not None for t in leaves] == [False, True, False, True]
    torch.autograd.grad(first.sum(), leaves[0])
    # A layer with no adapter in this batch.
    x.requires_grad_()
    _, alone = ops.lora_add_siblings([y, y], x, [a], [b], scalings=[1.0], owners=[0])
    assert torch.equal(alone, y)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(alone.sum(), x)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_registered_operations_pass_opcheck(p: float) -> None:
    case = LORA_CASES["several-adapters"].inputs()
    mask = [new_dropout_mask(case.x, p, a, "cpu") if p else None for a in case.lora_as]
    spans = [row for span in case.spans for row in span]
    rest = (case.scalings, [p] * 3, case.owners, spans, "cpu")
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (case.lora_as, case.lora_bs))
    ys = [y.requires_grad_() for y in products(case)]
    x = case.x.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastft.lora_add_fwd.default, (ys, x, a, b, mask, *rest))
    ss = [torch.randn(case.x.shape[0], t.shape[0]).to(case.x.dtype) for t in a]
    backward = (case.dys, case.x, case.lora_as, case.lora_bs, mask, ss, *rest)
    torch.library.opcheck(torch.ops.fastft.lora_add_bwd.default, backward)


@pytest.mark.parametrize("name", ["several-adapters", "mixed-batch"])
def test_compiles_without_a_graph_break(name: str) -> None:
    case = LORA_CASES[name].inputs()
    case.ps = [0.0] * len(case.ps)  # a mask is drawn inside the graph
    leaves = [t.clone().requires_grad_() for t in (case.x, *case.lora_as, *case.lora_bs)]
    n = len(case.owners)

    def function(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        ys = [torch.nn.functional.linear(x, w) for w in case.weights]
        return ops.lora_add_siblings(
            ys, x, adapters[:n], adapters[n:], scalings=case.scalings, owners=case.owners,
            spans=case.spans, overwrite=True,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, function):
        ys = call(*leaves)
        found.append([*ys, *torch.autograd.grad(ys, leaves, case.dys)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_without_gradients_and_in_inference_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        y, x, a, b = arguments()
        with mode():
            made = y * 1
            got = ops.lora_add(made, x * 1, a, b, scaling=0.5, overwrite=True)
        assert got.data_ptr() == made.data_ptr()
        torch.testing.assert_close(got, y + 0.5 * (x @ a.t()) @ b.t())


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    y, x, a, b = arguments(rows)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    got = torch.autograd.grad(ops.lora_add(y, *leaves, scaling=0.5).sum(), leaves)
    want = torch.autograd.grad((0.5 * (x @ a.t()) @ b.t()).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


Y, X, A, B = torch.zeros(6, 5), torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(5, 2)
REJECTED = [
    Rejected("rows", lambda: ops.lora_add(Y[1:], X, A, B, scaling=1.0),
             errors.ShapeError, ["lora_add", "(5, 5)"]),
    Rejected("dtype", lambda: ops.lora_add(Y.int(), X, A, B, scaling=1.0),
             errors.DtypeError, ["y", "int32"]),
    Rejected("adapters", lambda: ops.lora_add(Y, X, A.half(), B.half(), scaling=1.0),
             errors.DtypeError, ["lora_a", "float16"]),
    Rejected("b", lambda: ops.lora_add(Y, X, A, B.t(), scaling=1.0),
             errors.ShapeError, ["lora_add", "lora_b", "(5, 2)"]),
    Rejected("device", lambda: ops.lora_add(Y.to("meta"), X, A, B, scaling=1.0),
             errors.DeviceError, ["y", "meta"]),
    Rejected("none", lambda: ops.lora_add_siblings([], X, [A], [B], scalings=[1.0]),
             errors.ShapeError, ["ys"]),
    Rejected("owner", lambda: ops.lora_add_siblings([Y], X, [A], [B], scalings=[1.0], owners=[1]),
             errors.ArgumentError, ["lora_add", "owners"]),
    Rejected(
        "span",
        lambda: ops.lora_add_siblings([Y], X, [A], [B], scalings=[1.0], spans=[(0, 7)]),
        errors.ArgumentError,
        ["lora_add", "spans"],
    ),
    Rejected("p", lambda: ops.lora_add(Y, X, A, B, scaling=1.0, dropout_p=1.0),
             errors.ArgumentError, ["dropout_p"]),
    Rejected("backend", lambda: ops.lora_add(Y, X, A, B, scaling=1.0, backend="cuda"),
             errors.BackendError, ["cuda"]),
]  # fmt: skip


@pytest.mark.parametrize("case", REJECTED, ids=lambda c: c.name)
def test_refuses(case: Rejected) -> None:
    assert_rejected(case)
