"""Launcher of a gated unit's backward that makes dS and dB of the layers before it on the way."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastft_kernels import lora_config
from fastft_kernels._common import INTERPRETED, device_guard
from fastft_kernels._launch import KEPT, Prepared, cdiv
from fastft_kernels._lora_calls import GluPair, choose_way, dense
from fastft_kernels._lora_glu_kernels import _glu_pair_kernel
from fastft_kernels._lora_pair import PairParts, pair_block, pair_pays, reduce_pairs
from fastft_kernels._lora_reduce import split_rows
from fastft_kernels.glu import CODES

__all__ = ["glu_bwd"]


def glu_bwd(
    d_out: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    gate_first: bool,
    activation: str,
) -> GluPair | None:
    """The gradients of gate and up = x W_i^T + scaling_i S_i B_i^T, each with one adapter over all
    rows, from that of activation(gate) * up; None where it would not pay.

    Args:
        d_out, gate, up: (M, N), 16 bits; the rows of gate and up may be strided.
        x, ss, weights, lora_as, lora_bs, scalings, masks: of the two layers in their order, as
            ``bwd`` takes them; gate is the first's result where ``gate_first``, else the second's.
    """
    if not _pays(gate, lora_bs):
        return None
    tokens, features = gate.shape
    r = lora_bs[0].shape[1]
    with device_guard(gate):
        way, held = choose_way("glu", x, [gate, up], weights, lora_as, masks)
        left: Tensor | None = None
        thins: Sequence[Tensor | None] = [None, None]
        if way == "border" and held is not None:
            left, dys, thins = held.room(gate, tokens, held.widths)
        else:
            dys = [torch.empty_like(d_out) for _ in ss]
        strides = gate.stride(0), up.stride(0), dys[0].stride(0)
        launch, strips, splits = _launch(gate.device, tokens, features, r, strides, activation)
        room = functools.partial(gate.new_empty, dtype=torch.float32)
        parts, sums = ([room(shape) for _ in ss]
                       for shape in ((strips, tokens, r), (splits, r, features)))  # fmt: skip
        order = (0, 1) if gate_first else (1, 0)
        bs = dense(lora_bs)
        of = [[values[i] for i in order] for values in (dys, bs, ss, parts, sums)]
        launch(*of[0], d_out, gate, up, *of[1], *of[2], *of[3], *of[4])
        d_ss = [torch.empty_like(s) for s in ss]
        dbs = [torch.empty_like(b) for b in bs]
        made = zip(d_ss, dbs, thins, parts, sums, map(float, scalings), strict=True)
        reduce_pairs([PairParts(*one) for one in made])
    return GluPair(dys, d_ss, dbs, left)


@functools.lru_cache(maxsize=KEPT)
def _launch(
    device: torch.device,
    tokens: int,
    features: int,
    r: int,
    strides: tuple[int, ...],
    activation: str,
) -> tuple[Prepared, int, int]:
    """The launch, and the strips and splits of its parts. strides: of gate, up and their
    gradients."""
    arch = lora_config.for_device(device)
    block_r = pair_block(arch.glu_pair, r)
    tile = arch.glu_pair[block_r]
    strips = cdiv(features, tile.block_n)
    splits, rows = split_rows(tokens, tile.block_m, strips, arch.multiprocessors * tile.resident)
    launch = Prepared(
        _glu_pair_kernel, (strips, splits), range(13), (tokens, features, r, rows, *strides),
        ACTIVATION=CODES[activation], SETTLE=not INTERPRETED, BLOCK_M=tile.block_m,
        BLOCK_R=block_r, BLOCK_N=tile.block_n, **tile.launch.options(),
    )  # fmt: skip
    return launch, strips, splits


def _pays(gate: Tensor, lora_bs: Sequence[Tensor]) -> bool:
    """Whether the parts of dS, float32 and written and read once, are fewer bytes than a read of
    the gradients, and whole vectors make a row."""
    table, r = lora_config.for_device(gate.device).glu_pair, lora_bs[0].shape[1]
    if 0 in gate.shape or r != lora_bs[1].shape[1]:
        return False
    return pair_pays(table, gate.element_size(), gate.shape[1], r)
