"""What a terminal shows of ``fastft train``: a progress bar with the last loss, or one line each
``logging_steps`` where the output is no terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from fastft.train.processes import first_process

if TYPE_CHECKING:
    from fastft.train.callbacks import StepEvent
    from fastft.train.run import TrainResult
    from fastft.train.together import TogetherEvent

__all__ = ["TrainView"]


class TrainView:
    """Shows notices and steps; a context manager, which puts the terminal in order at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("preparing", total=None)
        self._live = self._console.is_terminal and first_process()

    def __enter__(self) -> TrainView:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live:
            self._progress.stop()

    def notice(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, event: StepEvent) -> None:
        self._show(event, f"loss {event.loss:.4f}")

    def together(self, event: TogetherEvent) -> None:
        losses = " ".join("done" if math.isnan(x) else f"{x:.4f}" for x in event.losses)
        self._show(event, f"losses {losses}")

    def _show(self, event: StepEvent | TogetherEvent, losses: str) -> None:
        text = (
            f"step {event.step}/{event.max_steps}  {losses}  "
            f"{event.tokens / max(event.seconds, 1e-9):,.0f} tokens/s"
        )
        if self._live:
            self._progress.update(
                self._task, description=text, completed=event.step, total=event.max_steps
            )
        else:
            self.notice(text)

    def finish(self, result: TrainResult) -> None:
        if not first_process():
            return
        if result.explanation is not None:
            modules = result.explanation["modules"]
            fused = sum(bool(module["fused"]) for module in modules)
            self.notice(f"{fused} modules fused, {len(modules) - fused} not")
            for reason in sorted({str(m["reason"]) for m in modules if not m["fused"]}):
                self.notice(f"  not fused: {reason}")
        if result.eval_loss is not None:
            self.notice(f"held-out loss {result.eval_loss:.4f}")
        self.notice(
            f"adapter: {result.adapter} (read back: largest difference of logits "
            f"{result.adapter_reload_max_diff:g})"
        )
