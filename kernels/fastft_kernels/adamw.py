"""``adamw`` in Triton: AdamW with decoupled weight decay (Loshchilov & Hutter 2019) for all
tensors of a step, with global-norm clipping, in three launches and no host synchronisation.

    norm     partial sums of squares of every gradient, one for each chunk
    prepare  the norm, the clip coefficient, step counts and bias corrections; counts a skip
    update   one launch for all tensors that share parameter and gradient dtype

A non-finite norm leaves parameters, states and step counts as they are: the decision is made on
the device. Sums are two-stage and in a fixed order. Never autotuned: a trial run would update.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels.multi_tensor import N_SCALARS, plan_for

__all__ = ["step", "supports"]

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _typed(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table as a pointer; ALIGNED promises 16 bytes, for vector access."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["n_tensors", "first_chunk"])
def _adamw_norm_kernel(
    addresses_ptr,  # int64 (4, n): params, grads, exp_avgs, exp_avg_sqs
    sizes_ptr,  # int64 (n,)
    chunk_tensor_ptr,  # int32 (chunks,)
    chunk_part_ptr,  # int32 (chunks,)
    partials_ptr,  # float32 (chunks,)
    n_tensors,
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
    left = tl.load(sizes_ptr + tensor) - start
    grad = _typed(tl.load(addresses_ptr + n_tensors + tensor), GRAD, ALIGNED) + start
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        g = tl.load(grad + offset + lanes, mask=offset + lanes < left, other=0.0).to(tl.float32)
        acc += g * g
    tl.store(partials_ptr + chunk, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["n_chunks", "n_tensors"])
def _adamw_prepare_kernel(
    partials_ptr,  # float32 (chunks,)
    stats_ptr,  # float32 (3,): norm, clip coefficient, skipped steps
    steps_ptr,  # float32 (n,)
    hyper_ptr,  # float32 (n, 5): lr, beta1, beta2, eps, weight_decay
    scalars_ptr,  # float32 (n, N_SCALARS)
    n_chunks,
    n_tensors,
    max_norm,  # 0: no clipping
    N_HYPER: tl.constexpr,
    N_OUT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the norm, and the numbers that are constant over a tensor."""
    sums = tl.arange(0, SUMS)
    acc = tl.zeros((SUMS,), tl.float32)
    for start in range(0, n_chunks, SUMS):
        acc += tl.load(partials_ptr + start + sums, mask=start + sums < n_chunks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(acc, 0))
    tl.store(stats_ptr, norm)
    if norm < float("inf"):  # false for NaN as well
        limit = tl.where(max_norm > 0.0, max_norm / (norm + 1e-6), 1.0)
        tl.store(stats_ptr + 1, tl.minimum(limit, 1.0))
        lanes = tl.arange(0, BLOCK)
        for start in range(0, n_tensors, BLOCK):
            i = start + lanes
            inside = i < n_tensors
            count = tl.load(steps_ptr + i, mask=inside, other=0.0) + 1.0
            tl.store(steps_ptr + i, count, mask=inside)
            hyper = hyper_ptr + i * N_HYPER
            lr = tl.load(hyper, mask=inside, other=0.0)
            beta1 = tl.load(hyper + 1, mask=inside, other=0.5)
            beta2 = tl.load(hyper + 2, mask=inside, other=0.5)
            eps = tl.load(hyper + 3, mask=inside, other=1.0)
            weight_decay = tl.load(hyper + 4, mask=inside, other=0.0)
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
    else:
        tl.store(stats_ptr + 1, 0.0)
        tl.store(stats_ptr + 2, tl.load(stats_ptr + 2) + 1.0)


@triton.jit(do_not_specialize=["n_tensors", "first_chunk"])
def _adamw_update_kernel(
    addresses_ptr, sizes_ptr, chunk_tensor_ptr, chunk_part_ptr,  # as in _adamw_norm_kernel
    scalars_ptr,  # float32 (n, N_SCALARS)
    stats_ptr,  # float32 (3,)
    n_tensors,
    first_chunk,
    sign,  # -1 where the objective is maximised
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    N_IN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: the same arithmetic as csrc/include/fastft/adamw.h."""
    if tl.load(stats_ptr) < float("inf"):
        chunk = first_chunk + tl.program_id(0)
        tensor = tl.load(chunk_tensor_ptr + chunk)
        start = tl.load(chunk_part_ptr + chunk).to(tl.int64) * CHUNK
        left = tl.load(sizes_ptr + tensor) - start
        address = addresses_ptr + tensor
        param = _typed(tl.load(address), PARAM, ALIGNED) + start
        grad = _typed(tl.load(address + n_tensors), GRAD, ALIGNED) + start
        exp_avg = _typed(tl.load(address + 2 * n_tensors), tl.float32, ALIGNED) + start
        exp_avg_sq = _typed(tl.load(address + 3 * n_tensors), tl.float32, ALIGNED) + start
        scalars = scalars_ptr + tensor * N_IN
        beta1 = tl.load(scalars)
        beta2 = tl.load(scalars + 1)
        one_minus_beta1 = tl.load(scalars + 2)
        one_minus_beta2 = tl.load(scalars + 3)
        decay = tl.load(scalars + 4)
        step_size = tl.load(scalars + 5)
        inv_sqrt_bias2 = tl.load(scalars + 6)
        eps = tl.load(scalars + 7)
        scale = tl.load(stats_ptr + 1) * sign
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


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype} parameters"
    return supports_device(device_type)


def step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float,
    maximize: bool,
) -> None:
    """One AdamW step of all tensors, in place.

    Args:
        params, grads: contiguous, float32, bfloat16 or float16, all on one device.
        exp_avgs, exp_avg_sqs: float32, of the parameters' shapes.
        steps: float32 (n,), incremented.
        hyper: float32 (n, 5): lr, beta1, beta2, eps, weight_decay.
        stats: float32 (3,): gradient norm and clip coefficient of this step (0 where the step was
            skipped), and the count of skipped steps, incremented.
        max_norm: largest global norm, 0 for none.
        maximize: ascend instead of descend.
    """
    if not params:
        stats[:2] = torch.tensor([0.0, 1.0])
        return
    launch = config.for_device(params[0].device).adamw
    with device_guard(params[0]):
        plan = plan_for(params, grads, exp_avgs, exp_avg_sqs, launch.chunk)
        tables = (plan.addresses, plan.sizes, plan.chunk_tensor, plan.chunk_part)
        groups = [group for group in plan.groups if group.n_chunks]
        for group in groups:
            _adamw_norm_kernel[(group.n_chunks,)](
                *tables, plan.partials, len(params), group.first_chunk,
                GRAD=_DTYPES[group.grad_dtype], ALIGNED=plan.aligned,
                CHUNK=launch.chunk, BLOCK=launch.block, **launch.launch.options(),
            )  # fmt: skip
        _adamw_prepare_kernel[(1,)](
            plan.partials, stats, steps, hyper, plan.scalars,
            plan.n_chunks, len(params), float(max_norm),
            N_HYPER=hyper.shape[1], N_OUT=N_SCALARS, SUMS=launch.prepare_sums,
            BLOCK=launch.prepare.block,
            **launch.prepare.launch.options(),
        )  # fmt: skip
        for group in groups:
            _adamw_update_kernel[(group.n_chunks,)](
                *tables, plan.scalars, stats, len(params), group.first_chunk,
                -1.0 if maximize else 1.0,
                PARAM=_DTYPES[group.param_dtype], GRAD=_DTYPES[group.grad_dtype],
                ALIGNED=plan.aligned, N_IN=N_SCALARS,
                CHUNK=launch.chunk, BLOCK=launch.block, **launch.launch.options(),
            )  # fmt: skip
