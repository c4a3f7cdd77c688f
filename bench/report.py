"""Records as a table for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .records import Record


def show(records: Iterable[Record], console: Console) -> None:
    """One table a suite: a row for each case and implementation, a column for each metric."""
    by_suite: dict[str, list[Record]] = {}
    for record in records:
        by_suite.setdefault(record.suite, []).append(record)
    for suite, found in by_suite.items():
        console.print(_table(suite, found))
        _show_absent(found, console)


def _table(suite: str, records: list[Record]) -> Table:
    first = records[0]
    dtypes = ", ".join(dict.fromkeys(record.dtype for record in records))
    table = Table(
        title=f"{suite}: {first.device}, {dtypes}, {first.threads} threads, "
        f"median of {first.rounds} rounds",
        title_justify="left",
    )
    metrics = list(dict.fromkeys(r.metric for r in records if r.value is not None))
    table.add_column("case")
    table.add_column("impl")
    for metric in metrics:
        table.add_column(metric, justify="right")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        if record.value is not None:
            rows.setdefault((record.case, record.impl), {})[record.metric] = _number(record)
    previous = None
    for (case, impl), row in rows.items():
        if previous is not None and previous != case:
            table.add_section()
        cells = [row.get(metric, "") for metric in metrics]
        table.add_row("" if previous == case else case, impl, *cells)
        previous = case
    return table


def _show_absent(records: list[Record], console: Console) -> None:
    """Names every implementation that has no number, each reason once."""
    absent: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.value is None:
            absent.setdefault((record.impl, record.reason or ""), []).append(record.case)
    everywhere = len({record.case for record in records})
    for (impl, reason), cases in absent.items():
        where = "" if len(cases) == everywhere else f" ({', '.join(cases)})"
        console.print(f"no number for {impl}{where}: {reason}", highlight=False, markup=False)


def _number(record: Record) -> str:
    value = record.value or 0.0
    if record.unit == "bytes" and record.metric.startswith("peak"):
        return f"{value / 2**20:,.1f} MiB"
    if record.unit == "fraction":
        return f"{value:+.1%}"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
