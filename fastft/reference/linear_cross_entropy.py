"""``linear_cross_entropy`` and ``linear_divergence`` in plain torch, right in float64: whole, for
tests and second derivatives, and in the parts that a backend has."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "add_d_weight",
    "cross_entropy",
    "d_hidden",
    "divergence",
    "divergence_rows",
    "entropy",
    "linear_cross_entropy",
    "new_slab",
    "project",
    "rows",
    "supports",
    "transform",
]


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def transform(logits: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softcap(scale (logits + bias)), softcap(x) = c tanh(x / c), in at least float32."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z * scale
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """The loss of each token, of all logits at once; differentiable."""
    z = transform(torch.nn.functional.linear(hidden, weight), bias, scale, softcap)
    return cross_entropy(z, labels, ignore_index, class_weight, label_smoothing, z_loss)


def cross_entropy(
    z: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The loss of each row of logits; differentiable."""
    losses = torch.nn.functional.cross_entropy(
        z,
        labels,
        None if class_weight is None else class_weight.to(z.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    squares = torch.logsumexp(z, -1).square()
    return losses + z_loss * torch.where(labels == ignore_index, 0.0, squares)


def entropy(z: Tensor, ignored: Tensor) -> Tensor:
    """The entropy of each row of logits, 0 where it is ignored; differentiable."""
    log_p = torch.log_softmax(z, -1)
    # 0 log 0 is 0, and so is its gradient.
    each = log_p.exp() * log_p.clamp(min=torch.finfo(z.dtype).min)
    return torch.where(ignored, 0.0, -each.sum(-1))


def divergence(kind: int, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Of each row: sum q log(q / p), sum p log(p / q), or with m = beta q + (1 - beta) p
    beta sum q log(q / m) + (1 - beta) sum p log(p / m); p, q the softmax of student and teacher."""
    lp, lq = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    if kind == 0:
        return _relative_entropy(lq, lp)
    if kind == 1:
        return _relative_entropy(lp, lq)
    log_beta = torch.tensor([beta, 1 - beta], dtype=lp.dtype, device=lp.device).log()
    gone = (lq == -torch.inf) & (lp == -torch.inf)  # a class of neither: logaddexp gives NaN
    of_q, of_p = (torch.where(gone, 0.0, t) for t in (lq, lp))
    log_m = torch.logaddexp(of_q + log_beta[0], of_p + log_beta[1])
    return beta * _relative_entropy(lq, log_m) + (1 - beta) * _relative_entropy(lp, log_m)


def _relative_entropy(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    # Where a is 0 the term is 0, whatever b; -inf - -inf must not be computed on the way.
    some = a > 0
    return (a * torch.where(some, log_a, 0.0) - a * torch.where(some, log_b, 0.0)).sum(-1)


def new_slab(name: str, tokens: int, vocabulary: int, hidden: Tensor) -> Tensor:
    """(tokens, vocabulary) in the dtype of hidden."""
    return hidden.new_empty(tokens, vocabulary)


def project(slab: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """slab = hidden weight^T."""
    torch.mm(hidden, weight.t(), out=slab)


def d_hidden(out: Tensor, slab: Tensor, weight: Tensor) -> None:
    """out = slab weight."""
    torch.mm(slab, weight, out=out)


def add_d_weight(d_weight: Tensor, slab: Tensor, hidden: Tensor, first: bool) -> None:
    """d_weight = or += slab^T hidden."""
    product = (slab.t() @ hidden).to(d_weight.dtype)
    d_weight.copy_(product) if first else d_weight.add_(product)


def rows(
    slab: Tensor,
    *,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_weight: Tensor | None,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    top: Tensor,
    log_sum: Tensor,
    z_label: Tensor,
    argmax: Tensor,
    weighted_sum: Tensor | None,
    entropy: Tensor | None,
    log_sum_sq: Tensor | None,
    mean_logit: Tensor | None,
    scale: float,
    softcap: float,
    smoothing: float,
    z_loss: float,
    weight_sum: float,
    classes: float,
    statistics: bool,
    gradient: bool,
) -> None:
    """The statistics of the slab's rows, and with ``gradient`` that of the loss in their place.

    labels: -1 where the label is in no column, -2 where the token is ignored. entropy_scale: what
    the gradient has of the entropy, which is then read.
    """
    z = transform(slab, bias, scale, softcap)
    here = labels >= 0
    column = labels.clamp(min=0)[:, None]
    w = torch.ones((), dtype=z.dtype, device=z.device) if class_weight is None else class_weight
    if statistics:
        values, argmax[:] = z.max(-1)
        top.copy_(values)
        log_sum.copy_(torch.logsumexp(z - top[:, None], -1))
        z_label.copy_(torch.where(here, z.gather(1, column)[:, 0], 0.0))
        if weighted_sum is not None:
            weighted_sum.copy_((z * w).sum(-1))
    lse = (top + log_sum)[:, None]
    if statistics and entropy is not None and log_sum_sq is not None and mean_logit is not None:
        p = torch.exp(z - lse)
        entropy.copy_(-(p * torch.where(p > 0, z - lse, 0.0)).sum(-1))
        log_sum_sq.copy_(p.square().sum(-1).log())
        mean_logit.copy_(z.mean(-1))
    if not gradient:
        return
    g = (labels != -2).to(z.dtype) if row_scale is None else row_scale * (labels != -2)
    hard = g * (1 - smoothing) * (1 if label_weight is None else label_weight)
    smooth = g * smoothing / classes
    total = hard + smooth * weight_sum + 2 * z_loss * g * lse[:, 0]
    dz = torch.exp(z - lse) * total[:, None] - smooth[:, None] * w
    if entropy_scale is not None and entropy is not None:
        log_p = z - lse
        bonus = log_p.exp() * (log_p.clamp(min=torch.finfo(z.dtype).min) + entropy[:, None])
        dz -= entropy_scale[:, None] * bonus
    dz.scatter_add_(1, column, torch.where(here, -hard, 0.0)[:, None])
    # 0 inf is no gradient of an ignored row.
    slab.copy_(torch.where((labels != -2)[:, None], dz * _slope(z, scale, softcap), 0.0))


def _slope(z: Tensor, scale: float, softcap: float) -> Tensor | float:
    """dz / dlogits of :func:`transform`, from its result."""
    return scale * (1 - (z / softcap).square()) if softcap > 0 else scale


def divergence_rows(
    slab: Tensor,
    teacher: Tensor,
    losses: Tensor,
    *,
    kind: int,
    gradient: bool,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    temperature: float,
    beta: float,
) -> None:
    """The divergence of each row from the teacher's, and with ``gradient`` that in its place."""
    with torch.enable_grad():
        logits = slab.detach().clone().requires_grad_()
        z = transform(logits, bias, scale, softcap) / temperature
        t = transform(teacher, teacher_bias, teacher_scale, teacher_softcap) / temperature
        found = divergence(kind, z, t.to(z.dtype), beta)
        losses.copy_(found.detach())
        if gradient:
            ones = torch.ones_like(found) if row_scale is None else row_scale.to(found.dtype)
            slab.copy_(torch.autograd.grad(found, logits, ones)[0])
