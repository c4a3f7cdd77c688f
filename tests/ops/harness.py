"""What proves an operation: its error against float64 is at most K times that of plain torch in
the same dtype on the same inputs, for the output and every gradient, with every output poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft.cpu import products

# Both sides sum the same products with the same unit roundoff in another order, and may round once
# more between two products; a factor of 4 covers both. The floor is half a unit in the last place,
# for shapes so small that plain torch happens to be exact.
K = 4.0


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def relative_error(got: Tensor, truth: Tensor) -> float:
    if got.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = truth.norm().item()
    return (got.double() - truth).norm().item() / (scale if scale > 0 else 1.0)


def assert_as_good_as_torch(
    names: Sequence[str],
    got: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Every tensor of ``got`` is within K times plain torch's error."""
    for name, g, p, t in zip(names, got, plain, truth, strict=True):
        assert g.shape == t.shape, f"{name}: shape {tuple(g.shape)}, expected {tuple(t.shape)}"
        bound = K * max(relative_error(p, t), half_ulp(dtype))
        error = relative_error(g, t)
        assert error <= bound, f"{name}: relative error {error:.3e} above {bound:.3e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN (integers: the largest value), scratch buffers too."""
    products._scratch.buffers.clear()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        products._scratch.buffers.clear()


@dataclass(frozen=True)
class Rejected:
    """A call that must be refused: how, and with which words."""

    name: str
    call: Callable[[], object]
    error: type[Exception]
    words: Sequence[str]


def assert_rejected(case: Rejected) -> None:
    """The call raises this error and its text has all the words."""
    try:
        case.call()
    except case.error as error:
        text = str(error)
        missing = [word for word in case.words if word not in text]
        assert not missing, f"{case.name}: {missing} missing in: {text}"
        return
    raise AssertionError(f"{case.name}: accepted, expected {case.error.__name__}")
