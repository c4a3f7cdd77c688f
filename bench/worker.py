"""A measurement in a process of its own: what one leaves in the heap must not reach another."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .records import ROOT


def run_worker(module: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Runs ``python -m bench.<module> JOB`` and returns the JSON object of its last line.

    Raises:
        RuntimeError: it failed; the message is the last line it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", json.dumps(job)],
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
