"""``linear_divergence``: distillation over a vocabulary without the student's logits.

    p = softmax(z / T), z = softcap(scale (W h + bias));   q the same of the teacher
    forward_kl:  sum_v q log(q / p)        reverse_kl:  sum_v p log(p / q)
    jensen_shannon:  beta sum_v q log(q / m) + (1 - beta) sum_v p log(p / m)
                     m = beta q + (1 - beta) p

times T^2 (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Agarwal et al. 2024,
"On-Policy Distillation of Language Models", for the generalised Jensen-Shannon divergence). Both
models' logits exist for one slab of tokens at a time, where the student's become their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError
from fastft.ops._checks import autocast_dtype, without_autocast
from fastft.ops._differentiable import batched
from fastft.ops._divergence_checks import KINDS, WHERE, Teacher, check
from fastft.ops._eager import dispatched, recording
from fastft.ops._head_loop import (
    ELSEWHERE,
    Gradients,
    Head,
    Needs,
    Tokens,
    default_chunk,
    empty_gradients,
    free_bytes,
    over,
    slabs,
)
from fastft.reference import linear_cross_entropy as reference

__all__ = ["KINDS", "Teacher", "check", "divergence", "linear_divergence", "soft_cross_entropy"]


def linear_divergence(
    hidden_states: Tensor,
    weight: Tensor,
    teacher: Tensor | Teacher,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora_s: Tensor | None = None,
    lora_b: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    return_entropy: bool = False,
    backend: str | None = None,
    chunk: int | None = None,
) -> Any:
    """Divergence of the student's distribution from the teacher's.

    Args:
        hidden_states: (..., hidden) of the student; weight: (vocabulary, hidden), its head; both
            may require gradients. Dtypes as in :func:`fastft.ops.linear_cross_entropy`.
        teacher: its logits (..., vocabulary), or a :class:`Teacher`. It gets no gradient.
        kind: "forward_kl", "reverse_kl" or "jensen_shannon".
        temperature: T, above 0.
        beta: of the Jensen-Shannon divergence, between 0 and 1 (near 0 forward, near 1 reverse).
        bias, logit_scale, softcap: of the student's logits.
        lora_s, lora_b: (..., r) and (vocabulary, r), an adapter of the student's head: what its A
            and scaling make of ``hidden_states``, and its B, in any floating dtype.
        mask: (...) bool, True for tokens that count; None: all do.
        reduction: "mean" over the tokens that count, "sum", or "none": one number a token, 0 where
            it does not count; the head and lora_b must then be frozen.
        return_entropy: return (divergence, entropy): of each token -sum_v p log p, float32 (...), 0
            where it does not count, without gradient.
        chunk: tokens of a slab, of which there are two.

    Returns:
        float32: a scalar, or of the shape (...).

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``; ArgumentError also under
            torch.compile.
    """
    check(
        hidden_states, weight, teacher, kind, temperature, beta, bias, mask, reduction, chunk,
        lora_s, lora_b,
    )  # fmt: skip
    leading = hidden_states.shape[:-1]
    given = _Call(KINDS[kind], temperature, beta, logit_scale, softcap or 0.0)
    source = _teacher_source(teacher, hidden_states.device.type)
    adapter = lora_s, lora_b
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    entropy = hidden_states.new_zeros(leading, dtype=wide) if return_entropy else None
    losses = _losses(
        hidden_states, weight, bias, adapter, source, given, mask, None, entropy, backend, chunk
    )
    loss = _reduced(losses.view(leading) * temperature**2, mask, reduction)
    return loss if entropy is None else (loss, entropy)


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """What :func:`linear_divergence` computes, of logits (..., vocabulary) that exist: plain torch.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: as for :func:`linear_divergence`.
    """
    classes = student.shape[-1]
    head = student.new_zeros(1, 1).expand(classes, classes)  # stands in for a head: no memory
    check(student, head, teacher, kind, temperature, beta, None, mask, reduction, None)
    wide = torch.promote_types(student.dtype, torch.float32)
    z, t = student.to(wide) / temperature, teacher.detach().to(wide) / temperature
    if mask is not None:  # what does not count may be anything
        z, t = (torch.where(mask[..., None], logits, 0.0) for logits in (z, t))
    losses = reference.divergence(KINDS[kind], z, t, beta) * temperature**2
    losses = losses if mask is None else torch.where(mask, losses, 0.0)
    return _reduced(losses, mask, reduction)


def _reduced(losses: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64).to(losses.dtype)
    count = losses.numel() if mask is None else mask.sum()
    return over(total, count) if reduction == "mean" else total


def soft_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    probabilities: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    chunk: int | None,
    backend: str | None,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """-sum_v w_v q'_v log p_v of each token, q' = (1 - eps) q + eps / V: with s = sum w q', s times
    the divergence from w q' / s, and its entropy."""
    vocabulary = weight.shape[0]
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    flat = probabilities.detach().reshape(-1, vocabulary)

    def targets(places: Any) -> Tensor:
        q = flat[places].to(wide) * (1 - label_smoothing) + label_smoothing / vocabulary
        return q if class_weight is None else q * class_weight.to(wide)

    rows = flat.shape[0]
    mass, plogp = flat.new_empty(rows, dtype=wide), flat.new_empty(rows, dtype=wide)
    for places in torch.arange(rows, device=flat.device).split(1024):
        q = targets(places)
        mass[places] = q.sum(-1)
        plogp[places] = torch.special.xlogy(q, q).sum(-1)
    given = _Call(0, 1.0, 0.5, logit_scale, softcap or 0.0)

    def source(places: Any) -> tuple[Tensor, dict[str, Any]]:
        log_q = targets(places).log()
        # A row without mass counts nothing; log 0 - log 0 must not be made on the way.
        return torch.where(mass[places][:, None] > 0, log_q, 0.0), dict(_PLAIN)

    losses = _losses(
        hidden_states, weight, bias, (None, None), source, given, None, mass, None, backend, chunk
    )
    # s KL(q / s || p) = sum q log q - s log s - sum q log p
    losses = losses - (plogp - torch.special.xlogy(mass, mass))
    return losses.view(hidden_states.shape[:-1])


class _Call(NamedTuple):
    kind: int
    temperature: float
    beta: float
    scale: float
    softcap: float


_PLAIN = {"teacher_bias": None, "teacher_scale": 1.0, "teacher_softcap": 0.0}
# The teacher's logits of some tokens, and how they are transformed.
Source = Callable[[Any], tuple[Tensor, dict[str, Any]]]


def _teacher_source(teacher: Tensor | Teacher, device_type: str) -> Source:
    if isinstance(teacher, Tensor):
        logits = teacher.detach().reshape(-1, teacher.shape[-1])
        return lambda places: (_with_memory(logits[places]), dict(_PLAIN))
    _refuse_dispatched(teacher.hidden_states, teacher.weight, teacher.bias)
    dtype = autocast_dtype(device_type) or teacher.hidden_states.dtype
    hidden = teacher.hidden_states.detach().reshape(-1, teacher.hidden_states.shape[-1]).to(dtype)
    weight = teacher.weight.detach().to(dtype)
    options = {
        "teacher_bias": teacher.bias,
        "teacher_scale": teacher.logit_scale,
        "teacher_softcap": teacher.softcap or 0.0,
    }
    return lambda places: (hidden[places] @ weight.t(), dict(options))


def _with_memory(logits: Tensor) -> Tensor:
    """For a kernel: deferred logits are read, torch refuses others (sharded ones, fake ones)."""
    if not dispatched(logits):
        return logits
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device).copy_(logits)


def _refuse_dispatched(*tensors: Tensor | None) -> None:
    """There is no registered operation; logits that exist are plain torch's."""
    if dispatched(*tensors):
        expected = "tensors with memory, outside torch.compile"
        got = "others, or a call under it"
        raise ArgumentError(WHERE, "hidden_states", expected=expected, got=got)


def _losses(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor | None, Tensor | None],
    source: Source,
    given: _Call,
    mask: Tensor | None,
    row_scale: Tensor | None,
    entropy: Tensor | None,
    backend: str | None,
    chunk: int | None,
) -> Tensor:
    device_type = hidden_states.device.type
    dtype = autocast_dtype(device_type) or hidden_states.dtype
    flat = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype).contiguous()
    lora_s, lora_b = adapter
    if lora_s is not None:
        lora_s = lora_s.reshape(-1, lora_s.shape[-1]).to(dtype).contiguous()
    tensors = [flat, weight, bias, lora_s, lora_b]
    _refuse_dispatched(*tensors, mask, row_scale)
    if not recording():
        tensors = [None if t is None else t.detach() for t in tensors]
    name, launcher = backends.select(
        "linear_cross_entropy", backend, device_type=device_type, dtype=dtype
    )
    del name
    rows = chunk or default_chunk(
        flat.shape[0],
        2 * weight.shape[0],  # two slabs
        flat.element_size(),
        device_type,
        trained=bool(weight.requires_grad),
        free_bytes=free_bytes(flat.device),
    )
    kept = None if mask is None else mask.reshape(-1)
    entropies = None if entropy is None else entropy.view(-1)
    return LinearDivergence.apply(
        *tensors, source, given, kept, row_scale, entropies, launcher, rows
    )


def _run(
    needs: Needs,
    head: Head,
    bias: Tensor | None,
    source: Source,
    given: _Call,
    kept: Tensor | None,
    row_scale: Tensor | None,
    entropy: Tensor | None,
    launcher: Any,
    chunk: int,
) -> tuple[Tensor, Gradients]:
    n = head.hidden.shape[0]
    losses = head.hidden.new_zeros(n, dtype=head.wide)
    out = empty_gradients(head, needs, head.weight.shape[0])
    wide_bias = None if bias is None else bias.detach().to(head.wide).contiguous()
    tokens = Tokens() if kept is None else Tokens(kept.nonzero().flatten())

    def rows(slab: Tensor, places: Tensor | slice, _: slice) -> None:
        logits, options = source(places)
        if logits.dtype not in (slab.dtype, head.wide):
            logits = logits.to(head.wide)
        if options["teacher_bias"] is not None:
            options["teacher_bias"] = options["teacher_bias"].detach().to(head.wide).contiguous()
        if entropy is not None:
            entropy[places] = _entropies(launcher, slab, wide_bias, given)
        found = head.hidden.new_empty(slab.shape[0], dtype=head.wide)
        scale = None if row_scale is None else row_scale[places]
        launcher.divergence_rows(
            slab, logits.contiguous(), found, gradient=any(needs), bias=wide_bias, row_scale=scale,
            **given._asdict(), **options,
        )  # fmt: skip
        losses[places] = found if scale is None else found * scale

    slabs(launcher, head, tokens, chunk, needs, out, rows)
    return losses, out


def _entropies(launcher: Any, slab: Tensor, bias: Tensor | None, given: _Call) -> Tensor:
    """Of the slab's rows: one of the loss's statistics."""
    rows, classes = slab.shape
    wide = torch.promote_types(slab.dtype, torch.float32)
    names = ("top", "log_sum", "z_label", "entropy", "log_sum_sq", "mean_logit")
    found = dict(zip(names, slab.new_empty(len(names), rows, dtype=wide).unbind(), strict=True))
    absent = ("class_weight", "label_weight", "row_scale", "entropy_scale", "weighted_sum")
    label = torch.full((rows,), ELSEWHERE, dtype=torch.int64, device=slab.device)
    launcher.rows(
        slab, labels=label, argmax=torch.empty_like(label), bias=bias, **found,
        **dict.fromkeys(absent), scale=given.scale / given.temperature,
        softcap=given.softcap / given.temperature, smoothing=0.0, z_loss=0.0,
        weight_sum=float(classes), classes=float(classes), statistics=True, gradient=False,
    )  # fmt: skip
    return found["entropy"]


class LinearDivergence(torch.autograd.Function):
    """The gradients of the summed loss are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_s: Tensor | None,
        lora_b: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        needs = Needs(*ctx.needs_input_grad[:5])
        with without_autocast(hidden.device.type):
            narrow = None if lora_b is None else lora_b.to(hidden.dtype)
            head = Head(hidden, weight.to(hidden.dtype), lora_s, narrow)
            losses, made = _run(needs, head, bias, *rest)
        ctx.save_for_backward(*made)
        given = hidden, weight, bias, lora_s, lora_b
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        ctx.needs = needs
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> Any:
        if torch.is_grad_enabled():  # a second would take the teacher's logits: they are not kept
            raise ArgumentError(
                WHERE,
                "hidden_states",
                expected="first derivatives",
                got="create_graph=True",
                remedy="Take them of logits: fastft.ops.divergence, or accelerate(loss=False).",
            )
        each = d_losses[:, None]
        one = d_losses[:1] if d_losses.numel() else d_losses.new_zeros(1)
        scaled: list[Tensor | None] = []
        for gradient, scale, dtype, need in zip(
            ctx.saved_tensors, (each, one, one, each, one), ctx.dtypes, ctx.needs, strict=True
        ):  # fmt: skip
            if not need:
                scaled.append(None)
                continue
            if batched(d_losses):  # which out= does not take
                scaled.append((gradient * scale).to(dtype))
                continue
            target = torch.empty_like(gradient, dtype=dtype)
            scaled.append(torch.mul(gradient, scale, out=target))
        return *scaled, *[None] * 7
