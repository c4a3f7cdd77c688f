"""GPU tests: skipped with a reason where there is no GPU, reported to bench.gpu where there is.

With FASTFT_REHEARSAL set, under Triton's interpreter, those that need no GPU of their own run on
the CPU (tests/kernels/test_interpreted.py): a GPU's time is not for finding a test's mistakes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

REHEARSAL = bool(os.environ.get("FASTFT_REHEARSAL"))
COMPILE_AHEAD = bool(os.environ.get("FASTFT_COMPILE_AHEAD"))  # see compile_ahead.py
if REHEARSAL:
    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()
_OBSERVED = pytest.StashKey["Observed"]()


@dataclass
class Observed:
    """What a test measured of its kernel."""

    error: dict[str, float] = field(default_factory=dict)
    time_ms: dict[str, float] = field(default_factory=dict)

    def saw(self, name: str, error: float) -> None:
        self.error[name] = max(error, self.error.get(name, 0.0))


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for what nothing else can do: its clock, streams, graphs, large cases."""
    if COMPILE_AHEAD:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: run `make gpu` on a machine that has one")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU; in a rehearsal the CPU."""
    return torch.device("cpu") if REHEARSAL else request.getfixturevalue("gpu")


@pytest.fixture
def observed(request: pytest.FixtureRequest) -> Observed:
    """Where a test puts errors and times for the ledger."""
    return request.node.stash.setdefault(_OBSERVED, Observed())


def _write(item: pytest.Item, outcome: str, seen: Observed) -> None:
    """A line for a test of a kernel in the file bench.gpu names."""
    path = os.environ.get("FASTFT_GPU_REPORT")
    kernel = getattr(getattr(item, "callspec", None), "params", {}).get("kernel")
    if path and kernel:
        line = {
            "kernel": kernel,
            "test": item.nodeid,
            "outcome": outcome,
            "error": seen.error,
            "time_ms": seen.time_ms,
        }
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """A test that never ends, because the time is up, is missed."""
    for item in session.items:
        _write(item, "collected", Observed())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """How each test of a kernel ended."""
    report: Any = yield
    # A test ends in its call; one that never got so far ends in its setup.
    if report.when == "call" or (report.when == "setup" and not report.passed):
        # What a backend does not offer says nothing of the kernel it has.
        not_offered = report.skipped and "not offered" in str(report.longrepr)
        outcome = "not offered" if not_offered else report.outcome
        _write(item, outcome, item.stash.get(_OBSERVED, Observed()))
    return report
