"""``lora_linear`` in plain torch: every step of the formula, nothing fused."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """(M, ceil(K/8)) uint8 -> (M, K) bool; bit k % 8 of byte k // 8 is column k."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :columns].bool()


def pack_mask(kept: Tensor) -> Tensor:
    """(M, K) bool -> (M, ceil(K/8)) uint8, the inverse of :func:`unpack_mask`."""
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -columns % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (padded.view(rows, padded.shape[1] // 8, 8) << shifts).sum(-1, dtype=torch.uint8)


def drop(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """x * mask / (1 - p); x itself without a mask."""
    if mask is None:
        return x
    return x * (unpack_mask(mask, x.shape[-1]).to(x.dtype) * (1.0 / (1.0 - dropout_p)))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x W^T + bias + scaling * drop(x) A^T B^T, differentiable, in x's dtype."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y + lora_term(x, lora_a, lora_b, scaling, mask, dropout_p)


def lora_term(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """scaling * drop(x) A^T B^T, differentiable, in x's dtype."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    return (drop(x, mask, dropout_p) @ a.t() @ b.t()) * scaling


def dropout_mask(out: Tensor, seed: Tensor, p: float) -> None:
    """Fills ``out`` (M, bytes) with kept bits, each 1 with probability 1 - p."""
    generator = torch.Generator(device=out.device)
    generator.manual_seed(int(seed.item()))
    kept = torch.rand(out.shape[0], out.shape[1] * 8, device=out.device, generator=generator) >= p
    out.copy_(pack_mask(kept))


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
    ss[j] = drop_j(x) A_j^T (rows, r_j). Without weights the ys hold the frozen products already."""
    for y, weight, bias in zip(ys, weights, biases, strict=True) if weights else ():
        y.copy_(torch.nn.functional.linear(x, weight, bias))
    for j, (owner, (start, stop)) in enumerate(zip(owners, spans, strict=True)):
        a, b = lora_as[j].to(x.dtype), lora_bs[j].to(x.dtype)
        ss[j].copy_(drop(x[start:stop], masks[j], dropout_ps[j]) @ a.t())
        ys[owner][start:stop] += (ss[j] @ b.t()) * scalings[j]


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
    """Writes dx (M, K), das[j] (r_j, K), dbs[j] (N, r_j); None is not wanted. Without weights dx is
    that of the adapters' terms alone."""
    if dx is not None:
        dx.zero_()
        for dy, weight in zip(dys, weights, strict=True) if weights else ():
            dx.add_(dy @ weight)
    for j, (owner, (start, stop)) in enumerate(zip(owners, spans, strict=True)):
        dy = dys[owner][start:stop]
        ds = (dy @ lora_bs[j].to(dy.dtype)) * scalings[j]
        if dx is not None:
            dx[start:stop] += drop(ds @ lora_as[j].to(dy.dtype), masks[j], dropout_ps[j])
        if (da := das[j]) is not None:
            da.copy_(ds.t() @ drop(x[start:stop], masks[j], dropout_ps[j]))
        if (db := dbs[j]) is not None:
            db.copy_((dy.t() @ ss[j]) * scalings[j])
