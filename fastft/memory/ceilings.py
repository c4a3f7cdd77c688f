"""What this machine reaches: products of a few shapes, copies, elementwise work, attention.

The planner divides work by these; a file keeps them, by device (``fastft doctor --measure``).
"""

from __future__ import annotations

import json
import mmap
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastft import ops
from fastft.files import write_text
from fastft.ops._room import pooled

__all__ = ["Ceilings", "load", "measure", "save"]

# Rows, columns and depth of products: one layer of a small and of a large model, and a head.
SHAPES = ((512, 576, 576), (2048, 1536, 576), (2048, 4096, 4096), (256, 49152, 576))
_ROUNDS = 5
# A measurement lasts at least this long, in seconds.
_SHORTEST = 0.03


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device in one dtype.

    Attributes:
        device, dtype: its name and the dtype's.
        products: (rows, columns, depth, floating-point operations a second).
        copies: bytes a second, reads and writes together, of a large copy.
        elementwise: bytes a second of a gated activation, forward and backward.
        attention: floating-point operations a second of causal attention, forward and backward.
        fresh: seconds a byte of newly mapped memory costs (CPU; 0 elsewhere).
        launch: seconds the smallest operation takes.
    """

    device: str
    dtype: str
    products: tuple[tuple[int, int, int, float], ...]
    copies: float
    elementwise: float
    attention: float
    fresh: float
    launch: float

    def product(self, rows: int, columns: int, depth: int) -> float:
        """Operations a second of the measured product nearest in shape."""

        def distance(point: tuple[int, int, int, float]) -> float:
            pairs = zip(point[:3], (rows, columns, depth), strict=True)
            return sum(abs(_log(a) - _log(b)) for a, b in pairs)

        return min(self.products, key=distance)[3]


def _log(value: float) -> float:
    return float(torch.tensor(max(1.0, value)).log())


def measure(device: torch.device, name: str, dtype: torch.dtype) -> Ceilings:
    """Measures ``device``: seconds of work, results from where an accelerated model's come from."""
    with pooled():
        return _measure(device, name, dtype)


def _measure(device: torch.device, name: str, dtype: torch.dtype) -> Ceilings:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    products = []
    for rows, columns, depth in SHAPES:
        x, w = draw(rows, depth), draw(columns, depth)
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        seconds = _seconds(lambda: torch.mm(x, w.t(), out=out), device)  # noqa: B023
        products.append((rows, columns, depth, 2.0 * rows * columns * depth / seconds))
    size = (64 << 20) if device.type == "cpu" else (1 << 30)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 2.0 * size / _seconds(lambda: target.copy_(source), device)
    gate, up, d_out = (draw(2048, 4096).requires_grad_() for _ in range(3))

    def activation() -> None:
        torch.autograd.grad(ops.glu(gate, up), (gate, up), d_out)

    moved = 8.0 * gate.nbytes
    q, k, v, d_heads = (draw(2, 8, 1024, 64).requires_grad_() for _ in range(4))

    def attention() -> None:
        if device.type == "cpu":
            out = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), d_heads)

    scores = 7.0 * 2 * 8 * 1024 * 1024 * (64 + 64) / 2
    small = draw(16, 16)
    return Ceilings(
        name,
        str(dtype).removeprefix("torch."),
        tuple(products),
        copies,
        moved / _seconds(activation, device),
        scores / _seconds(attention, device),
        _fresh() if device.type == "cpu" else 0.0,
        _seconds(lambda: small.add(1), device),
    )


def _fresh(size: int = 64 << 20) -> float:
    """Touching each page of a new mapping once."""
    found = []
    for _ in range(_ROUNDS):
        with mmap.mmap(-1, size) as memory:
            pages = np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE]
            start = time.perf_counter()
            pages[:] = 1
            found.append((time.perf_counter() - start) / size)
            del pages
    return statistics.median(found)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of one call."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    run()
    repeats = max(1, int(_SHORTEST / max(now() - start, 1e-7)))
    found = []
    for _ in range(_ROUNDS):
        start = now()
        for _ in range(repeats):
            run()
        found.append((now() - start) / repeats)
    return statistics.median(found)


def load(path: Path, device: str, dtype: str) -> Ceilings | None:
    """The numbers kept for this device and dtype; None where there are none."""
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            if entry["device"] == device and entry["dtype"] == dtype:
                points = tuple(tuple(point) for point in entry.pop("products"))
                return Ceilings(products=points, **entry)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def save(path: Path, found: Ceilings) -> None:
    """Puts the numbers in the file, in the place of older ones of the same device and dtype."""
    kept: list[dict[str, Any]] = []
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = (found.device, found.dtype)
        kept = [entry for entry in old if (entry.get("device"), entry.get("dtype")) != same]
    except (OSError, ValueError, AttributeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*kept, asdict(found)], indent=2) + "\n")
