"""What ``fastft_kernels.aot`` compiles: every kernel with the argument types and compile-time
constants that its launcher gives it.

``VARIANTS`` is the heaviest and the lightest form of every kernel for each kind of dtype and rank;
``ALL_VARIANTS`` adds every combination in between.
"""

from __future__ import annotations

import json

from fastft_kernels import _variants_block, _variants_lora
from fastft_kernels._variant import Variant

__all__ = ["ALL_VARIANTS", "VARIANTS", "Variant"]

VARIANTS: tuple[Variant, ...] = (*_variants_lora.VARIANTS, *_variants_block.VARIANTS)


def _distinct(variants: list[Variant]) -> tuple[Variant, ...]:
    unique = {(v.kernel, v.label, json.dumps(v.constants, default=str)): v for v in variants}
    return tuple(unique.values())


ALL_VARIANTS: tuple[Variant, ...] = _distinct(
    [*VARIANTS, *_variants_lora.ALL_VARIANTS, *_variants_block.ALL_VARIANTS]
)
