"""Which of the tensors that a layer saves are activations, and those in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fastft.memory._compress import Compressed, Noise, compress
from fastft.ops._checks import autocast_dtype

__all__ = ["Narrowing"]

# Kernels of attention on GPUs pad their statistics to a multiple of so many tokens.
_PADDED = 32


class Narrowing:
    """Of one forward of a layer: called with a tensor that is saved, gives it in 8 bits, or None
    where it stays as it is.

    Args:
        form: the format.
        seed: of the random numbers by which int8 is rounded.
        hidden: the layer's input (..., features): what activations are told by.
        weights: the layer's parameters and buffers.
        inputs: all that the layer is given. Beside its weights they are there anyway.
    """

    def __init__(
        self,
        form: str,
        seed: int,
        hidden: Tensor | None,
        weights: Iterable[Tensor],
        inputs: Iterable[Tensor] = (),
    ) -> None:
        weights, others = list(weights), [t for t in inputs if t is not hidden]
        self._form, self._noise = form, Noise(seed)
        self._hidden = hidden
        # Asked for now: inside an operation that autocast has cast for, it is off.
        self._autocast = None if hidden is None else autocast_dtype(hidden.device.type)
        self._places = {t.untyped_storage().data_ptr() for t in (*weights, *others)}
        # Attention makes numbers of a mask's truth values, autocast others of its numbers.
        self._masks = {t.shape for t in others if t.dim() == 4}
        # As autocast casts them: whole, or the matrix of one expert.
        self._shapes = {t.shape for t in weights} | {t.shape[-2:] for t in weights}

    def __call__(self, tensor: Tensor) -> Compressed | None:
        if type(tensor) is not Tensor or not self._is_activation(tensor):
            return None
        return compress(tensor.detach(), self._form, self._noise)

    def _is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the dtype of the layer's input or of autocast's products, and
        neither a weight nor a mask nor a statistic."""
        hidden = self._hidden
        if hidden is None or tensor.dtype not in (hidden.dtype, self._autocast):
            return False
        if tensor.untyped_storage().data_ptr() in self._places or tensor.shape in self._masks:
            return False
        # What is expanded is larger in 8 bits.
        expanded = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        if expanded or _is_statistic(tensor, hidden):
            return False
        return tensor.dtype != self._autocast or not self._is_cast(tensor, hidden)

    def _is_cast(self, tensor: Tensor, hidden: Tensor) -> bool:
        """Whether a tensor may be a weight that autocast has cast: of a weight's shape, unless it
        has a row for each token; ``nn.Linear`` saves its weight transposed."""
        if tensor.dim() < 2:
            return False
        if tensor.stride(-1) != 1 and tensor.mT.shape in self._shapes:
            return True
        rows, tokens = tensor.shape[:-1].numel(), hidden.shape[:-1].numel()
        return tensor.shape in self._shapes and rows != tokens


def _is_statistic(tensor: Tensor, hidden: Tensor) -> bool:
    """Whether a tensor is attention's logsumexp (batch, heads, tokens). Features may be as many as
    tokens are, but then there is a row for each token, which heads are as good as never."""
    tokens = hidden.shape[:-1].numel()
    length = hidden.shape[-2] if hidden.dim() > 1 else 1
    if tensor.dim() != 3 or tensor.shape[1] == length or tokens == 0:
        return False
    padded = tokens // length * (-(-length // _PADDED) * _PADDED)
    return tensor.shape[0] * tensor.shape[-1] in (tokens, padded)
