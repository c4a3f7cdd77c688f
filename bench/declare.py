"""What a benchmark is: a suite of cases, their implementations and the metrics read from them.

A suite is data. The runner knows nothing of LoRA or of losses: it builds the inputs of a case, lets
every implementation prove its result, times the survivors in turn and reads the metrics.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """How to run: the same for every suite of a run."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    quick: bool = False
    model: str = "default"
    batch: int = 4
    tokens: int = 512
    steps: int = 2
    optimizer: bool = True
    checkpointing: bool = False
    impls: tuple[str, ...] = ()

    def left_out(self, impl: str) -> str | None:
        """The reason an implementation is not run because others were asked for."""
        return "left out: --impls" if self.impls and impl not in self.impls else None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One line of a table: a name for people and the sizes it stands for."""

    name: str
    facts: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.facts[key]


@dataclass
class Step:
    """A built implementation.

    run:     the timed work, on inputs that already exist.
    outputs: runs the same work once and returns its results, for the check before the timing.
    mask:    seed -> which inputs dropout kept; only where an implementation has dropout.
    copies:  bytes of the inputs that building copied: no part of the work's own memory.
    """

    run: Callable[[], None]
    outputs: Callable[[], dict[str, torch.Tensor]]
    mask: Callable[[int], torch.Tensor] | None = None
    copies: int = 0


@dataclass(frozen=True)
class Impl:
    """A way to do the work of a case.

    package:       what must be importable, if anything beyond torch.
    not_here:      (case, options) -> why this implementation does not apply, or None.
    """

    name: str
    build: Callable[[Any], Step]
    package: str | None = None
    not_here: Callable[[Case, Options], str | None] = lambda case, options: None


@dataclass
class Measured:
    """Times in seconds, one per round (rounds of all implementations align), and peak memory; on a
    GPU, where a suite asks, how many launches a step is and how long the host takes for them."""

    times: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    host_seconds: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)


@dataclass(frozen=True)
class Metric:
    """A number read from the measurements: (own, by implementation, case) -> value, or None."""

    name: str
    unit: str
    higher_is_better: bool
    compute: Callable[[Measured, Mapping[str, Measured], Case], float | None]


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    prepare: builds the inputs of a case.
    check:   (inputs, step) -> None, or what is wrong with the result; it compares with float64.
    tiny:    a case of the same kind, small; it loads and warms code before memory is measured.
    preload: modules the fork server of bench.peak imports once for all its children.
    """

    name: str
    cases: Callable[[Options], Sequence[Case]]
    impls: Sequence[Impl]
    metrics: Sequence[Metric]
    prepare: Callable[[Case, Options], Any]
    check: Callable[[Any, Step], str | None]
    tiny: Callable[[Case], Case] | None = None
    measures_memory: bool = False
    counts_launches: bool = False
    preload: tuple[str, ...] = ()

    def impl(self, name: str) -> Impl:
        return next(impl for impl in self.impls if impl.name == name)


def time_ms(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Median time of a step in milliseconds."""
    return own.median * 1e3


def peak_bytes(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Memory above the inputs at the peak of the first step."""
    return None if own.peak_bytes is None else float(own.peak_bytes)
