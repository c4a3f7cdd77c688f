"""What the workflow asks of the machine: which dtype it computes natively, how much memory a
stretch of work took, and which versions are installed."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "PeakMemory",
    "cpu_flags",
    "cpu_name",
    "device_name",
    "native_bfloat16",
    "package_version",
    "resolve_dtype",
    "total_memory",
    "working_device",
]

# Any of these multiplies bfloat16 in hardware.
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as Linux lists them; empty where they cannot be read."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of memory of this machine, or of the container it runs in."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return found


def native_bfloat16(device_type: str) -> bool:
    """Whether ``device_type`` multiplies bfloat16 in hardware. Emulated, it is far slower than
    float32."""
    import torch

    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return device_type == "cpu" and bool(BFLOAT16_FLAGS & cpu_flags())


def working_device() -> torch.device:
    """The device a Trainer would choose."""
    import torch

    if torch.cuda.is_available():
        # Of several processes on this machine each has its own, also before the Trainer takes it.
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        return torch.device("cuda", index % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for ``TrainConfig.dtype`` on this machine."""
    import torch

    device_type = working_device().type
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device_type) else torch.float32
    if name == "float16" and device_type != "cuda":
        raise ConfigError(
            "TrainConfig",
            "dtype",
            expected="bfloat16, float32 or auto where there is no CUDA GPU",
            got="float16",
            remedy="float16 needs loss scaling, which runs on CUDA only.",
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def device_name() -> str:
    import torch

    device = working_device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "mps":
        return f"{platform.machine()} GPU (MPS)"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class PeakMemory:
    """Peak memory from ``start()`` on, above what was held at ``start()``.

    On a GPU it is the allocator's peak (``torch.cuda.max_memory_allocated``). On a CPU it is the
    process's peak resident size: Linux counts it exactly (``VmHWM``, set back through
    ``/proc/self/clear_refs``); where that is not permitted, the lifetime peak of ``getrusage``
    stands in, which is never too low.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self.method = "torch.cuda.max_memory_allocated" if device.type == "cuda" else ""

    def start(self) -> None:
        """Takes what is held now as the base; freed memory is handed back first."""
        gc.collect()
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
            return
        _trim_heap()
        self.method = "VmHWM" if _reset_high_water_mark() else "getrusage"
        self._base = _status_bytes("VmRSS") or _lifetime_peak()

    def extra(self) -> int:
        """Bytes of the peak since ``start()`` above its base."""
        if self._device.type == "cuda":
            import torch

            return max(0, torch.cuda.max_memory_allocated(self._device) - self._base)
        peak = _status_bytes("VmHWM") if self.method == "VmHWM" else None
        return max(0, (peak or _lifetime_peak()) - self._base)


def touch(module: Any) -> None:
    """Reads every parameter and buffer once, so that weights which are still only mapped from
    their file are resident before the base is taken."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.detach().flatten()[::512].sum()


def _trim_heap() -> None:
    """glibc keeps freed memory; training would fill it again without being seen."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def _status_bytes(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _lifetime_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
