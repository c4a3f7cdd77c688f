"""Callbacks for ``transformers.Trainer``: what happened in each step, Ctrl-C, and a loss that is
no number."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastft.errors import FastftError
from fastft.train.processes import any_process

__all__ = ["Interrupted", "StepEvent", "StepReporter", "StopAfter", "StopOnInterrupt", "StopOnNan"]


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C, after writing ``checkpoint``."""

    def __init__(self, step: int, checkpoint: str | None) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.checkpoint = step, checkpoint


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step. ``seconds`` is forward, backward and update; ``tokens`` counts what the
    model computed in all processes, padding included; ``batch_sha256`` is of this process's."""

    step: int
    max_steps: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float
    batch_sha256: str


class BatchLog:
    """What the Trainer trained on since the last report: filled by ``FastftTrainer``. ``here``:
    tokens of this process in the update that is running; ``tokens``: those of all processes."""

    def __init__(self) -> None:
        self.tokens = self.here = 0
        self.digest = ""


class StepReporter(TrainerCallback):
    """Calls ``report`` with a ``StepEvent`` each time the Trainer logs a loss (with
    ``logging_steps=1``, each step). ``tokens`` and ``seconds`` are sums since the last report."""

    def __init__(self, report: Callable[[StepEvent], None], batches: BatchLog) -> None:
        self._report, self._batches = report, batches
        self._started = 0.0
        self._seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronize()
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronize()
        self._seconds += time.perf_counter() - self._started

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        event = StepEvent(
            step=state.global_step,
            max_steps=state.max_steps,
            loss=float(logs["loss"]),
            learning_rate=float(logs.get("learning_rate", math.nan)),
            tokens=self._batches.tokens,
            seconds=self._seconds,
            batch_sha256=self._batches.digest,
        )
        self._seconds, self._batches.tokens = 0.0, 0
        self._report(event)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class StopOnNan(TrainerCallback):
    """Ends a run whose loss is NaN or infinite: nothing comes back from there."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise FastftError(
                "train",
                "loss",
                expected="a finite value",
                got=f"{loss} at step {state.global_step}",
                remedy="Lower learning_rate, or set dtype: float32. "
                "The checkpoints before this step are whole.",
            )


class StopAfter(TrainerCallback):
    """Ends training after so many steps, or after so many seconds but not before ``least`` steps;
    the schedule stays that of ``max_steps``."""

    def __init__(self, steps: int | None, seconds: float | None, least: int) -> None:
        self._steps, self._seconds, self._least = steps, seconds, least
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        late = self._seconds is not None and time.perf_counter() - self._started > self._seconds
        if state.global_step == self._steps or (late and state.global_step >= self._least):
            control.should_training_stop = True


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C (or SIGTERM) into a checkpoint and an orderly end after the step that
    is running. A second Ctrl-C stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notice: Callable[[str], None] | None = None) -> None:
        self.requested = False
        self._notice = notice or (lambda text: None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals inside the block; the handlers that were there come back after."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._notice("stopping after this step, writing a checkpoint (Ctrl-C again stops at once)")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A signal may reach one process a step before another.
        if any_process(self.requested, args.device):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True
