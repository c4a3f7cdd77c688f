"""The packages fastft is compared with, and why one is not there."""

from __future__ import annotations

import importlib.util

INSTALL = {
    "peft": "peft",
    "trl": "trl",
    "transformers": "transformers",
    "liger_kernel": "liger-kernel",
    "bitsandbytes": "bitsandbytes",
}


def missing(package: str | None) -> str | None:
    """Why `package` cannot be compared with, or None when it can."""
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"missing: {package} is not installed (pip install {INSTALL.get(package, package)})"
