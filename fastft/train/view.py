"""What a terminal shows of the demo: a live table and a progress bar, or plain lines where the
output is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from fastft.train.demo import SIDES, WARMUP_STEPS

__all__ = ["LiveView", "PlainView", "demo_view", "human_bytes", "human_seconds", "summary"]

NAMES = {"peft": "PEFT", "fastft": "fastft"}
# Steps shown at once: the first, and as many of the last as fit a small terminal.
ROWS = 12


def human_bytes(count: float) -> str:
    """``1536 MB`` up to a gigabyte, ``1.5 GB`` above (powers of 1024)."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MB"
    return f"{count / 2**30:.2f} GB"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


class _Clock:
    """Time left, from the pace so far. Until the second side has run, its pace is taken to be that
    of the first, so the estimate shrinks when it turns out faster. ``limit``: seconds after which
    the first side ends whatever its step; the second takes no more steps, so about as long."""

    def __init__(self, steps: int, limit: float | None = None) -> None:
        self._steps, self._limit = steps, limit
        self._seconds: dict[str, list[float]] = {side: [] for side in SIDES}

    def step(self, side: str, seconds: float) -> None:
        self._seconds[side].append(seconds)

    def end(self) -> int:
        """The running side has ended: the other will take as many steps. Returns that number."""
        self._steps = max(map(len, self._seconds.values()))
        return self._steps

    def done(self) -> int:
        return sum(map(len, self._seconds.values()))

    def left(self) -> float | None:
        total, pace = 0.0, None
        for side in SIDES:
            times = self._seconds[side]
            if times:
                # The first step is slower than the rest.
                pace = sum(times[1:] or times) / len(times[1:] or times)
            if pace is None:
                return None
            side_left = (self._steps - len(times)) * pace
            if self._limit is not None:
                side_left = min(side_left, max(0.0, self._limit - sum(times)) + pace)
            total += side_left
        return total


class PlainView:
    """One line for each step: for logs and pipes."""

    def __init__(self, console: Console, steps: int, limit: float | None = None) -> None:
        self._console, self._clock, self._total = console, _Clock(steps, limit), steps

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def notice(self, text: str) -> None:
        self._say(text)

    def event(self, side: str, event: dict[str, Any]) -> None:
        name = NAMES[side]
        if event["event"] == "start":
            self._say(f"{name}: starting")
        elif event["event"] == "loaded":
            self._say(f"{name}: {_loaded_line(event)}")
        elif event["event"] == "state":
            self._say(f"{name}: {event['text']}")
        elif event["event"] == "trained":
            self._total = self._clock.end()
        elif event["event"] == "step":
            self._clock.step(side, event["seconds"])
            left = self._clock.left()
            tail = f"  about {human_seconds(left)} left" if left is not None else ""
            self._say(
                f"{name:<6} step {event['step']:>3}/{self._total}  loss {event['loss']:.4f}  "
                f"{event['tokens'] / event['seconds']:7.1f} tokens/s  "
                f"extra memory {human_bytes(event['extra_bytes'])}{tail}"
            )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class LiveView:
    """A table of steps for both sides, and a progress bar over all steps of both."""

    def __init__(self, console: Console, steps: int, limit: float | None = None) -> None:
        self._console, self._steps, self._clock = console, steps, _Clock(steps, limit)
        self._events: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            expand=True,
        )
        self._task = self._progress.add_task("preparing", total=2 * steps, left="")
        self._title = ""
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(*exc)

    def notice(self, text: str) -> None:
        self._console.print(f"[dim]{text}[/dim]", highlight=False)

    def event(self, side: str, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "step":
            self._events[side].append(event)
            self._clock.step(side, event["seconds"])
            left = self._clock.left()
            self._progress.update(
                self._task,
                completed=self._clock.done(),
                description=f"{NAMES[side]}: training",
                left=f"about {human_seconds(left)} left" if left is not None else "",
            )
        elif kind == "trained":
            self._progress.update(self._task, total=2 * self._clock.end())
        elif kind == "loaded":
            self._title = _loaded_line(event)
        elif kind == "state":
            self._progress.update(self._task, description=f"{NAMES[side]}: {event['text']}")
        elif kind == "start":
            self._progress.update(self._task, description=f"{NAMES[side]}: starting")

    def _render(self) -> RenderableType:
        table = Table(title=self._title or None, expand=True, title_style="dim")
        table.add_column("step", justify="right")
        for heading in ("loss", "tokens/s", "extra memory"):
            for side in SIDES:
                style = "bold cyan" if side == "fastft" else ""
                table.add_column(f"{heading}\n{NAMES[side]}", justify="right", style=style)
        for index in self._shown():
            cells = []
            for value in (_loss_cell, _speed_cell, _memory_cell):
                for side in SIDES:
                    events = self._events[side]
                    cells.append(value(events[index]) if index < len(events) else "")
            table.add_row(str(index + 1), *cells)
        return Group(table, self._progress)

    def _shown(self) -> list[int]:
        """The first step and the last ones of the side that is running."""
        running = self._events["fastft"] or self._events["peft"]
        last = len(running)
        if last <= ROWS:
            return list(range(last))
        return [0, *range(last - ROWS + 1, last)]


def _loaded_line(event: dict[str, Any]) -> str:
    return (
        f"{event['parameters'] / 1e6:.0f}M parameters, {event['trainable'] / 1e6:.1f}M of them "
        f"trained, {event['dtype']}, on {event['device']}"
    )


def _loss_cell(event: dict[str, Any]) -> str:
    return f"{event['loss']:.4f}"


def _speed_cell(event: dict[str, Any]) -> str:
    warming = event["step"] <= WARMUP_STEPS
    text = f"{event['tokens'] / event['seconds']:.0f}"
    return f"[dim]{text}[/dim]" if warming else text


def _memory_cell(event: dict[str, Any]) -> str:
    return human_bytes(event["extra_bytes"])


def demo_view(console: Console, steps: int, limit: float | None = None) -> LiveView | PlainView:
    """The view that suits the console."""
    view = LiveView if console.is_terminal else PlainView
    return view(console, steps, limit)


def summary(report: dict[str, Any], html: str, seconds: float) -> Panel:
    """The last word: both sides, their ratio, and where the report is."""
    speed, memory = report["tokens_per_s"], report["peak_extra_bytes"]
    table = Table(box=None, padding=(0, 2))
    for heading in ("", "PEFT", "fastft", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(
        "tokens/s",
        f"{speed['peft']:.0f}",
        f"{speed['fastft']:.0f}",
        f"{speed['fastft'] / speed['peft']:.2f}x",
    )
    ratio = memory["fastft"] / memory["peft"] if memory["peft"] else float("nan")
    table.add_row(
        "peak extra memory",
        human_bytes(memory["peft"]),
        human_bytes(memory["fastft"]),
        f"{ratio:.2f}x",
    )
    table.add_row(
        "last loss",
        f"{report['loss']['peft'][-1]:.4f}",
        f"{report['loss']['fastft'][-1]:.4f}",
        f"largest difference {report['loss_max_rel_diff']:.1e}",
    )
    held_out = report["eval_loss"]
    if held_out["before"] is not None:
        table.add_row(
            "held-out loss after",
            f"{held_out['after_peft']:.4f}",
            f"{held_out['after']:.4f}",
            f"before {held_out['before']:.4f}",
        )
    foot = (
        f"{report['fused_modules']} modules fused, {report['fallback_modules']} not; "
        f"adapter read back: largest difference {report['adapter_reload_max_diff']:g}\n"
        f"{human_seconds(seconds)} in all. Report: {html}"
    )
    return Panel(Group(table, "", foot), title="fastft demo", expand=False)
