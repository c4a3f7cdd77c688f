"""TRL's fused head, served by fastft while an accelerated model is inside a forward of TRL's.

TRL's trainers (SFT, DPO, KTO, GRPO, RLOO) replace their model's forward by one that takes
``fused_lm_head=True`` and hands hidden states and head to a function of its own module. For the
length of such a forward that function gives the heads of accelerated models to
:func:`fastft.ops.linear_cross_entropy`, and every other head to TRL's own.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastft import ops
from fastft.nn.calls import count
from fastft.ops._checks import autocast_dtype
from fastft.ops._differentiable import transform

__all__ = ["begin", "end"]

_MODULE, _NAME, _COMPACT = "trl.trainer.utils", "_ChunkedLogProbFunction", "_use_triton"
# The per-token results that TRL may ask for, in the order it takes them.
_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_lock = threading.Lock()


class _Stand:
    """Stands in for TRL's autograd function, whose ``apply`` is all that TRL uses."""

    def __init__(self, module: Any) -> None:
        self.original, self.original_compact = getattr(module, _NAME), getattr(module, _COMPACT)
        self.uses = 0  # by all threads
        self.heads = threading.local()

    def apply(self, *arguments: Any) -> Any:
        head = next((h for h in self.open() if arguments[1] is h.weight), None)
        if head is None:
            return self.original.apply(*arguments)
        reason = _refusal(arguments)
        count(head, reason)
        return self.original.apply(*arguments) if reason is not None else _log_probs(*arguments)

    def compacts(self, device: torch.device) -> bool:
        """TRL's own answer, and True inside a forward of an accelerated model."""
        return bool(self.open()) or self.original_compact(device)

    def open(self) -> list[nn.Module]:
        """Heads of accelerated models whose forward this thread is in."""
        found: list[nn.Module] = self.heads.__dict__.setdefault("open", [])
        return found


def _refusal(arguments: tuple[Any, ...]) -> str | None:
    if len(arguments) != 9:
        return "this version of TRL calls its fused head otherwise"
    if (followed := transform()) is not None:
        return followed
    hidden, weight, _, labels, *_, outputs = arguments
    if not set(outputs) <= set(_OUTPUTS):
        return "a result of each token that fastft does not know"
    if type(hidden) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        return "tensor subclass"
    if weight.dtype != hidden.dtype and autocast_dtype(hidden.device.type) is None:
        return "mixed dtypes"
    return None if labels.dtype == torch.int64 else "labels are not int64"


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """TRL's results: log-probabilities of the labels, entropy, log sum p^2, mean logit, whether the
    label is the most likely; None where not asked for. Logits are divided by the temperature after
    their cap, which divides the cap and their scale."""
    statistics = set(outputs) - {"log_probs"}
    found = ops.linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=logit_scale / temperature,
        softcap=None if softcap is None else softcap / temperature,
        reduction="none",
        return_statistics=bool(statistics),
    )
    if not statistics:
        return -found, None, None, None, None
    losses, token = found
    values = {
        "entropy": token.entropy,
        "log_sum_sq_probs": token.log_sum_squares,
        "mean_logits": token.mean_logit,
        "is_top1": token.prediction == labels,
    }
    return -losses, *(values[name] if name in statistics else None for name in _OUTPUTS[1:])


def begin(head: nn.Module) -> None:
    """A forward of TRL's begins on an accelerated model with this head."""
    module = sys.modules.get(_MODULE)
    with _lock:
        stand = getattr(module, _NAME, None)
        if stand is None or not hasattr(module, _COMPACT):
            return count(head, "this version of TRL has another fused head")
        if not isinstance(stand, _Stand):
            stand = _Stand(module)
            setattr(module, _NAME, stand)
            # Whether TRL drops the tokens that do not count before the head: on a CPU, too.
            setattr(module, _COMPACT, lambda device: stand.compacts(device))
        stand.uses += 1
        stand.open().append(head)
    return None


def end() -> None:
    """The innermost forward of this thread that began has ended."""
    module = sys.modules.get(_MODULE)
    stand = getattr(module, _NAME, None)
    if not isinstance(stand, _Stand) or not stand.open():
        return
    with _lock:
        stand.open().pop()
        stand.uses -= 1
        if stand.uses == 0:
            setattr(module, _NAME, stand.original)
            setattr(module, _COMPACT, stand.original_compact)
