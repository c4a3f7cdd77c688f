"""These tests run in a process of their own, under Triton's interpreter; tests/kernels/
test_interpreted.py starts it. Elsewhere they are not collected."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()
else:
    collect_ignore_glob = ["test_*.py"]
