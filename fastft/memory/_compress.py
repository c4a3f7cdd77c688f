"""Activations kept in 8 bits: lossy, for whoever asks.

int8: each row by its largest magnitude, x ~ scale q with scale = max|x| / 127, rounded
stochastically so that the expected value is x. float8: e4m3 with one scale a row, to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "Compressed", "Noise", "compress"]

FORMATS = ("int8", "float8")
# Smaller tensors (statistics, S of an adapter) are not worth a scale.
_LEAST = 1 << 14
_NARROW_ROW = 64


@dataclass
class Compressed:
    """A tensor in 8 bits and one float32 scale for each row of its last dimension."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The tensor, rounded."""
        return torch.mul(self.codes.float(), self.scale).to(self.dtype)


class Noise:
    """Random numbers of its own, by a seed: torch's are drawn by dropout, whose masks would be
    others with compression than without.

    A CUDA graph that is captured takes torch's: the graph moves them on with each replay, and
    knows no others.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Float32 in the tensor's shape, uniform in [0, 1)."""
        room = torch.empty_like(tensor, dtype=torch.float32)
        return room.uniform_(generator=self._generator(tensor))

    def _generator(self, tensor: Tensor) -> torch.Generator | None:
        if tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        found = self._generators.get(tensor.device)
        if found is None:
            found = torch.Generator(tensor.device).manual_seed(self._seed)
            self._generators[tensor.device] = found
        return found


def compress(tensor: Tensor, form: str, noise: Noise) -> Compressed | None:
    """The tensor in ``form``; None where that saves nothing."""
    wide = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.dim() > 1
    if not wide or tensor.numel() < _LEAST or tensor.shape[-1] < _NARROW_ROW:
        return None
    # Infinite where a mask is: a scale that is would make its zeros NaN.
    top = tensor.abs().amax(-1, keepdim=True).float().clamp_max_(torch.finfo(torch.float32).max)
    if form == "int8":
        scale = (top / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        # floor(x + u), u uniform in [0, 1), is x in expectation; +-127 stay what they are.
        codes = torch.addcdiv(noise.like(tensor), tensor.float(), scale)
        codes = codes.floor_().clamp_(-127, 127).to(torch.int8)
    else:
        scale = (top / 448).clamp_min_(torch.finfo(torch.float32).tiny)
        codes = (tensor.float() / scale).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return Compressed(codes, scale, tensor.dtype)
