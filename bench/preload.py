"""Imported once by the fork server of bench.memory, so that its children start with code loaded.

Nothing may run here: a process that has started OpenMP threads must not be forked.
"""

from __future__ import annotations

import contextlib

for _name in ("torch", "transformers", "peft", "trl.trainer.utils", "fastft"):
    with contextlib.suppress(ImportError):
        __import__(_name)
