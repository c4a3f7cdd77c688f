"""What one compiled form of a kernel is described by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["BOOLEANS", "DTYPES", "Variant"]

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
BOOLEANS = (False, True)


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of argument types and compile-time constants.

    Args:
        module, kernel: where the ``@triton.jit`` function is.
        label: what distinguishes it, for people.
        types: argument name -> Triton type, for the arguments that are not compile-time constants;
            ``{BLOCK_M}`` and the like stand for block sizes.
        constants: compile-time constants other than block sizes.
        table: the tile table of ``config.Arch`` that gives block sizes, or the field's name.
        key: the key into that tile table: bytes of an element of x, rank block, form; for a norm
            its columns first.
        aligned: pointers and sizes are multiples of 16, as they usually are.
        stack_limit: bytes of stack (spilled registers) that are accepted: eight registers, by which
            versions of Triton differ (3.7.0 on sm_120), cost nothing that can be measured.
    """

    module: str
    kernel: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    key: tuple[int, int, bool | str] = (4, 16, "one")
    aligned: bool = True
    stack_limit: int = 32
