"""The three ways of a LoRA product against float64, each on every case it can take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastft_kernels import _lora_gemm, _lora_plain, _lora_routed, border, config, lora_config, ways
from fastft_kernels import lora_linear as launcher

from tests.kernels.bounds import assert_as_accurate
from tests.kernels.cases import LORA_CASES, LoraCase, LoraInputs
from tests.kernels.interpreted.test_lora_linear import _run, forward

BF16, F32 = torch.bfloat16, torch.float32
ONE_EACH = {name for name, case in LORA_CASES.items() if not case.owners}
ALIGNED = {
    name
    for name in ONE_EACH
    if (case := LORA_CASES[name]).dtype != F32
    and len(case.widths) <= 3
    and all(size % 8 == 0 for size in (case.features, *case.widths))
}


def _taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways chosen from here on, in order."""
    seen: list[str] = []
    plain = ways.pick

    def pick(*arguments: Any) -> str:
        seen.append(plain(*arguments))
        return seen[-1]

    monkeypatch.setattr(ways, "pick", pick)
    return seen


def _check(case: LoraInputs, actual: dict[str, torch.Tensor]) -> None:
    plain, truth = case.autograd(case.x.dtype), case.autograd(torch.float64)
    for key, value in actual.items():
        assert_as_accurate(key, value, plain[key], truth[key])


@pytest.mark.parametrize("name", sorted(ONE_EACH))
def test_border(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LORA_CASES[name].inputs()
    held = border.make(case.weights, [a.shape[0] for a in case.lora_as])
    case.weights = held.weights
    before = [w.clone() for w in case.weights]
    seen = _taken(monkeypatch)
    with ways.force("border"):
        _check(case, _run(case))
    assert seen == ["border", "border"]
    for weight, old in zip(case.weights, before, strict=True):
        assert torch.equal(weight, old), "an adapter was written over a frozen weight"


@pytest.mark.parametrize("name", sorted(ALIGNED))
def test_gemm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LORA_CASES[name].inputs()
    seen = _taken(monkeypatch)
    with ways.force("gemm"):
        _check(case, _run(case))
    assert seen == ["gemm", "gemm"]


def test_gemm_walks_several_tiles_and_takes_bordered_weights() -> None:
    case = LoraCase(300, 72, (520,), (16,), BF16, F32).inputs()
    case.weights = border.make(case.weights, [16]).weights
    tile = lora_config.ARCHS[90].gemm[False]  # type: ignore[index]
    tiles = math.ceil(300 / tile.block_m) * math.ceil(520 / tile.block_n)
    assert tiles > config.processors(case.x.device)
    with ways.force("gemm"):
        _check(case, _run(case))


@pytest.mark.parametrize("ranks", [(16, 8, 5), (40, 16, 3), (16,)], ids=str)
def test_gemm_masks_a_tile_in_parts(ranks: tuple[int, ...]) -> None:
    """dx is wider than a tile and ends within a part of the next; ranks are a block or more."""
    widths, ps = (64, 40, 24)[: len(ranks)], (0.25, 0.5, 0.1)[: len(ranks)]
    tile = lora_config.ARCHS[90].gemm[True]  # type: ignore[index]
    case = LoraCase(150, tile.block_n + tile.part + 8, widths, ranks, BF16, F32, ps).inputs()
    with ways.force("gemm"):
        _check(case, _run(case))


def test_what_the_persistent_product_refuses() -> None:
    x = torch.zeros(16, 64, dtype=BF16)
    assert _lora_gemm.fits([x, x, x])
    assert not _lora_gemm.fits([x.float()])
    assert _lora_gemm.fits([x[:, :9]]), "rows of 128 bytes, whatever is read of them"
    assert not _lora_gemm.fits([torch.zeros(16, 65, dtype=BF16)[:, :64]])
    assert not _lora_gemm.fits([x.flatten()[1:].view(1, -1)])
    assert not _lora_gemm.fits([torch.zeros(16, 65, dtype=BF16)])
    assert not _lora_gemm.fits([x[:0]])
    assert not _lora_gemm.fits([x] * 9)


@pytest.mark.parametrize("way", ["border", "gemm", "expand"])
def test_same_inputs_same_bits(way: str) -> None:
    case = LORA_CASES["aligned-siblings"].inputs()
    case.weights = border.make(case.weights, list(LORA_CASES["aligned-siblings"].ranks)).weights
    with ways.force(way):
        first, second = _run(case), _run(case)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[bool]]]:
    """Has plain calls take a way, unless it is not possible; what says which of them were served
    the short way."""
    served: list[bool] = []

    def forget() -> None:
        _lora_plain._forward.cache_clear()
        _lora_plain._backward.cache_clear()

    def take(way: str) -> list[bool]:
        forget()
        pick = lambda _, __, possible: way if way in possible else "expand"  # noqa: E731
        monkeypatch.setattr(ways, "pick", pick)
        for name in ("forward", "backward"):
            real = getattr(_lora_plain, name)
            monkeypatch.setattr(
                _lora_plain, name, lambda *args, real=real: served.append(real(*args)) or served[-1]
            )
        return served

    yield take
    forget()


# Widths of whole vectors, as a model's: their backward has a short way, too.
_WHOLE = (150, 72, (256, 80, 96), (8, 16, 5), BF16, F32)
PLAIN = {
    **{name: LORA_CASES[name] for name in ALIGNED},
    "whole": LoraCase(*_WHOLE),
    "whole-dropout": LoraCase(*_WHOLE, (0.1, 0.2, 0.1)),
}


@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_plain_call_has_the_bits_of_a_general_one(
    name: str, way: str, plainly: Callable[[str], list[bool]]
) -> None:
    case = PLAIN[name].inputs()
    if way == "border":
        held = border.make(case.weights, [a.shape[0] for a in case.lora_as])
        case.weights = held.weights
    with ways.force(way):
        general = _run(case)
    served = plainly(way)
    plain = _run(case)
    for key, value in general.items():
        assert torch.equal(value, plain[key]), key
    assert len(served) == 2
    if name.startswith("whole"):
        assert served == [True, True]


@pytest.mark.parametrize("way", ["border", "gemm"])
@pytest.mark.parametrize("name", ["aligned-siblings", "aligned-siblings-dropout"])
def test_the_halves_of_a_forward_are_the_whole(name: str, way: str) -> None:
    case = LORA_CASES[name].inputs()
    held = border.make(case.weights, list(LORA_CASES[name].ranks))
    case.weights = held.weights
    with ways.force(way):
        whole = forward(case, launcher.fwd)
        halves = forward(case, launcher.fwd_adapters, launcher.fwd_values)
    for one, other in zip(whole, halves, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_border_is_found_by_its_views_alone() -> None:
    weights = [torch.randn(n, 24) for n in (8, 16)]
    held = border.make(weights, [4, 2])
    assert border.find(held.weights, [4, 2]) is held
    assert border.find(held.weights, [4, 3]) is None, "another rank has no place"
    assert border.find(held.weights[:1], [4]) is None, "a layer alone is not the whole"
    assert border.find(weights, [4, 2]) is None
    views = [w[:, :20] for w in held.weights]
    assert border.find(views, [4, 2]) is None
    assert held.buffer.shape == (24 + 8, 32)
    address = held.weights[0].data_ptr()
    del held, views
    assert address not in border._known, "a border lives as long as who made it"


def test_columns_past_the_ranks_meet_zeros() -> None:
    """Ranks of 5 leave three columns of the border unused, and memory may hold NaN there."""
    case = LoraCase(9, 16, (24,), (5,)).inputs()
    case.weights = border.make(case.weights, [5]).weights
    plain = border.operand

    def poisoned(*arguments: Any) -> torch.Tensor:
        return plain(*arguments).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch, ways.force("border"):
        patch.setattr(border, "operand", poisoned)
        _check(case, _run(case))


def test_several_spans_go_in_one_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven adapters, two layers: a shrink and an expand forward; backward one of each and the two
    outer products."""
    launches: list[str] = []
    for name in ("shrink", "expand", "outer"):
        kernel = f"_routed_{name}_kernel"
        plain = getattr(_lora_routed, kernel)

        class Counted:
            def __init__(self, kernel: Any, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: Any) -> Any:
                launches.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(_lora_routed, kernel, Counted(plain, name))
    case = LORA_CASES["mixed-batch-apart"].inputs()
    _check(case, _run(case))
    assert launches == ["shrink", "expand", "shrink", "expand", "outer", "outer"]


@pytest.mark.parametrize("spans", [((0, 24), (24, 24)), ((0, 0), (0, 24)), ((0, 8), (8, 24))])
def test_a_mixed_batch_has_its_bias(spans: tuple[tuple[int, int], ...]) -> None:
    case = LoraCase(24, 16, (12,), (4, 4), F32, F32, owners=(0, 0), spans=spans).inputs()
    assert _lora_routed.fits((0, 0), spans)
    _check(case, _run(case))


def test_overlapping_spans_do_not_share_a_launch() -> None:
    assert _lora_routed.fits((0, 0), ((0, 4), (4, 8)))
    assert not _lora_routed.fits((0, 0), ((0, 5), (4, 8)))
    assert not _lora_routed.fits((0, 0), ((0, 8), (0, 8)))
    assert not _lora_routed.fits((0, 0, 0), ((0, 4), (4, 8), (0, 4)))
    case = LoraCase(
        24, 16, (12,), (4, 4), F32, F32, owners=(0, 0), spans=((0, 14), (8, 24))
    ).inputs()  # fmt: skip
    _check(case, _run(case))


SHAPE = ways.Shape("fwd", 8192, 4096, (4096,), 16, False)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts the given rows in the place of the shipped table."""

    def forget() -> None:
        ways._rows.cache_clear()
        ways._picked.cache_clear()

    def put(*rows: dict[str, Any]) -> None:
        table = tmp_path / "ways.json"
        table.write_text(json.dumps(rows))
        monkeypatch.setattr(ways, "TABLE", table)
        forget()

    yield put
    monkeypatch.undo()
    forget()


def test_without_a_measurement_bytes_decide(measured: Callable[..., None]) -> None:
    measured()
    both = ("expand", "border")
    decode = ways.Shape("fwd", 1, 4096, (4096,), 64, False)
    assert ways.pick("sm_90", decode, both) == "expand", "the border is filled at each call"
    assert ways.pick("sm_90", SHAPE, both) == "border"
    down = ways.Shape("fwd", 8192, 14336, (4096,), 16, False)
    assert ways.pick("sm_90", down, both) == "expand", "x is wider than y, read and written"
    siblings = ways.Shape("bwd", 8192, 4096, (4096, 1024, 1024), 16, False)
    assert ways.pick("sm_90", siblings, both) == "border"
    gate_up = ways.Shape("bwd", 8192, 4096, (14336, 14336), 16, False)
    assert ways.pick("sm_90", gate_up, both) == "expand"
    assert ways.pick("sm_90", SHAPE, ("expand", "gemm")) == "expand", "never without a measurement"
    assert ways.pick("sm_90", SHAPE, ("expand",)) == "expand"


def test_a_measurement_near_by_decides(measured: Callable[..., None]) -> None:
    times = {"expand": 1.0, "border": 0.9, "gemm": 0.8}
    row = {"arch": "sm_90", **SHAPE._asdict(), "time_ms": times}
    measured(row)
    assert ways.pick("sm_90", SHAPE, ways.WAYS) == "gemm"
    assert ways.pick("sm_90", SHAPE, ("expand", "border")) == "border"
    far = ways.Shape("fwd", 1024, 4096, (4096,), 16, False)
    assert ways.pick("sm_90", far, ways.WAYS) == "border", "bytes: 8192 tokens are too many"
    assert ways.pick("sm_80", SHAPE, ways.WAYS) == "border"
    dropped = ways.Shape("fwd", 8192, 4096, (4096,), 16, True)
    assert dropped.distance(row) == math.inf
    with ways.force("expand"):
        assert ways.pick("sm_90", SHAPE, ways.WAYS) == "expand"


def test_force_knows_its_ways() -> None:
    with (
        pytest.raises(ValueError, match="expand, border, gemm, got 'cublas'"),
        ways.force("cublas"),
    ):
        pass


def test_the_shipped_table_is_well_formed() -> None:
    keys = {"arch", "direction", "tokens", "features", "widths", "r", "dropout", "time_ms"}
    for row in json.loads(ways.TABLE.read_text()):
        assert keys | {"device", "date", "commit"} == set(row)
        assert row["arch"] in {arch.name for arch in lora_config.ARCHS.values()}
        assert set(row["time_ms"]) <= set(ways.WAYS)
