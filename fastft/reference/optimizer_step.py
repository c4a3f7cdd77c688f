"""Optimizer steps in plain torch; the formulas stand in :mod:`fastft.ops.optimizer_step`.

8-bit states are block-wise dynamic codes (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861)
with the maps of bitsandbytes. A block of 256 values is divided by its largest magnitude and each
quotient replaced by the nearest value of a map of 256: seven decades below 1, the higher the finer.
Second moments use the unsigned map and are never rounded to 0, where a step would divide by eps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "close_param",
    "decide",
    "decode8",
    "dynamic_map",
    "encode8",
    "open_param",
    "random_bits",
    "round_stochastic",
    "step",
    "supports",
]

_BLOCK = 256


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


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
    """One step over all tensors; ``tensors`` is what ``fastft.ops.StepTensors`` holds."""
    scale = decide(grads, stats, max_norm, needs_norm)
    if scale is None:
        return
    for i, (p, g) in enumerate(zip(tensors.params, grads, strict=True)):
        tensors.steps[i].add_(1)
        t = tensors.steps[i].item()
        row = [float(v) for v in hyper[i]]
        wide = torch.promote_types(p.dtype, torch.float32)
        kept = [k for k, states in enumerate(tensors.states) if states[i] is not None]
        states = [_open(tensors, k, i, wide) for k in kept]
        value = open_param(tensors, i)
        gradient = g.to(wide) * (scale * row[6])
        value = _RULES[tensors.rule](value, gradient, states, t, row)
        for k, state in zip(kept, states, strict=True):
            _close(tensors, k, i, state, seed)
        close_param(tensors, i, value, seed)


def decide(grads: list[Tensor], stats: Tensor, max_norm: float, needs_norm: bool) -> float | None:
    """What gradients are multiplied by, the clip over the loss scale; None where the step is left
    out. Written to ``stats``."""
    inverse_scale, found_inf = stats[3].item(), stats[4].item()
    total = sum((g.double().square().sum().item() for g in grads), 0.0) if needs_norm else 0.0
    norm = inverse_scale * (math.sqrt(total) if math.isfinite(total) else total)
    runs = math.isfinite(norm) and not found_inf > 0
    coefficient = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    stats[0], stats[1] = norm, coefficient if runs else 0.0
    if not runs:
        stats[2] += 1
        return None
    return coefficient * inverse_scale


def open_param(tensors: Any, i: int) -> Tensor:
    """Parameter i in float32 or wider, with what rounding has taken from it."""
    p, rest = tensors.params[i], tensors.compensation[i]
    wide = torch.promote_types(p.dtype, torch.float32)
    if rest is not None and tensors.rounding == "compensated":
        return p.to(wide) + rest.to(wide)
    return p.to(wide)


def close_param(tensors: Any, i: int, value: Tensor, seed: int) -> None:
    """Writes parameter i, rounded as is asked for; its step is counted already."""
    p, rest = tensors.params[i], tensors.compensation[i]
    if tensors.rounding == "nearest" or p.dtype != torch.bfloat16:
        p.copy_(value)
    elif tensors.rounding == "stochastic":
        t = int(tensors.steps[i].item())
        bits = random_bits(p.numel(), seed, t, tensors.keys[i], tensors.offsets[i])
        p.copy_(round_stochastic(value.float(), bits.view(p.shape).to(p.device)))
    else:
        p.copy_(value)
        rest.copy_(value - p.to(value.dtype))


def _open(tensors: Any, k: int, i: int, dtype: torch.dtype) -> Tensor:
    state, absmax = tensors.states[k][i], tensors.absmax[k][i]
    if absmax is None:
        return state.to(dtype).clone()
    return decode8(state, absmax, k == 0, dtype)


def _close(tensors: Any, k: int, i: int, value: Tensor, seed: int) -> None:
    state, absmax = tensors.states[k][i], tensors.absmax[k][i]
    if absmax is None and state.dtype == torch.bfloat16:
        t, key, offset = int(tensors.steps[i].item()), tensors.keys[i], tensors.offsets[i]
        bits = random_bits(state.numel(), seed, t, key, offset, k + 1)
        state.copy_(round_stochastic(value.float(), bits.view(state.shape).to(state.device)))
    elif absmax is None:
        state.copy_(value)
    else:
        codes, scales = encode8(value.float(), k == 0)
        state.copy_(codes)
        absmax.copy_(scales)


def _adamw(p: Tensor, g: Tensor, states: list[Tensor], t: float, row: list[float]) -> Tensor:
    lr, beta1, beta2, eps, weight_decay = row[:5]
    m, v = states
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return (p * (1 - lr * weight_decay)).sub_(update, alpha=lr)


def _lion(p: Tensor, g: Tensor, states: list[Tensor], t: float, row: list[float]) -> Tensor:
    lr, beta1, beta2, _, weight_decay = row[:5]
    (m,) = states
    way = m * beta1 + g * (1 - beta1)
    sign = torch.where(way.isnan(), way, way.sign())  # torch's sign of NaN is 0
    m.mul_(beta2).add_(g, alpha=1 - beta2)
    return (p * (1 - lr * weight_decay)).sub_(sign, alpha=lr)


def _sgd(p: Tensor, g: Tensor, states: list[Tensor], t: float, row: list[float]) -> Tensor:
    lr, momentum, dampening, _, weight_decay, nesterov = row[:6]
    g = g + p * weight_decay
    if states:
        (m,) = states
        m.mul_(momentum if t > 1 else 0.0).add_(g, alpha=1 - dampening if t > 1 else 1.0)
        g = g + m * momentum if nesterov else m
    return p - g * lr


def _muon(p: Tensor, g: Tensor, states: list[Tensor], t: float, row: list[float]) -> Tensor:
    momentum, nesterov = row[1], row[5]
    (m,) = states
    m.mul_(momentum).add_(g, alpha=1 - momentum)
    return g * (1 - momentum) + m * momentum if nesterov else m.clone()


def _schedule_free(
    p: Tensor, g: Tensor, states: list[Tensor], t: float, row: list[float]
) -> Tensor:
    lr, beta1, beta2, eps, weight_decay, weight = row[:6]
    z, v = states
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    move = g / ((v / (1 - beta2**t)).sqrt() + eps) + p * weight_decay
    p = p + (z - p) * weight + move * (lr * (beta1 * (1 - weight) - 1))
    z.sub_(move, alpha=lr)
    return p


_RULES: dict[str, Callable[[Tensor, Tensor, list[Tensor], float, list[float]], Tensor]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "schedule_free": _schedule_free,
    "muon": _muon,
}

_MASK = 0xFFFFFFFF


def random_bits(count: int, seed: int, step: int, key: int, offset: int, state: int = 0) -> Tensor:
    """16 uniform bits for each of the elements offset .. offset + count, int64 (count,).

    A block of 256 elements has a key: Philox4x32 with 7 rounds (Salmon et al. 2011) of its place,
    the step and ``key`` under the seed. Word w of the block is a keyed hash of w, and serves
    elements 2 w and 2 w + 1. ``state``: 0 for the parameter, k for its k-th state, whose words are
    the 128 behind.
    """
    block = offset // 256
    end = (offset + count - 1) // 256 + 1 if count else block
    blocks = torch.arange(block, end, device="cpu")
    c0, c1 = blocks & _MASK, blocks >> 32
    c2, c3 = torch.full_like(blocks, step & _MASK), torch.full_like(blocks, key & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(7):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    first, second = (c0 ^ c2)[:, None], (c1 ^ c3)[:, None]
    words = 128 * state + torch.arange(128, device="cpu")
    x = _multiply(0x9E3779B9, words)[1][None] ^ first
    x = _multiply(0x7FEB352D, x ^ (x >> 16))[1]
    x = _multiply(0x846CA68B, ((x ^ (x >> 15)) + second) & _MASK)[1]
    words = x ^ (x >> 16)
    halves = torch.stack((words & 0xFFFF, words >> 16), 2).flatten()
    return halves[offset % 256 : offset % 256 + count]


def _multiply(factor: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * c, whose 64 would not fit int64."""
    low = factor * (c & 0xFFFF)
    high = factor * (c >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, away from zero with the probability of what is cut off."""
    raw = value.view(torch.int32).long() & _MASK
    raised = torch.where(value.isfinite(), raw + bits, raw) >> 16
    signed = torch.where(raised >= 2**15, raised - 2**16, raised).to(torch.int16)
    return torch.where(value.isnan(), float("nan"), signed.view(torch.bfloat16))


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, float32, ascending: ``bitsandbytes.functional.create_dynamic_map``'s."""
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        count = (1 if signed else 2) * 2**decade
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32, device="cpu")
        means = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + ([-m for m in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _blocks(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)


def encode8(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of x's shape, and the largest magnitude of each block, float32 (blocks,)."""
    blocks = _blocks(x.flatten())
    absmax = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    absmax = torch.where(absmax >= torch.finfo(torch.float32).tiny, absmax, 0.0)
    inverse = torch.where(absmax > 0, 1 / absmax, 0.0)
    values = dynamic_map(signed).to(x.device, x.dtype)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks * inverse[:, None], middles, right=True)
    if not signed:
        codes = codes.clamp(min=1)
    return codes.to(torch.uint8).flatten()[: x.numel()].view(x.shape), absmax.float()


def decode8(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
    """The values that codes and scales stand for, in ``dtype``."""
    values = dynamic_map(signed).to(codes.device, dtype)[_blocks(codes.flatten()).long()]
    scaled = values * absmax.to(dtype)[:, None]
    return scaled.flatten()[: codes.numel()].view(codes.shape)
