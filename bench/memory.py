"""Memory and time of a step under each policy, beside PEFT's and torch's own ways, each in its own
process: the heap of one must not flatter another.

Real shapes with random weights, LoRA r = 16 on all linears, forward, loss and backward. The peak is
above the model: activations, gradients, workspace.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .declare import Options
from .peers import missing
from .plan import MODELS
from .records import Record, make
from .worker import run_worker

NAME = "memory"
TIMEOUT = 900
# Of the adapter gradients of plain PEFT and fastft, in bfloat16, on a short batch: the whole proof
# is the e2e suite's, this one sees that the same thing was computed.
ALLOWED = 0.1


@dataclass(frozen=True)
class Impl:
    """fused: fastft. policy: of fastft.memory; None: none asked for. ways: of plain PEFT."""

    name: str
    fused: bool
    policy: str | None = None
    way: str | None = None
    package: str | None = "peft"
    cuda_only: bool = False


# In the order of their worth, for a run may be cut short: first the two that the others are proved
# by, then what goals are stated for.
IMPLS = (
    Impl("peft", False),
    Impl("fastft", True),
    Impl("fastft-none", True, "none"),
    Impl("fastft-lora", True, "lora"),
    Impl("fastft-full", True, "full"),
    Impl("fastft-offload", True, "offload", cuda_only=True),
    Impl("fastft-attention", True, "attention"),
    Impl("peft+checkpoint", False, way="checkpoint"),
    Impl("peft+trl-offload", False, way="offload", package="trl", cuda_only=True),
    Impl("liger-tiled-mlp", False, way="liger", package="liger_kernel"),
)


@dataclass(frozen=True)
class Size:
    """Layers of a published shape, and a batch."""

    model: str
    layers: int
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.layers} layers, {self.batch}x{self.tokens}"


CPU = (
    Size("SmolLM2-135M", 30, 4, 512),
    Size("SmolLM2-135M", 30, 1, 2048),
    Size("SmolLM2-135M", 6, 1, 8192),
    Size("SmolLM2-135M", 2, 1, 16384),
    Size("SmolLM2-135M", 2, 1, 32768),
)
# Goals are stated for the first two.
GPU = tuple(Size("Llama-3.1-8B", 8, 1, tokens) for tokens in (2048, 16384, 8192, 512, 32768))


@dataclass
class _Found:
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    reason: str | None = None


def run(options: Options, emit: Callable[[Record], None]) -> list[Record]:
    """Measures every policy at every size; emits time_ms and peak_bytes of each as known."""
    records: list[Record] = []
    sizes = CPU if options.device.type == "cpu" else GPU
    for size in sizes[:1] if options.quick else sizes:
        found = {impl.name: _Found(reason=_not_here(impl, options)) for impl in IMPLS}
        with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
            for number in range(options.rounds):
                for impl in IMPLS:
                    own = found[impl.name]
                    if own.reason is None:
                        _round(impl, size, options, Path(folder), number, own)
                    if number == options.rounds - 1:
                        for record in _records(impl, size, options, own):
                            records.append(record)
                            emit(record)
    return records


def _records(impl: Impl, size: Size, options: Options, own: _Found) -> list[Record]:
    time = statistics.median(own.seconds) * 1e3 if own.seconds else None
    peak = float(statistics.median(own.peaks)) if own.peaks else None
    return [
        make(
            options, NAME, size.name, impl.name, metric, value, unit, False,
            reason=own.reason if value is None else None,
        )
        for metric, value, unit in (("time_ms", time, "ms"), ("peak_bytes", peak, "bytes"))
    ]  # fmt: skip


def _not_here(impl: Impl, options: Options) -> str | None:
    if impl.cuda_only and options.device.type != "cuda":
        return "does not apply: the host is the device"
    needed = impl.name in ("peft", "fastft")
    return missing(impl.package) or (None if needed else options.left_out(impl.name))


def _round(
    impl: Impl, size: Size, options: Options, folder: Path, number: int, into: _Found
) -> None:
    config = {**MODELS[size.model], "num_hidden_layers": size.layers}
    gradient = folder / f"{impl.name}.pt"
    job = {
        "config": config, "fused": impl.fused, "policy": impl.policy, "way": impl.way,
        "batch": size.batch, "tokens": size.tokens, "steps": options.steps,
        "device": str(options.device), "dtype": options.dtype_name,
        "threads": torch.get_num_threads(), "gradient": str(gradient) if number == 0 else None,
    }  # fmt: skip
    try:
        result = run_worker("memory_worker", job, TIMEOUT)
    except RuntimeError as error:
        into.reason = f"failed: {error}"
        return
    if number == 0:
        into.reason = _wrong(impl, gradient, folder)
        if into.reason is not None:
            return
    into.seconds.extend(result["step_seconds"])
    into.peaks.append(result["peak_bytes"])


def _wrong(impl: Impl, gradient: Path, folder: Path) -> str | None:
    """A policy must give fastft's own bits; fastft and PEFT agree up to rounding."""
    needed = ("peft",) if impl.policy is None else ("fastft", "peft")
    for name in needed:
        if not (folder / f"{name}.pt").exists():
            return f"not proved: {name}, which it is compared with, gave no gradients"
    got = torch.load(gradient)
    if impl.policy is not None and not torch.equal(got, torch.load(folder / "fastft.pt")):
        return "wrong: the gradients are not those of fastft alone, bit for bit"
    expected = torch.load(folder / "peft.pt")
    error = float((got - expected).norm() / expected.norm())
    return None if error <= ALLOWED else f"wrong: gradients differ from PEFT's by {error:.2e}"
