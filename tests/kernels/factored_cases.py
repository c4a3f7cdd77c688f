"""Cases of ``adafactor_step``, declared once: proved on the CPU, through CUDA sources run on the
host, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.reference import adafactor_step as reference
from tests.kernels.bounds import assert_as_accurate
from tests.kernels.step_cases import BF16, F16, F32, SEED, assert_alike

__all__ = ["FACTORED_CASES", "FactoredCase", "FactoredState", "assert_factored"]

CPU = torch.device("cpu")
Shapes = Sequence[tuple[tuple[int, ...], torch.dtype, torch.dtype]]
# Several tiles each way, over a thousand rows or columns, batches, vectors, one row, one column,
# one number, nothing.
MIXED: Shapes = (
    ((300, 700), F32, F32), ((2500, 16), F32, F32), ((7,), F32, F32), ((16, 3000), F32, BF16),
    ((0, 5), F32, F32), ((3, 2, 40, 50), F32, F32), ((), F32, F32), ((1, 9), F32, F32),
    ((9, 1), F32, F32), ((40001,), F32, F32), ((130, 301), BF16, BF16), ((5,), BF16, F32),
    ((3, 129, 257), F16, F16), ((4, 4), BF16, BF16),
)  # fmt: skip
# For threads that are emulated.
SMALL: Shapes = (
    ((150, 270), F32, F32), ((1100, 3), F32, F32), ((7,), F32, F32), ((2, 1030), F32, BF16),
    ((0, 5), F32, F32), ((2, 3, 5), F32, F32), ((), F32, F32), ((33000,), F32, F32),
    ((40, 301), BF16, BF16), ((9, 1), F16, F16),
)  # fmt: skip


@dataclass
class FactoredState:
    """The arguments of a step."""

    tensors: ops.FactoredTensors
    grads: list[Tensor]
    hyper: Tensor
    stats: Tensor

    def copy(self, dtype: torch.dtype | None = None) -> FactoredState:
        """The same numbers elsewhere, parameters, gradients and moments in ``dtype``."""

        def convert(tensors: Sequence[Tensor | None]) -> list[Any]:
            return [None if t is None else t.to(dtype or t.dtype, copy=True) for t in tensors]

        old = self.tensors
        new = ops.FactoredTensors(
            convert(old.params),
            [s.clone() for s in old.steps],
            convert(old.rows),
            convert(old.columns),
            [None if c is None else c.clone() for c in old.compensation],
            old.rounding,
            list(old.keys),
        )
        return FactoredState(new, convert(self.grads), self.hyper.clone(), self.stats.clone())

    def named(self) -> dict[str, Tensor]:
        """Parameters, moments and step counts."""
        t = self.tensors
        found = {f"p{i}": p for i, p in enumerate(t.params)}
        found |= {f"row{i}": r for i, r in enumerate(t.rows) if r is not None}
        found |= {f"column{i}": c for i, c in enumerate(t.columns)}
        return found | {f"step{i}": s for i, s in enumerate(t.steps)}


@dataclass(frozen=True)
class FactoredCase:
    """How bfloat16 is rounded, and what a step is asked for. eps1 is given: the default depends on
    the dtype, which differs in float64."""

    rounding: str = "nearest"
    shapes: Shapes = MIXED
    max_norm: float = 0.0
    sign: float = 1.0
    eps1: float = 1e-4
    threshold: float = 1.0

    def make(self, device: torch.device = CPU) -> FactoredState:
        """Tensors with a hyper-parameter row each, moments as after some steps."""
        generator = torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        params = [normal(shape, dtype) for shape, dtype, _ in self.shapes]
        rows = [
            normal((*shape[:-1], 1), F32, 0.1).square() if len(shape) > 1 else None
            for shape, *_ in self.shapes
        ]
        columns = [
            normal((*shape[:-2], 1, shape[-1]) if len(shape) > 1 else shape, F32, 0.1).square()
            for shape, *_ in self.shapes
        ]
        compensation = [
            normal(shape, BF16, 1e-3) if self.rounding == "compensated" and dtype == BF16 else None
            for shape, dtype, _ in self.shapes
        ]
        n = len(params)
        steps = [torch.full((), 3.0 * i, device=device) for i in range(n)]
        hyper = [
            [1e-2 * (i + 1), 0.1 * i, self.threshold, self.eps1, 1e-3, -0.8, self.sign]
            for i in range(n)
        ]
        tensors = ops.FactoredTensors(
            params, steps, rows, columns, compensation, self.rounding, [7 * i + 1 for i in range(n)]
        )
        grads = [normal(shape, dtype) for shape, _, dtype in self.shapes]
        stats = ops.new_stats(torch.device(device))
        return FactoredState(tensors, grads, torch.tensor(hyper, device=device), stats)


Stepper = Callable[..., None]


def assert_factored(
    case: FactoredCase, step: Stepper, device: torch.device = CPU
) -> dict[str, Any]:
    """Steps as ``step(tensors, grads, hyper, stats, max_norm=, needs_norm=, seed=)`` does are as
    close to float64 as plain torch's in the same dtypes; rounded at random, they are plain torch's
    own. Returns (own, plain, truth) of what was compared."""
    own = case.make(device)
    plain, truth = own.copy(), own.copy(torch.float64)
    for _ in range(2 if case.rounding == "nearest" else 1):
        for state, run in ((own, step), (plain, reference.step), (truth, reference.step)):
            run(
                state.tensors, state.grads, state.hyper, state.stats,
                max_norm=case.max_norm, needs_norm=True, seed=SEED,
            )  # fmt: skip
    got, expected, exact = own.named(), plain.named(), truth.named()
    for name, value in got.items():
        narrow = name[0] == "p" and value.dtype == BF16
        if name.startswith("step"):
            assert torch.equal(value, expected[name]), name
        elif narrow and case.rounding != "nearest":
            assert_alike(name, value, expected[name])
        else:
            assert_as_accurate(name, value, expected[name], exact[name].double())
    torch.testing.assert_close(own.stats[:3].double(), plain.stats[:3].double(), rtol=1e-5, atol=0)
    return {"own": got, "plain": expected, "truth": exact}


FACTORED_CASES: dict[str, FactoredCase] = {
    "adafactor": FactoredCase(),
    "adafactor-clip": FactoredCase(max_norm=1.0),
    "adafactor-maximize": FactoredCase(sign=-1.0, threshold=1.5),
    "adafactor-tiny-eps": FactoredCase(eps1=1e-30),
    "adafactor-stochastic": FactoredCase("stochastic", max_norm=1.0),
    "adafactor-compensated": FactoredCase("compensated"),
}
