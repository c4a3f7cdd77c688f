"""Runs the tests of ``interpreted/`` under TRITON_INTERPRET=1, each file in a process of its own.

Triton decides at import whether kernels are interpreted, so no other process can run them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastft_kernels import OPS

from tests.kernels.block_cases import BLOCK_CASES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def _run(file: Path, **more: str) -> str:
    """What pytest prints of a file whose tests all pass."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **more,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"(\d+) passed", done.stdout) is not None, done.stdout
    return done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_interpreted(file: Path) -> None:
    assert "skipped" not in _run(file)


def test_rehearsal_of_the_gpu_tests(tmp_path: Path) -> None:
    """Those that need no GPU's clock, streams or memory run as they will there, and leave lines of
    which the ledger could make entries."""
    lines = tmp_path / "tests.jsonl"
    gpu = ROOT / "tests" / "gpu" / "test_gpu_ops.py"
    _run(gpu, FASTFT_REHEARSAL="1", FASTFT_GPU_REPORT=str(lines))
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    triton = [one for one in found if one["kernel"].startswith("triton/")]
    passed = [one for one in triton if one["outcome"] == "passed"]
    assert len(passed) > 100
    assert {one["kernel"].split("/")[1] for one in passed} == set(OPS) - {"lora_grouped_linear"}


def test_every_operation_is_interpreted() -> None:
    covered = {file.stem.removeprefix("test_") for file in FILES}
    covered |= {case.op for case in BLOCK_CASES.values()}  # interpreted/test_block.py
    assert set(OPS) <= covered, f"no interpreted test for {set(OPS) - covered}"
