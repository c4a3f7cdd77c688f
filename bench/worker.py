"""A measurement in a process of its own: what one leaves in the heap must not reach another.

On a GPU most of such a process is its imports. There the processes of the next jobs import while
one runs: spares (bench/spare.py), which have not touched the GPU. On a CPU they would take from
the one that is timed, and there are none.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections import deque
from typing import Any

from .ledger import ROOT

# An import takes longer than many a job: with two on the way the GPU seldom waits.
SPARES = 2
# A job's own threads and autograd's, and the imports of its spares.
_FEWEST_CORES = 8
# What every worker needs, sooner or later. None of them touches the GPU when it is imported.
PRELOAD = (
    "peft",
    "transformers.models.llama.modeling_llama",
    "fastft.patch",
    "fastft.memory",
    "fastft.optim",
    "fastft_kernels.lora_linear",
)
_waiting: deque[subprocess.Popen[str]] = deque()


def run_worker(
    module: str, job: dict[str, Any], timeout: float, spares: int | None = None
) -> dict[str, Any]:
    """Runs ``python -m bench.<module> JOB`` and returns the JSON object of its last line.

    Args:
        spares: processes that import for the next jobs while this one runs; as many as are good
            for the job's device if not given.

    Raises:
        RuntimeError: it failed; the message is the last line it wrote to stderr.
        subprocess.TimeoutExpired: it took longer, and was ended.
    """
    text = json.dumps(job)
    if spares is None:
        spares = spares_for(job["device"])
    if spares:
        done = _run_spare(module, text, timeout, spares)
    else:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{module}", text],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spares_for(device: str) -> int:
    """How many spares a job on `device` should have beside it."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return SPARES if device.startswith("cuda") and cores >= _FEWEST_CORES else 0


def end_spares() -> None:
    """Ends the processes that wait for a job: none outlives this one."""
    while _waiting:
        _end(_waiting.popleft())


# A signal that Python does not see is no exit; a spare then ends at the end of its input.
atexit.register(end_spares)


def _run_spare(
    module: str, text: str, timeout: float, spares: int
) -> subprocess.CompletedProcess[str]:
    """The job in the spare that has waited longest, while `spares` others import."""
    command = [sys.executable, "-m", "bench.spare", module, *PRELOAD]
    for _ in range(len(_waiting)):
        process = _waiting.popleft()
        if process.args == command and process.poll() is None:
            _waiting.append(process)
        else:
            _end(process)
    while len(_waiting) <= spares:
        _waiting.append(_start(command))
    with _waiting.popleft() as process:
        try:
            out, err = process.communicate(text + "\n", timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _start(command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _end(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()
