"""``fastft_kernels.lora_linear`` against float64: values, gradients, masks, shapes, determinism."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastft_kernels import _lora_dropout_kernels, lora_config
from fastft_kernels import lora_linear as launcher
from torch import Tensor

from fastft import native, ops
from fastft.cpu import lora_linear as cpu
from fastft.ops import _lora_linear_call
from fastft.reference import lora_linear as reference
from tests.kernels.bounds import assert_as_accurate, poison
from tests.kernels.cases import LORA_CASES, LoraCase, LoraInputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def forward(case: LoraInputs, *parts: Callable[..., None]) -> tuple[list[Tensor], list[Tensor]]:
    """ys and ss after each of the parts, poisoned before."""
    tokens, dtype = case.x.shape[0], case.x.dtype
    ys = [poison((tokens, w.shape[0]), dtype) for w in case.weights]
    rows = [stop - start for start, stop in case.spans]
    ss = [poison((n, a.shape[0]), dtype) for n, a in zip(rows, case.lora_as, strict=True)]
    for part in parts:
        part(
            ys, ss, case.x, case.weights, case.biases, case.lora_as, case.lora_bs,
            *case.constants(),
        )  # fmt: skip
    return ys, ss


def _run(case: LoraInputs) -> dict[str, Tensor]:
    """The launcher, on poisoned outputs."""
    dtype = case.x.dtype
    ys, ss = forward(case, launcher.fwd)
    dx = poison(tuple(case.x.shape), dtype)
    das = [poison(tuple(a.shape), a.dtype) for a in case.lora_as]
    dbs = [poison(tuple(b.shape), b.dtype) for b in case.lora_bs]
    launcher.bwd(
        dx, das, dbs, case.dys, case.x, ss, case.weights, case.lora_as, case.lora_bs,
        *case.constants(),
    )  # fmt: skip
    results = {"dx": dx}
    for name, tensors in (("y", ys), ("s", ss), ("da", das), ("db", dbs)):
        results |= {f"{name}{i}": t for i, t in enumerate(tensors)}
    return results


@pytest.mark.parametrize("name", LORA_CASES)
def test_against_float64(name: str) -> None:
    case = LORA_CASES[name].inputs()
    before = [t.clone() for t in case.tensors()]
    actual, plain, truth = _run(case), case.autograd(case.x.dtype), case.autograd(torch.float64)
    for key, value in actual.items():
        assert_as_accurate(key, value, plain[key], truth[key])
    for tensor, old in zip(case.tensors(), before, strict=True):
        assert torch.equal(tensor, old), "an input was written to"


@pytest.mark.parametrize("name", LORA_CASES)
def test_the_halves_of_a_forward_are_the_whole(name: str) -> None:
    case = LORA_CASES[name].inputs()
    whole = forward(case, launcher.fwd)
    halves = forward(case, launcher.fwd_adapters, launcher.fwd_values)
    for one, other in zip(whole, halves, strict=True):
        assert all(map(torch.equal, one, other))


def _added(case: LoraInputs, backend: str) -> dict[str, Tensor]:
    """``ops.lora_add_siblings`` to the products of the case, under its masks."""
    leaves = [t.detach().requires_grad_() for t in (case.x, *case.lora_as, *case.lora_bs)]
    n, given = len(case.owners), iter([mask for mask in case.masks if mask is not None])
    ys = [torch.nn.functional.linear(case.x, w) for w in case.weights]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_lora_linear_call, "new_dropout_mask", lambda *_: next(given))
        outs = ops.lora_add_siblings(
            ys, leaves[0], leaves[1 : 1 + n], leaves[1 + n :], scalings=case.scalings,
            dropout_ps=case.ps, owners=case.owners, spans=case.spans, overwrite=True,
            backend=backend,
        )  # fmt: skip
    assert [out.data_ptr() for out in outs] == [y.data_ptr() for y in ys]
    gradients = torch.autograd.grad(outs, leaves, case.dys)
    names = ["dx", *(f"da{i}" for i in range(n)), *(f"db{i}" for i in range(n))]
    results = {f"y{i}": y.detach() for i, y in enumerate(outs)}
    return results | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("name", LORA_CASES)
def test_terms_alone_against_float64(name: str) -> None:
    """Without weights the results have the frozen products already, and dx is the terms' own."""
    case = LORA_CASES[name].inputs()
    actual, plain = _added(case, "triton"), _added(case, "reference")
    wide = dataclasses.replace(
        case,
        x=case.x.double(),
        weights=[w.double() for w in case.weights],
        lora_as=[a.double() for a in case.lora_as],
        lora_bs=[b.double() for b in case.lora_bs],
        dys=[dy.double() for dy in case.dys],
    )
    truth = _added(wide, "reference")
    for key, value in actual.items():
        assert_as_accurate(key, value, plain[key], truth[key])
    again = _added(case, "triton")
    assert all(torch.equal(value, again[key]) for key, value in actual.items())


def test_same_inputs_same_bits() -> None:
    case = LORA_CASES["siblings-bf16"].inputs()
    first, second = _run(case), _run(case)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (3, 0)])
def test_empty(tokens: int, width: int) -> None:
    case = LoraCase(tokens, 12, (width, 4), (2, 3), ps=(0.0, 0.5)).inputs()
    actual, truth = _run(case), case.autograd(torch.float64)
    for key, value in actual.items():
        torch.testing.assert_close(value.double(), truth[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["dx", "da1", "db0", ""])
def test_only_what_is_wanted(wanted: str) -> None:
    case = LORA_CASES["siblings-dropout"].inputs()
    full = _run(case)
    ss = [full[f"s{i}"] for i in range(3)]
    dx = poison(tuple(case.x.shape)) if wanted == "dx" else None

    def room(name: str, like: list[Tensor]) -> list[Tensor | None]:
        keys = [f"{name}{i}" for i in range(len(like))]
        return [poison(tuple(t.shape)) if wanted == k else None for k, t in zip(keys, like)]

    das, dbs = room("da", case.lora_as), room("db", case.lora_bs)
    launcher.bwd(
        dx, das, dbs, case.dys, case.x, ss, case.weights, case.lora_as, case.lora_bs,
        *case.constants(),
    )  # fmt: skip
    got = [t for t in (dx, *das, *dbs) if t is not None]
    assert len(got) == bool(wanted)
    for tensor in got:
        torch.testing.assert_close(tensor, full[wanted], rtol=1e-5, atol=1e-4)


def test_adapters_that_are_views() -> None:
    case = LoraCase(9, 20, (12,), (4,)).inputs()
    expected = _run(case)
    case.lora_as = [case.lora_as[0].t().contiguous().t()]
    case.lora_bs = [torch.stack([case.lora_bs[0]] * 2, -1)[..., 0]]
    ys, ss = [poison((9, 12))], [poison((9, 4))]
    arguments = (case.lora_as, case.lora_bs, *case.constants())
    launcher.fwd(ys, ss, case.x, case.weights, case.biases, *arguments)
    das, dbs = [torch.empty_like(case.lora_as[0])], [torch.empty_like(case.lora_bs[0])]
    assert not das[0].is_contiguous()
    launcher.bwd(None, das, dbs, case.dys, case.x, ss, case.weights, *arguments)
    assert torch.equal(ys[0], expected["y0"])
    assert torch.equal(das[0], expected["da0"])
    assert torch.equal(dbs[0], expected["db0"])


def _mask(
    seed: int, p: float, rows: int = 50, row_bytes: int = 100, launcher: Any = launcher
) -> Tensor:
    out = torch.full((rows, row_bytes), 0xA5, dtype=torch.uint8)
    launcher.dropout_mask(out, torch.tensor([seed]), p)
    return out


def _philox(seed: int, counter: int, rounds: int) -> list[int]:
    """Philox-4x32 (Salmon et al. 2011), in plain integers."""
    low = 0xFFFFFFFF
    c = [counter & low, counter >> 32, 0, 0]
    k0, k1 = seed & low, seed >> 32
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & low, (a >> 32) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def test_philox_of_the_test_itself() -> None:
    """The published known answer for counter 0, key 0, ten rounds."""
    assert _philox(0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_mask_is_philox(p: float) -> None:
    seed = 0x123456789ABCDEF
    mask = _mask(seed, p, 30, 40).flatten().tolist()
    for index in (0, 1, 39, 511, 512, 1199):
        words = _philox(seed, index, 7)
        halves = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16)]
        expected = sum((half >= round(p * 65536)) << bit for bit, half in enumerate(halves))
        assert mask[index] == expected, index


@pytest.mark.skipif(not native.available(), reason="no native module")
@pytest.mark.parametrize("threshold", [0, 1, 3277, 32767, 32768, 32769, 65535, 65536])
def test_mask_is_the_cpus(threshold: int) -> None:
    seed, p = 2**45 + 7, threshold / 65536
    mask = _mask(seed, p)
    assert torch.equal(mask, _mask(seed, p, launcher=cpu))
    assert threshold < 65536 or not mask.any()


def _prmt(a: int, b: int, selector: int) -> int:
    """PTX's ``prmt.b32``: a byte of eight a nibble, or its sign where the nibble is 8 or more."""
    source = [(word >> shift) & 0xFF for word in (a, b) for shift in (0, 8, 16, 24)]
    found = 0
    for place in range(4):
        nibble = (selector >> 4 * place) & 0xF
        byte = source[nibble & 7]
        found |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * place
    return found


def test_the_selectors_of_dropped_halves() -> None:
    """What only a GPU runs: two 16-bit elements under the keep signs of one sibling."""
    source = inspect.getsource(_lora_dropout_kernels._drop.fn)
    selectors = [int(text, 16) for text in re.findall(r"\$2, \$3, (0x\w{4})", source)]
    assert len(selectors) == lora_config.MAX_SIBLINGS
    for sibling, selector in enumerate(selectors):
        sign = 0x80 << 8 * sibling
        for even, odd, others in itertools.product((0, sign), (0, sign), (0, 0xFFFFFFFF & ~sign)):
            mask = _prmt(even | others, odd | others, selector)
            assert mask == (0xFFFF if even else 0) | (0xFFFF0000 if odd else 0)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_keeps_the_fraction_asked_for(p: float) -> None:
    kept = reference.unpack_mask(_mask(1234, p), 800).double()
    # Five standard deviations of a binomial, for the whole and for each of the eight bits.
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    by_bit = kept.view(-1, 8).mean(0)
    assert bool(((by_bit - (1 - p)).abs() < 5 * (p * (1 - p) / (kept.numel() / 8)) ** 0.5).all())
    # Neighbours are independent: the share of equal neighbours is p^2 + (1-p)^2.
    same = (kept[:, 1:] == kept[:, :-1]).double().mean()
    assert abs(same - (p * p + (1 - p) ** 2)) < 0.02


def test_mask_is_a_function_of_the_seed() -> None:
    large = 2**62 + 12345
    assert torch.equal(_mask(large, 0.5), _mask(large, 0.5))
    assert not torch.equal(_mask(large, 0.5), _mask(large + 1, 0.5))
    differing = reference.unpack_mask(_mask(1, 0.5) ^ _mask(1 + 2**40, 0.5), 800).double().mean()
    assert abs(differing - 0.5) < 0.02, "the high half of the seed counts"


def test_mask_without_dropout_keeps_everything() -> None:
    assert bool((_mask(3, 0.0, 3, 7) == 255).all())
    launcher.dropout_mask(torch.empty((0, 4), dtype=torch.uint8), torch.tensor([1]), 0.5)


def test_supports() -> None:
    assert launcher.supports("cpu", F32, F32, 16) is None
    assert "float64" in (launcher.supports("cpu", torch.float64, F32, 16) or "")
    assert "adapters" in (launcher.supports("cpu", F16, BF16, 16) or "")
    assert "rank" in (launcher.supports("cpu", F32, F32, 0) or "")


@pytest.mark.parametrize(
    "bias", [torch.randn(1).expand(8), torch.randn(16)[::2]], ids=["expanded", "strided"]
)
def test_a_bias_of_elements_that_are_apart(bias: Tensor) -> None:
    """The kernels read it by its address."""
    shapes = [(6, 16), (8, 16), (2, 16), (8, 2)]
    tensors = [torch.randn(shape) for shape in shapes]
    got = ops.lora_linear(*tensors, scaling=0.5, bias=bias, backend="triton")
    expected = ops.lora_linear(*tensors, scaling=0.5, bias=bias, backend="reference")
    torch.testing.assert_close(got, expected)
