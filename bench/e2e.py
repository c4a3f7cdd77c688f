"""A model end to end, SmolLM2-135M if no other is named: tokens per second and extra memory of a
training step.

Every implementation runs in a process of its own, in turn, for a number of rounds. A step is
forward, loss and backward of one batch and, for adapters, the clip of the gradients' norm and
AdamW. Before anything is timed its loss and gradients are compared with PEFT's in float64 on a
short batch, and with plain PEFT's on a batch as it is timed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checks import FACTOR
from .declare import Options
from .peers import missing
from .records import Record, make
from .worker import run_worker

NAME = "e2e"
# --model of so many layers of Llama-3.1-8B's shapes and random weights.
SHAPED = "llama-3.1-8b:"
TIMEOUT = 3600


@dataclass(frozen=True)
class Impl:
    """One way to train; the worker (bench/e2e_worker.py) reads these facts.

    adapters:  'none' (frozen model), 'float32' (PEFT's default) or 'model' (the model's dtype).
    """

    name: str
    adapters: str
    compile: bool = False
    fused: bool = False
    liger: bool = False
    only: torch.dtype | None = None
    package: str | None = "peft"


IMPLS = (
    Impl("frozen", adapters="none", package="transformers"),
    Impl("peft", adapters="float32"),
    Impl("peft-bf16", adapters="model", only=torch.bfloat16),
    Impl("peft-bf16+torch.compile", adapters="model", compile=True, only=torch.bfloat16),
    Impl("peft+torch.compile", adapters="float32", compile=True, only=torch.float32),
    Impl(
        "peft-bf16+liger", adapters="model", liger=True, only=torch.bfloat16, package="liger_kernel"
    ),
    Impl("fastft", adapters="float32", fused=True),
)


@dataclass
class Results:
    """What the rounds of one implementation gave, or why there is no number."""

    step_seconds: list[float] = field(default_factory=list)
    peak_extra_bytes: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def run(options: Options, emit: Callable[[Record], None]) -> list[Record]:
    """Measures every implementation and hands its records to `emit` as soon as they are known."""
    records: list[Record] = []

    def out(record: Record) -> None:
        records.append(record)
        emit(record)

    model, model_name = _model(options)
    case = f"{model_name} r=16 all-linear {options.batch}x{options.tokens}"
    if options.checkpointing:
        case += " checkpointed"
    results = {impl.name: Results(reason=_not_here(impl, options)) for impl in IMPLS}
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        _work({"role": "truth", "model": model, **_files(Path(folder))}, options)
        judged, measured = False, list[Impl]()
        for number in range(options.rounds):
            for impl in IMPLS:
                if results[impl.name].reason is None:
                    _one_round(impl, number == 0, model, Path(folder), options, results[impl.name])
                # Nobody is judged, or has a number, before what the errors are measured by.
                judged = judged or impl.name == _yardstick(options)
                if judged and number == 0:
                    _judge(results, options)
                if number == options.rounds - 1:
                    measured.append(impl)
                while judged and measured:
                    own = measured.pop(0)
                    _report(own, results[own.name], case, options, out)
    return records


def _not_here(impl: Impl, options: Options) -> str | None:
    if impl.only is not None and impl.only != options.dtype:
        name = str(impl.only).removeprefix("torch.")
        return f"does not apply: it is for {name}, this run is {options.dtype_name}"
    if impl.liger and options.device.type != "cuda":
        return "does not apply: Liger's kernels are for GPUs"
    # Plain PEFT is what the others are proved against, asked for or not.
    needed = impl.name in ("peft", _yardstick(options))
    return missing(impl.package) or (None if needed else options.left_out(impl.name))


def _yardstick(options: Options) -> str:
    """The plain implementation whose products run in the run's own dtype."""
    return "peft-bf16" if options.dtype == torch.bfloat16 else "peft"


def _model(options: Options) -> tuple[str, str]:
    """(folder or 'random', name for the case)."""
    if options.model == "random":
        return "random", "SmolLM2-135M-shaped, random weights"
    if options.model.startswith(SHAPED):
        layers = options.model.removeprefix(SHAPED)
        return options.model, f"Llama-3.1-8B-shaped, {layers} layers, random weights,"
    if options.model != "default":
        return options.model, Path(options.model).name
    from fastft.train.models import obtain_default_model

    return str(obtain_default_model()), "SmolLM2-135M"


def _files(folder: Path) -> dict[str, str]:
    return {name: str(folder / f"{name}.safetensors") for name in ("truth", "whole")}


def _one_round(
    impl: Impl, check: bool, model: str, folder: Path, options: Options, into: Results
) -> None:
    job = {
        "role": "impl",
        "impl": impl.name,
        "adapters": impl.adapters,
        "compile": impl.compile,
        "fused": impl.fused,
        "liger": impl.liger,
        "checkpointing": options.checkpointing,
        "model": model,
        "check": check,
        "writes_whole": impl.name == "peft",
        **_files(folder),
        "steps": options.steps,
        "optimizer": options.optimizer,
    }
    try:
        done = _work(job, options)
    except RuntimeError as error:
        into.reason = f"failed: {error}"
        return
    into.step_seconds.extend(done["step_seconds"])
    if done["peak_extra_bytes"] is not None:
        into.peak_extra_bytes.append(done["peak_extra_bytes"])
    into.losses.append(done["losses"])
    into.errors = done["errors"] or into.errors
    into.detail = done["detail"]


def _work(job: dict[str, Any], options: Options) -> dict[str, Any]:
    job = {
        **job,
        "device": str(options.device),
        "dtype": options.dtype_name,
        "batch": options.batch,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
    }
    return run_worker("e2e_worker", job, TIMEOUT)


def _judge(results: dict[str, Results], options: Options) -> None:
    """Takes away the numbers of every implementation whose loss or gradient is wrong.

    Against float64: at most 4 times the error PEFT makes in the run's dtype. Beside PEFT: twice
    that, for both sides of the comparison may be off.
    """
    yardstick = results[_yardstick(options)].errors
    eps = torch.finfo(options.dtype).eps
    for result in results.values():
        if result.reason is not None:
            continue
        for what, error in result.errors.items():
            own = max(yardstick.get(what.split()[0], 0.0), eps)
            limit = FACTOR * own * (2 if what.endswith("beside peft") else 1)
            if not error <= limit:
                result.reason = f"{what} is wrong: relative error {error:.2e}, allowed {limit:.2e}"
        if result.detail.get("fused_calls") == 0:
            result.reason = "nothing ran fused"


def _report(
    impl: Impl, result: Results, case: str, options: Options, out: Callable[[Record], None]
) -> None:
    def record(metric: str, value: float | None, unit: str, higher: bool, **more: Any) -> None:
        out(make(options, NAME, case, impl.name, metric, value, unit, higher, **more))

    if result.reason is not None:
        record("tokens_per_s", None, "tokens/s", True, reason=result.reason)
        return
    tokens = options.batch * options.tokens
    detail = {
        **result.detail,
        "step": "forward+loss+backward"
        + ("+clip+adamw" if options.optimizer and impl.adapters != "none" else ""),
        "step_seconds": [round(seconds, 4) for seconds in result.step_seconds],
        "losses": result.losses[0],
        "errors": result.errors,
    }
    speed = tokens / statistics.median(result.step_seconds)
    record("tokens_per_s", speed, "tokens/s", True, detail=detail)
    if result.peak_extra_bytes:
        extra = float(statistics.median(result.peak_extra_bytes))
        record("peak_extra_bytes", extra, "bytes", False)
