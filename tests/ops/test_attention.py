from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, half_ulp, poisoned
from torch import Tensor
from torch.nn import functional

from fastft import backends, errors, native, ops
from fastft.cpu import attention as launcher
from fastft.cpu import attention_fused as fused
from fastft.reference import attention as reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int = 0
    causal: bool = False
    mask: str = ""  # "", "padding" (batch, 1, 1 -> queries, keys), "random", "blind"


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(2, 4, 2, 9, 9, 8, causal=True),
    Case(2, 3, 1, 130, 130, 16, causal=True),
    Case(1, 2, 2, 257, 257, 33, causal=True),
    Case(2, 6, 3, 20, 35, 7, value_width=5),
    Case(3, 4, 2, 140, 140, 8, mask="padding"),
    Case(3, 4, 2, 140, 140, 8, causal=True, mask="padding"),
    Case(2, 4, 4, 33, 50, 16, mask="random"),
    Case(2, 4, 2, 17, 17, 8, mask="blind"),
    Case(1, 2, 1, 300, 40, 8),
]


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, Tensor]:
    def draw(heads: int, tokens: int, width: int) -> Tensor:
        # As a model's projections give them: heads next to each other.
        values = torch.randn(case.batch, tokens, heads, width).to(dtype)
        return values.transpose(1, 2).requires_grad_()

    value_width = case.value_width or case.width
    leaves = [
        draw(case.heads, case.queries, case.width),
        draw(case.kv_heads, case.keys, case.width),
        draw(case.kv_heads, case.keys, value_width),
    ]
    dy = torch.randn(case.batch, case.heads, case.queries, value_width).to(dtype)
    shape = (case.batch, 1, case.queries, case.keys)
    mask = None
    if case.mask == "padding":
        lengths = torch.linspace(case.keys // 3, case.keys, case.batch).long()
        seen = torch.arange(case.keys) < lengths[:, None]
        mask = seen[:, None, None, :].expand(shape)
        if not case.causal:
            mask = mask & torch.ones(case.queries, case.keys, dtype=torch.bool).tril()
    elif case.mask:
        mask = torch.rand(case.batch, case.heads, case.queries, case.keys) < 0.6
        mask[..., 0] = True
        if case.mask == "blind":
            mask[:, :, 3] = False
    return leaves, mask, dy


def outputs(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def runs_here(dtype: torch.dtype) -> bool:
    return launcher.supports(device_type="cpu", dtype=dtype) is None


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(backend: str, case: Case, dtype: torch.dtype) -> None:
    if backend == "cpu" and not runs_here(dtype):
        pytest.skip("this processor does not multiply bfloat16")
    leaves, mask, dy = inputs(case, dtype)

    def eager(dtype: torch.dtype) -> list[Tensor]:
        """Unfused: scores rounded to the dtype, as products are."""
        wide = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y, _ = reference.attention(*wide, mask, case.width**-0.5, case.causal)
        return outputs(y, wide, dy.to(dtype))

    with poisoned():
        y = ops.scaled_dot_product_attention(*leaves, mask, is_causal=case.causal, backend=backend)
        got = outputs(y, leaves, dy)
    assert_as_good_as_torch(["y", "dq", "dk", "dv"], got, eager(dtype), eager(F64), dtype)
    assert {t.dtype for t in got} == {dtype}
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("size", [30, 100])
def test_large_scores(size: int) -> None:
    """Where the logsumexp is large it is rounded, too, and its rounding scales all of a row's p."""
    case = Case(2, 4, 2, 9, 9, 8, causal=True)
    leaves, _, dy = inputs(case, F32)
    leaves = [(t * size**0.5).detach().requires_grad_() for t in leaves[:2]] + leaves[2:]

    def unfused(dtype: torch.dtype) -> list[Tensor]:
        wide = [t.detach().to(dtype).requires_grad_() for t in leaves]
        q, k, v = (t.repeat_interleave(case.heads // t.shape[1], 1) for t in wide)
        hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * case.width**-0.5).masked_fill(hidden, -torch.inf)
        return outputs(scores.softmax(-1) @ v, wide, dy.to(dtype))

    y = ops.scaled_dot_product_attention(*leaves, is_causal=True, backend="cpu")
    got = outputs(y, leaves, dy)
    assert_as_good_as_torch(["y", "dq", "dk", "dv"], got, unfused(F32), unfused(F64), F32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_torch_s_own(case: Case) -> None:
    """And the truth above is no mistake of ours."""
    leaves, mask, dy = inputs(case, F64)
    spread = [t.repeat_interleave(case.heads // t.shape[1], 1) for t in leaves]
    both = mask
    if mask is not None and case.causal:
        both = mask & torch.ones(case.queries, case.keys, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(
        *spread, both, is_causal=case.causal and mask is None
    )
    if case.mask == "blind":
        expected = expected.nan_to_num()
    y = ops.scaled_dot_product_attention(*leaves, mask, is_causal=case.causal)
    torch.testing.assert_close(y, expected)
    if case.mask != "blind":
        torch.testing.assert_close(outputs(y, leaves, dy), outputs(expected, leaves, dy))


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    """The row kernels alone, far outside exp's easy range, with a mask and without."""
    scores = (torch.randn(2, 6, 37) * 40).to(dtype)
    dp = torch.randn(2, 6, 37).to(dtype)
    mask = torch.rand(1, 2, 3, 37) < 0.7
    mask[..., 0] = True
    for given in (None, mask):
        seen = torch.ones(2, 2, 3, 37, dtype=torch.bool).tril(30)
        if given is not None:
            seen = seen & given
        seen = seen.reshape(2, 6, 37)
        # batch 2, one key head, groups of 2 heads, 3 queries from the 31st: causal from there.
        lse = torch.empty(2, 2, 33)
        sizes = [2, 1, 2, 3, 37, 30, 33]
        at = 0 if given is None else given.data_ptr() - 30 * 37
        facts = (sizes, True, 0.5, at, [0, 3 * 37, 37], lse.data_ptr(), 0 if dtype == F32 else 1)
        p, ds = scores.clone(), dp.clone()
        c = native.module()
        c.attention_softmax(p.data_ptr(), *facts, isa=isa)
        z = (scores.double() * 0.5).masked_fill(~seen, float("-inf"))
        eps = torch.finfo(dtype).eps
        close = {"rtol": eps + 2e-5, "atol": 1e-7}
        torch.testing.assert_close(p.double(), z.softmax(-1), **close)
        rows = lse[..., 30:].reshape(2, 6)
        torch.testing.assert_close(rows.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-5)
        again = scores.clone()
        c.attention_gradient(again.data_ptr(), ds.data_ptr(), *facts, isa=isa)
        torch.testing.assert_close(again.double(), z.softmax(-1), **close)
        truth = z.softmax(-1)
        truth = 0.5 * truth * (dp.double() - (truth * dp.double()).sum(-1, keepdim=True))
        torch.testing.assert_close(ds.double(), truth, rtol=eps + 1e-4, atol=1e-5)


FUSED = [c for c in CASES if c.width % 2 == (c.value_width or c.width) % 2 == 0]
# Heads wider than a panel, blocks of few queries, an odd number of keys, stretches of one head.
FUSED += [
    # The last stretches have no queries.
    Case(1, 2, 1, 306, 1300, 80, value_width=66),
    Case(1, 1, 1, 311, 311, 8, causal=True),
    # Several blocks of keys: a query may see none of one.
    Case(2, 2, 1, 270, 600, 16, mask="random"),
    Case(2, 2, 1, 530, 530, 16, causal=True, mask="padding"),
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_the_kernel_with_its_products_of_every_instruction_set(case: Case) -> None:
    """Against float64, on poisoned memory, any thread count with the same bits, whether a mask is
    read or what it lets each query see, and no write past the end of what it is given."""
    leaves, mask, dy = inputs(case, BF16)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y, lse = reference.attention(*wide, mask, case.width**-0.5, case.causal)
    truth = outputs(y, wide, dy.double())
    plain_leaves = [t.detach().requires_grad_() for t in leaves]
    plain_y, _ = reference.attention(*plain_leaves, mask, case.width**-0.5, case.causal)
    plain = outputs(plain_y, plain_leaves, dy)
    q, k, v = (t.detach() for t in leaves)
    sizes = [*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]]
    # Rows of the gradient with room between them.
    spaced = torch.full((*dy.shape[:3], dy.shape[3] + 6), 9.0, dtype=BF16)
    spaced[..., : dy.shape[3]] = dy
    dy = spaced[..., : dy.shape[3]]
    strides, at_mask = [0, 0, 0], 0
    if mask is not None:
        at_mask = mask.data_ptr()
        pairs = zip(mask.shape[:3], mask.stride()[:3], strict=True)
        strides = [0 if size == 1 else stride for size, stride in pairs]
    c = native.module()
    for isa in native.build_info()["instruction_sets_usable"]:
        ways = [(case.causal, at_mask, 0, strides)]
        if mask is not None:
            pairs = zip(mask.shape, strides[:2], strict=False)
            rows = [1 if stride == 0 else n for n, stride in pairs]
            visible = torch.full((*rows, mask.shape[2]), -7, dtype=torch.int32)
            facts = (strides, [*visible.shape], mask.shape[3], visible.data_ptr())
            kind = c.attention_prefixes(at_mask, *facts, isa=isa)
            assert kind == {"padding": 1 if case.causal else 2}.get(case.mask, 0)
            if kind:
                pairs = zip(rows, visible.stride(), strict=False)
                own = [0 if n == 1 else stride for n, stride in pairs]
                ways.append((True, 0, visible.data_ptr(), [*own, 1]))
        found = []
        for threads, (causal, *sight) in itertools.product((1, 2, 3), ways):
            shapes = [(t.transpose(1, 2).shape, BF16) for t in (y, q, k, v)]
            held = [_guarded(*shape) for shape in (*shapes, (lse.shape, F32))]
            out, *gradients = [t.transpose(1, 2) for _, t in held[:4]]
            got_lse = held[4][1]
            facts = (causal, case.width**-0.5, *sight)
            for tensors in ([q, k, v, out], [q, k, v, out, dy, *gradients]):
                places = [(t.data_ptr(), *t.stride()[:3]) for t in tensors]
                words = c.attention_scratch(places, [*sizes, threads], causal, isa=isa)
                room = torch.full((words + 8,), float("nan"))
                room[-8:] = 7
                call = (places, [*sizes, threads], got_lse.data_ptr(), *facts, room.data_ptr())
                c.attention_fused(*call, isa=isa)
                assert all(bool((t[-8:] == 7).all()) for t in (room, *(t for t, _ in held))), isa
            found.append([out, *gradients])
            seen = lse.isfinite()
            assert torch.equal(got_lse.isfinite(), seen)
            torch.testing.assert_close(
                got_lse[seen].double(), lse[seen].detach(), rtol=1e-5, atol=1e-5
            )
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other)), isa
        assert_as_good_as_torch(["y", "dq", "dk", "dv"], found[0], plain, truth, BF16)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_what_a_mask_lets_each_query_see(shape: tuple[int, int], kind: int) -> None:
    queries, keys = 21, 37
    torch.manual_seed(kind)
    seen = torch.randint(0, keys + 1, (*shape, queries), dtype=torch.int32)
    seen[0, 0, 5] = 9 if kind == 1 else 0
    if kind == 2:
        seen = seen.minimum(torch.arange(1, queries + 1, dtype=torch.int32))
    # Rows with room between them.
    mask = torch.zeros(*shape, queries, keys + 3, dtype=torch.bool)[..., :keys]
    mask.copy_(torch.arange(keys) < seen[..., None])
    if kind == 0:
        mask[-1, -1, -1] = torch.arange(keys) > 2
    strides = fused.mask_strides(mask)
    for isa in native.build_info()["instruction_sets_usable"]:
        found = torch.full((*shape, queries), -7, dtype=torch.int32)
        got = native.module().attention_prefixes(
            mask.data_ptr(), strides, [*shape, queries], keys, found.data_ptr(), isa=isa
        )
        assert got == kind
        assert kind == 0 or torch.equal(found, seen)


@pytest.mark.parametrize("before", [0, 3])
def test_a_prefix_mask_gives_the_bits_of_its_mask(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding on the right, of encoders too, and prefixes that all see: with and without the mask
    being read key by key."""
    monkeypatch.setattr(fused, "vectors_multiply", lambda: True)
    monkeypatch.setattr(launcher, "native_bfloat16", lambda: True)
    leaves, _, dy = inputs(Case(3, 4, 2, 140, 140, 8), BF16)
    lengths = torch.tensor([140, 77, 1])[:, None, None, None]
    seen = torch.arange(140) < torch.arange(1, 141)[:, None].clamp(min=before * 20)
    mask = (seen if before else torch.tensor(True)) & (torch.arange(140) < lengths)
    mask = mask.expand(3, 1, 140, 140)
    found = []
    assert fused._prefixes(mask, fused.mask_strides(mask), False)[0], "it is one"
    for _ in range(2):
        out = ops.scaled_dot_product_attention(*leaves, mask)
        found.append(outputs(out, leaves, dy))
        monkeypatch.setattr(fused, "_prefixes", lambda mask, strides, causal: (0, strides, causal))
    assert all(map(torch.equal, *found))


def _guarded(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory with eight elements behind it, and the tensor of this shape in front of them."""
    memory = torch.full((shape.numel() + 8,), float("nan"), dtype=dtype)
    memory[-8:] = 7
    return memory, memory[:-8].view(shape)


def test_what_the_kernel_refuses() -> None:
    for sizes, words in (
        ([1, 1, 1, 1, 1, 3, 2, 1], "odd width"),
        ([1, 1, 1, 0, 1, 2, 2, 1], "below"),
    ):
        with pytest.raises(ValueError, match=words):
            native.module().attention_scratch([(0, 0, 0, 0)] * 4, sizes, False)


@pytest.mark.parametrize("case", FUSED[:9], ids=str)
def test_the_operation_takes_the_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, on any processor; a gradient whose features are apart is copied."""
    monkeypatch.setattr(fused, "vectors_multiply", lambda: True)
    monkeypatch.setattr(launcher, "native_bfloat16", lambda: True)
    taken: list[int] = []
    run = fused.run
    monkeypatch.setattr(fused, "run", lambda *a: (taken.append(len(a[0])), run(*a))[1])
    leaves, mask, dy = inputs(case, BF16)
    apart = dy.transpose(2, 3).contiguous().transpose(2, 3)
    y = ops.scaled_dot_product_attention(*leaves, mask, is_causal=case.causal, backend="cpu")
    got = outputs(y, leaves, apart if dy.shape[2] > 1 else dy)
    assert taken == [4, 8]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = outputs(
        reference.attention(*wide, mask, case.width**-0.5, case.causal)[0], wide, dy.double()
    )
    plain_leaves = [t.detach().requires_grad_() for t in leaves]
    plain_y, _ = reference.attention(*plain_leaves, mask, case.width**-0.5, case.causal)
    assert_as_good_as_torch(
        ["y", "dq", "dk", "dv"], got, outputs(plain_y, plain_leaves, dy), truth, BF16
    )


def test_who_the_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 2, 8, 16, dtype=BF16)
    monkeypatch.setattr(fused, "vectors_multiply", lambda: True)
    assert fused.serves(q, q, q)
    assert not fused.serves(q.float(), q.float(), q.float())
    assert not fused.serves(q[..., :15], q[..., :15], q)
    assert not fused.serves(q.transpose(2, 3), q, q)
    assert not fused.serves(q, q, q, q.transpose(2, 3))
    long = torch.empty(1, 1, 1, 2, dtype=BF16).expand(1, 2, 33000, 2)
    assert not fused.serves(long, long, long)
    assert fused.serves(long, long[:, :, :32768], long[:, :, :32768])
    assert not fused.serves(long[:, :, :1], long[:, :, :32768], long[:, :, :32768])
    monkeypatch.setattr(fused, "vectors_multiply", lambda: False)
    assert not fused.serves(q, q, q)


def test_masked_keys_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that no query of a block sees reach no product."""
    seen: list[int] = []
    original = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b, **kw: seen.append(b.shape[2]) or original(a, b, **kw)
    )
    q = torch.randn(1, 1, 256, 8)
    ops.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert [n for n in seen if n != 8] == [128, 256]
    seen.clear()
    mask = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    mask[..., 5:40] = True
    ops.scaled_dot_product_attention(q, q, q, mask)
    assert [n for n in seen if n != 8] == [40, 40]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slabs_of_some_heads(case: Case, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of one key head, or of two that no element of the batch is made of, give what one slab
    gives."""
    leaves, mask, dy = inputs(case, F32)
    run = lambda: outputs(  # noqa: E731
        ops.scaled_dot_product_attention(*leaves, mask, is_causal=case.causal), leaves, dy
    )
    expected = run()
    group = leaves[0].shape[1] // leaves[1].shape[1]
    of_a_head = group * min(16, leaves[0].shape[2]) * leaves[1].shape[2] * 4
    monkeypatch.setattr(launcher, "_HEAD_BYTES", 1)
    monkeypatch.setattr(launcher, "_SLAB_BYTES", heads * of_a_head)
    torch.testing.assert_close(run(), expected)


def test_slabs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small slabs give what one gives."""
    leaves, mask, dy = inputs(CASES[6], F32)
    run = lambda: outputs(  # noqa: E731
        ops.scaled_dot_product_attention(*leaves, mask, is_causal=True), leaves, dy
    )
    expected = run()
    for name in ("_SLAB_BYTES", "_HEAD_BYTES"):
        monkeypatch.setattr(launcher, name, 1)
    torch.testing.assert_close(run(), expected)
    sizes: list[int] = []
    original = launcher.scratch
    monkeypatch.setattr(
        launcher,
        "scratch",
        lambda name, shape, dtype: sizes.append(shape[1]) or original(name, shape, dtype),
    )
    run()
    # 16 queries at a time, two heads a group.
    assert 32 in sizes
    assert not {256, 280} & set(sizes)


def test_not_finite_stays_not_finite() -> None:
    q, k, v = (torch.randn(1, 1, 5, 8) for _ in range(3))
    q[0, 0, 2, 1] = float("nan")
    y = ops.scaled_dot_product_attention(q, k, v)
    assert y.isnan().any(-1).flatten().tolist() == [False, False, True, False, False]


def test_empty() -> None:
    q = torch.randn(0, 2, 5, 8, requires_grad=True)
    ops.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad.shape == q.shape
    q = torch.randn(1, 2, 0, 8)
    k = torch.randn(1, 2, 5, 8, requires_grad=True)
    ops.scaled_dot_product_attention(q, k, k).sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_same_bits_twice_and_backward_twice() -> None:
    leaves, mask, dy = inputs(CASES[2], F32)
    y = ops.scaled_dot_product_attention(*leaves, mask, is_causal=True)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, leaves, dy)))


def test_second_derivative() -> None:
    q, k, v = (torch.randn(1, 2, 3, 2, dtype=F64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)
    )


def test_autocast_is_torch_s() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=BF16):
        y = ops.scaled_dot_product_attention(q, k.bfloat16(), v)
        expected = functional.scaled_dot_product_attention(q, k, v)
    assert y.dtype == expected.dtype == BF16
    difference = (y.double() - expected.double()).norm() / expected.double().norm()
    assert difference <= 4 * half_ulp(BF16)
    assert torch.autograd.grad(y.sum(), q)[0].dtype == F32


def test_bfloat16_needs_a_processor_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "native_bfloat16", lambda: False)
    assert "bfloat16" in str(launcher.supports(device_type="cpu", dtype=BF16))
    assert backends.ORDER[-1] == "reference"


def test_registered_operation_passes_opcheck_and_compiles() -> None:
    leaves, mask, dy = inputs(CASES[7], F32)
    facts = (0.25, False, "cpu")
    torch.library.opcheck(torch.ops.fastft.attention_fwd.default, (*leaves, mask, *facts))
    detached = [t.detach() for t in leaves]
    lse = torch.randn(2, 4, 33)
    torch.library.opcheck(
        torch.ops.fastft.attention_bwd.default,
        (dy, *detached, mask, torch.randn_like(dy), lse, *facts),
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.scaled_dot_product_attention(q, k, v, mask) * 2

    expected = torch.autograd.grad(run(*leaves), leaves, dy)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves, dy), expected)


def _rejected() -> list[Rejected]:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)

    def call(**change: object) -> object:
        given = {"query": q, "key": k, "value": k, **change}
        return lambda: ops.scaled_dot_product_attention(**given)  # type: ignore[arg-type]

    dtype, shape, device = errors.DtypeError, errors.ShapeError, errors.DeviceError
    cases = [
        ("no tensor", {"key": [1]}, dtype, ["key", "torch.Tensor"]),
        ("integers", {"query": q.int()}, dtype, ["query", "float32", "int32"]),
        ("dtype", {"value": k.bfloat16()}, dtype, ["value", "float32", "bfloat16"]),
        ("three dimensions", {"query": q[0]}, shape, ["query", "(batch, heads, queries, width)"]),
        ("batch", {"key": k[:1]}, shape, ["key", "(2, kv_heads, keys, 8)"]),
        ("heads", {"query": q[:, :3]}, shape, ["key", "divides the 3", "2"]),
        ("value", {"value": k[:, :, :5]}, shape, ["value", "(2, 2, 6, 'width')"]),
        ("no keys", {"key": k[:, :, :0], "value": k[:, :, :0]}, errors.ArgumentError,
         ["key", "at least one"]),
        ("float mask", {"attn_mask": mask.float()}, dtype, ["attn_mask", "bool"]),
        ("mask", {"attn_mask": mask[:, :, :4]}, shape, ["attn_mask", "(2, 1, 5, 6)"]),
        ("flat mask", {"attn_mask": mask[0, 0]}, shape, ["attn_mask", "queries, keys"]),
        ("device", {"key": k.to("meta")}, device, ["key", "meta"]),
    ]  # fmt: skip
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
