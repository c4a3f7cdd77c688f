"""``rope``: rotary position embedding of queries and keys in one pass over each.

    (a, b) -> (a cos - b sin, b cos + a sin)      backward: the inverse rotation, its transpose

over pairs of features: (j, j + rotary / 2), or with ``interleaved`` (2 j, 2 j + 1) (Su et al. 2021,
"RoFormer"). Features past ``rotary`` stay. Only cos and sin are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor
from fastft.ops._differentiable import wanted
from fastft.ops._eager import call, dispatched
from fastft.ops._library import register
from fastft.ops._room import empty_like, new_empty
from fastft.reference import rope as reference

__all__ = ["check", "rope"]

_WHERE = "fastft.ops.rope"
_AUTO = "auto"


def rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    half_tables: bool = False,
    out_dtype: torch.dtype | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by their positions.

    Args:
        query: (batch, heads, tokens, width), float32, bfloat16, float16 or float64; any strides.
        key: (batch, its heads, tokens, width), the dtype of query.
        cos, sin: (batch or 1, tokens, rotary), an entry for each feature as Transformers has them,
            rotary at most width; any of these dtypes; no gradient.
        interleaved: pairs are neighbours (GPT-J, Cohere), not half a width apart (GPT-NeoX, Llama).
        half_tables: cos and sin (..., rotary / 2), an entry for each pair.
        out_dtype: of the results; None for what torch would promote query and cos to.
        inplace: write over query and key, where no gradient is wanted of either.

    Returns:
        (query, key) turned, with the strides of the inputs where these are dense. Computed in
        float32 and rounded once.

    Raises:
        DtypeError, ShapeError, DeviceError: see ``check``.
        ArgumentError, BackendError: inplace with a gradient or another dtype, an unknown backend,
            or one that cannot run this.
    """
    check(query, key, cos, sin, half_tables)
    dtype = out_dtype or torch.promote_types(query.dtype, cos.dtype)
    # What the kernels write; torch rounds it to any other.
    written = dtype if dtype in (query.dtype, torch.float64) else torch.float32
    name = backend or _AUTO
    through = dispatched(query, key, cos, sin)
    if inplace:
        _check_inplace(query, key, dtype)
        if through:
            found = rope(
                query, key, cos, sin, interleaved=interleaved, half_tables=half_tables,
                backend=backend,
            )  # fmt: skip
            return query.copy_(found[0]), key.copy_(found[1])
        found = _run(query, key, cos, sin, interleaved, half_tables, False, (query, key), name)
        torch.autograd.graph.increment_version(found)  # so that a graph that holds them can tell
        return found[0], found[1]
    arguments = (interleaved, half_tables, False, written)
    if through:
        found = torch.ops.fastft.rope_fwd(query, key, cos, sin, *arguments, name)
    else:
        chosen = _choose(name, query, cos.dtype, written)[0]
        found = call(Rope, query, key, cos, sin, *arguments, chosen)
    return found if written == dtype else (found[0].to(dtype), found[1].to(dtype))


def check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, half_tables: bool) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, or a key in another than the query's.
        ShapeError: not four dimensions, sizes that differ, or tables wider than the heads.
        DeviceError: tensors on different devices.
        ArgumentError: a table that requires a gradient.
    """
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        check_tensor(_WHERE, name, tensor)
        check_dtype(_WHERE, name, tensor, (query.dtype,) if name == "key" else FLOATS)
        check_device(_WHERE, name, tensor, query.device)
    if query.dim() != 4:
        expected = "(batch, heads, tokens, width)"
        raise ShapeError(_WHERE, "query", expected=expected, got=str(tuple(query.shape)))
    batch, _, tokens, width = query.shape
    heads = key.shape[1] if key.dim() == 4 else 0
    shape, what = (batch, heads, tokens, width), "(batch, heads, tokens, width)"
    check_shape(_WHERE, "key", key, shape, what)
    rotary = cos.shape[-1] * (2 if half_tables else 1) if cos.dim() == 3 else 0
    fits = cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == tokens
    if not fits or rotary > width or rotary % 2:
        expected = f"({batch} or 1, {tokens}, at most {width // (2 if half_tables else 1)}, even)"
        raise ShapeError(_WHERE, "cos", expected=expected, got=str(tuple(cos.shape)))
    check_shape(_WHERE, "sin", sin, tuple(cos.shape), "the shape of cos")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        expected, got = "tables without a gradient", "one that requires one"
        raise ArgumentError(_WHERE, "cos", expected=expected, got=got)


def _check_inplace(query: Tensor, key: Tensor, dtype: torch.dtype) -> None:
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    several = _expanded(query) or _expanded(key)
    if wanted or several or dtype != query.dtype:
        expected = "tensors that need no gradient, in the dtype of the result, each element once"
        got = f"{query.dtype} for {dtype}"
        got = "a gradient" if wanted else "an expanded tensor" if several else got
        raise ArgumentError(_WHERE, "inplace", expected=expected, got=got)


def _expanded(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return 0 in strides and any(s == 0 and n > 1 for s, n in zip(strides, tensor.shape))


def _choose(backend: str, query: Tensor, *others: torch.dtype) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs. others: the
    dtypes of tables and results."""
    double = torch.float64 in others
    return backends.select(
        "rope",
        None if backend == _AUTO else backend,
        device_type=query.device.type,
        dtype=torch.float64 if double else query.dtype,
    )


def _features(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _run(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    half_tables: bool,
    backward: bool,
    outs: tuple[Tensor, Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    if query.numel() or key.numel():
        if cos.dtype not in (torch.float32, torch.float64, query.dtype):
            cos, sin = cos.float(), sin.float()
        table = [_features(t) for t in (cos, sin)]
        if table[1].stride() != table[0].stride():
            table = [t.contiguous() for t in table]
        targets = [_features(t) for t in outs]
        _choose(backend, query, cos.dtype, outs[0].dtype)[1].fwd(
            targets,
            [_features(t) for t in (query, key)],
            *table,
            interleaved=interleaved,
            half_tables=half_tables,
            backward=backward,
        )
        for out, target in zip(outs, targets, strict=True):
            if out is not target:  # inplace over features that are apart
                out.copy_(target)
    return outs


def _fwd_kernel(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    half_tables: bool,
    backward: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    facts = (interleaved, half_tables, backward)
    outs = _fwd_fake(query, key, cos, sin, *facts, dtype, backend)
    return _run(query, key, cos, sin, *facts, outs, backend)


def _fwd_fake(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    half_tables: bool,
    backward: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # Strides of a dense input are kept: a transposed view of a projection stays one.
    return _like(query, dtype), _like(key, dtype)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = empty_like(x, dtype)
    return out if out.stride(-1) == 1 else new_empty(x, x.shape, dtype)


class Rope(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *facts: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.facts, ctx.dtype = facts, query.dtype
        ctx.set_materialize_grads(False)  # what no gradient reaches has none
        return _fwd_kernel(query, key, cos, sin, *facts)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        reached = [d for d in upstream if d is not None]
        if not reached:
            return (None,) * 9
        cos, sin = ctx.saved_tensors
        interleaved, half_tables, backward, _, backend = ctx.facts
        gradients: Sequence[Tensor]
        if wanted(*reached):
            options = {"interleaved": interleaved, "half_tables": half_tables}
            wide = [reference.rope(d, cos, sin, **options, backward=True) for d in reached]
            gradients = [t.to(ctx.dtype) for t in wide]
        else:
            facts = (interleaved, half_tables, not backward, ctx.dtype, backend)
            first, last = reached[0], reached[-1]
            if len(reached) == 1:  # beside it, heads of none
                last = first[:, :0]
            gradients = _fwd_kernel(first, last, cos, sin, *facts)
        found = iter(gradients)
        return (*[None if d is None else next(found) for d in upstream], *[None] * 7)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.facts, ctx.dtype = inputs[4:], inputs[0].dtype


def _registered_backward(ctx: Any, *upstream: Any) -> Any:
    interleaved, half_tables, backward, _, backend = ctx.facts
    facts = (interleaved, half_tables, not backward, ctx.dtype, backend)
    return (*torch.ops.fastft.rope_fwd(*upstream, *ctx.saved_tensors, *facts), *[None] * 7)


register(
    "rope_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved, "
    "bool half_tables, bool backward, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
torch.library.register_autograd(
    "fastft::rope_fwd", _registered_backward, setup_context=_setup_context
)
