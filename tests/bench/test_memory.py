"""The memory suite without its processes: what proves what, and when a number is given out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import memory
from bench.declare import Options
from bench.records import Record

TRUTH = torch.arange(1.0, 9.0)


class Workers:
    """Stands in for bench.worker: gradients and failures by implementation, and what was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.failing: set[str] = set()
        self.events: list[tuple[str, str, int]] = []
        by_facts = {(i.fused, i.policy, i.way): i.name for i in memory.IMPLS}

        def run_worker(module: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
            name = by_facts[job["fused"], job["policy"], job["way"]]
            self.events.append(("run", name, job["tokens"]))
            if name in self.failing:
                raise RuntimeError("out of memory")
            if job["gradient"]:
                torch.save(self.gradients.get(name, TRUTH), Path(job["gradient"]))
            return {"step_seconds": [0.5], "peak_bytes": 7}

        monkeypatch.setattr(memory, "run_worker", run_worker)
        monkeypatch.setattr(memory, "missing", lambda package: None)

    def measure(self, rounds: int = 1, quick: bool = True) -> list[Record]:
        options = Options(torch.device("cpu"), torch.float32, rounds, quick)

        def emit(record: Record) -> None:
            self.events.append((record.metric, record.impl, 0))

        return memory.run(options, emit)

    def reasons(self) -> dict[str, str | None]:
        return {r.impl: r.reason for r in self.measure() if r.metric == "time_ms"}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


def test_a_number_is_given_out_once_its_last_round_is_over(workers: Workers) -> None:
    found = workers.measure(rounds=2)
    names = [impl.name for impl in memory.IMPLS]
    ran = [name for kind, name, _ in workers.events if kind == "run"]
    here = [impl.name for impl in memory.IMPLS if not impl.cuda_only]
    assert ran == here * 2
    last = [(kind, name) for kind, name, _ in workers.events[len(here) :]]
    kinds = ("run", "time_ms", "peak_bytes")
    assert last == [(k, name) for name in names for k in kinds if k != "run" or name in here]
    values = {(r.impl, r.metric): r.value for r in found}
    assert len(values) == len(found) == 2 * len(names)
    assert values["fastft-lora", "time_ms"] == 500
    assert values["fastft-lora", "peak_bytes"] == 7
    assert values["fastft-offload", "time_ms"] is None


def test_what_goals_are_stated_for_comes_first(workers: Workers) -> None:
    assert [size.tokens for size in memory.GPU] == [2048, 16384, 8192, 512, 32768]
    names = [impl.name for impl in memory.IMPLS]
    assert names[:2] == ["peft", "fastft"]
    assert set(names[2:6]) == {"fastft-none", "fastft-lora", "fastft-full", "fastft-offload"}
    workers.measure(quick=False)
    tokens = [size for kind, _, size in workers.events if kind == "run"]
    assert list(dict.fromkeys(tokens)) == list(dict.fromkeys(size.tokens for size in memory.CPU))


def test_a_wrong_gradient_takes_the_number(workers: Workers) -> None:
    assert set(workers.reasons().values()) == {None, "does not apply: the host is the device"}
    workers.gradients["fastft-full"] = TRUTH.nextafter(torch.tensor(9.0))
    workers.gradients["peft+checkpoint"] = TRUTH * 1.2
    reasons = workers.reasons()
    assert reasons["fastft-full"] is not None
    assert "bit for bit" in reasons["fastft-full"]
    assert reasons["peft+checkpoint"] == "wrong: gradients differ from PEFT's by 2.00e-01"
    assert reasons["fastft"] is reasons["fastft-lora"] is None
    # A policy with the bits of a fastft that is wrong is wrong.
    workers.gradients = {i.name: -TRUTH for i in memory.IMPLS if i.fused}
    reasons = workers.reasons()
    assert reasons["fastft"] == reasons["fastft-lora"]
    assert reasons["fastft"] == "wrong: gradients differ from PEFT's by 2.00e+00"
    assert reasons["peft"] is None


def test_what_cannot_be_proved_gets_no_number(workers: Workers) -> None:
    workers.failing = {"fastft"}
    reasons = workers.reasons()
    assert reasons["fastft"] == "failed: out of memory"
    assert reasons["fastft-lora"] == (
        "not proved: fastft, which it is compared with, gave no gradients"
    )
    assert reasons["peft+checkpoint"] is None
    workers.failing = {"peft"}
    without = set(workers.reasons().values())
    assert without == {
        "failed: out of memory",
        "not proved: peft, which it is compared with, gave no gradients",
        "does not apply: the host is the device",
    }
