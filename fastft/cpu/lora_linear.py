"""CPU launcher of ``lora_linear``: library products, and C++ kernels where dropout comes in.

Without dropout every step is a product. With it, x is dropped a slice of rows at a time into a
buffer that stays in cache and feeds the product at once; no dropped copy of x is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, scratch

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


def _dropped(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """x * mask / (1 - p) for a slice of rows, in this thread's buffer."""
    out = scratch("dropped", tuple(x.shape), x.dtype)
    native.module().dropout_apply(
        out.data_ptr(),
        x.data_ptr(),
        mask.data_ptr(),
        x.shape[0],
        x.shape[1],
        1.0 / (1.0 - p),
        native.DTYPE_CODES[x.dtype],
    )
    return out


def _stackable(masks: list[Tensor | None]) -> bool:
    return len(masks) > 1 and all(mask is None for mask in masks)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
) -> None:
    """Writes ys[i] (M, N_i) and ss[i] = drop_i(x) A_i^T (M, r_i)."""
    if x.shape[0] == 0:
        return
    if _stackable(masks):
        # One read of x for all siblings.
        stacked = torch.cat([_cast(a, x.dtype) for a in lora_as])
        s_all = scratch("s_all", (x.shape[0], stacked.shape[0]), x.dtype)
        mm_nt(s_all, x, stacked)
        for s, part in zip(ss, s_all.split([a.shape[0] for a in lora_as], 1), strict=True):
            s.copy_(part)
    else:
        for s, a, mask, p in zip(ss, lora_as, masks, dropout_ps, strict=True):
            narrow = _cast(a, x.dtype)
            if mask is None:
                mm_nt(s, x, narrow)
                continue
            for rows in _row_slices(x.shape[0], x.shape[1], x.element_size()):
                mm_nt(s[rows], _dropped(x[rows], mask[rows], p), narrow)
    for y, s, weight, bias, b, scaling in zip(
        ys, ss, weights, biases, lora_bs, scalings, strict=True
    ):
        mm_nt(y, x, weight)
        if bias is not None:
            y.add_(bias)
        mm_nt(y, s, _cast(b, x.dtype), alpha=scaling, accumulate=True)


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
) -> None:
    """Writes dx (M, K), das[i] (r_i, K), dbs[i] (N_i, r_i); None is not wanted."""
    rows = x.shape[0]
    if rows == 0:
        for gradient in (*das, *dbs):
            if gradient is not None:
                gradient.zero_()
        return
    ranks = [a.shape[0] for a in lora_as]
    ds_all = scratch("s_all", (rows, sum(ranks)), x.dtype)
    dss = list(ds_all.split(ranks, 1))
    for ds, dy, b, scaling in zip(dss, dys, lora_bs, scalings, strict=True):
        mm_nn(ds, dy, _cast(b, x.dtype), alpha=scaling)
    for db, dy, s, scaling in zip(dbs, dys, ss, scalings, strict=True):
        if db is not None:
            mm_tn(db, dy, s, alpha=scaling)
    if dx is not None:
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            mm_nn(dx, dy, weight, accumulate=i > 0)

    if _stackable(masks):
        _bwd_stacked(dx, das, ds_all, x, lora_as)
        return
    for ds, da, a, mask, p in zip(dss, das, lora_as, masks, dropout_ps, strict=True):
        narrow = _cast(a, x.dtype)
        if mask is None:
            if dx is not None:
                mm_nn(dx, ds, narrow, accumulate=True)
            if da is not None:
                mm_tn(da, ds, x)
        else:
            _bwd_dropped(dx, da, ds, x, narrow, mask, p)


def _bwd_stacked(
    dx: Tensor | None,
    das: list[Tensor | None],
    ds_all: Tensor,
    x: Tensor,
    lora_as: list[Tensor],
) -> None:
    """One pass over dx and one over x for all siblings."""
    if dx is not None:
        stacked = torch.cat([_cast(a, x.dtype) for a in lora_as])
        mm_nn(dx, ds_all, stacked, accumulate=True)
    wanted = [da for da in das if da is not None]
    if not wanted:
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
    """dx += mask/(1-p) * (dS A) and dA = dS^T drop(x), a slice of rows at a time."""
    c = native.module()
    columns = x.shape[1]
    code = native.DTYPE_CODES[x.dtype]
    total = part = None
    if da is not None:
        total = scratch("da_total", tuple(da.shape), torch.float32).zero_()
        part = scratch("da_part", tuple(da.shape), torch.float32)
    for rows in _row_slices(x.shape[0], columns, x.element_size()):
        if dx is not None:
            product = scratch("ds_a", (rows.stop - rows.start, columns), x.dtype)
            mm_nn(product, ds[rows], lora_a)
            c.dropout_add(
                dx[rows].data_ptr(),
                product.data_ptr(),
                mask[rows].data_ptr(),
                product.shape[0],
                columns,
                1.0 / (1.0 - p),
                code,
                code,
            )
        if total is not None and part is not None:
            mm_tn(part, ds[rows], _dropped(x[rows], mask[rows], p))
            total += part
    if da is not None and total is not None:
        da.copy_(total)
