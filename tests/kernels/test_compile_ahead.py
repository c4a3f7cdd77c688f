"""What the GPU tests launch is compiled where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_of_gpu_tests_are_compiled_into_a_cache(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "tests.gpu.compile_ahead", str(tmp_path / "cache")]
    command += ["-k", "test_glu and llama and not time"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Forward and backward of one case; their C launchers too.
    assert done.stdout.startswith("2 kernels for sm_90")
    assert len(list(tmp_path.rglob("_glu_*_kernel.cubin"))) == 2
    assert list(tmp_path.rglob("*.so")) or list(tmp_path.rglob("*launcher*"))
