"""The bound every kernel is held to: its error against float64 may not exceed a small multiple of
the error that plain torch makes in the same dtype on the same inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_as_accurate", "poison", "relative_errors"]

# Of the root mean square and of the largest error. The kernels round at the same places as plain
# torch, in another order: the first is a ratio of averages, the second of extremes.
_K_RMS = 2.0
_K_MAX = 3.0
_FEW = 32


def relative_errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """(root mean square, largest) error, each relative to that of the truth."""
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = actual.detach().double() - truth
    rms, largest = truth.square().mean().sqrt(), truth.abs().max()
    scale_rms, scale_max = (float(s) or 1.0 for s in (rms, largest))
    return (
        float(difference.square().mean().sqrt()) / scale_rms,
        float(difference.abs().max()) / scale_max,
    )


def assert_as_accurate(
    name: str,
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    rounded_to: torch.dtype | None = None,
    terms: int = 1,
) -> None:
    """Fails unless ``actual`` is as close to the float64 ``truth`` as ``plain`` torch is.

    The floor is for luck. In a result of a few numbers plain torch may round each to the very
    truth: there one unit in the last place, two correct roundings, is allowed. Over many numbers
    luck averages out: an eighth of that is left for the mean, half, one rounding, for the largest.
    ``rounded_to`` is the dtype that terms were rounded to, where the result's own is wider: a
    float32 loss of bfloat16 logits. ``terms`` are summed in float32 for an element, one after the
    other where plain torch has a tree: of partial sums that grow as a random walk, whose roundings
    are up to u = 2^-24 each, sqrt(n / 6) u is left in the mean.
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not fully written, or not finite"
    few, eps = truth.numel() < _FEW, torch.finfo(actual.dtype).eps
    summed = 2.0**-24 * math.sqrt(terms / 6)
    rounded = torch.finfo(rounded_to).eps / 8 if rounded_to is not None else 0.0
    mean, largest = (eps, eps) if few else (eps / 8, eps / 2)
    errors = zip(
        ("rms", "max"),
        relative_errors(actual, truth),
        relative_errors(plain, truth),
        (_K_RMS, _K_MAX),
        (max(mean, rounded, summed), max(largest, rounded, 2 * summed)),
        strict=True,
    )
    for kind, own, torch_own, k, floor in errors:
        bound = k * torch_own + floor
        assert own <= bound, f"{name}: {kind} error {own:.3g} > {k} * {torch_own:.3g} + {floor:.3g}"


def poison(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """An output buffer full of NaN (of a large number where there is none): what a kernel leaves
    unwritten shows."""
    fill = float("nan") if dtype.is_floating_point else 1 << 30
    return torch.full(shape, fill, dtype=dtype)
