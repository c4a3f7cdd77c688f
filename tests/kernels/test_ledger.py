"""The ledger of GPU runs, and the runner that writes it, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, ledger
from bench.__main__ import parse

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "triton/optimizer_step"
FACTS: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "memory_bytes": 85_000_000_000,
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "versions": {"torch": "2.11.0"},
}


def _entry(**changes: Any) -> ledger.Entry:
    values = {"source": "0" * 16, "device": "GPU", "date": "2026-01-02T00:00:00", "commit": "abc"}
    return ledger.Entry(**{**values, **changes})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources that kernels are made of."""
    for folder in ("kernels", "csrc/cuda", "csrc/include", "fastft/cuda"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_the_committed_ledger_is_valid() -> None:
    states = ledger.status()
    assert {s.kernel for s in states} == set(ledger.kernels())
    assert all(s.state in ("verified", "changed", "never") for s in states)


def test_kernels_and_their_files() -> None:
    files = {k: {p.name for p in v} for k, v in ledger.kernels().items()}
    assert {"lora_linear.py", "_lora_linear_kernels.py", "config.py"} <= files["triton/lora_linear"]
    assert "optimizer_step.py" not in files["triton/lora_linear"]
    cuda = files["cuda/optimizer_step"]
    assert {"optimizer_step.cu", "optimizer.h", "dynamic8.h", "numeric.h", "cuda_api.h"} <= cuda
    assert all((ROOT / p).is_file() for v in ledger.kernels().values() for p in v)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        (
            "kernels/fastft_kernels/config.py",
            {
                "lora_linear",
                "linear_cross_entropy",
                "optimizer_step",
                "glu",
                "rms_norm",
                "dora_scale",
                "layer_norm",
                "rope",
                "embedding",
            },
        ),
        ("kernels/fastft_kernels/_lora_linear_kernels.py", {"lora_linear"}),
        ("kernels/fastft_kernels/aot.py", set()),
        ("csrc/include/fastft/numeric.h", {"cuda/optimizer_step", "cuda/adafactor_step"}),
        ("csrc/cuda/lanes.cuh", {"cuda/optimizer_step", "cuda/adafactor_step"}),
        ("csrc/include/fastft/dynamic8.h", {"cuda/optimizer_step"}),
    ],
)
def test_a_change_is_noticed(file: str, changed: set[str], checkout: Path) -> None:
    path = checkout / "verified.json"
    names = ledger.kernels(checkout)
    ledger.record(
        {k: _entry(source=ledger.source_hash(v, checkout)) for k, v in names.items()}, path
    )
    assert {s.state for s in ledger.status(path, checkout)} == {"verified"}
    with (checkout / file).open("a") as source:
        source.write("\n")
    for status in ledger.status(path, checkout):
        backend, op = status.kernel.split("/")
        expected = status.kernel in changed or (backend == "triton" and op in changed)
        assert status.state == ("changed" if expected else "verified"), status
        assert ("changed since" in str(status)) == expected


def test_empty_missing_and_updated(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "verified.json"
    assert ledger.load(path) == {}
    assert {s.state for s in ledger.status(path)} == {"never"}
    ledger.record({KERNEL: _entry(device="A", tests=1)}, path)
    ledger.record({KERNEL: _entry(device="B", error={"p": 1e-7}, time_ms={"t": 2.0})}, path)
    ledger.record({KERNEL: _entry(device="A", tests=2)}, path)
    loaded = ledger.load(path)[KERNEL]
    assert {d: e.tests for d, e in loaded.items()} == {"A": 2, "B": 0}
    assert loaded["B"].error == {"p": 1e-7}
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1, "kernels": {"a": 3}}'])
def test_a_broken_ledger_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "verified.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"verified\.json: expected a ledger"):
        ledger.record({KERNEL: _entry()}, path)
    assert path.read_text() == text


def test_a_failed_write_leaves_the_old_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "verified.json"
    ledger.record({KERNEL: _entry()}, path)
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        ledger.record({KERNEL: _entry(tests=5)}, path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def _line(kernel: str = KERNEL, outcome: str = "passed", test: str = "t", **more: Any) -> str:
    return json.dumps({"kernel": kernel, "test": test, "outcome": outcome, **more})


def test_only_kernels_whose_tests_all_passed_are_entered() -> None:
    lines = [
        _line(error={"p": 1e-7}, time_ms={"step": 0.5}),
        _line(error={"p": 3e-7, "m": 1e-8}),
        _line("triton/lora_linear"),
        _line("triton/lora_linear", "failed"),
        _line("cuda/optimizer_step", "skipped"),
        _line("triton/no_longer_there"),
        "",
    ]
    entries = gpu.collect(lines, FACTS)
    assert set(entries) == {KERNEL}
    entry = entries[KERNEL]
    assert entry.tests == 2
    assert entry.error == {"p": 3e-7, "m": 1e-8}
    assert entry.time_ms == {"step": 0.5}
    assert entry.source == ledger.source_hash(ledger.kernels()[KERNEL])


def test_a_kernel_whose_tests_were_cut_short_is_not_entered() -> None:
    begun = [_line(outcome="collected", test=name) for name in "abc"]
    passed = [_line(test=name) for name in "ab"]
    assert gpu.collect([*begun, *passed], FACTS) == {}
    not_offered = _line(outcome="not offered", test="c")
    assert gpu.collect([*begun, *passed, not_offered], FACTS)[KERNEL].tests == 2
    assert gpu.collect([*begun[2:], not_offered], FACTS) == {}


def _python(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of every kind: their ends, their files, and what the ledger takes from them."""
    monkeypatch.setattr(gpu, "facts", lambda: FACTS)
    line = _line(error={"p": 1e-7})
    steps = (
        gpu.Step("build", _python("import sys; sys.exit('no compiler')"), 60),
        gpu.Step(
            "tests",
            _python(f"import os; open(os.environ['WHERE'], 'w').write({line!r})"),
            60,
            {"WHERE": "{out}/tests.jsonl"},
        ),
        gpu.Step(
            "lora",
            (*_python("import sys; open(sys.argv[1], 'w')"), "{out}/lora.jsonl", "m:{layers}"),
            60,
        ),
        gpu.Step("loss", _python("import time; time.sleep(60)"), 5),
    )
    out, results = tmp_path / "out", tmp_path / "results"
    begin = time.monotonic()
    assert gpu.run(out, steps, results) == 1
    assert time.monotonic() - begin < 40
    document = json.loads((out / "gpu.json").read_text())
    states = {step["name"]: step["state"] for step in document["steps"]}
    assert states == {"build": "failed", "tests": "ok", "lora": "ok", "loss": "timed out"}
    assert next(s for s in document["steps"] if s["name"] == "lora")["command"].endswith(" m:8")
    assert "no compiler" in (out / "build.log").read_text()
    assert set(document["kernels"]) == {KERNEL}
    assert document["device"] == FACTS["device"]
    assert set(ledger.load(results / "verified.json")[KERNEL]) == {FACTS["device"]}
    assert {p.name for p in results.iterdir()} == {
        "verified.json",
        "nvidia-h100-80gb-hbm3-lora.jsonl",
    }


def test_some_steps_leave_what_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--only and --seconds; an unknown step is refused before anything runs."""
    ran: list[tuple[list[str], float]] = []

    def record(out: Path, steps: Any, seconds: float) -> int:
        ran.append(([step.name for step in steps], seconds))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "obstacles", list)
        patch.setattr(gpu, "run", record)
        assert gpu.main([str(tmp_path)]) == 0
        assert gpu.main([str(tmp_path), "--only", "e2e,tests", "--seconds", "100"]) == 0
        with pytest.raises(SystemExit):
            gpu.main([str(tmp_path), "--only", "e2e,nothing"])
    assert ran == [([s.name for s in gpu.STEPS], gpu.TOTAL_LIMIT_S), (["tests", "e2e"], 100.0)]
    assert "nothing" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "facts", lambda: FACTS)
    for name in ("tests", "lora", "loss"):
        (tmp_path / f"{name}.jsonl").write_text(_line() if name == "tests" else "old")
    code = "import sys; open(sys.argv[1], 'w').write('new')"
    step = gpu.Step("lora", (*_python(code), "{out}/lora.jsonl"), 60)
    assert gpu.run(tmp_path, [step], tmp_path / "results") == 0
    assert (tmp_path / "loss.jsonl").read_text() == "old"
    assert (tmp_path / "lora.jsonl").read_text() == "new"
    # Tests of another run say nothing of the kernels as they are now.
    assert ledger.load(tmp_path / "results" / "verified.json") == {}


def test_no_step_starts_when_the_time_is_up(tmp_path: Path) -> None:
    step = gpu.Step("late", _python("raise SystemExit(0)"), 60)
    outcome = gpu.run_step(step, tmp_path, time.monotonic() + 1, {})
    assert (outcome.state, outcome.seconds) == ("no time left", 0.0)


def test_steps_build_test_and_measure_within_the_limit() -> None:
    names = [step.name for step in gpu.STEPS]
    # The table of ways is written before anything is measured that chooses by it.
    suites = ["ways", "table", "layer", "optim", "e2e", "loss", "block", "lora", "memory"]
    suites += ["e2e-checkpointed", "qlora"]
    assert names == ["build", "tests", "times", *suites]
    assert set(gpu.SUITES) == set(names[3:]) - {"table"}
    assert gpu.TOTAL_LIMIT_S < 540
    build = gpu.STEPS[0]
    assert build.environment["FASTFT_CUDA"] == "1"
    assert gpu.environment_for("9.0")["TORCH_CUDA_ARCH_LIST"].startswith("9.0")


def test_steps_are_commands_that_the_benchmarks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    written = []
    for step in gpu.STEPS:
        if step.name in gpu.SUITES:
            found = parse([part.replace("{layers}", "8") for part in step.command[3:]])
            assert found.device == "cuda"
            assert found.checkpointing is step.name.endswith("-checkpointed")
            assert found.suite == step.name.removesuffix("-checkpointed")
            written.append(str(found.json))
            if found.suite == "e2e":
                assert (found.model, found.rounds, found.steps) == ("llama-3.1-8b:8", 1, 5)
    assert sorted(written) == sorted(f"{{out}}/{name}.jsonl" for name in gpu.SUITES)


def test_a_model_has_the_layers_a_card_has_room_for() -> None:
    h200, h100, a100 = 150_000_000_000, 85_000_000_000, 42_000_000_000
    assert [gpu.layers_for(size) for size in (h200, h100, a100)] == [16, 8, 8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "CUDA" in done.stderr
    assert not (tmp_path / "out").exists()
