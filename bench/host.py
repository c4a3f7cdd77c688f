"""What a transformer layer costs the host that launches its kernels, forward and backward.

On a GPU the host works ahead; where it is slower than the kernels, the GPU waits. No GPU is needed
to see it: tensors are tiny and on the CPU, and fastft takes its way on GPUs with a driver that
launches nothing (bench/stand_in.py). What is computed is in the time; what a driver takes for a
launch is not, and ``launches`` says how many there would be, forward and backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from .declare import Options
from .e2e import Impl
from .peers import missing
from .records import Record, make
from .worker import run_worker

NAME = "host"
TIMEOUT = 600
DROPOUTS = (0.0, 0.05)
METRICS = (("forward_us", "us"), ("backward_us", "us"), ("launches", "launches"))
IMPLS = (
    Impl("frozen", adapters="none", package="transformers"),
    Impl("peft", adapters="float32"),
    Impl("peft-bf16", adapters="model"),
    Impl("fastft", adapters="float32", fused=True, package="triton"),
)


def run(options: Options, emit: Callable[[Record], None]) -> list[Record]:
    """Measures every implementation in processes of their own, in turn, and hands its records to
    `emit`."""
    records: list[Record] = []
    for dropout in DROPOUTS[: 1 if options.quick else None]:
        found: dict[str, list[dict[str, float]]] = {impl.name: [] for impl in IMPLS}
        reasons = {i.name: options.left_out(i.name) or missing(i.package) for i in IMPLS}
        for _ in range(options.rounds):
            for impl in IMPLS:
                if reasons[impl.name] is not None:
                    continue
                job = {"adapters": impl.adapters, "fused": impl.fused, "dropout": dropout}
                try:
                    times = run_worker("host_worker", {**job, "device": "cpu"}, TIMEOUT)
                except RuntimeError as error:
                    reasons[impl.name] = f"failed: {error}"
                else:
                    found[impl.name].append(times)
        for impl in IMPLS:
            for metric, unit in METRICS:
                reason = reasons[impl.name]
                value = None
                if reason is None:
                    value = statistics.median(times[metric] for times in found[impl.name])
                case = f"a layer of Llama, r=16 all-linear, dropout {dropout:g}"
                record = make(
                    options, NAME, case, impl.name, metric, value, unit, False,
                    dtype="bfloat16", reason=reason,
                )  # fmt: skip
                records.append(record)
                emit(record)
                if reason is not None:
                    break
    return records
