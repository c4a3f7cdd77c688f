"""The functor that csrc/cpu and csrc/cuda share, compiled for the host, against the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastft.reference import adamw as reference

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include "fastft/adamw.h"

// p g m v as hexadecimal floats in, p m v out; argv: t and the row of hyper-parameters, scale.
int main(int argc, char** argv) {
  float a[7];
  for (int i = 1; i < argc && i < 8; ++i) std::sscanf(argv[i], "%a", &a[i - 1]);
  const fastft::AdamWHyper hyper{a[1], a[2], a[3], a[4], a[5]};
  const double t = a[0];
  const auto s = fastft::adamw_scalars(hyper, std::pow(static_cast<double>(a[2]), t),
                                       std::pow(static_cast<double>(a[3]), t), a[6]);
  float p, g, m, v;
  while (std::scanf("%a %a %a %a", &p, &g, &m, &v) == 4) {
    fastft::adamw_update(p, g, m, v, s);
    std::printf("%a %a %a\n", p, m, v);
  }
}
"""

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


@pytest.mark.parametrize("scale", [1.0, 0.125, -1.0])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_one_step(step: int, scale: float, tmp_path: Path) -> None:
    program = _compile(PROGRAM, tmp_path)
    torch.manual_seed(0)
    p, g, m = (torch.randn(200) for _ in range(3))
    v = torch.rand(200)
    hyper = torch.tensor([3e-3, 0.9, 0.999, 1e-8, 0.1])
    arguments = [float(step).hex(), *(float(h).hex() for h in hyper), scale.hex()]
    rows = zip(*(t.tolist() for t in (p, g, m, v)), strict=True)
    text = "\n".join(" ".join(x.hex() for x in row) for row in rows)
    done = subprocess.run(
        [str(program), *arguments], input=text, capture_output=True, text=True, check=True
    )
    got = torch.tensor(
        [[float.fromhex(x) for x in line.split()] for line in done.stdout.splitlines()],
        dtype=torch.float64,
    ).T
    truth = [t.double() for t in (p, m, v)]
    reference.step(
        [truth[0]], [g.double() * abs(scale)], [truth[1]], [truth[2]],
        torch.tensor([step - 1.0], dtype=torch.float64), hyper.double()[None],
        torch.zeros(3, dtype=torch.float64), max_norm=0.0, maximize=scale < 0,
    )  # fmt: skip
    # Each result is a handful of float32 operations on terms no larger than these.
    eps = torch.finfo(torch.float32).eps
    for name, own, exact, start in zip("pmv", got, truth, (p, m, v), strict=True):
        size = torch.maximum(exact.abs(), start.double().abs()) + g.double().abs() * 0.1
        assert bool(((own - exact).abs() <= 4 * eps * size).all()), name


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
