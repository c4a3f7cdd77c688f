"""A process that has imported what a worker needs before there is a job for it.

    python -m bench.spare WORKER MODULE...

Imports ``bench.WORKER`` and the modules, waits for a job, one line of JSON, on its standard input,
and goes on as ``python -m bench.WORKER JOB``. Where its parent ends without one, it ends too.
"""

from __future__ import annotations

import contextlib
import importlib
import sys


def main() -> None:
    name, *needed = sys.argv[1:]
    worker = importlib.import_module(f"bench.{name}")
    for module in needed:
        # Not every job needs every module: one that needs this one fails as it would have.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    job = sys.stdin.readline()
    if job:
        sys.argv[1:] = [job]
        worker.main()


if __name__ == "__main__":
    main()
