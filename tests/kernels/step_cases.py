"""Cases of ``optimizer_step``, declared once: proved on the CPU, interpreted, through CUDA sources
run on the host, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.ops.optimizer_step import RULES
from fastft.reference import optimizer_step as reference
from tests.kernels.bounds import assert_as_accurate

__all__ = ["MIXED", "STEP_CASES", "StepCase", "StepState", "assert_alike", "assert_step"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
# Over a chunk, under a vector, empty, one element, exactly a chunk, mixed and 16-bit dtypes.
MIXED = (
    (20001, F32, F32), (5, BF16, BF16), (0, F32, F32), (1, F32, F32), (8192, F32, F32),
    (777, BF16, F32), (63, F16, F16), (4097, BF16, BF16),
)  # fmt: skip
SEED = 0x1234_5678_9ABC


@dataclass
class StepState:
    """The arguments of a step."""

    tensors: ops.StepTensors
    grads: list[Tensor]
    hyper: Tensor
    stats: Tensor

    def copy(self, dtype: torch.dtype | None = None) -> StepState:
        """The same numbers elsewhere, parameters, gradients and float32 states in ``dtype``."""

        def convert(t: Tensor | None, wide: bool = True) -> Tensor | None:
            if t is None or not wide or dtype is None or t.dtype == torch.uint8:
                return None if t is None else t.clone()
            return t.to(dtype, copy=True)

        old = self.tensors
        new = ops.StepTensors(
            old.rule,
            [convert(p) for p in old.params],
            [convert(s, False) for s in old.steps],
            [[convert(s) for s in state] for state in old.states],
            [[convert(a, False) for a in absmax] for absmax in old.absmax],
            [convert(c, False) for c in old.compensation],
            old.rounding,
            list(old.keys),
            list(old.offsets),
        )
        return StepState(
            new, [convert(g) for g in self.grads], self.hyper.clone(), self.stats.clone()
        )

    def named(self) -> dict[str, Tensor]:
        """Parameters, states and step counts, 8-bit states as what they stand for."""
        t = self.tensors
        found = {f"p{i}": p for i, p in enumerate(t.params)}
        found |= {f"step{i}": s for i, s in enumerate(t.steps)}
        for k, (states, scales) in enumerate(zip(t.states, t.absmax, strict=True)):
            for i, (state, absmax) in enumerate(zip(states, scales, strict=True)):
                if absmax is not None:
                    state = reference.decode8(state, absmax, k == 0, torch.float32)
                found[f"state{k + 1}_{i}"] = state
        return found


@dataclass(frozen=True)
class StepCase:
    """A rule, how its states are kept, and how bfloat16 is rounded."""

    rule: str
    state_bits: int = 32
    rounding: str = "nearest"
    shapes: Sequence[tuple[int, torch.dtype, torch.dtype]] = MIXED
    max_norm: float = 0.0
    sign: float = 1.0
    extra: float = 0.0
    offset: int = 0

    def make(self, device: torch.device = CPU) -> StepState:
        """Tensors with a hyper-parameter row each, states as after some steps."""
        generator = torch.Generator().manual_seed(0)

        def normal(size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).to(dtype).to(device)

        n = len(self.shapes)
        params = [normal(size, dtype) for size, dtype, _ in self.shapes]
        states: list[list[Tensor]] = []
        absmax: list[list[Tensor | None]] = []
        for k in range(RULES[self.rule].states):
            values = [normal(size, F32, 0.1) for size, *_ in self.shapes]
            values = [v if k == 0 else v.square() for v in values]
            scales: list[Tensor | None] = [None] * n
            if self.state_bits == 8:
                pairs = [reference.encode8(v, k == 0) for v in values]
                values, scales = [c for c, _ in pairs], [a for _, a in pairs]
            elif self.state_bits == 16:
                values = [v.to(BF16) for v in values]
            states.append(values)
            absmax.append(scales)
        compensation = [
            normal(size, BF16, 1e-3) if self.rounding == "compensated" and dtype == BF16 else None
            for size, dtype, _ in self.shapes
        ]
        steps = [torch.full((), 10.0 * i, device=device) for i in range(n)]
        hyper = [
            [1e-2 / (i + 1), 0.9, 0.99, 1e-8, 0.1 * i, self.extra, self.sign] for i in range(n)
        ]
        tensors = ops.StepTensors(
            self.rule, params, steps, states, absmax, compensation, self.rounding,
            [7 * i + 1 for i in range(n)], [self.offset * i for i in range(n)],
        )  # fmt: skip
        return StepState(
            tensors,
            [normal(size, dtype) for size, _, dtype in self.shapes],
            torch.tensor(hyper, device=device),
            ops.new_stats(torch.device(device)),
        )


Stepper = Callable[..., None]


def assert_step(case: StepCase, step: Stepper, device: torch.device = CPU) -> dict[str, Any]:
    """Steps as ``step(tensors, grads, hyper, stats, max_norm=, needs_norm=, seed=)`` does are as
    close to float64 as plain torch's in the same dtypes; rounded at random, they are plain torch's
    own. Returns (own, plain, truth) of what was compared."""
    own = case.make(device)
    plain, truth = own.copy(), own.copy(torch.float64)
    rounds_alike = case.state_bits != 32 or case.rounding != "nearest"
    for _ in range(1 if rounds_alike else 2):
        for state, run in ((own, step), (plain, reference.step), (truth, reference.step)):
            run(
                state.tensors, state.grads, state.hyper, state.stats,
                max_norm=case.max_norm, needs_norm=True, seed=SEED,
            )  # fmt: skip
    got, expected, exact = own.named(), plain.named(), truth.named()
    for name, value in got.items():
        index = int(name.split("_")[-1].removeprefix("p").removeprefix("step"))
        narrow = name[0] == "p" and own.tensors.params[index].dtype == BF16
        if name.startswith("step"):
            assert torch.equal(value, expected[name]), name
        elif (narrow and case.rounding != "nearest") or (
            name.startswith("state") and case.state_bits != 32
        ):
            assert_alike(name, value, expected[name])
        else:
            assert_as_accurate(name, value, expected[name], exact[name].double())
    if case.rounding == "compensated":
        pairs = zip(own.tensors.params, own.tensors.compensation, truth.tensors.params, strict=True)
        for i, (p, rest, whole) in enumerate(pairs):
            if rest is not None and p.numel():
                error = (p.double() + rest.double() - whole).abs().max() / whole.abs().max()
                assert error < 2**-16, f"p{i} with its rest: {error:.2e}"
    torch.testing.assert_close(own.stats[:3].double(), plain.stats[:3].double(), rtol=1e-5, atol=0)
    return {"own": got, "plain": expected, "truth": exact}


def assert_alike(name: str, value: Tensor, expected: Tensor) -> None:
    """Equal but where a number lies on the border of two roundings: few, and by one rounding."""
    # Scales may differ by a rounding of float32.
    differs = (value.float() - expected.float()).abs() > 1e-5 * expected.float().abs()
    assert differs.sum() <= 1 + differs.numel() * 1e-3, f"{name}: {differs.sum()} differ"
    if value.numel():
        # Neighbours in the dynamic map are up to 0.014 of a block's largest apart.
        spacing = 0.02 * float(expected.abs().max())
        assert float((value.float() - expected.float()).abs().max()) <= spacing, name


STEP_CASES: dict[str, StepCase] = {
    "adamw": StepCase("adamw"),
    "adamw-clip": StepCase("adamw", max_norm=1.0),
    "adamw-no-clip-needed": StepCase("adamw", max_norm=1e6),
    "adamw-maximize": StepCase("adamw", max_norm=1.0, sign=-1.0),
    "adamw-8bit": StepCase("adamw", 8, max_norm=1.0),
    "adamw-8bit-stochastic": StepCase("adamw", 8, "stochastic"),
    "adamw-stochastic": StepCase("adamw", 32, "stochastic", offset=1003),
    "adamw-compensated": StepCase("adamw", 32, "compensated"),
    "adamw-16bit": StepCase("adamw", 16, "stochastic", max_norm=1.0, offset=1003),
    "adamw-16bit-compensated": StepCase("adamw", 16, "compensated"),
    "lion": StepCase("lion"),
    "lion-8bit": StepCase("lion", 8, "stochastic", max_norm=1.0, offset=8),
    "sgd": StepCase("sgd", max_norm=1.0),
    "sgd-nesterov": StepCase("sgd", extra=1.0),
    "sgd-8bit": StepCase("sgd", 8),
    "sgd-16bit": StepCase("sgd", 16, extra=1.0, offset=8),
    "lion-16bit": StepCase("lion", 16, "stochastic"),
    "schedule-free": StepCase("schedule_free", extra=0.25),
    "muon": StepCase("muon", max_norm=1.0),
    "muon-nesterov": StepCase("muon", extra=1.0, sign=-1.0),
    "schedule-free-stochastic": StepCase("schedule_free", 32, "stochastic", extra=0.25),
}
