"""``optimizer_step`` in Triton: AdamW with float32 states (Loshchilov & Hutter 2019) for all
tensors of a step, with global-norm clipping, in three launches and no host synchronisation. For
GPUs on which the compiled CUDA kernels, which know every rule, are missing.

    norm     partial sums of squares of every gradient, one for each chunk
    prepare  the norm, the clip coefficient, step counts and bias corrections; counts a skip
    update   one launch for all tensors that share parameter and gradient dtype

A non-finite norm leaves parameters, states and step counts as they are: the decision is made on
the device. Sums are two-stage and in a fixed order. Never autotuned: a trial run would update.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels.multi_tensor import COLUMNS, chunks_for, table_for

__all__ = ["step", "supports"]

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Numbers kept for each tensor between the kernels of one step.
N_SCALARS = 9
_COLUMNS = tl.constexpr(12)
_GRAD = tl.constexpr(COLUMNS["grad"])
_STATE1 = tl.constexpr(COLUMNS["state1"])
_STATE2 = tl.constexpr(COLUMNS["state2"])
_STEP = tl.constexpr(COLUMNS["step"])
_NUMEL = tl.constexpr(COLUMNS["numel"])


@triton.jit
def _typed(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table as a pointer; ALIGNED promises 16 bytes, for vector access."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["first_chunk"])
def _adamw_norm_kernel(
    table_ptr,  # int64 (n, 12), see csrc/include/fastft/optimizer.h
    chunk_tensor_ptr,  # int32 (chunks,)
    chunk_part_ptr,  # int32 (chunks,)
    partials_ptr,  # float32 (chunks,)
    first_chunk,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[c] = sum of squares of the gradients of chunk c."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + chunk)
    start = tl.load(chunk_part_ptr + chunk).to(tl.int64) * CHUNK
    row = table_ptr + tensor * _COLUMNS
    left = tl.load(row + _NUMEL) - start
    grad = _typed(tl.load(row + _GRAD), GRAD, ALIGNED) + start
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        g = tl.load(grad + offset + lanes, mask=offset + lanes < left, other=0.0).to(tl.float32)
        acc += g * g
    tl.store(partials_ptr + chunk, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["n_chunks", "n_tensors"])
def _adamw_prepare_kernel(
    partials_ptr,  # float32 (chunks,)
    stats_ptr,  # float32 (6,), see fastft.ops.optimizer_step
    table_ptr,  # int64 (n, 12)
    hyper_ptr,  # float32 (n, 7): lr, beta1, beta2, eps, weight_decay, unused, sign
    scalars_ptr,  # float32 (n, N_SCALARS)
    n_chunks,
    n_tensors,
    max_norm,  # 0: no clipping
    NEEDS_NORM: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_OUT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the norm, and the numbers that are constant over a tensor."""
    inverse_scale = tl.load(stats_ptr + 3)
    norm = 0.0
    if NEEDS_NORM:
        sums = tl.arange(0, SUMS)
        acc = tl.zeros((SUMS,), tl.float32)
        for start in range(0, n_chunks, SUMS):
            acc += tl.load(partials_ptr + start + sums, mask=start + sums < n_chunks, other=0.0)
        norm = tl.sqrt_rn(tl.sum(acc, 0)) * inverse_scale
    tl.store(stats_ptr, norm)
    # The comparison is false for NaN as well.
    if (norm < float("inf")) & (tl.load(stats_ptr + 4) <= 0.0):
        limit = tl.where(max_norm > 0.0, max_norm / (norm + 1e-6), 1.0)
        coefficient = tl.minimum(limit, 1.0)
        tl.store(stats_ptr + 1, coefficient)
        tl.store(stats_ptr + 5, 1.0)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, n_tensors, BLOCK):
            i = start + lanes
            inside = i < n_tensors
            address = tl.load(table_ptr + i * _COLUMNS + _STEP, mask=inside, other=0)
            step = address.to(tl.pointer_type(tl.float32))
            count = tl.load(step, mask=inside, other=0.0) + 1.0
            tl.store(step, count, mask=inside)
            hyper = hyper_ptr + i * N_HYPER
            lr = tl.load(hyper, mask=inside, other=0.0)
            beta1 = tl.load(hyper + 1, mask=inside, other=0.5)
            beta2 = tl.load(hyper + 2, mask=inside, other=0.5)
            eps = tl.load(hyper + 3, mask=inside, other=1.0)
            weight_decay = tl.load(hyper + 4, mask=inside, other=0.0)
            sign = tl.load(hyper + 6, mask=inside, other=1.0)
            # 1 - beta^t loses three digits in float32 at t = 1, beta = 0.999.
            beta1_wide, beta2_wide = beta1.to(tl.float64), beta2.to(tl.float64)
            count_wide = count.to(tl.float64)
            bias1 = 1.0 - tl.exp(count_wide * tl.log(beta1_wide))
            bias2 = 1.0 - tl.exp(count_wide * tl.log(beta2_wide))
            out = scalars_ptr + i * N_OUT
            tl.store(out, beta1, mask=inside)
            tl.store(out + 1, beta2, mask=inside)
            tl.store(out + 2, (1.0 - beta1_wide).to(tl.float32), mask=inside)
            tl.store(out + 3, (1.0 - beta2_wide).to(tl.float32), mask=inside)
            tl.store(out + 4, 1.0 - lr * weight_decay, mask=inside)
            tl.store(out + 5, (lr.to(tl.float64) / bias1).to(tl.float32), mask=inside)
            tl.store(out + 6, (1.0 / tl.sqrt(bias2)).to(tl.float32), mask=inside)
            tl.store(out + 7, eps, mask=inside)
            tl.store(out + 8, sign * coefficient * inverse_scale, mask=inside)
    else:
        tl.store(stats_ptr + 1, 0.0)
        tl.store(stats_ptr + 5, 0.0)
        tl.store(stats_ptr + 2, tl.load(stats_ptr + 2) + 1.0)


@triton.jit(do_not_specialize=["first_chunk"])
def _adamw_update_kernel(
    table_ptr, chunk_tensor_ptr, chunk_part_ptr,  # as in _adamw_norm_kernel
    scalars_ptr,  # float32 (n, N_SCALARS)
    stats_ptr,  # float32 (6,)
    first_chunk,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    N_IN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: the same arithmetic as csrc/include/fastft/optimizer.h."""
    if tl.load(stats_ptr + 5) > 0.0:
        chunk = first_chunk + tl.program_id(0)
        tensor = tl.load(chunk_tensor_ptr + chunk)
        start = tl.load(chunk_part_ptr + chunk).to(tl.int64) * CHUNK
        row = table_ptr + tensor * _COLUMNS
        left = tl.load(row + _NUMEL) - start
        param = _typed(tl.load(row), PARAM, ALIGNED) + start
        grad = _typed(tl.load(row + _GRAD), GRAD, ALIGNED) + start
        exp_avg = _typed(tl.load(row + _STATE1), tl.float32, ALIGNED) + start
        exp_avg_sq = _typed(tl.load(row + _STATE2), tl.float32, ALIGNED) + start
        scalars = scalars_ptr + tensor * N_IN
        beta1 = tl.load(scalars)
        beta2 = tl.load(scalars + 1)
        one_minus_beta1 = tl.load(scalars + 2)
        one_minus_beta2 = tl.load(scalars + 3)
        decay = tl.load(scalars + 4)
        step_size = tl.load(scalars + 5)
        inv_sqrt_bias2 = tl.load(scalars + 6)
        eps = tl.load(scalars + 7)
        scale = tl.load(scalars + 8)
        lanes = tl.arange(0, BLOCK)
        for offset in range(0, CHUNK, BLOCK):
            index = offset + lanes
            inside = index < left
            g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32) * scale
            m = tl.load(exp_avg + index, mask=inside, other=0.0)
            v = tl.load(exp_avg_sq + index, mask=inside, other=0.0)
            p = tl.load(param + index, mask=inside, other=0.0).to(tl.float32)
            m = beta1 * m + one_minus_beta1 * g
            v = beta2 * v + one_minus_beta2 * g * g
            p = p * decay - step_size * (m / (tl.sqrt(v) * inv_sqrt_bias2 + eps))
            tl.store(exp_avg + index, m, mask=inside)
            tl.store(exp_avg_sq + index, v, mask=inside)
            tl.store(param + index, p.to(PARAM), mask=inside)


def supports(
    device_type: str,
    dtype: torch.dtype,
    rule: str = "adamw",
    state_bits: int = 32,
    rounding: str = "nearest",
) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if rule != "adamw" or state_bits != 32 or rounding != "nearest":
        return f"no Triton kernel for {rule}, {state_bits}-bit states, rounding {rounding}"
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype} parameters"
    return supports_device(device_type)


def step(
    tensors: Any,
    grads: list[Tensor],
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float,
    needs_norm: bool,
    seed: int,
) -> None:
    """One AdamW step of all tensors, in place.

    Args:
        tensors: fastft.ops.StepTensors, at least one.
        grads: contiguous, float32, bfloat16 or float16.
        hyper: float32 (n, 7).
        stats: float32 (6,), see fastft.ops.new_stats.
        max_norm: largest global norm, 0 for none.
        needs_norm: whether gradients are summed at all.
        seed: of no use here, nothing is rounded at random.
    """
    launch = config.for_device(tensors.device).adamw
    with device_guard(tensors.params[0]):
        chunks = chunks_for(tensors, grads, launch.chunk, N_SCALARS)
        table = table_for(tensors, grads)
        tables = (table, chunks.tensor, chunks.part)
        lists = (tensors.params, grads, *tensors.states)
        aligned = all(t.data_ptr() % 16 == 0 for values in lists for t in values)
        for group in chunks.groups if needs_norm else ():
            _adamw_norm_kernel[(group.n_chunks,)](
                *tables, chunks.partials, group.first_chunk,
                GRAD=_DTYPES[group.grad_dtype], ALIGNED=aligned,
                CHUNK=launch.chunk, BLOCK=launch.block, **launch.launch.options(),
            )  # fmt: skip
        _adamw_prepare_kernel[(1,)](
            chunks.partials, stats, table, hyper, chunks.scalars,
            chunks.count, len(grads), float(max_norm),
            NEEDS_NORM=needs_norm, N_HYPER=hyper.shape[1], N_OUT=N_SCALARS,
            SUMS=launch.prepare_sums, BLOCK=launch.prepare.block,
            **launch.prepare.launch.options(),
        )  # fmt: skip
        for group in chunks.groups:
            _adamw_update_kernel[(group.n_chunks,)](
                *tables, chunks.scalars, stats, group.first_chunk,
                PARAM=_DTYPES[group.param_dtype], GRAD=_DTYPES[group.grad_dtype],
                ALIGNED=aligned, N_IN=N_SCALARS,
                CHUNK=launch.chunk, BLOCK=launch.block, **launch.launch.options(),
            )  # fmt: skip
