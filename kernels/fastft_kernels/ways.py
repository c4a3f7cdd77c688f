"""Which way a LoRA product takes: data measured on a GPU where there is any, else bytes counted.

    expand   the library's product, then one pass that adds the low-rank term
    border   one library product on bordered operands (``fastft_kernels.border``)
    gemm     one persistent Triton product, the term in its accumulator

``ways.json`` holds measured times: a list of objects {"arch", "direction" ("fwd" or "bwd"),
"tokens", "features", "widths", "r", "dropout" (true or false), "time_ms": {way: milliseconds},
"device", "date", "commit"}; ``python -m bench ways`` makes its rows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["TABLE", "WAYS", "Shape", "counted", "force", "forced", "pick"]

WAYS = ("expand", "border", "gemm")
TABLE = Path(__file__).with_name("ways.json")
# A measurement speaks for a shape if no size is further from its own than this factor.
_NEAR = 2.0


class Shape(NamedTuple):
    """What a choice depends on. direction: "fwd", "bwd", or "glu", a backward whose dY and dS a
    gated unit's leaves wherever they are wanted. widths: of the layers that share x; r: the largest
    rank."""

    direction: str
    tokens: int
    features: int
    widths: tuple[int, ...]
    r: int
    dropout: bool

    def distance(self, row: dict[str, Any]) -> float:
        """The largest factor between a size of its own and the row's; inf where they differ in
        kind."""
        same = (self.direction, self.dropout, len(self.widths))
        if same != (row["direction"], row["dropout"], len(row["widths"])):
            return math.inf
        own = (self.tokens, self.features, self.r, *self.widths)
        theirs = (row["tokens"], row["features"], row["r"], *row["widths"])
        return max(max(a, b) / max(min(a, b), 1) for a, b in zip(own, theirs, strict=True))


@functools.cache
def _rows(arch: str) -> tuple[dict[str, Any], ...]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(row for row in rows if row["arch"] == arch)


def counted(shape: Shape, way: str) -> float:
    """Elements a token that a way reads and writes beside the frozen product's own, from memory.

    A Triton product's own speed cannot be counted, so ``gemm`` is inf: only a measurement picks it.
    """
    k, n, layers = shape.features, sum(shape.widths), len(shape.widths)
    # The adapters are written into the border anew at each call, however few the tokens.
    fill = shape.r / max(shape.tokens, 1)
    if way == "gemm":
        return math.inf
    if shape.direction == "fwd":
        # expand reads x for S, then reads and writes y; border reads x and writes [x | S].
        return float(k + 2 * n if way == "expand" else 2 * k + n * fill)
    if shape.direction == "glu":
        # expand: every product but the first adds to dx, and so does the low-rank term.
        own = 2 * k if shape.dropout else k * layers * fill
        return float(2 * k * layers if way == "expand" else own)
    # Both read dy for dS and dB. expand: every product but the first adds to dx, and so does the
    # low-rank term; border writes [dy | dS], and under dropout the term is still added apart.
    own = n + (2 * k if shape.dropout else k * layers * fill)
    return float(n + (2 * k * layers if way == "expand" else own))


_forced: list[str] = []


@contextmanager
def force(way: str) -> Iterator[None]:
    """Inside, ``way`` is taken wherever it can run: for benchmarks and tests."""
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    _forced.append(way)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> bool:
    """Whether a way is forced."""
    return bool(_forced)


@functools.lru_cache(maxsize=1024)
def _picked(arch: str, shape: Shape, possible: tuple[str, ...]) -> str:
    near = sorted((shape.distance(row), i) for i, row in enumerate(_rows(arch)))
    for distance, i in near:
        times = {way: t for way, t in _rows(arch)[i]["time_ms"].items() if way in possible}
        if distance <= _NEAR and len(times) == len(possible):
            return min(times, key=lambda way: times[way])
    return min(possible, key=lambda way: counted(shape, way))


def pick(arch: str, shape: Shape, possible: Sequence[str]) -> str:
    """The way of ``possible`` (never empty) that is fastest for this shape."""
    if _forced and _forced[-1] in possible:
        return _forced[-1]
    return _picked(arch, shape, tuple(possible))
