"""CPU launcher of ``lora_linear``: library products, and C++ kernels where dropout comes in.

Without dropout every step is a product. With it, x is dropped a slice of rows at a time into a
buffer that stays in cache and feeds the product at once, and the backward's two thin products read
the mask as they go; no dropped copy of x is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, scratch

# Ranks up to which a pass of our own over dx or x beats a library product and a pass after it.
_FUSED_RANK = 32
# Bytes of x dropped at a time: half of a common second-level cache.
_SLICE_BYTES = 1 << 19


def supports(
    *, device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype, r: int
) -> str | None:
    """float32 and bfloat16 activations, adapters in float32 or bfloat16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    for name, value in (("activations", dtype), ("adapters", adapter_dtype)):
        if value not in (torch.float32, torch.bfloat16):
            return f"{name} in {value}; the CPU kernels take float32 and bfloat16"
    return None


def threshold16(p: float) -> int:
    """Dropout draws 16 bits an element: dropped where they are below this."""
    return round(p * 65536)


def dropout_mask(out: Tensor, seed: Tensor, p: float) -> None:
    """Fills ``out`` (M, bytes) with kept bits, each 1 with probability 1 - round(2^16 p)/2^16."""
    native.module().dropout_mask(
        out.data_ptr(), out.numel(), int(seed.item()) & (2**64 - 1), threshold16(p)
    )


def _row_slices(rows: int, columns: int, itemsize: int) -> list[slice]:
    size = max(16, _SLICE_BYTES // max(1, columns * itemsize))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def _dropped(x: Tensor, mask: Tensor) -> Tensor:
    """x * mask for a slice of rows, in this thread's buffer; 1 / (1 - p) is left to the product."""
    out = scratch("dropped", tuple(x.shape), x.dtype)
    native.module().dropout_apply(
        out.data_ptr(),
        x.data_ptr(),
        mask.data_ptr(),
        x.shape[0],
        x.shape[1],
        native.DTYPE_CODES[x.dtype],
    )
    return out


def _groups(masks: list[Tensor | None], spans: list[tuple[int, int]]) -> list[list[int]]:
    """Adapters that can share one read of x: those over the same rows without dropout."""
    groups: dict[object, list[int]] = {}
    for j, (mask, span) in enumerate(zip(masks, spans, strict=True)):
        groups.setdefault(span if mask is None else j, []).append(j)
    return list(groups.values())


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in dtype, in this thread's buffer where it has to be cast."""
    if tensor.dtype == dtype:
        return tensor
    return scratch(name, tuple(tensor.shape), dtype).copy_(tensor)


def _stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All rows in one matrix of dtype."""
    if len(tensors) == 1:
        return _narrow("a_all", tensors[0], dtype)
    ranks = [t.shape[0] for t in tensors]
    out = scratch("a_all", (sum(ranks), tensors[0].shape[1]), dtype)
    for part, tensor in zip(out.split(ranks), tensors, strict=True):
        part.copy_(tensor)
    return out


def fwd(
    ys: list[Tensor],
    ss: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """Writes ys[i] (M, N_i), and for adapter j of layer owners[j] over the rows spans[j] of x:
    ss[j] = drop_j(x) A_j^T (rows, r_j)."""
    if x.shape[0] == 0:
        return
    for group in _groups(masks, spans):
        first = group[0]
        part = x[slice(*spans[first])]
        if part.shape[0] == 0:
            continue
        mask, stacked = masks[first], _stacked([lora_as[j] for j in group], x.dtype)
        if mask is not None:
            for rows in _row_slices(part.shape[0], part.shape[1], part.element_size()):
                dropped, keep = _dropped(part[rows], mask[rows]), 1.0 / (1.0 - dropout_ps[first])
                mm_nt(ss[first][rows], dropped, stacked, alpha=keep)
        elif len(group) == 1:
            mm_nt(ss[first], part, stacked)
        else:
            s_all = scratch("s_all", (part.shape[0], stacked.shape[0]), x.dtype)
            mm_nt(s_all, part, stacked)
            for j, s in zip(group, s_all.split([lora_as[j].shape[0] for j in group], 1)):
                ss[j].copy_(s)
    for i, (y, weight, bias) in enumerate(zip(ys, weights, biases, strict=True)):
        mm_nt(y, x, weight)
        if bias is not None:
            y.add_(bias)
        for j, owner in enumerate(owners):
            if owner == i and ss[j].shape[0]:
                b = _narrow("b", lora_bs[j], x.dtype)
                mm_nt(y[slice(*spans[j])], ss[j], b, alpha=scalings[j], accumulate=True)


def bwd(
    dx: Tensor | None,
    das: list[Tensor | None],
    dbs: list[Tensor | None],
    dys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """Writes dx (M, K), das[j] (r_j, K), dbs[j] (N, r_j); None is not wanted."""
    for gradient, (start, stop) in zip((*das, *dbs), (*spans, *spans), strict=True):
        if gradient is not None and start == stop:
            gradient.zero_()
    if x.shape[0] == 0:
        return
    if dx is not None:
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            mm_nn(dx, dy, weight, accumulate=i > 0)
    for group in _groups(masks, spans):
        rows = slice(*spans[group[0]])
        if rows.start == rows.stop:
            continue
        ranks = [lora_as[j].shape[0] for j in group]
        ds_all = scratch("s_all", (rows.stop - rows.start, sum(ranks)), x.dtype)
        for j, ds in zip(group, ds_all.split(ranks, 1), strict=True):
            dy = dys[owners[j]][rows]
            mm_nn(ds, dy, _narrow("b", lora_bs[j], x.dtype), alpha=scalings[j])
            if (db := dbs[j]) is not None:
                mm_tn(db, dy, ss[j], alpha=scalings[j])
        dx_rows = None if dx is None else dx[rows]
        group_as, group_das = [lora_as[j] for j in group], [das[j] for j in group]
        mask = masks[group[0]]
        if mask is None:
            _bwd_stacked(dx_rows, group_das, ds_all, x[rows], group_as)
        else:
            p = dropout_ps[group[0]]
            _bwd_dropped(dx_rows, group_das[0], ds_all, x[rows], group_as[0], mask, p)


def _bwd_stacked(
    dx: Tensor | None,
    das: list[Tensor | None],
    ds_all: Tensor,
    x: Tensor,
    lora_as: list[Tensor],
) -> None:
    """One pass over dx and one over x for all adapters of a group."""
    if dx is not None:
        mm_nn(dx, ds_all, _stacked(lora_as, x.dtype), accumulate=True)
    wanted = [da for da in das if da is not None]
    if not wanted:
        return
    if len(das) == 1:
        mm_tn(wanted[0], ds_all, x)
        return
    da_all = scratch("da_all", (ds_all.shape[1], x.shape[1]), wanted[0].dtype)
    mm_tn(da_all, ds_all, x)
    for da, part in zip(das, da_all.split([a.shape[0] for a in lora_as]), strict=True):
        if da is not None:
            da.copy_(part)


def _bwd_dropped(
    dx: Tensor | None,
    da: Tensor | None,
    ds: Tensor,
    x: Tensor,
    lora_a: Tensor,
    mask: Tensor,
    p: float,
) -> None:
    """dx += mask/(1-p) * (dS A) and dA = dS^T drop(x), each in one pass."""
    if ds.shape[1] > _FUSED_RANK:
        _bwd_dropped_in_slices(dx, da, ds, x, lora_a, mask, p)
        return
    c = native.module()
    sizes = (x.shape[0], x.shape[1], ds.shape[1], 1.0 / (1.0 - p), native.DTYPE_CODES[x.dtype])
    wide_ds = _narrow("ds32", ds, torch.float32)
    if dx is not None:
        wide_a = _narrow("a32", lora_a, torch.float32).contiguous()
        c.lora_dx(dx.data_ptr(), wide_ds.data_ptr(), wide_a.data_ptr(), mask.data_ptr(), *sizes)
    if da is not None:
        total = scratch("da_total", tuple(da.shape), torch.float32)
        c.lora_da(total.data_ptr(), wide_ds.data_ptr(), x.data_ptr(), mask.data_ptr(), *sizes)
        da.copy_(total)


def _bwd_dropped_in_slices(
    dx: Tensor | None,
    da: Tensor | None,
    ds: Tensor,
    x: Tensor,
    lora_a: Tensor,
    mask: Tensor,
    p: float,
) -> None:
    """The same through library products, a slice of rows at a time."""
    c = native.module()
    columns, keep = x.shape[1], 1.0 / (1.0 - p)
    code = native.DTYPE_CODES[x.dtype]
    narrow = _narrow("a_all", lora_a, x.dtype)
    total = part = None
    if da is not None:
        total = scratch("da_total", tuple(da.shape), torch.float32).zero_()
        part = scratch("da_part", tuple(da.shape), torch.float32)
    for rows in _row_slices(x.shape[0], columns, x.element_size()):
        if dx is not None:
            product = scratch("ds_a", (rows.stop - rows.start, columns), x.dtype)
            mm_nn(product, ds[rows], narrow)
            c.dropout_add(
                dx[rows].data_ptr(),
                product.data_ptr(),
                mask[rows].data_ptr(),
                product.shape[0],
                columns,
                keep,
                code,
                code,
            )
        if total is not None and part is not None:
            mm_tn(part, ds[rows], _dropped(x[rows], mask[rows]), alpha=keep)
            total += part
    if da is not None and total is not None:
        da.copy_(total)
