"""The e2e suite without its processes: who is judged by what, and when a number is given out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import e2e
from bench.declare import Options
from bench.records import Record


class Workers:
    """Stands in for bench.worker: errors and failures by implementation, and what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: dict[str, float] = {}
        self.failing: set[str] = set()
        self.events: list[tuple[str, str]] = []
        monkeypatch.setattr(e2e, "run_worker", self.run_worker)
        monkeypatch.setattr(e2e, "missing", lambda package: None)

    def run_worker(self, module: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        name = job.get("impl", job["role"])
        self.events.append(("run", name))
        if name in self.failing:
            raise RuntimeError("out of memory")
        errors = {"gradient": self.errors.get(name, 1e-2)} if job.get("check") else {}
        return {"step_seconds": [0.5], "peak_extra_bytes": 7, "losses": [1.0], "errors": errors,
                "detail": {}}  # fmt: skip

    def measure(self, dtype: torch.dtype, rounds: int = 1) -> dict[str, Record]:
        options = Options(torch.device("cpu"), dtype, rounds, model="random")

        def emit(record: Record) -> None:
            if record.metric == "tokens_per_s":
                self.events.append(("number" if record.value else "none", record.impl))

        found = e2e.run(options, emit)
        return {r.impl: r for r in found if r.metric == "tokens_per_s"}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_number_waits_for_its_last_round_and_for_the_yardstick(
    workers: Workers, rounds: int
) -> None:
    workers.errors["fastft"] = 5e-2
    found = workers.measure(torch.bfloat16, rounds)
    assert set(found) == {impl.name for impl in e2e.IMPLS}
    assert "gradient is wrong" in (found["fastft"].reason or "")
    first = [("run", "frozen"), ("run", "peft"), ("run", "peft-bf16")]
    numbers = [("number", name) for _, name in first]
    # With one round three wait for peft-bf16; with two each ends with its own second.
    expected = first + numbers if rounds == 1 else [e for p in zip(first, numbers) for e in p]
    compiled = "peft-bf16+torch.compile"
    expected += [("run", compiled), ("number", compiled), ("none", "peft+torch.compile")]
    expected += [("none", "peft-bf16+liger")]
    expected += [("run", "fastft")] if rounds == 1 else []  # wrong in the first: not run again
    assert workers.events[-len(expected) - 1 :] == [*expected, ("none", "fastft")]


def test_plain_peft_is_the_yardstick_in_float32(workers: Workers) -> None:
    workers.failing = {"frozen"}
    found = workers.measure(torch.float32)
    assert found["frozen"].reason == "failed: out of memory"
    assert found["peft"].value == found["fastft"].value == 4 * 512 / 0.5
    assert workers.events[1:5] == [
        ("run", "frozen"), ("run", "peft"), ("none", "frozen"), ("number", "peft"),
    ]  # fmt: skip
    # Where it fails itself nobody's error may exceed rounding.
    workers.failing = {"peft"}
    found = workers.measure(torch.float32)
    assert "gradient is wrong" in (found["fastft"].reason or "")
