"""The conversions that csrc/cpu and csrc/cuda share, compiled for the host, against torch's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

CONVERSIONS = r"""
#include <cstdio>
#include "fastft/numeric.h"

// Bits of a float in, bits of it as bfloat16 and float16 out, and of those two widened again.
int main() {
  unsigned bits;
  while (std::scanf("%x", &bits) == 1) {
    const float value = fastft::float_from_bits(bits);
    const auto b = fastft::from_float<fastft::bfloat16>(value);
    const auto h = fastft::from_float<fastft::float16>(value);
    std::printf("%x %x %x %x\n", b.bits, h.bits, fastft::float_bits(fastft::to_float(b)),
                fastft::float_bits(fastft::to_float(h)));
  }
}
"""


def _compile(text: str, folder: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = folder / "main.cpp", folder / "main"
    source.write_text(text)
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def test_conversions_equal_torch(tmp_path: Path) -> None:
    program = _compile(CONVERSIONS, tmp_path)
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (60_000,)).to(torch.int32)
    # Around the edges of float16: overflow, the smallest normal, subnormals, ties, zero.
    edges = torch.tensor([0.0, 65504.0, 65519.99, 65520.0, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8, 1.5])
    values = torch.cat([bits.view(torch.float32), edges, -edges])
    values = torch.cat([values, torch.randn(20_000) * 1e-6, torch.randn(20_000)])
    values = torch.where(values.isnan(), torch.tensor(float("nan")), values)
    text = "\n".join(f"{b & 0xFFFFFFFF:x}" for b in values.view(torch.int32).tolist())
    done = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True)
    rows = [[int(x, 16) for x in line.split()] for line in done.stdout.splitlines()]
    table = torch.tensor(rows)
    for column, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        narrow = values.to(dtype)
        ours = table[:, column].to(torch.int16).view(dtype)
        widened = table[:, column + 2].to(torch.int32).view(torch.float32)
        for own, expected in ((ours, narrow), (widened, narrow.float())):
            equal = (own == expected) | (own.isnan() & expected.isnan())
            assert bool(equal.all()), values[~equal][:5]
