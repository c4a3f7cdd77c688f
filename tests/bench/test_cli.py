"""python -m bench: a whole run, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import options_for, parse
from bench.optim import SMOLLM2, lora_shapes
from bench.records import has_native_bf16, pick_dtype

ROOT = Path(__file__).resolve().parents[2]


# Of the adapters of two layers of SmolLM2 at rank 16.
PARAMS = sum(torch.Size(shape).numel() for shape in lora_shapes(SMOLLM2, 2))


def test_a_run_writes_its_json(tmp_path: Path) -> None:
    """The optimizer suite, its memory measured in processes of their own."""
    target = tmp_path / "results" / "optim.json"
    command = [sys.executable, "-m", "bench", "optim", "--quick", "--rounds", "1"]
    command += ["--impls", "torch-fused,fastft", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [path.name for path in target.parent.iterdir()] == ["optim.json"]
    numbers = {(r["case"], r["impl"], r["metric"]): r["value"] for r in lines}
    assert len(numbers) == len(lines)
    for case in ("lora SmolLM2 28 tensors", "flat 1 tensor"):
        for impl in ("torch-fused", "fastft"):
            assert numbers[case, impl, "ns_per_param"] > 0
            # Two float32 moments, less a few pages that were there and free, and the pages of what
            # runs for the first time: 2 MB at most.
            bytes_per_param = numbers[case, impl, "bytes_per_param"]
            assert 8 - (1 << 16) / PARAMS <= bytes_per_param < 8 + (1 << 21) / PARAMS
    reasons = {r["impl"]: r["reason"] for r in lines if r["value"] is None}
    assert reasons["torch-foreach"] == "left out: --impls"
    assert "fastft" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lorra"], "invalid choice: 'lorra'"),
        (["lora", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["lora", "--impls", "peft,pfet"], "--impls: no pfet; there are"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["lora", "--device", "cuda"])
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_defaults() -> None:
    found = options_for("e2e", parse(["e2e"]))
    assert (found.rounds, found.batch, found.tokens) == (3, 4, 512)
    assert options_for("lora", parse(["lora"])).rounds == 7
    quick = options_for("e2e", parse(["e2e", "--quick", "--tokens", "64"]))
    assert (quick.rounds, quick.batch, quick.tokens) == (2, 1, 64)


def test_auto_dtype_is_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False)
    assert not has_native_bf16(cpu)
    assert pick_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pick_dtype("auto", cpu) == torch.bfloat16
