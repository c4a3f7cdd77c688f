"""Runs a suite: every implementation proves its result, then all are timed in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import peak
from .declare import Case, Impl, Measured, Options, Step, Suite
from .measure import Clock, host_seconds, launches
from .peers import missing
from .records import Record, make

Emit = Callable[[Record], None]


def run_suite(suite: Suite, options: Options, emit: Emit) -> list[Record]:
    """Measures every case of `suite` and hands each record to `emit` as soon as it is known."""
    records: list[Record] = []

    def out(record: Record) -> None:
        records.append(record)
        emit(record)

    for case in suite.cases(options):
        _run_case(suite, case, options, out)
    return records


def _run_case(suite: Suite, case: Case, options: Options, out: Emit) -> None:
    inputs = suite.prepare(case, options)
    steps: dict[str, Step] = {}
    refused: dict[str, str] = {}
    for impl in suite.impls:
        reason = options.left_out(impl.name) or missing(impl.package)
        reason = reason or impl.not_here(case, options)
        step = None
        if reason is None:
            step, reason = _build_and_check(suite, impl, inputs)
        if reason is None and step is not None:
            steps[impl.name] = step
        else:
            refused[impl.name] = reason or "not built"
    measured = interleave(steps, options)
    if suite.counts_launches and options.device.type == "cuda":
        for name, step in steps.items():
            measured[name].launches = launches(step.run)
            measured[name].host_seconds = host_seconds(step.run)
    # The inputs and all implementations leave before memory is measured in processes of their own.
    del inputs
    steps.clear()
    for impl in suite.impls:
        if impl.name in refused:
            out(_no_number(suite, case, impl, options, refused[impl.name]))
            continue
        own = measured[impl.name]
        if suite.measures_memory:
            own.peak_bytes = peak.peak_of(suite, case, impl, options)
        for metric in suite.metrics:
            value = metric.compute(own, measured, case)
            if value is not None:
                out(
                    make(
                        options,
                        suite.name,
                        case.name,
                        impl.name,
                        metric.name,
                        value,
                        metric.unit,
                        metric.higher_is_better,
                        dtype=case.facts.get("dtype"),
                    )
                )


def _build_and_check(suite: Suite, impl: Impl, inputs: object) -> tuple[Step | None, str | None]:
    """A peer that raises must not end the run of the others: its error is its line in the table."""
    try:
        step = impl.build(inputs)
        wrong = suite.check(inputs, step)
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
    return (None, wrong) if wrong else (step, None)


def _no_number(suite: Suite, case: Case, impl: Impl, options: Options, reason: str) -> Record:
    metric = suite.metrics[0]
    return make(
        options,
        suite.name,
        case.name,
        impl.name,
        metric.name,
        None,
        metric.unit,
        metric.higher_is_better,
        dtype=case.facts.get("dtype"),
        reason=reason,
    )


def interleave(steps: dict[str, Step], options: Options) -> dict[str, Measured]:
    """Times every step once a round, after one warm-up round.

    The order turns by one each round, so that none always runs in the wake of the same other.
    """
    clock = Clock(options.device)
    names = list(steps)
    measured = {name: Measured() for name in names}
    for name in names:
        clock(steps[name].run)
    for number in range(options.rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            measured[name].times.append(clock(steps[name].run))
    if options.device.type == "cuda":
        torch.cuda.synchronize(options.device)
    return measured
