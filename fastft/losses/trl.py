"""TRL's trainers that ask a model for its logits, without them: ORPO, CPO and with it SimPO, and
the distillations GKD, GOLD and IW-OPD; and its ``DistillationTrainer``, which makes none itself, by
the fused operation.

They take each token's log-probability, or its divergence from a teacher, by a function of TRL's.
For as long as the context is open that function knows deferred logits (:mod:`fastft.nn.deferred`)
of accelerated models; given any others it is TRL's own.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastft.losses.log_probs import distillation_loss, token_log_probs
from fastft.nn.deferred import DeferredLogits
from fastft.nn.head import fleeting_logits
from fastft.ops import Teacher, linear_divergence
from fastft.ops._checks import autocast_dtype
from fastft.ops._differentiable import transform

__all__ = ["deferred_in_trl"]

_lock = threading.Lock()
_open = 0  # contexts, of all threads
_replaced: list[tuple[Any, str, Any]] = []  # modules and classes, a name, what it was


@contextmanager
def deferred_in_trl() -> Iterator[None]:
    """Inside, :func:`fastft.losses.deferred_logits`, and TRL's log-probabilities and divergences
    come out of the fused head:

        trainer = ORPOTrainer(model=fastft.accelerate(model), ...)
        with fastft.losses.deferred_in_trl():
            trainer.train()

    GKD's teacher is best accelerated, too: else its logits are made, all at once.

    Under DDP set ``ddp_find_unused_parameters=False`` in the trainer's arguments, without which
    nothing is deferred there. TRL's modules that are imported when the first context opens are
    served, and as they were when the last one closes.
    """
    global _open
    with _lock:
        if _open == 0:
            _serve()
        _open += 1
    try:
        with fleeting_logits():
            yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                for owner, name, original in _replaced:
                    setattr(owner, name, original)
                _replaced.clear()


def _serve() -> None:
    for name, module in list(sys.modules.items()):
        if not name.startswith("trl."):
            continue
        _replace(module, "selective_log_softmax", _log_probs_of_deferred)
        _replace(module, "_chunked_divergence_loss", _divergence_of_heads)
        for kind in list(vars(module).values()):  # the lazy ones are no classes yet
            if isinstance(kind, type) and kind.__module__ == name:
                _replace(kind, "generalized_jsd_loss", _divergence_of_deferred)


def _replace(owner: Any, name: str, knowing: Callable[[Any], Any]) -> None:
    original = vars(owner).get(name)
    if original is not None:
        _replaced.append((owner, name, original))
        setattr(owner, name, knowing(original))


def _log_probs_of_deferred(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def selective_log_softmax(logits: Tensor, index: Tensor, *rest: Any, **options: Any) -> Tensor:
        temperature, *more = rest or (options.get("temperature", 1.0),)
        more += [value for key, value in options.items() if key != "temperature"]
        masked = any(value is not None for value in more)
        if _deferred(logits) and not masked and index.shape == logits.shape[:-1]:
            return token_log_probs(logits, index, temperature=temperature, shift=False)
        return original(logits, index, *rest, **options)

    return selective_log_softmax


def _kind(beta: float) -> dict[str, Any]:
    """TRL's beta in this library's terms."""
    ends = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}
    return ends.get(beta, {"kind": "jensen_shannon", "beta": beta})


# What TRL's functions take, by which they are known.
_OF_LOGITS = "student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction"
_ITEMS = "num_items_in_batch"  # before it had these, TRL took other means
_OF_HEADS = (
    "student_hidden_states", "teacher_hidden_states", "student_lm_head_weight",
    "teacher_lm_head_weight", "completion_mask", "beta", _ITEMS,
    "student_lm_head_bias", "teacher_lm_head_bias", "student_logit_scale", "teacher_logit_scale",
    "student_final_logit_softcapping", "teacher_final_logit_softcapping", "temperature",
)  # fmt: skip
# Of the divergence's options those at which it is that of whole distributions.
_WHOLE: dict[str, tuple[Any, ...]] = {
    "logits_are_probs": (False,),
    "top_k": (0,),
    "add_tail": (False, True),  # of the top_k
}


def _divergence_of_deferred(original: Any) -> Any:
    theirs = getattr(original, "__func__", original)
    signature = inspect.signature(theirs)
    names = tuple(signature.parameters)
    if names[:6] != _OF_LOGITS or _ITEMS not in names:
        return original

    @functools.wraps(theirs)
    def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = dict(bound.arguments)
        student, teacher, labels, beta, temperature, how = map(options.pop, _OF_LOGITS)
        items = options.pop(_ITEMS)
        fits = (
            _deferred(student)
            and student.shape == teacher.shape
            and (labels is None or labels.shape == student.shape[:-1])
            and (items is not None or how in ("batchmean", "sum"))
            and all(value in _WHOLE.get(key, ()) for key, value in options.items())
            # Here the teacher gets no gradient.
            and not (teacher.requires_grad and torch.is_grad_enabled())
        )
        if not fits:
            return theirs(*args, **kwargs)  # type: ignore[no-any-return]
        mask = None if labels is None else labels != -100
        total = distillation_loss(
            student, teacher, mask, temperature=temperature, reduction="sum", **_kind(beta)
        )
        total = total / temperature**2  # which TRL leaves out
        if items is not None:
            return _over(total, items)
        if how == "sum":
            return total
        rows = max(student.shape[0], 1) if mask is None else mask.sum().clamp_min(1)
        return total / rows

    return staticmethod(generalized_jsd_loss)


def _divergence_of_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    if tuple(signature.parameters) != _OF_HEADS:
        return original

    @functools.wraps(original)
    def _chunked_divergence_loss(*args: Any, **kwargs: Any) -> Any:
        """TRL's: the loss, the sum of the student's entropies, the number of tokens that count."""
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        hidden, of_teacher, weight, teacher_weight, mask, beta, items, *rest = bound.args
        bias, teacher_bias, scale, teacher_scale, cap, teacher_cap, temperature = rest
        tensors = [hidden, of_teacher, weight, teacher_weight, bias, teacher_bias]
        plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
        same = weight.dtype == hidden.dtype or autocast_dtype(hidden.device.type) is not None
        if not (plain and same) or transform() is not None or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        counts = mask.reshape(hidden.shape[:-1]) != 0
        total, entropy = linear_divergence(
            hidden,
            weight,
            Teacher(of_teacher, teacher_weight, teacher_bias, teacher_scale, teacher_cap),
            bias=bias,
            logit_scale=scale,
            softcap=cap,
            temperature=temperature,
            mask=counts,
            reduction="sum",
            return_entropy=True,
            **_kind(beta),
        )
        number = counts.sum()
        loss = _over(total / temperature**2, number.clamp(min=1) if items is None else items)
        return loss, entropy.sum(), number

    return _chunked_divergence_loss


def _over(total: Tensor, number: Tensor | float) -> Tensor:
    return total / (number.to(total.device) if isinstance(number, Tensor) else number)


def _deferred(logits: Tensor) -> bool:
    return isinstance(logits, DeferredLogits) and logits.deferrable()
