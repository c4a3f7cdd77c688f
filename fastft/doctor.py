"""``fastft doctor``: what this machine and this installation can do, why not more, and what to
change. ``examine`` gathers, ``show`` prints; nothing is changed."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastft import __version__

__all__ = ["OP_FACTS", "TESTED", "examine", "show"]

# Oldest version fastft declares and newest it is tested with. The one place for these.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.15", "5.24"),
    "peft": ("0.21", "0.21"),
    "trl": ("1.14", "1.16"),
    "accelerate": ("1.10", "1.15"),
    "datasets": ("3.0", "5.2"),
}
# TRL is nobody's requirement: only its trainers need it.
OPTIONAL = frozenset({"trl"})

# CPU features that a kernel of fastft or of torch chooses by.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)

# For each operation, what its `supports` is asked besides device and dtype: the usual call.
OP_FACTS: dict[str, dict[str, Any]] = {
    "adafactor_step": {"rounding": "nearest"},
    "attention": {},
    "embedding": {},
    "dora_scale": {},
    "layer_norm": {},
    "rope": {},
    "glu": {},
    "linear_cross_entropy": {"weight_requires_grad": False},
    "lora_grouped_linear": {"adapter_dtype": "float32", "r": 16},
    "lora_linear": {"adapter_dtype": "float32", "r": 16},
    "optimizer_step": {"rule": "adamw", "state_bits": 32, "rounding": "nearest"},
    "rms_norm": {},
}

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
NOT_HERE = "not in this installation"


def examine() -> dict[str, Any]:
    """Everything ``fastft doctor`` knows, ready for JSON."""
    findings: dict[str, Any] = {
        "fastft": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "torch": _torch(),
        "gpu": _gpu(),
        "cpu": _cpu(),
        "compiler": _tool(os.environ.get("CXX") or "c++", "g++", "clang++"),
        "nvcc": _nvcc(),
        "native": _native(),
        "openmp": _openmp_runtimes(),
        "libraries": _libraries(),
        "ops": _ops(),
        "ledger": _ledger(),
    }
    findings["advice"] = _advice(findings)
    return findings


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _gpu() -> dict[str, Any]:
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return {"available": bool(devices), "devices": devices}


def _cpu() -> dict[str, Any]:
    from fastft.train.machine import cpu_flags, cpu_name, native_bfloat16

    flags = cpu_flags()
    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "native_bfloat16": native_bfloat16("cpu"),
    }


def _tool(*names: str) -> dict[str, str | None]:
    """Path and version line of the first of the commands that is there."""
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        # nvcc says its release in a later line.
        release = next((line for line in lines if "release" in line), lines[0] if lines else None)
        return {"path": path, "version": release}
    return {"path": None, "version": None}


def _nvcc() -> dict[str, str | None]:
    """Where a build would look: CUDA_HOME, PATH, PyPI's nvidia-cuda-nvcc."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes]
    places.append("nvcc")
    for entry in sys.path:
        places += [str(path) for path in Path(entry or ".").glob("nvidia/*/bin/nvcc")]
    return _tool(*places)


def _native() -> dict[str, Any]:
    from fastft import native

    return {
        "available": native.available(),
        "load_error": native.load_error(),
        "build_info": native.build_info(),
    }


def _openmp_runtimes() -> list[str] | None:
    """OpenMP libraries mapped into this process, with torch and the native module loaded; None
    where that cannot be read."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps)
    return sorted(set(found))


def _libraries() -> dict[str, dict[str, Any]]:
    from fastft.train.machine import package_version

    libraries = {}
    for name, (oldest, newest) in TESTED.items():
        installed = package_version(name)
        libraries[name] = {
            "installed": installed,
            "oldest": oldest,
            "newest_tested": newest,
            "status": _status(installed, oldest, newest),
        }
    return libraries


def _status(installed: str | None, oldest: str, newest: str) -> str:
    """``missing``, ``too old``, ``tested`` or ``newer than tested``, by major and minor."""
    if installed is None:
        return "missing"
    found = _minor(installed)
    if found < _minor(oldest):
        return "too old"
    return "tested" if found <= _minor(newest) else "newer than tested"


def _minor(version: str) -> tuple[int, int]:
    numbers = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


def _ops() -> dict[str, dict[str, Any]]:
    """For each operation, in the dtype a training run would use here: who serves it, and why the
    others do not."""
    import torch

    from fastft import backends
    from fastft.train.machine import resolve_dtype, working_device

    device, dtype = working_device(), resolve_dtype("auto")
    ops = {}
    for op, more in OP_FACTS.items():
        facts = {"device_type": device.type, "dtype": dtype}
        facts |= {k: getattr(torch, v) if k.endswith("dtype") else v for k, v in more.items()}
        if op.endswith("_step"):
            facts["dtype"] = torch.float32  # the adapters', not the model's
        reasons = dict(backends.explain_op(op, **facts))
        ops[op] = {
            "facts": {k: str(v).removeprefix("torch.") for k, v in facts.items()},
            "served_by": next((name for name, why in reasons.items() if why is None), None),
            "not_served_by": {name: why for name, why in reasons.items() if why is not None},
        }
    return ops


def _ledger() -> dict[str, Any]:
    """Which kernels have run on which GPU since they last changed, as a checkout records it."""
    import fastft

    path = Path(fastft.__file__).parent.parent / "bench" / "results" / "verified.json"
    if not path.is_file():
        return {"status": NOT_HERE, "entries": None}
    try:
        return {"status": str(path), "entries": json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError) as error:
        return {"status": f"{path} cannot be read: {error}", "entries": None}


def _advice(findings: dict[str, Any]) -> list[str]:
    """What to change, most useful first."""
    advice = []
    native, gpu, torch_facts = findings["native"], findings["gpu"], findings["torch"]
    if not native["available"]:
        advice.append(
            f"The compiled module is missing ({native['load_error']}): CPU kernels fall back to "
            "plain torch. Build it with a C++17 compiler: 'pip install .' in a checkout, "
            "'pip install --no-binary fastft fastft' otherwise."
        )
    for name, facts in findings["libraries"].items():
        if facts["status"] == "too old":
            advice.append(
                f"{name} {facts['installed']} is older than {facts['oldest']}: "
                f"pip install --upgrade {name}"
            )
        elif facts["status"] == "missing" and name not in OPTIONAL and name != "triton":
            advice.append(f"{name} is not installed: pip install 'fastft[train]'")
    if gpu["available"] and findings["libraries"]["triton"]["installed"] is None:
        advice.append("There is a GPU but no Triton: pip install triton")
    if torch_facts["cuda_build"] and not gpu["available"] and shutil.which("nvidia-smi"):
        advice.append(
            "This torch is built for CUDA and nvidia-smi is there, yet torch finds no GPU: "
            "look at CUDA_VISIBLE_DEVICES and the driver's version."
        )
    if not gpu["available"]:
        if not findings["cpu"]["native_bfloat16"]:
            advice.append(
                "This CPU does not multiply bfloat16 natively: train in float32 (dtype: auto does)."
            )
        if platform.libc_ver()[0] == "glibc" and any(
            os.environ.get(name) != value for name, value in ALLOCATOR.items()
        ):
            settings = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
            advice.append(
                "glibc gives every large tensor back to the system and page-faults it anew: for "
                f"plain PyTorch on this CPU, 'export {settings}'. fastft.accelerate sets the same "
                "for its own process."
            )
    if findings["openmp"] is not None and len(findings["openmp"]) > 1:
        advice.append(
            "Several OpenMP runtimes are loaded, their thread pools compete: "
            + ", ".join(findings["openmp"])
        )
    return advice


def show(findings: dict[str, Any]) -> None:
    """Prints ``examine()``'s findings as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table(title=f"fastft {findings['fastft']}", show_header=False, title_justify="left")
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(findings):
        facts.add_row(name, value)
    console.print(facts)

    libraries = Table(title="Libraries", title_justify="left")
    for heading in ("library", "installed", "oldest", "newest tested", ""):
        libraries.add_column(heading)
    for name, entry in findings["libraries"].items():
        status = entry["status"]
        style = {"tested": "green", "too old": "red", "missing": "dim"}.get(status, "yellow")
        libraries.add_row(
            name,
            entry["installed"] or "-",
            entry["oldest"],
            entry["newest_tested"],
            f"[{style}]{status}[/{style}]",
        )
    console.print(libraries)

    ops = Table(title="Who computes", title_justify="left")
    for heading in ("operation", "asked", "served by", "not by"):
        ops.add_column(heading, overflow="fold")
    for op, entry in findings["ops"].items():
        asked = ", ".join(f"{key}={value}" for key, value in entry["facts"].items())
        why = "\n".join(f"{name}: {reason}" for name, reason in entry["not_served_by"].items())
        ops.add_row(op, asked, entry["served_by"] or "nobody", why)
    console.print(ops)

    console.print("GPU ledger: ", findings["ledger"]["status"], sep="", markup=False)
    for line in _runs(findings["ledger"]["entries"] or {}):
        console.print(f"  {line}", markup=False)
    for line in findings["advice"] or ["Nothing to change."]:
        console.print(f"- {line}", markup=False, soft_wrap=True)


def _runs(entries: dict[str, Any]) -> list[str]:
    """Of the ledger: a line for each kernel and GPU; ``--json`` has all of it."""
    return [
        f"{kernel}: {gpu}, {run['tests']} tests, {run['date'][:10]}, commit {run['commit'][:7]}"
        for kernel, gpus in entries.get("kernels", {}).items()
        for gpu, run in gpus.items()
    ]


def _facts(findings: dict[str, Any]) -> list[tuple[str, str]]:
    torch_facts, cpu, native = findings["torch"], findings["cpu"], findings["native"]
    build = native["build_info"]
    built = ", ".join(f"{k} {_text(v)}" for k, v in build.items()) if build else ""
    gpus = [
        f"{d['name']} (compute capability {d['compute_capability']}, "
        f"{d['memory_bytes'] / 2**30:.0f} GiB)"
        for d in findings["gpu"]["devices"]
    ]
    runtimes = findings["openmp"]
    return [
        ("Python", f"{findings['python']['version']}, {findings['python']['executable']}"),
        ("system", findings["platform"]),
        (
            "torch",
            f"{torch_facts['version']}, CUDA {torch_facts['cuda_build'] or 'not built in'}, "
            f"{torch_facts['cpu_capability']} kernels, {torch_facts['threads']} threads",
        ),
        ("GPU", "; ".join(gpus) or "none that torch can use"),
        (
            "CPU",
            f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['features']) or 'flags unknown'}; "
            f"bfloat16 {'native' if cpu['native_bfloat16'] else 'not native'}",
        ),
        ("C++ compiler", findings["compiler"]["version"] or "none found"),
        ("nvcc", findings["nvcc"]["version"] or "none found"),
        ("native module", built if native["available"] else str(native["load_error"])),
        (
            "OpenMP runtimes",
            "cannot be read here" if runtimes is None else ", ".join(runtimes) or "none",
        ),
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return str(value) or "none"
