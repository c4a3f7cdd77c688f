"""``adamw``: one AdamW step over all tensors, global-norm clip and non-finite check included.

    norm = sqrt(sum g^2);  c = min(1, max_norm / (norm + 1e-6))
    p <- p (1 - lr wd);  m <- b1 m + (1 - b1) c g;  v <- b2 v + (1 - b2) (c g)^2
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Loshchilov & Hutter 2019, algorithm 2, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, DtypeError, ShapeError
from fastft.ops._checks import check_device, check_dtype, check_shape, check_tensor
from fastft.ops._library import register

__all__ = ["adamw", "check"]

_WHERE = "fastft.ops.adamw"
_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float = 0.0,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One step, in place, over every tensor of the lists.

    Args:
        params: n tensors, float32, bfloat16 or (GPU) float16, contiguous, updated in place.
        grads: n tensors of the same shapes, in the dtype of their parameter or float32.
        exp_avgs, exp_avg_sqs: n float32 tensors each, m and v, updated in place.
        steps: (n,) float32, t of each tensor, incremented here.
        hyper: (n, 5) float32: lr, beta1, beta2, eps, weight_decay of each tensor.
        stats: (3,) float32: receives the norm and c; its third entry counts skipped steps.
        max_norm: clip the global norm at this; 0 for no clip.
        maximize: step along the gradient instead of against it.

    A norm that is not finite changes nothing but ``stats``: norm, 0, and one more skipped step.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``.
    """
    check(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, stats, max_norm)
    if not params:
        return
    # The dtype least supported decides: every tensor of the step goes through one launcher.
    dtype = max({p.dtype for p in params}, key=_PARAM_DTYPES.index)
    name, launcher = backends.select(
        "adamw", backend, device_type=params[0].device.type, dtype=dtype
    )
    if torch.compiler.is_compiling():
        torch.ops.fastft.adamw_step(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            steps,
            hyper,
            stats,
            max_norm,
            maximize,
            name,
        )
        return
    launcher.step(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        steps,
        hyper,
        stats,
        max_norm=max_norm,
        maximize=maximize,
    )


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    hyper: Tensor,
    stats: Tensor,
    max_norm: float,
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: a dtype other than those listed, complex or sparse gradients.
        ShapeError: lists of different lengths, shapes that differ, tensors not contiguous.
        DeviceError: tensors on different devices.
        ArgumentError: a negative max_norm.
    """
    count = len(params)
    if not len(grads) == len(exp_avgs) == len(exp_avg_sqs) == count:
        lengths = [len(v) for v in (params, grads, exp_avgs, exp_avg_sqs)]
        raise ShapeError(_WHERE, "params", expected="as many of each", got=str(lengths))
    if not max_norm >= 0.0:
        raise ArgumentError(_WHERE, "max_norm", expected="0 (no clip) or more", got=repr(max_norm))
    for name, tensor, shape in (
        ("steps", steps, (count,)),
        ("hyper", hyper, (count, 5)),
        ("stats", stats, (3,)),
    ):
        check_tensor(_WHERE, name, tensor)
        check_dtype(_WHERE, name, tensor, (torch.float32,))
        check_shape(_WHERE, name, tensor, shape, "shape")
        _check_contiguous(name, tensor)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        check_dtype(_WHERE, "params", p, _PARAM_DTYPES)
        if g.layout is not torch.strided:
            raise DtypeError(_WHERE, "grads", expected="dense gradients", got=str(g.layout))
        check_dtype(_WHERE, "grads", g, (p.dtype, torch.float32))
        for name, tensor in (("grads", g), ("exp_avgs", m), ("exp_avg_sqs", v)):
            check_device(_WHERE, name, tensor, p.device)
            check_shape(_WHERE, name, tensor, tuple(p.shape), "the parameter's shape")
        check_dtype(_WHERE, "exp_avgs", m, (torch.float32,))
        check_dtype(_WHERE, "exp_avg_sqs", v, (torch.float32,))
        for name, tensor in (("params", p), ("grads", g), ("exp_avgs", m), ("exp_avg_sqs", v)):
            _check_contiguous(name, tensor)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ShapeError(
            _WHERE,
            name,
            expected="contiguous tensors",
            got=f"strides {tensor.stride()}",
            remedy=f"Use {name}.contiguous().",
        )


def _step_kernel(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    hyper: Tensor,
    stats: Tensor,
    max_norm: float,
    maximize: bool,
    backend: str,
) -> None:
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        hyper,
        stats,
        max_norm=max_norm,
        maximize=maximize,
        backend=backend,
    )


register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!) steps, Tensor hyper, Tensor(e!) stats, "
    "float max_norm, bool maximize, str backend) -> ()",
    _step_kernel,
    lambda *arguments: None,
)
