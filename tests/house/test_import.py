"""Importing fastft is cheap and starts nothing; each check in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys


def in_a_new_process(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_import_is_lean() -> None:
    heavy = ("triton", "peft", "transformers", "trl", "datasets", "matplotlib", "typer", "rich")
    code = f"""
import torch, sys
before = set(sys.modules)
import fastft, fastft.ops, fastft.optim, fastft.backends
added = set(sys.modules) - before
import json
print(json.dumps([sorted(m for m in {heavy!r} if m in added), torch.cuda.is_initialized(),
                  len(added)]))
"""
    loaded, cuda, count = json.loads(in_a_new_process(code))
    assert loaded == []
    assert cuda is False
    assert count < 72


def test_a_cpu_call_loads_no_triton() -> None:
    code = """
import torch, sys, fastft
fastft.ops.lora_linear(torch.randn(3, 8), torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 2),
                       scaling=1.0)
print("triton" in sys.modules)
"""
    assert in_a_new_process(code) == "False"


def test_public_names_resolve() -> None:
    import fastft

    for name in fastft.__all__:
        assert getattr(fastft, name) is not None, name
    assert set(fastft.__all__) <= set(dir(fastft))


def test_missing_native_module_is_explained_not_hidden() -> None:
    """Without the compiled module the reference runs, and everyone who asks is told why."""
    code = """
import sys
sys.modules["fastft._C"] = None
import torch, fastft
assert not fastft.native.available() and "fastft._C" in fastft.native.load_error()
y = fastft.ops.lora_linear(torch.randn(3, 8), torch.randn(8, 8), torch.randn(2, 8),
                           torch.randn(8, 2), scaling=1.0)
try:
    fastft.ops.lora_linear(torch.randn(3, 8), torch.randn(8, 8), torch.randn(2, 8),
                           torch.randn(8, 2), scaling=1.0, backend="cpu")
except fastft.errors.BackendError as error:
    assert "compiled module is missing" in str(error), error
try:
    fastft.native.module()
except fastft.errors.BackendError as error:
    assert "pip install ." in str(error)
    print("told")
"""
    assert in_a_new_process(code) == "told"


def test_one_openmp_runtime_and_torch_s_thread_count() -> None:
    code = """
import torch, fastft, re
torch.set_num_threads(2)
c = fastft.native.module()
x = torch.randn(64, 64)
fastft.ops.lora_linear(x, x, x[:4], x[:, :4].contiguous(), scaling=1.0, dropout_p=0.1)
two = c.max_threads()
torch.set_num_threads(1)
maps = open("/proc/self/maps").read()
runtimes = {p for p in re.findall(r"(/\\S*lib(?:g|i)?omp[\\w.-]*\\.so\\S*)", maps)}
print(two, c.max_threads(), len(runtimes))
"""
    if sys.platform != "linux":
        return
    assert in_a_new_process(code) == "2 1 1"
