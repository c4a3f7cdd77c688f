"""Clocks and memory meters for CPU and CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

# A CPU step shorter than this is repeated until it lasts as long: the clock and the scheduler are
# coarser than a small step.
SHORTEST = 0.02


class Clock:
    """Times one call of a step, in seconds.

    CPU: wall time, repeated to at least 20 ms. CUDA: events on the current stream, with the L2
    cache overwritten before each call so that every call reads its inputs from memory, and the GPU
    kept waiting for 1.3 times the least the host has taken to launch the step: as in training,
    where the host is ahead. What it takes is no part of the time, unless the step waits for the
    GPU itself.
    """

    # Of a GPU's clock in a second, at most; the longest wait, in seconds.
    _TICKS = 2e9
    _LONGEST = 0.1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._repeats: dict[int, int] = {}
        self._host: dict[int, float] = {}
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], None]) -> float:
        return self._cuda(run) if self.device.type == "cuda" else self._cpu(run)

    def _cpu(self, run: Callable[[], None]) -> float:
        repeats = self._repeats.get(id(run))
        if repeats is None:
            start = time.perf_counter()
            run()
            repeats = max(1, int(SHORTEST / max(time.perf_counter() - start, 1e-9)))
            self._repeats[id(run)] = repeats
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def _cuda(self, run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is not None:
            self._flush.zero_()
        ahead = min(1.3 * self._host.get(id(run), 0.0), self._LONGEST)
        torch.cuda._sleep(int(ahead * self._TICKS))
        begin.record()
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        # The first call compiles; one that waits for the GPU is no measure of the host either.
        self._host[id(run)] = min(took, self._host.get(id(run), took))
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def limit_to_free() -> None:
    """From here on this process can allocate nineteen twentieths of what is free: more is its own
    error, and not the end of whatever the kernel chooses."""
    import resource

    from fastft.memory._auto import free_memory

    room = int(free_memory(torch.device("cpu")) * 0.95) + (resident_bytes() or 0)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    room = room if most == resource.RLIM_INFINITY else min(room, most)
    resource.setrlimit(resource.RLIMIT_DATA, (room, most))


def launches(run: Callable[[], None]) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def host_seconds(run: Callable[[], None], calls: int = 20) -> float:
    """Median time until a call returns that finds the GPU idle: the host's share of it, and more
    where it waits for the GPU."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def trim() -> None:
    """Gives freed memory back to the system, so that resident size means memory in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int | None:
    """Resident size of this process (VmRSS), None where /proc does not tell."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Starts VmHWM anew from the present resident size; False where the kernel forbids it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    """Largest resident size (VmHWM) since the last `reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_above(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes `run` needs at its peak above what is held before it; None where nobody can tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim()
    resident = resident_bytes()
    if resident is None or not reset_peak():
        return None
    run()
    peak = peak_resident_bytes()
    return None if peak is None else peak - resident
