"""``bench.ways`` at a toy size, and the table it makes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fastft_kernels import config
from fastft_kernels import ways as table

from bench import ways
from bench.declare import Impl, Options
from bench.runner import run_suite

OPTIONS = Options(device=torch.device("cpu"), dtype=torch.bfloat16, rounds=1)
CASES = [
    ways._case("fwd", 40, 48, (64, 16), 8, 0.0),
    ways._case("bwd", 40, 48, (64, 16), 8, 0.0),
    ways._case("bwd", 40, 48, (64,), 16, 0.2),
]


def test_every_way_is_right_and_is_the_one_taken() -> None:
    suite = dataclasses.replace(ways.SUITE, cases=lambda options: CASES)
    found = run_suite(suite, OPTIONS, lambda record: None)
    assert not [r.reason for r in found if r.value is None]
    assert {r.impl for r in found} == {"frozen", "expand", "border", "gemm"}


def test_a_wrong_way_prints_no_number() -> None:
    def wrong(inputs: ways.Inputs) -> ways.Step:
        step = ways.build("expand")(inputs)

        def outputs() -> dict[str, torch.Tensor]:
            return {name: 1.1 * tensor for name, tensor in step.outputs().items()}

        return dataclasses.replace(step, outputs=outputs)

    suite = dataclasses.replace(
        ways.SUITE, cases=lambda options: CASES[:2], impls=(Impl("gemm", wrong),)
    )
    found = run_suite(suite, OPTIONS, lambda record: None)
    assert all("is wrong" in (r.reason or "") for r in found)


def test_nothing_is_chosen_on_a_cpu() -> None:
    assert ways.cases(OPTIONS) == []


def test_the_table_it_makes_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = Options(device=torch.device("cuda"), dtype=torch.bfloat16, rounds=1)
    cases = ways.cases(gpu)
    lines = []
    for number, case in enumerate(cases):
        for impl, value in (("expand", 2.0), ("border", 1.0 + number % 2), ("gemm", 1.5)):
            record = {"suite": "ways", "case": case.name, "impl": impl, "metric": "time_ms"}
            lines.append(json.dumps({**record, "value": value, "device": "X", "commit": "c"}))
    results, target = tmp_path / "ways.jsonl", tmp_path / "ways.json"
    # The run was stopped in one more case than it has ended.
    results.write_text("\n".join(lines[:-1]))
    first, last = (
        {k: v for k, v in case.facts.items() if k != "p"} for case in (cases[0], cases[-1])
    )
    old = [{"arch": "sm_80", **first}, {"arch": "sm_90", **first}, {"arch": "sm_90", **last}]
    target.write_text(json.dumps(old))
    monkeypatch.setattr(ways, "TABLE", target)
    monkeypatch.setattr(config, "for_device", lambda device: config.ARCHS[90])
    assert ways.main([str(results)]) == 0
    rows = json.loads(target.read_text())
    assert rows[:2] == [old[0], old[2]], "what was not measured anew stays"
    # Forward, each case also speaks for dropout.
    forward = sum(case["direction"] == "fwd" for case in cases)
    assert len(rows) == 2 + len(cases) - 1 + forward
    monkeypatch.setattr(table, "TABLE", target)
    table._rows.cache_clear()
    table._picked.cache_clear()
    try:
        case = cases[1]
        shape = {k: v for k, v in case.facts.items() if k != "p"}
        shape = table.Shape(**{**shape, "widths": tuple(shape["widths"])})
        assert table.pick("sm_90", shape, table.WAYS) == "gemm"
        assert table.pick("sm_90", shape, ("expand", "border")) == "expand"
    finally:
        table._rows.cache_clear()
        table._picked.cache_clear()
    results.write_text("")
    assert ways.main([str(results)]) == 1
    assert ways.main([]) == 2
