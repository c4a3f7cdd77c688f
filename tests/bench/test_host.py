"""The host suite: what a layer's launches cost, without a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

from bench import host_worker
from bench.__main__ import main
from bench.stand_in import stand_in


def test_every_implementation_has_a_time(tmp_path: Path) -> None:
    file = tmp_path / "host.jsonl"
    assert main(["host", "--quick", "--rounds", "1", "--json", str(file)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    values = {(r["impl"], r["metric"]): r["value"] for r in records}
    assert len(values) == 12
    assert values["peft", "launches"] > values["fastft", "launches"] > 0
    assert values["peft", "launches"] > values["frozen", "launches"] > 0
    # A time is the difference of two depths': on a machine that others use it may be anything.
    assert all(math.isfinite(value) for value in values.values())


def test_what_does_not_run_fused_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastft

    monkeypatch.setattr(host_worker, "REPEATS", 2)
    monkeypatch.setattr(fastft, "accelerate", lambda model, **_: model)
    job = {"adapters": "float32", "dropout": 0.0, "fused": True}
    with pytest.raises(RuntimeError, match="not all of it ran fused"):
        host_worker.run(job)


def test_the_stand_in_leaves_nothing_behind() -> None:
    import triton

    before = triton.runtime.driver._active
    with stand_in():
        assert triton.runtime.driver.active.get_current_target().arch == 90
    assert triton.runtime.driver._active is before
