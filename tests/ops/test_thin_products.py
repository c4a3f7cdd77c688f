"""The CPU's one-pass thin products (csrc/cpu/thin.inc) by themselves."""

from __future__ import annotations

import pytest
import torch
from harness import relative_error

from fastft.reference import lora_linear as reference

F32, BF16 = torch.float32, torch.bfloat16
ID = str

# Rows, columns, ranks: one of each; odd; several blocks of rows and strips of columns; a row pitch
# that is copied; the highest rank.
THIN = [(1, 1, 1), (7, 45, 5), (130, 1030, 16), (600, 520, 24), (65, 1024, 33), (513, 96, 64)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", [F32, BF16], ids=ID)
@pytest.mark.parametrize("shape", THIN, ids=ID)
def test_one_pass_products_of_every_instruction_set(
    shape: tuple[int, int, int], adapter: torch.dtype, p: float
) -> None:
    """The four thin products of each set against float64 of the operands as they are multiplied,
    any thread count with the same bits, on poisoned memory, and no write past the end."""
    from fastft import native

    rows, columns, r = shape
    x, wide, y = (torch.randn(rows, columns).to(BF16) for _ in range(3))
    a, b = torch.randn(r, columns).to(adapter), torch.randn(columns, r).to(adapter)
    s = torch.randn(rows, r).to(BF16)
    kept, mask = torch.rand(rows, columns) >= p, None
    if p:
        mask = reference.pack_mask(kept)
    dropped = x.double() * kept
    narrow_a, narrow_b, s64 = (t.to(BF16).double() for t in (a, b, s))
    truth = {
        "shrink": 1.5 * dropped @ narrow_a.t(),
        "expand": y.double() + 0.7 * s64 @ narrow_b.t(),
        "ds": 0.7 * wide.double() @ narrow_b,
        "db": 0.7 * wide.double().t() @ s64,
        "dx": y.double() + 1.25 * kept * (s64 @ narrow_a),
        "da": 1.25 * s64.t() @ dropped,
    }
    c, facts = native.module(), (adapter == F32,)
    for isa in _sets():
        words = c.thin_scratch(rows, columns, r, isa=isa)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            room = torch.full((words + 8,), float("nan"))
            room[-8:] = 7
            got = {
                name: torch.full((value.numel() + 8,), 7.0, dtype=adapter if name[0] == "d"
                                 and name[1] in "ab" else BF16)
                for name, value in truth.items()
            }  # fmt: skip
            for name in ("expand", "dx"):
                got[name][:-8] = y.flatten()
            at = {name: t.data_ptr() for name, t in got.items()}
            bits = 0 if mask is None else mask.data_ptr()
            pointers = [t.data_ptr() for t in (x, wide, a, b, s, room)]
            px, pwide, pa, pb, ps, proom = pointers
            size = (rows, columns, r)
            c.thin_shrink(at["shrink"], px, pa, bits, *size, 1.5, *facts, proom, isa=isa)
            c.thin_expand(at["expand"], ps, pb, *size, 0.7, *facts, proom, isa=isa)
            c.thin_pair(at["ds"], r, at["db"], pwide, ps, pb, *size, 0.7, *facts, proom, isa=isa)
            c.thin_back(
                at["dx"], at["da"], ps, px, pa, bits, *size, 1.25, *facts, proom, isa=isa
            )  # fmt: skip
            assert all(bool((t[-8:] == 7).all()) for t in (room, *got.values())), isa
            found.append({n: t[:-8].view(truth[n].shape) for n, t in got.items()})
        for name, value in truth.items():
            assert torch.equal(found[0][name], found[1][name]), (isa, name)
            # One rounding of the result, and float32 sums over rows or columns.
            bound = torch.finfo(found[0][name].dtype).eps
            bound += max(rows, columns) ** 0.5 * torch.finfo(F32).eps
            assert relative_error(found[0][name], value) <= bound, (isa, name)


def _sets() -> list[str]:
    from fastft import native

    return native.build_info()["instruction_sets_usable"]


def test_one_pass_products_take_columns_of_a_wider_ds_and_leave_out_what_is_not_wanted() -> None:
    from fastft.cpu import thin

    x, dy, s = torch.randn(70, 64).to(BF16), torch.randn(70, 48).to(BF16), torch.randn(70, 4)
    s, a, b = s.to(BF16), torch.randn(4, 64), torch.randn(48, 4)
    both = torch.full((70, 9), 7.0, dtype=BF16)
    db, alone = torch.empty(48, 4), torch.empty(70, 4, dtype=BF16)
    thin.pair(both[:, 2:6], db, dy, s, b, 2.0)
    thin.pair(alone, None, dy, s, b, 2.0)
    assert torch.equal(both[:, 2:6], alone)
    assert bool((both[:, :2] == 7).all())
    assert bool((both[:, 6:] == 7).all())
    dx, da = torch.ones(70, 64, dtype=BF16), torch.empty(4, 64)
    thin.back(dx, da, alone, x, a, None, 1.0)
    only_dx, only_da = torch.ones_like(dx), torch.empty_like(da)
    thin.back(only_dx, None, alone, x, a, None, 1.0)
    thin.back(None, only_da, alone, x, a, None, 1.0)
    assert torch.equal(only_dx, dx)
    assert torch.equal(only_da, da)


def test_a_rank_no_kernel_was_built_for_is_refused() -> None:
    from fastft import native

    with pytest.raises(ValueError, match="rank too large"):
        native.module().thin_scratch(8, 8, 65)
