"""Builds a source of csrc/cuda for the CPU: each thread of each block, by ``cuda_on_host.h``."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["build"]

ROOT = Path(__file__).resolve().parents[2]


def build(name: str, folder: Path, launches: int) -> ctypes.CDLL:
    """csrc/cuda/``name``.cu, which has so many launches, as a library of this machine; skips the
    test where no compiler can make one."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = (ROOT / f"csrc/cuda/{name}.cu").read_text()
    text = text.replace("#include <cuda_runtime.h>", '#include "cuda_on_host.h"')
    # kernel<<<blocks, threads, 0, queue>>>(args) is no C++.
    text, found = re.subn(
        r"([\w<>, ]+?)\s*<<<(\w+), (\w+), 0, queue>>>\(", r"host::launch(\1, \2, \3, ", text
    )
    assert found == launches
    source, out = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(text)
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread"]
    command += [f"-I{p}" for p in (Path(__file__).parent, ROOT / "csrc/include", ROOT / "csrc")]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    if "unrecognized" in done.stderr or "barrier: No such file" in done.stderr:
        pytest.skip(f"{compiler} knows no C++20")
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(out))
