"""The rules of a benchmark: proved before timed, absent ones named, one JSON object a line."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from bench import checks, e2e, records, report
from bench.declare import Case, Impl, Measured, Metric, Options, Step, Suite, time_ms
from bench.runner import interleave, run_suite

OPTIONS = Options(device=torch.device("cpu"), dtype=torch.float32, rounds=3)
KEYS = {
    "suite": str,
    "case": str,
    "impl": str,
    "metric": str,
    "value": float,
    "unit": str,
    "higher_is_better": bool,
    "device": str,
    "commit": str,
    "versions": dict,
    "dtype": str,
}


class Counted:
    """An implementation of x -> 2 x with an error, that counts how often it was timed."""

    def __init__(self, name: str, error: float = 0.0, **facts: object) -> None:
        self.calls = 0
        self.error = error
        self.impl = Impl(name, self.build, **facts)  # type: ignore[arg-type]

    def build(self, x: torch.Tensor) -> Step:
        def run() -> None:
            self.calls += 1

        return Step(run, lambda: {"y": 2 * x + self.error})


def raises(x: torch.Tensor) -> Step:
    raise OSError("no such device")


def suite_of(*impls: Impl) -> Suite:
    def check(x: torch.Tensor, step: Step) -> str | None:
        return checks.compare(step.outputs(), {"y": 2 * x.double()}, {"y": 2 * x})

    return Suite(
        name="toy",
        cases=lambda options: [Case("eight", {"n": 8})],
        impls=impls,
        metrics=(Metric("time_ms", "ms", False, time_ms),),
        prepare=lambda case, options: torch.linspace(1.0, 2.0, case["n"]),
        check=check,
    )


def test_every_line_has_the_stated_keys() -> None:
    seen: list[str] = []
    run_suite(suite_of(Counted("right").impl), OPTIONS, lambda r: seen.append(r.to_json()))
    assert len(seen) == 1
    found = json.loads(seen[0])
    for key, kind in KEYS.items():
        assert isinstance(found[key], kind), key
    assert "\n" not in seen[0]
    assert found["versions"]["torch"] == torch.__version__
    assert found["dtype"] == "float32"


def test_a_wrong_result_prints_no_number_and_is_not_timed() -> None:
    right, wrong, nan = Counted("right"), Counted("wrong", 1e-3), Counted("nan", math.nan)
    found = run_suite(suite_of(right.impl, wrong.impl, nan.impl), OPTIONS, lambda r: None)
    by_impl = {record.impl: record for record in found}
    assert by_impl["right"].value is not None
    assert right.calls > OPTIONS.rounds
    for name, impl in (("wrong", wrong), ("nan", nan)):
        assert by_impl[name].value is None
        assert "y is wrong" in (by_impl[name].reason or "")
        assert impl.calls == 0


def test_missing_failing_and_unfit_peers_are_named() -> None:
    there = Counted("there")
    absent = Counted("absent", package="fastft_no_such_package")
    unfit = Counted("unfit", not_here=lambda case, options: "does not apply: toy")
    broken = Impl("broken", raises)
    suite = suite_of(there.impl, absent.impl, unfit.impl, broken)
    found = run_suite(suite, OPTIONS, lambda r: None)
    reasons = {record.impl: record.reason for record in found if record.value is None}
    assert "fastft_no_such_package is not installed" in (reasons["absent"] or "")
    assert reasons["unfit"] == "does not apply: toy"
    assert reasons["broken"] == "failed: OSError: no such device"
    assert set(reasons) == {"absent", "unfit", "broken"}
    assert absent.calls == unfit.calls == 0

    screen = io.StringIO()
    report.show(found, Console(file=screen, width=200))
    for name in ("absent", "unfit", "broken"):
        assert f"no number for {name}" in screen.getvalue()


def test_impls_left_out_are_named() -> None:
    a, b = Counted("a"), Counted("b")
    options = dataclasses.replace(OPTIONS, impls=("a",))
    found = run_suite(suite_of(a.impl, b.impl), options, lambda r: None)
    assert {r.impl: r.reason for r in found} == {"a": None, "b": "left out: --impls"}


def test_rounds_take_turns() -> None:
    order: list[str] = []

    def step(name: str) -> Step:
        return Step(lambda: order.append(name), dict)

    clock_once = {"a": step("a"), "b": step("b")}
    measured = interleave(clock_once, OPTIONS)
    assert [len(m.times) for m in measured.values()] == [3, 3]
    changes = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Warm-up a b, then the rounds a b, b a, a b: neighbours of one name melt into one.
    assert changes == ["a", "b", "a", "b", "a", "b"]


def test_peak_memory_counts_what_a_step_allocates() -> None:
    """In a process of its own: here other tests have freed memory that would be taken again."""
    code = (
        "import torch\n"
        "from bench import measure\n"
        "step = lambda: torch.ones(16 * 2**20)\n"  # 64 MiB, written
        "print(measure.peak_above(step, torch.device('cpu')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("this kernel does not reset the peak of a process")
    assert 64 * 2**20 <= int(done.stdout) < 72 * 2**20


def test_the_bound_follows_plain_torch() -> None:
    truth = torch.randn(1000, dtype=torch.float64)
    plain = (truth * (1 + 1e-3)).float()
    assert checks.compare({"y": truth * (1 + 3e-3)}, {"y": truth}, {"y": plain}) is None
    assert checks.compare({"y": truth * (1 + 5e-3)}, {"y": truth}, {"y": plain}) is not None
    spoilt = truth.clone()
    spoilt[7] += 0.1 * truth.abs().max()
    assert checks.compare({"y": spoilt}, {"y": truth}, {"y": plain}) is not None
    assert checks.compare({"y": truth[:-1]}, {"y": truth}, {"y": plain}) is not None


def test_e2e_takes_the_number_from_a_wrong_gradient() -> None:
    def result(gradient: float, **more: object) -> e2e.Results:
        errors = {"loss": 1e-7, "gradient": gradient, **more}
        return e2e.Results(step_seconds=[1.0], losses=[[2.0]], errors=errors)  # type: ignore[arg-type]

    results = {
        "peft": result(1e-6),
        "good": result(3e-6, **{"gradient beside peft": 7e-6}),
        "wrong": result(5e-6),
        "strays": result(1e-6, **{"gradient beside peft": 9e-6}),
        "nan": result(math.nan),
        "idle": result(1e-6),
        "absent": e2e.Results(reason="missing: it is not installed"),
    }
    results["idle"].detail["fused_calls"] = 0
    e2e._judge(results, OPTIONS)
    assert results["peft"].reason is results["good"].reason is None
    assert "gradient is wrong" in (results["wrong"].reason or "")
    assert "gradient beside peft is wrong" in (results["strays"].reason or "")
    assert "gradient is wrong" in (results["nan"].reason or "")
    assert results["idle"].reason == "nothing ran fused"
    assert results["absent"].reason == "missing: it is not installed"

    found: list[records.Record] = []
    for impl in e2e.IMPLS[:2]:
        e2e._report(
            impl, results["wrong" if impl.name == "peft" else "good"], "c", OPTIONS, found.append
        )
    assert [(r.impl, r.value is None) for r in found] == [("frozen", False), ("peft", True)]


def test_medians() -> None:
    assert Measured(times=[3.0, 1.0, 2.0]).median == 2.0
