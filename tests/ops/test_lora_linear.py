from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned, relative_error
from torch import Tensor

from fastft import backends, errors, ops
from fastft.ops import _lora_linear_call
from fastft.ops._lora_linear_call import new_dropout_mask
from fastft.reference import lora_linear as reference
from tests.kernels.cases import LORA_CASES

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Shape:
    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    r: tuple[int, ...]


# Odd, tiny, empty, one row, wide, tall, several siblings of different rank and width.
SHAPES = [
    Shape(0, 8, (8,), (2,)),
    Shape(1, 9, (5,), (1,)),
    Shape(37, 45, (29,), (5,)),
    Shape(64, 64, (64,), (16,)),
    Shape(19, 130, (257,), (64,)),
    Shape(300, 96, (40,), (8,)),
    Shape(21, 33, (17, 9, 40), (4, 4, 4)),
    Shape(21, 33, (17, 9), (3, 8)),
    Shape(700, 1030, (33,), (16,)),
]
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
ID = str


class Call:
    """Inputs of one call, in the dtypes under test."""

    def __init__(self, shape: Shape, dtype: torch.dtype, adapter: torch.dtype, bias: bool) -> None:
        k = shape.in_features
        self.x = torch.randn(shape.tokens, k).to(dtype)
        self.weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n in shape.out_features]
        self.biases = [torch.randn(n).to(dtype) if bias else None for n in shape.out_features]
        self.lora_as = [(torch.randn(r, k) / k**0.5).to(adapter) for r in shape.r]
        pairs = zip(shape.out_features, shape.r, strict=True)
        self.lora_bs = [(torch.randn(n, r) / r**0.5).to(adapter) for n, r in pairs]
        self.scalings = [0.5 + i for i in range(len(shape.r))]
        self.dys = [torch.randn(shape.tokens, n).to(dtype) for n in shape.out_features]

    def leaves(self, dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        def leaf(t: Tensor) -> Tensor:
            return t.detach().clone().to(dtype or t.dtype).requires_grad_()

        return leaf(self.x), [leaf(a) for a in self.lora_as], [leaf(b) for b in self.lora_bs]

    def fused(self, backend: str, ps: list[float]) -> list[Tensor]:
        x, lora_as, lora_bs = self.leaves(None)
        ys = ops.lora_linear_siblings(
            x,
            self.weights,
            lora_as,
            lora_bs,
            scalings=self.scalings,
            biases=self.biases,
            dropout_ps=ps,
            backend=backend,
        )
        return [*ys, *torch.autograd.grad(ys, [x, *lora_as, *lora_bs], self.dys)]

    def plain(
        self, dtype: torch.dtype | None, masks: list[Tensor | None], ps: list[float]
    ) -> list[Tensor]:
        """The formula in torch's own operations: float64 for the truth, None for the inputs'."""
        x, lora_as, lora_bs = self.leaves(dtype)
        ys = [
            reference.lora_linear(
                x,
                w.to(x.dtype),
                None if bias is None else bias.to(x.dtype),
                a,
                b,
                scaling,
                mask,
                p,
            )
            for w, bias, a, b, scaling, mask, p in zip(
                self.weights, self.biases, lora_as, lora_bs, self.scalings, masks, ps, strict=True
            )
        ]
        dys = [dy.to(x.dtype) for dy in self.dys]
        return [*ys, *torch.autograd.grad(ys, [x, *lora_as, *lora_bs], dys)]

    def names(self) -> list[str]:
        n = len(self.weights)
        return [f"{part}{i}" for part, count in (("y", n), ("dx", 1), ("da", n), ("db", n))
                for i in range(count)]  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=ID)
@pytest.mark.parametrize("shape", SHAPES, ids=ID)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(
    backend: str,
    shape: Shape,
    dtype: torch.dtype,
    adapter: torch.dtype,
    bias: bool,
    p: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = Call(shape, dtype, adapter, bias)
    ps = [p] * len(shape.r)
    masks: list[Tensor | None] = []

    def recorded(x: Tensor, p: float, lora_a: Tensor, name: str) -> Tensor:
        masks.append(new_dropout_mask(x, p, lora_a, name))
        return masks[-1]

    monkeypatch.setattr(_lora_linear_call, "new_dropout_mask", recorded)
    with poisoned():
        got = call.fused(backend, ps)
    used = masks or [None] * len(ps)
    truth = call.plain(F64, used, ps)
    plain = call.plain(None, used, ps)
    assert_as_good_as_torch(call.names(), got, plain, truth, dtype)
    assert [g.dtype for g in got] == [p.dtype for p in plain]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_second_derivative_and_gradcheck(backend: str) -> None:
    if backend == "reference":
        x, a, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((4, 6), (2, 6), (5, 2)))
        w = torch.randn(5, 6, dtype=F64, requires_grad=True)

        def run(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return ops.lora_linear(x, w, a, b, scaling=0.7)

        assert torch.autograd.gradcheck(run, (x, w, a, b))
        assert torch.autograd.gradgradcheck(run, (x, w, a, b))
        return
    x, w, a, b = (torch.randn(s, requires_grad=True) for s in ((4, 6), (5, 6), (2, 6), (5, 2)))

    def penalty(fn: object) -> Tensor:
        (dx,) = torch.autograd.grad(fn().square().sum(), x, create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(dx.square().sum(), a)[0]

    got = penalty(lambda: ops.lora_linear(x, w, a, b, scaling=0.7, backend=backend))
    torch.testing.assert_close(
        got, penalty(lambda: reference.lora_linear(x, w, None, a, b, 0.7)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_registered_operation_passes_opcheck(p: float) -> None:
    shape = SHAPES[6]
    call = Call(shape, F32, F32, True)
    x, lora_as, lora_bs = call.leaves(None)
    mask = new_dropout_mask(x, p, lora_as[0], "cpu") if p else None
    masks = [mask] * len(shape.r)
    ps = [p] * len(shape.r)
    arguments = (
        x,
        call.weights,
        call.biases,
        lora_as,
        lora_bs,
        masks,
        call.scalings,
        ps,
        [0, 1, 2],
        [0, shape.tokens] * 3,
        "cpu",
    )
    torch.library.opcheck(torch.ops.fastft.lora_linear_fwd.default, arguments)
    ss = [torch.randn(shape.tokens, r) for r in shape.r]
    backward = (
        call.dys,
        x.detach(),
        ss,
        call.weights,
        [a.detach() for a in lora_as],
        [b.detach() for b in lora_bs],
        masks,
        call.scalings,
        ps,
        [0, 1, 2],
        [0, shape.tokens] * 3,
        "cpu",
    )
    torch.library.opcheck(torch.ops.fastft.lora_linear_bwd.default, backward)


def test_compiles_without_a_graph_break() -> None:
    call = Call(SHAPES[2], F32, F32, True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_linear(x, call.weights[0], a, b, scaling=0.5, bias=call.biases[0]).relu()

    x, (a,), (b,) = call.leaves(None)
    expected = torch.autograd.grad(run(x, a, b).sum(), (x, a, b))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, a, b).sum(), (x, a, b))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("name", ["several-adapters", "mixed-batch"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_several_adapters_and_mixed_batches(
    backend: str, compiled: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of their own rows and layers, against float64, gradients of gradients too."""
    case = LORA_CASES[name].inputs()
    given = iter([m for m in case.masks if m is not None])
    monkeypatch.setattr(_lora_linear_call, "new_dropout_mask", lambda *_: next(given))

    def run(x: Tensor, lora_as: list[Tensor], lora_bs: list[Tensor]) -> tuple[Tensor, ...]:
        return ops.lora_linear_siblings(
            x, case.weights, lora_as, lora_bs, scalings=case.scalings, biases=case.biases,
            dropout_ps=case.ps, owners=case.owners, spans=case.spans, backend=backend,
        )  # fmt: skip

    if compiled:  # the masks are drawn inside the graph: without
        case.ps, case.masks = [0.0] * len(case.ps), [None] * len(case.ps)
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, *case.lora_as, *case.lora_bs)]
    n = len(case.owners)
    with poisoned():
        ys = run(leaves[0], leaves[1 : 1 + n], leaves[1 + n :])
        gradients = torch.autograd.grad(ys, leaves, case.dys, retain_graph=not compiled)
    names = ["dx", *(f"da{i}" for i in range(n)), *(f"db{i}" for i in range(n))]
    got = dict(zip(names, gradients, strict=True)) | {f"y{i}": y for i, y in enumerate(ys)}
    plain, truth = case.autograd(case.x.dtype), case.autograd(F64)
    order = list(got)
    expected = [[t[k] for k in order] for t in (plain, truth)]
    assert_as_good_as_torch(order, [got[k] for k in order], *expected, case.x.dtype)
    if not compiled:
        again = torch.autograd.grad(ys, leaves, case.dys, create_graph=True)
        assert_as_good_as_torch(names, again, *[e[: 1 + 2 * n] for e in expected], case.x.dtype)


@pytest.mark.parametrize("adapter", [F32, BF16, F16], ids=ID)
@pytest.mark.parametrize("base", [F32, BF16], ids=ID)
def test_autocast_is_peft_s(base: torch.dtype, adapter: torch.dtype) -> None:
    """Under autocast any mix of dtypes runs in the autocast dtype, as F.linear does."""
    call = Call(SHAPES[2], F32, adapter, True)
    weight = call.weights[0].to(base)
    x, (a,), (b,) = call.leaves(None)
    with torch.autocast("cpu", dtype=BF16):
        y = ops.lora_linear(x, weight, a, b, scaling=0.5)
        linear = torch.nn.functional.linear
        plain = linear(x, weight) + linear(linear(x, a), b) * 0.5
    assert y.dtype == BF16
    got = [y, *torch.autograd.grad(y, (x, a, b), torch.ones_like(y))]
    plain_all = [plain, *torch.autograd.grad(plain, (x, a, b), torch.ones_like(plain))]
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    y64 = x64 @ weight.double().t() + (x64 @ a64.t() @ b64.t()) * 0.5
    truth = [y64, *torch.autograd.grad(y64, (x64, a64, b64), torch.ones_like(y64))]
    assert_as_good_as_torch(["y", "dx", "da", "db"], got, plain_all, truth, BF16)
    assert [g.dtype for g in got] == [BF16, F32, adapter, adapter]


def test_input_that_is_not_contiguous_and_has_batch_dimensions() -> None:
    x = torch.randn(45, 3, 7).permute(1, 2, 0).requires_grad_()
    call = Call(SHAPES[2], F32, F32, False)
    y = ops.lora_linear(x, call.weights[0], call.lora_as[0], call.lora_bs[0], scaling=0.5)
    assert y.shape == (3, 7, 29)
    expected = reference.lora_linear(
        x, call.weights[0], None, call.lora_as[0], call.lora_bs[0], 0.5
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.transpose(0, 2).sum().backward()  # a gradient that is not contiguous


def test_non_finite_inputs_propagate() -> None:
    call = Call(SHAPES[2], F32, F32, False)
    call.x[3, 4] = float("nan")
    call.x[5, 6] = float("inf")
    y = ops.lora_linear(call.x, call.weights[0], call.lora_as[0], call.lora_bs[0], scaling=0.5)
    assert bool(y[3].isnan().all())
    assert not bool(y[5].isfinite().any())
    others = [i for i in range(37) if i not in (3, 5)]
    assert bool(y[others].isfinite().all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_mask(backend: str, p: float) -> None:
    x = torch.empty(500, 1003)
    torch.manual_seed(3)
    first = new_dropout_mask(x, p, x, backend)
    second = new_dropout_mask(x, p, x, backend)
    torch.manual_seed(3)
    assert torch.equal(first, new_dropout_mask(x, p, x, backend))
    assert not torch.equal(first, second)
    kept = reference.unpack_mask(first, 1003).double()
    n = kept.numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * sigma + 1 / 65536
    # Neighbours, rows and the two masks are uncorrelated.
    centred = (kept - kept.mean()) / kept.std()
    other = reference.unpack_mask(second, 1003).double()
    other = (other - other.mean()) / other.std()
    for a, b in (
        (centred[:, :-1], centred[:, 1:]),
        (centred[:-1], centred[1:]),
        (centred[:, :-8], centred[:, 8:]),
        (centred, other),
    ):
        assert abs((a * b).mean().item()) < 5 / n**0.5


def test_masks_of_all_instruction_sets_and_thread_counts_agree() -> None:
    from fastft import native

    info = native.build_info()
    masks = []
    for isa, threads in itertools.product(info["instruction_sets_usable"], (1, 2)):
        torch.set_num_threads(threads)
        mask = torch.empty(64, 127, dtype=torch.uint8)
        native.module().dropout_mask(mask.data_ptr(), mask.numel(), 7, 3277, isa=isa)
        masks.append(mask)
    assert all(torch.equal(masks[0], m) for m in masks)


def test_deterministic_and_saves_no_copy_of_x() -> None:
    call = Call(SHAPES[8], F32, F32, False)
    first, second = call.fused("cpu", [0.0]), call.fused("cpu", [0.0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x, lora_as, lora_bs = call.leaves(None)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(x, call.weights[0], lora_as[0], lora_bs[0], scaling=1.0, dropout_p=0.1)
    known = {t.untyped_storage().data_ptr() for t in (x, call.weights[0], *lora_as, *lora_bs)}
    extra = sum(
        t.numel() * t.element_size() for t in saved if t.untyped_storage().data_ptr() not in known
    )
    tokens, features = x.shape
    assert extra <= tokens * (features + 7) // 8 + tokens * 16 * 4 + tokens


@pytest.mark.parametrize("dtype", [F32, BF16], ids=ID)
@pytest.mark.parametrize("shape", [(1, 3, 1), (7, 45, 5), (9, 130, 16), (300, 192, 33)], ids=ID)
def test_thin_products_of_every_instruction_set(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """dx += mask / (1-p) (dS A) and dA = dS^T drop(x) of each set against float64, any thread
    count with the same bits, and no write past the end."""
    from fastft import native

    rows, columns, r = shape
    x, dx = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    ds, a = torch.randn(rows, r), torch.randn(r, columns)
    mask = new_dropout_mask(x, 0.3, a, "reference")
    kept = reference.unpack_mask(mask, columns).double() * 1.25
    exact_dx = dx.double() + kept * (ds.double() @ a.double())
    exact_da = ds.double().t() @ (x.double() * kept)
    size = (rows, columns, r, 1.25, native.DTYPE_CODES[dtype])
    for isa in native.build_info()["instruction_sets_usable"]:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = torch.full((rows * columns + 8,), 7.0, dtype=dtype)
            out[:-8] = dx.flatten()
            da = torch.full((r * columns + 8,), 7.0)
            pointers = (ds.data_ptr(), a.data_ptr(), mask.data_ptr())
            native.module().lora_dx(out.data_ptr(), *pointers, *size, isa=isa)
            pointers = (ds.data_ptr(), x.data_ptr(), mask.data_ptr())
            native.module().lora_da(da.data_ptr(), *pointers, *size, isa=isa)
            assert bool((out[-8:] == 7).all()), isa
            assert bool((da[-8:] == 7).all()), isa
            found.append((out[:-8].view(rows, columns), da[:-8].view(r, columns)))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True)), isa
        step = torch.finfo(dtype).eps
        assert relative_error(found[0][0], exact_dx) <= step, isa
        # Float32 sums over the rows: the square root of their number in roundings.
        assert relative_error(found[0][1], exact_da) <= rows**0.5 * torch.finfo(F32).eps, isa


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", [F32, BF16], ids=ID)
def test_bfloat16_where_the_processor_has_none(
    adapter: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's products, as on a processor without bfloat16 instructions."""
    from fastft.cpu import products, thin

    monkeypatch.setattr(thin, "serves", lambda *_: False)
    monkeypatch.setattr(products, "native_bfloat16", lambda: False)
    for shape in (SHAPES[2], SHAPES[6], SHAPES[8]):
        call, ps = Call(shape, BF16, adapter, True), [p] * len(shape.r)
        with poisoned():
            torch.manual_seed(5)
            got = call.fused("cpu", ps)
        masks: list[Tensor | None] = [None] * len(ps)
        if p:
            torch.manual_seed(5)
            masks = [new_dropout_mask(call.x, p, call.lora_as[0], "cpu") for _ in ps]
        plain, truth = call.plain(None, masks, ps), call.plain(F64, masks, ps)
        assert_as_good_as_torch(call.names(), got, plain, truth, BF16)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=ID)
def test_nothing_is_allocated_in_the_steady_state(
    dtype: torch.dtype, adapter: torch.dtype, p: float
) -> None:
    """Once the buffers are there, the launcher makes none beside the outputs it is given."""
    from fastft.cpu import lora_linear as launcher

    shape = Shape(300, 96, (40, 64), (8, 16))
    call = Call(shape, dtype, adapter, True)
    ys = [torch.empty_like(dy) for dy in call.dys]
    ss = [torch.empty(300, r, dtype=dtype) for r in shape.r]
    masks: list[Tensor | None] = [None, None]
    if p:
        x, a = call.x, call.lora_as[0]
        masks = [new_dropout_mask(x, p, a, "cpu") for _ in ss]
    rest = (call.scalings, masks, [p, p], [0, 1], [(0, 300), (0, 300)])
    arguments = (call.x, call.weights, call.biases, call.lora_as, call.lora_bs, *rest)
    dx, das, dbs = (torch.empty_like(call.x), *([torch.empty_like(t) for t in ts]
                    for ts in (call.lora_as, call.lora_bs)))  # fmt: skip
    backward = (call.dys, call.x, ss, call.weights, call.lora_as, call.lora_bs, *rest)

    def run() -> None:
        launcher.fwd(ys, ss, *arguments)
        launcher.bwd(dx, das, dbs, *backward)

    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    made = {e.key: e.self_cpu_memory_usage for e in profile.key_averages()}
    assert {key: size for key, size in made.items() if size > 0} == {}


def _rejected() -> list[Rejected]:
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    a, b = torch.randn(2, 6), torch.randn(5, 2)

    def call(**change: object) -> object:
        given = {"x": x, "weight": w, "lora_a": a, "lora_b": b, "scaling": 1.0, **change}
        return lambda: ops.lora_linear(**given)  # type: ignore[arg-type]

    cases = [
        ("x is a list", {"x": [1.0]}, errors.DtypeError, ["x", "torch.Tensor", "list"]),
        ("integers", {"x": x.long()}, errors.DtypeError, ["x", "int64", "Cast it"]),
        ("weight bf16", {"weight": w.bfloat16()}, errors.DtypeError, ["weight", "float32"]),
        ("adapter f16", {"lora_a": a.half()}, errors.DtypeError, ["lora_a", "float16"]),
        ("adapters differ", {"x": x.bfloat16(), "weight": w.bfloat16(), "lora_b": b.bfloat16()},
         errors.DtypeError, ["lora_b"]),
        ("meta", {"weight": w.to("meta")}, errors.DeviceError, ["weight", "cpu", "meta"]),
        ("in features", {"lora_a": a[:, :5]}, errors.ShapeError, ["lora_a", "(r, 6)", "(2, 5)"]),
        ("out features", {"lora_b": b[:4]}, errors.ShapeError, ["lora_b", "(5, 2)", "(4, 2)"]),
        ("weight 1-d", {"weight": w[0]}, errors.ShapeError, ["weight"]),
        ("bias", {"bias": torch.zeros(6)}, errors.ShapeError, ["bias", "(5,)", "(6,)"]),
        ("r = 0", {"lora_a": a[:0], "lora_b": b[:, :0]}, errors.ArgumentError, ["r", "1 to", "0"]),
        ("r > features", {"lora_a": torch.randn(6, 6), "lora_b": torch.randn(5, 6)},
         errors.ArgumentError, ["r", "= 5", "6"]),
        ("p = 1", {"dropout_p": 1.0}, errors.ArgumentError, ["dropout_p", "0 <= p < 1", "1.0"]),
        ("p < 0", {"dropout_p": -0.1}, errors.ArgumentError, ["dropout_p"]),
        ("scaling", {"scaling": float("nan")}, errors.ArgumentError, ["scaling", "finite"]),
        ("backend name", {"backend": "tritn"}, errors.ArgumentError, ["backend", "triton"]),
        ("backend", {"backend": "triton"}, errors.BackendError, ["triton", "cuda", "cpu"]),
    ]  # fmt: skip

    def siblings(**change: object) -> object:
        given = {"scalings": [1.0, 1.0], **change}
        return lambda: ops.lora_linear_siblings(x, [w], [a, a], [b, b], **given)  # type: ignore[arg-type]

    many = [
        ("no owner", {}, errors.ShapeError, ["lora_as", "[2, 2, 2, 2, 1]"]),
        ("owner", {"owners": [0, 1]}, errors.ArgumentError, ["owners", "0 to 0", "1"]),
        ("biases", {"owners": [0, 0], "biases": [None, None]}, errors.ShapeError,
         ["1 weights and 2 biases"]),
        ("one span", {"owners": [0, 0], "spans": [(0, 4)]}, errors.ShapeError, ["spans", "2", "1"]),
        ("span", {"owners": [0, 0], "spans": [(0, 4), (3, 5)]}, errors.ArgumentError,
         ["spans", "<= 4", "(3, 5)"]),
    ]  # fmt: skip
    cases_of = [Rejected(n, call(**c), e, words) for n, c, e, words in cases]
    return cases_of + [Rejected(n, siblings(**c), e, words) for n, c, e, words in many]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)


def test_no_silent_reference() -> None:
    """What the CPU kernels do not take is said, not replaced, when they are asked for."""
    wide = [t.double() for t in (torch.randn(4, 6), torch.randn(5, 6))]
    with pytest.raises(errors.BackendError, match=r"float64.*float32, torch.bfloat16"):
        ops.lora_linear(
            wide[0],
            wide[1],
            torch.randn(2, 6).double(),
            torch.randn(5, 2).double(),
            scaling=1.0,
            backend="cpu",
        )
    table = dict(
        backends.explain_op("lora_linear", device_type="cpu", dtype=F64, adapter_dtype=F64, r=2)
    )
    assert table["reference"] is None
    assert "float64" in str(table["cpu"])
