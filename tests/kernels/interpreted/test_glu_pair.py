"""A gated unit's backward that makes dS and dB of the LoRA layers before it, through autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastft_kernels import _lora_backward, _lora_glu, _lora_plain, border, ways
from fastft_kernels import lora_linear as launcher
from torch.utils.checkpoint import checkpoint

from fastft import ops
from fastft.ops.lora_linear import lora_linear_siblings
from tests.kernels.glu_pair_cases import BF16, F16, F32, NAMES, SCALINGS, Block


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each unit's backward has left: None where it did not pay."""
    seen: list[Any] = []
    usual = launcher.glu_bwd

    def glu_bwd(*args: Any, **kwargs: Any) -> Any:
        seen.append(usual(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(launcher, "glu_bwd", glu_bwd)
    return seen


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes over gradients that the LoRA backward has made itself."""
    seen: list[str] = []
    usual = _lora_backward._d_s_and_d_b

    def d_s_and_d_b(*args: Any) -> Any:
        seen.append("dS, dB")
        return usual(*args)

    plain = _lora_plain.backward

    def backward(*args: Any) -> bool:
        served = plain(*args)
        seen.extend(["dS, dB"] * len(args[3]) if served and args[-1] is None else [])
        return served

    monkeypatch.setattr(_lora_backward, "_d_s_and_d_b", d_s_and_d_b)
    monkeypatch.setattr(_lora_plain, "backward", backward)
    return seen


@pytest.mark.parametrize("way", ["expand", "border"])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize(
    ("activation", "r", "dtype", "adapter"),
    [("silu", 16, BF16, F32), ("gelu", 3, F16, F16), ("gelu_tanh", 12, BF16, BF16)],
)
def test_one_pass_for_all(
    activation: str, r: int, dtype: torch.dtype, adapter: torch.dtype, gate_first: bool, way: str,
    made: list[Any], thin: list[str],
) -> None:  # fmt: skip
    block = Block((r, r), 144, dtype, adapter)
    held = border.make(block.weights, [r, r]) if way == "border" else None
    if held is not None:
        block.weights = held.weights
    with ways.force(way):
        got = block.fused(activation, gate_first)
    assert len(made) == 1
    assert made[0] is not None
    assert (made[0].left is not None) == (way == "border")
    assert not thin
    block.check(got, activation, gate_first)


def test_wider_than_a_strip_and_longer_than_a_split(
    made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = _lora_glu.split_rows
    splits: list[int] = []

    def split_rows(tokens: int, block_m: int, blocks: int, slots: int) -> tuple[int, int]:
        splits.append(-(-tokens // block_m))
        return splits[-1], block_m

    monkeypatch.setattr(_lora_glu, "split_rows", split_rows)
    assert usual(8192, 16, 56, 264)[0] > 1
    block = Block(width=272)
    block.check(block.fused("silu"), "silu")
    assert made[0] is not None
    assert splits == [5]


@pytest.mark.parametrize(
    "block",
    [
        lambda: Block((4, 16)),
        lambda: Block(dtype=F32),
        lambda: Block(width=145),
        lambda: Block((33, 33), features=48),
    ],
    ids=["ranks that differ", "float32", "no whole vectors", "a rank too high"],
)
def test_where_it_does_not_pay(block: Callable[[], Block], made: list[Any]) -> None:
    given = block()
    given.check(given.fused("silu"), "silu")
    assert made == [None]


def test_gradients_from_elsewhere_are_added(made: list[Any], thin: list[str]) -> None:
    """What was left goes with other gradients than those that arrive: it is not used."""
    block = Block()

    def run(also: bool) -> Any:
        ys = lora_linear_siblings(
            block.x, block.weights, block.a, block.b, scalings=SCALINGS, backend="triton"
        )
        y = ops.glu(*ys, "silu", backend="triton")
        return torch.autograd.grad([y, *([ys[0]] if also else [])], block.leaves(),
                                   [block.dy, *([block.dy] if also else [])])  # fmt: skip

    both = run(True)
    assert len(thin) == 2
    alone = run(False)
    assert len(thin) == 2
    assert len(made) == 2
    ys = lora_linear_siblings(
        block.x, block.weights, block.a, block.b, scalings=SCALINGS, backend="triton"
    )
    other = torch.autograd.grad(ys[0], block.leaves(), block.dy, allow_unused=True)
    for name, got, one, two in zip(NAMES, both, alone, other, strict=True):
        more = 0.0 if two is None else two.double()
        error = (got.double() - one.double() - more).norm() / got.double().norm()
        assert float(error) < 4 * torch.finfo(BF16).eps, name


def test_a_hook_s_gradient_counts(thin: list[str]) -> None:
    block = Block()
    ys = lora_linear_siblings(
        block.x, block.weights, block.a, block.b, scalings=SCALINGS, backend="triton"
    )
    ys[1].register_hook(lambda g: torch.zeros_like(g))
    y = ops.glu(*ys, "silu", backend="triton")
    got = dict(zip(NAMES, torch.autograd.grad(y, block.leaves(), block.dy), strict=True))
    assert len(thin) == 2
    assert not got["da1"].any()
    assert not got["db1"].any()
    assert got["db0"].any()


def test_twice_through_one_graph(made: list[Any]) -> None:
    block = Block()
    y = block.unit("silu")
    first, second = (
        torch.autograd.grad(y, block.leaves(), block.dy, retain_graph=True) for _ in range(2)
    )
    assert len(made) == 2
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_in_a_checkpoint_which_unpacks_once(made: list[Any]) -> None:
    block = Block()
    expected = block.fused("silu")
    y = checkpoint(lambda _: block.unit("silu"), block.x, use_reentrant=False)
    got = torch.autograd.grad(y, block.leaves(), block.dy)
    assert len(made) == 2
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


def test_other_units_find_no_such_call() -> None:
    """Two calls, one call's results and something else, a call of three layers."""
    from fastft.ops._glu_pair import producer

    block = Block()
    both = {"scalings": SCALINGS, "backend": "triton"}
    ys = lora_linear_siblings(block.x, block.weights, block.a, block.b, **both)
    again = lora_linear_siblings(block.x, block.weights, block.a, block.b, **both)
    three = lora_linear_siblings(
        block.x, [*block.weights, block.weights[0]], [*block.a, block.a[0]],
        [*block.b, block.b[0]], scalings=(1.0, 1.0, 1.0), backend="triton",
    )  # fmt: skip
    assert producer(*ys, "triton") is not None
    assert producer(*ys, "reference") is None
    assert producer(ys[0], again[1], "triton") is None
    assert producer(ys[0], ys[0], "triton") is None
    assert producer(ys[0], ys[1] * 2, "triton") is None
    assert producer(three[0], three[1], "triton") is None
    with torch.no_grad():
        ys = lora_linear_siblings(block.x, block.weights, block.a, block.b, **both)
        assert producer(*ys, "triton") is None


def test_a_backward_that_ends_at_gate_and_up(made: list[Any]) -> None:
    """The layers' own backward does not come: nothing is made for it, nor are its tensors asked
    for, which may be gone."""
    block = Block()
    ys = lora_linear_siblings(
        block.x, block.weights, block.a, block.b, scalings=SCALINGS, backend="triton"
    )
    y = ops.glu(*ys, "silu", backend="triton")
    own = [block.x, block.a[0], block.b[0]]
    torch.autograd.grad(ys[0], own, block.dy, retain_graph=True)
    expected = torch.autograd.grad(y, ys, block.dy, retain_graph=True)
    assert not made
    torch.autograd.grad(ys[0], own, block.dy)  # frees what the layers saved
    got = torch.autograd.grad(y, ys, block.dy)
    assert not made
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


def test_a_border_that_the_unit_did_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its choice stands, whatever the layers' backward would choose."""
    block = Block()
    held = border.make(block.weights, [16, 16])
    block.weights = held.weights
    usual = _lora_glu.choose_way

    def choose_way(*args: Any) -> Any:
        with ways.force("expand"):
            return usual(*args)

    monkeypatch.setattr(_lora_glu, "choose_way", choose_way)
    with ways.force("border"):
        block.check(block.fused("silu"), "silu")
