"""One measured number as one JSON object, and the facts that make it comparable with another."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .declare import Options

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "numpy")


@dataclass(frozen=True)
class Record:
    """A line of the output. `value` is None where there is no number, and `reason` says why."""

    suite: str
    case: str
    impl: str
    metric: str
    value: float | None
    unit: str
    higher_is_better: bool
    device: str
    commit: str
    versions: dict[str, str]
    dtype: str
    rounds: int
    threads: int
    reason: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        fields = asdict(self)
        for optional in ("reason", "detail"):
            if not fields[optional]:
                del fields[optional]
        return json.dumps(fields)


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of everything a number depends on."""
    found = {"python": platform.python_version(), "fastft": _version("fastft") or "source"}
    for name in PACKAGES:
        version = _version(name)
        if version:
            found[name] = version
    found["torch"] = torch.__version__  # with its build: CPU or CUDA
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str:
    """The checkout's commit, '-dirty' where files differ from it; 'unknown' outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        # Results are written while a suite runs; they do not change what is measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return head + ("-dirty" if changed else "")


@functools.cache
def device_name(device: torch.device) -> str:
    """What the numbers were measured on, for example 'AMD EPYC 7B13, 2 cores, AVX2'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    instructions = torch.backends.cpu.get_cpu_capability()
    if has_native_bf16(device):
        instructions += "+bf16"
    return f"{_cpu_model()}, {cores} cores, {instructions}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products run on instructions of their own (else they are emulated)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return True
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the device has it natively, else float32."""
    if name == "auto":
        name = "bfloat16" if has_native_bf16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def make(
    options: Options,
    suite: str,
    case: str,
    impl: str,
    metric: str,
    value: float | None,
    unit: str,
    higher_is_better: bool,
    *,
    dtype: str | None = None,
    reason: str | None = None,
    detail: dict[str, Any] | None = None,
) -> Record:
    """A record with the facts of this run filled in."""
    return Record(
        suite=suite,
        case=case,
        impl=impl,
        metric=metric,
        value=value,
        unit=unit,
        higher_is_better=higher_is_better,
        device=device_name(options.device),
        commit=commit(),
        versions=versions(),
        dtype=dtype or options.dtype_name,
        rounds=options.rounds,
        threads=torch.get_num_threads(),
        reason=reason,
        detail=detail or {},
    )
