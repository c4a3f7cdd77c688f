"""TRL's trainers that ask a model for its logits (ORPO, CPO and with it SimPO), without them.

They take each token's log-probability by a function of TRL's, ``selective_log_softmax``. For as
long as the context is open that function knows deferred logits (:mod:`fastft.nn.deferred`) of
accelerated models; given any others it is TRL's own.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastft.losses.log_probs import token_log_probs
from fastft.nn.deferred import DeferredLogits
from fastft.nn.head import fleeting_logits

__all__ = ["deferred_in_trl"]

_NAME = "selective_log_softmax"
_lock = threading.Lock()
_open = 0  # contexts, of all threads
_replaced: list[tuple[Any, Any]] = []  # modules, and what they held


@contextmanager
def deferred_in_trl() -> Iterator[None]:
    """Inside, :func:`fastft.losses.deferred_logits`, and TRL's log-probabilities come out of the
    fused head:

        trainer = ORPOTrainer(model=fastft.accelerate(model), ...)
        with fastft.losses.deferred_in_trl():
            trainer.train()

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
                for module, original in _replaced:
                    setattr(module, _NAME, original)
                _replaced.clear()


def _serve() -> None:
    for name, module in list(sys.modules.items()):
        original = vars(module).get(_NAME) if name.startswith("trl.") else None
        if original is not None:
            _replaced.append((module, original))
            setattr(module, _NAME, _knowing_deferred(original))


def _knowing_deferred(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, *rest: Any, **options: Any
    ) -> Tensor:
        deferred = isinstance(logits, DeferredLogits) and logits.deferrable()
        masked = any(value is not None for value in (*rest, *options.values()))
        if deferred and not masked and index.shape == logits.shape[:-1]:
            return token_log_probs(logits, index, temperature=temperature, shift=False)
        return original(logits, index, temperature, *rest, **options)

    return selective_log_softmax
