"""``embedding``: rows of a trained table, whose gradients are summed in float32.

    y = W[ids];   dW[v] = sum over tokens with ids = v: dy

On a CPU torch adds a token's gradient to its row in the dtype of the weight: of 600 tokens whose
gradients have one sign, in bfloat16, 15% goes to rounding. Here tokens are sorted, each
row's sum is rounded once, and rows that no token has are not touched beyond being zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import FLOATS, check_device, check_dtype, check_tensor
from fastft.ops._differentiable import wanted
from fastft.ops._eager import dispatched
from fastft.ops._library import register

__all__ = ["check", "embedding"]

_WHERE = "fastft.ops.embedding"
_AUTO = "auto"


def embedding(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None, backend: str | None = None
) -> Tensor:
    """W[ids].

    Args:
        ids: any shape, int32 or int64, each 0 to rows - 1.
        weight: (rows, features), float32, bfloat16, float16 or float64.
        padding_idx: the id whose row gets no gradient, or None; negative counts from the end.

    Returns:
        (*ids.shape, features) in the dtype of weight. Saved: ids. The gradient of weight is dense,
        summed in float32 (float64 for float64), in the order of the tokens; with
        ``create_graph`` by torch's own operation.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``.
        BackendError: the backend asked for cannot run the call.
        IndexError: an id that is no row, from torch.
    """
    padding = check(ids, weight, padding_idx)
    name = backend or _AUTO
    if dispatched(ids, weight):
        return torch.ops.fastft.embedding_fwd(ids, weight, padding, name)
    return Embedding.apply(ids, weight, padding, _choose(name, weight)[0])


def check(ids: Tensor, weight: Tensor, padding_idx: int | None) -> int:
    """Refuses what the operation is not defined for; gives the row of padding, or -1.

    Raises:
        DtypeError: no tensor, ids that are not int32 or int64, no floating dtype.
        ShapeError: a weight that has not two dimensions.
        DeviceError: ids on another device.
        ArgumentError: padding_idx that is no row.
    """
    check_tensor(_WHERE, "ids", ids)
    check_dtype(_WHERE, "ids", ids, (torch.int64, torch.int32))
    check_tensor(_WHERE, "weight", weight)
    check_dtype(_WHERE, "weight", weight, FLOATS)
    check_device(_WHERE, "ids", ids, weight.device)
    if weight.dim() != 2:
        got = str(tuple(weight.shape))
        raise ShapeError(_WHERE, "weight", expected="(rows, features)", got=got)
    if padding_idx is None:
        return -1
    rows = weight.shape[0]
    if not -rows <= padding_idx < rows:
        expected = f"None, or a row from {-rows} to {rows - 1}"
        raise ArgumentError(_WHERE, "padding_idx", expected=expected, got=repr(padding_idx))
    return padding_idx % rows


def _fwd_kernel(ids: Tensor, weight: Tensor, padding: int, backend: str) -> Tensor:
    return functional.embedding(ids, weight)


def _fwd_fake(ids: Tensor, weight: Tensor, padding: int, backend: str) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _bwd_kernel(dy: Tensor, ids: Tensor, rows: int, padding: int, backend: str) -> Tensor:
    flat = dy.reshape(ids.numel(), dy.shape[-1]).contiguous()
    d_weight = _zeros(flat, rows)
    if flat.numel():
        ordered, order = ids.reshape(-1).long().sort(stable=True)
        _choose(backend, dy)[1].bwd(d_weight, flat, order, ordered, padding=padding)
    return d_weight


def _zeros(like: Tensor, rows: int) -> Tensor:
    """(rows, columns of like) zeros; on a CPU from numpy, which has them from the system, unwritten
    until they are: torch writes them all, 0.35 s for Qwen2.5's 272 MB in memory that is new."""
    shape = (rows, like.shape[1])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    held = torch.from_numpy(np.zeros(rows * shape[1] * like.element_size(), np.uint8))
    return like.new_empty(0).set_(held.untyped_storage(), 0, shape, (shape[1], 1))


def _bwd_fake(dy: Tensor, ids: Tensor, rows: int, padding: int, backend: str) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1])


def _choose(backend: str, tensor: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "embedding",
        None if backend == _AUTO else backend,
        device_type=tensor.device.type,
        dtype=tensor.dtype,
    )


class Embedding(torch.autograd.Function):
    """Eager autograd; a second derivative, with regard to dy, goes through torch's own."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int, backend: str) -> Tensor:
        _setup_context(ctx, (ids, weight, padding, backend), weight)
        return _fwd_kernel(ids, weight, padding, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        rows, padding, _ = ctx.facts
        if wanted(dy):
            d_weight = torch.ops.aten.embedding_dense_backward(dy, ids, rows, padding, False)
        else:
            d_weight = _bwd_kernel(dy, ids, *ctx.facts)
        return None, d_weight, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, padding, backend = inputs
    ctx.save_for_backward(ids)
    ctx.facts = (weight.shape[0], padding, backend)


def _registered_backward(ctx: Any, dy: Tensor) -> Any:
    d_weight = torch.ops.fastft.embedding_bwd(dy, *ctx.saved_tensors, *ctx.facts)
    return None, d_weight, None, None


register(
    "embedding_fwd(Tensor ids, Tensor weight, int padding, str backend) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "embedding_bwd(Tensor dy, Tensor ids, SymInt rows, int padding, str backend) -> Tensor",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::embedding_fwd", _registered_backward, setup_context=_setup_context
)
