"""No GPU machine meets a compile error, a spill or too much shared memory first."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

from fastft_kernels import OPS, aot, lora_config
from fastft_kernels._lora_reduce import split_rows

KERNELS = Path(aot.__file__).parent


@pytest.mark.slow
def test_every_kernel_fits_every_architecture() -> None:
    reports = aot.check(jobs=2)
    archs = lora_config.ARCHS.values()
    assert len(reports) == sum(aot.applies(v, arch) for v in aot.VARIANTS for arch in archs)
    assert all(any(aot.applies(v, arch) for arch in archs) for v in aot.VARIANTS)
    failed = [f"{r.arch} {r.kernel} {r.label}: {'; '.join(r.errors)}" for r in reports if r.errors]
    assert not failed, "\n".join(failed)
    assert all(0 < r.registers <= 255 for r in reports)
    assert all(0 <= r.shared <= r.shared_limit for r in reports)
    # The products stage tiles in shared memory: a zero everywhere would mean nothing was read.
    assert any(r.shared > 10_000 for r in reports)


def test_every_kernel_is_declared() -> None:
    """A kernel that a launcher starts and that has no variant would never be compiled here."""
    written = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                written.add((f"fastft_kernels.{path.stem}", node.name))
    declared = {(v.module, v.kernel) for v in aot.VARIANTS}
    assert declared == written


@pytest.mark.parametrize("variant", aot.VARIANTS, ids=lambda v: f"{v.kernel}-{v.label}")
def test_a_variant_names_every_argument(variant: aot.Variant) -> None:
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    arch = next(a for a in lora_config.ARCHS.values() if aot.applies(variant, a))
    blocks, _ = aot._blocks(variant, arch)
    given = {*variant.types, *variant.constants, *blocks}
    assert given == set(kernel.arg_names)


@pytest.mark.parametrize("arch", lora_config.ARCHS.values(), ids=lambda a: a.name)
def test_every_tile_of_the_tables_can_be_asked_for(arch: lora_config.LoraArch) -> None:
    expected = {
        (size, block, form)
        for size, blocks in lora_config.BLOCK_RS.items()
        for block in blocks
        for form in lora_config.FORMS
    }
    for table in (arch.shrink, arch.expand, arch.outer):
        assert set(table) == expected
        for (size, block_r, _), tile in table.items():
            assert tile.block_n % 8 == 0, "the keep bits come in bytes"
            assert lora_config.tile_for(table, size, block_r, "several")[0] == block_r
    for tile in (arch.gemm or {}).values():
        assert tile.part % 8 == 0
        assert tile.block_n // tile.part in (1, 2, 4)
    assert set(arch.pair) <= set(lora_config.BLOCK_RS[2])
    assert arch.adamw.chunk % arch.adamw.block == 0
    assert lora_config.block_r_for(1, 2) == 16
    assert lora_config.block_r_for(500, 2) == 64
    assert lora_config.block_r_for(500, 4) == 32


@pytest.mark.parametrize(
    ("tokens", "blocks", "slots"),
    [(8192, 56, 132), (8192, 112, 264), (8192, 64, 264), (2048, 300, 264), (1, 7, 264), (70, 1, 8)],
)
def test_a_split_sum_covers_its_rows_in_whole_turns(tokens: int, blocks: int, slots: int) -> None:
    splits, rows = split_rows(tokens, 64, blocks, slots)
    assert rows % 64 == 0
    assert (splits - 1) * rows < tokens <= splits * rows, "no program without rows, no row without"
    turns = -(-blocks * splits // slots)
    steps = -(-tokens // 64)

    def time(other: int) -> int:
        return -(-blocks * other // slots) * (-(-steps // other) + 2)

    assert turns * (rows // 64 + 2) <= time(1)
    # 280 programs where 264 run at a time took two turns.
    assert turns == 1 or blocks * splits / (turns * slots) > 0.75


def test_every_operation_has_a_launcher() -> None:
    for op in OPS:
        module = importlib.import_module(f"fastft_kernels.{op}")
        assert inspect.isfunction(module.supports)


def test_a_kernel_over_its_limit_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The gate closes: with a limit of one byte the same kernel is an error, and a status of 1."""
    variant = next(v for v in aot.VARIANTS if v.kernel == "_cross_entropy_kernel")
    arch = lora_config.ARCHS[90]
    assert not aot.compile_variant(variant, 90).errors
    monkeypatch.setitem(lora_config.ARCHS, 90, dataclasses.replace(arch, shared_limit=1))
    strict = dataclasses.replace(variant, stack_limit=-1)
    report = aot.compile_variant(strict, 90)
    assert "shared memory" in " ".join(report.errors)
    assert "stack" in " ".join(report.errors)
    monkeypatch.setattr(aot, "_TENSOR_MEMORY", 1)
    product = next(v for v in aot.VARIANTS if v.table == "gemm")
    assert "tensor memory" in " ".join(aot.compile_variant(product, 100).errors)
    broken = dataclasses.replace(variant, constants={**variant.constants, "HAS_BIAS": "fp32"})
    assert aot._guarded((dataclasses.replace(broken, types={}), 90)).errors
    monkeypatch.setattr(aot, "check", lambda *_: [report])
    path = tmp_path / "aot.json"
    assert aot.main(["--arch", "90", "--json", str(path)]) == 1
    assert "1 over a limit" in capsys.readouterr().out
    assert json.loads(path.read_text())["kernels"][0]["errors"]
    assert list(tmp_path.iterdir()) == [path]
