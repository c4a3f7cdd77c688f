"""The report's figures, as SVG texts. Matplotlib draws without a display."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

__all__ = ["bar_chart", "line_chart", "stacked_bars"]

COLORS = {"peft": "#8a8f98", "fastft": "#0b7285"}
LABELS = {"peft": "PEFT", "fastft": "fastft"}
WIDTH, HEIGHT = 5.6, 3.2


def _figure(draw: Callable[[Any], None]) -> str:
    """Draws on fresh axes and returns the SVG, without the date and random ids, so that the same
    data give the same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fastft", "font.size": 10}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def line_chart(
    series: dict[str, list[float]], ylabel: str, *, from_zero: bool = False, skip: int = 0
) -> str:
    """One line a side over the step. ``skip`` shades so many first steps as warm-up. Where the
    lines coincide, the second is seen on top of the first, which is drawn wider."""

    def draw(axes: Any) -> None:
        for name, values in series.items():
            below = name == "peft"
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=COLORS[name],
                label=LABELS[name],
                linewidth=4.0 if below else 1.6,
                alpha=0.6 if below else 1.0,
                marker=None if below else "o",
                markersize=3,
            )
        if skip:
            axes.axvspan(0.5, skip + 0.5, color="#000000", alpha=0.05, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)

    return _figure(draw)


def bar_chart(values: dict[str, float], ylabel: str, fmt: Callable[[float], str]) -> str:
    """One bar a side from zero, with its value above."""

    def draw(axes: Any) -> None:
        names = list(values)
        bars = axes.bar(
            [LABELS[n] for n in names],
            [values[n] for n in names],
            color=[COLORS[n] for n in names],
            width=0.55,
        )
        axes.bar_label(bars, labels=[fmt(values[n]) for n in names], padding=3)
        axes.set_ylabel(ylabel)
        axes.set_ylim(0, (max(values.values()) or 1) * 1.15)

    return _figure(draw)


def stacked_bars(
    bars: dict[str, dict[str, float]],
    colors: dict[str, str],
    ylabel: str,
    limit: float,
    limit_name: str,
) -> str:
    """One bar for each name, its parts stacked, and a line at ``limit``."""

    def draw(axes: Any) -> None:
        names = list(bars)
        below = [0.0] * len(names)
        for part, color in colors.items():
            values = [bars[name][part] for name in names]
            axes.bar(names, values, bottom=below, color=color, width=0.6, label=part)
            below = [a + b for a, b in zip(below, values, strict=True)]
        for place, total in enumerate(below):
            axes.annotate(
                f"{total:.3g}", (place, total), (0, 3), textcoords="offset points", ha="center"
            )
        top = max(below)
        # A limit far above the bars would leave them flat.
        if limit <= 3 * top:
            axes.axhline(limit, color="#c92a2a", linewidth=1.2)
            axes.annotate(
                limit_name, (1, limit), (0, 3), ("axes fraction", "data"), "offset points",
                ha="right", color="#c92a2a",
            )  # fmt: skip
            top = max(top, limit)
        axes.set_ylim(0, top * 1.15)
        axes.set_ylabel(ylabel)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return _figure(draw)
