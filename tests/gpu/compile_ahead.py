"""Compiles what the GPU tests launch where there is no GPU: the time of one is not for that.

    python -m tests.gpu.compile_ahead CACHE [--arch 90] [-k EXPRESSION] [-n WORKERS]

Run it with the Python, torch and Triton of the machine with the GPU, copy CACHE there to the same
path and set TRITON_CACHE_DIR to it: Triton finds its kernels, and launches them without compiling.
The tests run on the CPU with a driver that launches nothing; what they then find wrong says
nothing. Eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_ARCH = "FASTFT_COMPILE_AHEAD"
_PROPERTIES = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536}


class _Nothing:
    """Takes anything, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class _Module:
    """Stands for Triton's C modules."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return _PROPERTIES

    def __getattr__(self, name: str) -> type[_Nothing]:
        return _Nothing


def _driver(arch: int) -> Any:
    """Triton's own, whose C modules are built into the cache but not loaded."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    module = _Module()
    build._load_module_from_path = lambda *_: module

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _=None: 0
            self.get_device_capability = lambda _=0: divmod(arch, 10)

    return Driver()


def _product(a: Any, b: Any, *, out: Any = None, **_: Any) -> Any:
    return a.new_empty(a.shape[0], b.shape[1]) if out is None else out


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of the tests: CPU tensors reach Triton, and nothing else takes long."""
    arch = int(os.environ[_ARCH])
    from fastft_kernels import _common
    from fastft_kernels import config as launches
    from triton.runtime import driver

    from fastft import backends

    driver.set_active(_driver(arch))
    _common.supports_device = lambda _: None
    backends.Backend.refuses_device = lambda *_: None  # type: ignore[method-assign]
    launches.for_device = lambda _: launches.ARCHS[arch]
    launches.processors = lambda _: _PROPERTIES["multiprocessor_count"]
    torch.mm = _product  # type: ignore[assignment]
    torch.Tensor.addmm_ = lambda self, *_, **__: self  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None


def pytest_collection_finish(session: pytest.Session) -> None:
    """No truth is computed, and nothing compared or timed."""
    from tests.kernels import cases

    for kind in filter(lambda found: isinstance(found, type), vars(cases).values()):
        if hasattr(kind, "autograd"):
            kind.autograd = lambda *_: {}
        if hasattr(kind, "n_correct"):
            kind.n_correct = lambda _: 0
    for module in {item.module for item in session.items}:  # type: ignore[attr-defined]
        for name, stand_in in (("compare", lambda *_, **__: None), ("median_ms", _once)):
            if hasattr(module, name):
                setattr(module, name, stand_in)


def _once(run: Any, rounds: int = 1) -> float:
    run()
    return 1.0


def main() -> int:
    """The command line; 1 where nothing was compiled."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.compile_ahead", description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("-k", default="", help="only these tests")
    parser.add_argument("-n", default="0", help="processes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # What Triton's C modules are linked with, where there is no NVIDIA driver.
        source = Path(folder, "cuda.c")
        source.write_text("void fastft_stands_in(void) {}\n")
        library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *library, str(source)], check=True)
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            _ARCH: str(asked.arch),
            "TRITON_CACHE_DIR": str(asked.cache.resolve()),
            "TRITON_LIBCUDA_PATH": folder,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
        command += ["-p", "tests.gpu.compile_ahead", "-m", "gpu", "-k", asked.k, "tests/gpu"]
        command += ["-n", asked.n] if asked.n != "0" else []
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    compiled = len(list(asked.cache.rglob("*.cubin")))
    print(f"{compiled} kernels for sm_{asked.arch} in {asked.cache}")
    return 0 if compiled else 1


if __name__ == "__main__":
    sys.exit(main())
