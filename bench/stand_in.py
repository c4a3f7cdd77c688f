"""A stand-in for a GPU: Triton compiles for one and its launches are noted, not run.

What a launch costs the host, and what it passes to a kernel, can so be seen where there is no GPU.
Results are whatever was in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

CAPABILITY = 90
_SHARED = 227 * 1024


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel as compiled, its grid and all that it was given."""

    kernel: str
    hash: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass
class Launches:
    """What was launched; ``kept`` only where asked for, for it holds the tensors."""

    count: int = 0
    keep: bool = False
    kept: list[Launch] = field(default_factory=list)


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, 1, 32, 0, 1024  # no module, a function, registers, spills, threads at most

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    def __init__(self, launches: Launches) -> None:
        self.utils = _Utils()
        self.launches = launches
        self.kernels: list[Any] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel, in Triton's calling convention."""
        launches = self.launches
        self.kernels.append(source.fn)

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            launches.count += 1
            if launches.keep:  # stream, function, metadata twice and two hooks come first
                made = Launch(metadata.name, metadata.hash, (x, y, z), rest[6:])
                launches.kept.append(made)

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stand_in() -> Iterator[Launches]:
    """Inside, Triton's kernels are launched on CPU tensors as on a GPU, and run nothing."""
    launches = Launches()
    before, driver = triton.runtime.driver._active, _Driver(launches)
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    try:
        yield launches
    finally:
        triton.runtime.driver._active = before
        for kernel in driver.kernels:  # what was compiled launches nothing
            kernel.device_caches.clear()
