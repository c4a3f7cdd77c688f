"""``scaled_dot_product_attention``: softmax attention for training, scores never held.

    out = softmax(scale q k^T) v over the keys a query may see

The scores of one block of queries exist at a time; the backward makes them again from q, k and
their logsumexp (Dao et al. 2022, FlashAttention). With D_i = sum_j p_ij dp_ij = dout_i . out_i:

    dv = p^T dout;   ds = scale p (dp - D), dp = dout v^T;   dq = ds k;   dk = ds^T q
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import (
    FLOATS,
    autocast_dtype,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
    without_autocast,
)
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._eager import dispatched
from fastft.ops._library import register
from fastft.ops._room import empty_like, new_empty
from fastft.ops._saving import registered
from fastft.reference import attention as reference

__all__ = ["check", "scaled_dot_product_attention"]

_WHERE = "fastft.ops.scaled_dot_product_attention"
_AUTO = "auto"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with torch's names and layout, without dropout.

    Args:
        query: (batch, heads, queries, width), any strides; float32, bfloat16, float16, float64,
            the same in key and value; under autocast all three are cast, as torch does.
        key: (batch, kv_heads, keys, width), kv_heads a divisor of heads: query head h reads key
            head h // (heads / kv_heads), grouped-query attention without repeated keys.
        value: (batch, kv_heads, keys, value width).
        attn_mask: bool, (batch or 1, heads or 1, queries, keys), True where a query looks. A query
            that sees nothing gives 0.
        is_causal: query i sees keys 0 to i (as torch's, from the upper left), and of those what
            attn_mask says.
        scale: of the scores; None for 1 / sqrt(width).

    Returns:
        (batch, heads, queries, value width), laid out so that ``out.transpose(1, 2)`` is
        contiguous. Saved for backward: query, key, value, attn_mask, one float32 a query, and the
        result, which an adapted or trained layer after it keeps as well.

    In bfloat16 on a CPU the scores are float32 where its vectors multiply bfloat16 (AVX512-BF16
    without AMX), widths are even, features adjacent and keys at most 32,768; else they are rounded
    to bfloat16 once, as in an unfused product. Their softmax and every sum are float32.

    Raises:
        DtypeError, ShapeError, DeviceError: see ``check``.
        ArgumentError, BackendError: an unknown backend, or one that cannot run this call.
    """
    check(query, key, value, attn_mask)
    dtype = autocast_dtype(query.device.type)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = attn_mask
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    name = backend or _AUTO
    if registered() or dispatched(query, key, value, mask):
        out, _ = torch.ops.fastft.attention_fwd(query, key, value, mask, factor, is_causal, name)
        return out
    name = _choose(name, query)[0]
    return Attention.apply(query, key, value, mask, factor, is_causal, name)


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, dtypes that differ, a mask that is not bool.
        ShapeError: shapes that do not fit.
        DeviceError: tensors on different devices.
        ArgumentError: a mask that requires a gradient cannot be (it is bool); no keys at all.
    """
    check_tensor(_WHERE, "query", query)
    check_dtype(_WHERE, "query", query, FLOATS)
    if query.dim() != 4:
        raise ShapeError(
            _WHERE,
            "query",
            expected="(batch, heads, queries, width)",
            got=str(tuple(query.shape)),
        )
    autocast = autocast_dtype(query.device.type) is not None
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(_WHERE, name, tensor)
        check_dtype(_WHERE, name, tensor, FLOATS if autocast else (query.dtype,))
        check_device(_WHERE, name, tensor, query.device)
    batch, heads, queries, width = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != width:
        raise ShapeError(
            _WHERE,
            "key",
            expected=f"({batch}, kv_heads, keys, {width})",
            got=str(tuple(key.shape)),
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ShapeError(
            _WHERE,
            "key",
            expected=f"a number of heads that divides the {heads} of query",
            got=str(key.shape[1]),
        )
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            _WHERE,
            "value",
            expected=f"{(*key.shape[:3], 'width')}",
            got=str(tuple(value.shape)),
        )
    if key.shape[2] == 0:
        raise ArgumentError(_WHERE, "key", expected="at least one key", got="none")
    if mask is not None:
        check_tensor(_WHERE, "attn_mask", mask)
        check_dtype(_WHERE, "attn_mask", mask, (torch.bool,))
        check_device(_WHERE, "attn_mask", mask, query.device)
        if mask.dim() != 4:
            raise ShapeError(
                _WHERE,
                "attn_mask",
                expected="(batch or 1, heads or 1, queries, keys)",
                got=str(tuple(mask.shape)),
            )
        fits = (
            batch if mask.shape[0] != 1 else 1,
            heads if mask.shape[1] != 1 else 1,
            queries,
            key.shape[2],
        )
        check_shape(_WHERE, "attn_mask", mask, fits, "(batch or 1, heads or 1, queries, keys)")


def _choose(backend: str, query: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "attention",
        None if backend == _AUTO else backend,
        device_type=query.device.type,
        dtype=query.dtype,
    )


def _fwd_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out, lse = _fwd_fake(query, key, value, mask, scale, is_causal, backend)
    if query.numel():
        with without_autocast(query.device.type):
            _choose(backend, query)[1].fwd(
                out, lse, query, key, value, mask, scale=scale, is_causal=is_causal
            )
    return out, lse


def _fwd_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    out = new_empty(query, (batch, queries, heads, value.shape[-1])).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(batch, heads, queries, dtype=wide)


def _bwd_kernel(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _bwd_fake(d_out, query, key, value, mask, out, lse, scale, is_causal, backend)
    if not query.numel():
        return gradients[0], gradients[1].zero_(), gradients[2].zero_()
    with without_autocast(query.device.type):
        _choose(backend, query)[1].bwd(
            *gradients, d_out, query, key, value, mask, out, lse, scale=scale, is_causal=is_causal
        )
    return gradients


def _bwd_fake(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(query), empty_like(key), empty_like(value)


class Attention(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = _fwd_kernel(*arguments)  # type: ignore[call-arg]
        query, key, value, mask, ctx.scale, ctx.is_causal, ctx.backend = arguments
        ctx.save_for_backward(query, key, value, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        if wanted(d_out):
            return _plain_backward(ctx, d_out)
        query, key, value, mask, result, lse = ctx.saved_tensors
        gradients = _bwd_kernel(
            d_out, query, key, value, mask, result, lse, ctx.scale, ctx.is_causal, ctx.backend
        )
        return (*gradients, *[None] * 4)


def _plain_backward(ctx: Any, d_out: Tensor) -> Any:
    """Through the reference."""
    query, key, value, mask, *_ = ctx.saved_tensors

    def again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.attention(query, key, value, mask, ctx.scale, ctx.is_causal)[0]

    needs = ctx.needs_input_grad[:3]
    return (*plain_gradients(again, (query, key, value), needs, [d_out]), *[None] * 4)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, mask, ctx.scale, ctx.is_causal, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _registered_backward(ctx: Any, d_out: Tensor, _: Any) -> Any:
    if wanted(d_out) and not registered():  # of a layer that keeps its attention
        return _plain_backward(ctx, d_out)
    facts = (ctx.scale, ctx.is_causal, ctx.backend)
    gradients = torch.ops.fastft.attention_bwd(d_out, *ctx.saved_tensors, *facts)
    return (*gradients, *[None] * 4)


register(
    "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, "
    "bool is_causal, str backend) -> (Tensor, Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "attention_bwd(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor? mask, "
    "Tensor out, Tensor lse, float scale, bool is_causal, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::attention_fwd", _registered_backward, setup_context=_setup_context
)
