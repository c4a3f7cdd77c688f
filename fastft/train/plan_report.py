"""What ``fastft plan`` says: every policy beside the device's memory, the cheapest that fits, the
largest batch and sequence, and what to change where nothing fits."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import ConfigError, FastftError
from fastft.files import write_text
from fastft.memory.ceilings import Ceilings
from fastft.memory.devices import Device
from fastft.train.config import TrainConfig
from fastft.train.plan import Planner, Prediction
from fastft.train.plan_model import OPTIMIZERS, Request

__all__ = ["Report", "changes", "picture", "report", "room", "show"]

# Of a GPU's memory: the rest is CUDA's context and what its caching allocator cannot use.
_SHARE = {"cuda": 0.93, "cpu": 0.95}
# Names of the parts of the peak, and their colours.
PARTS = {
    "weights": "#0b7285",
    "gradients": "#f08c00",
    "optimizer": "#ae3ec9",
    "activations": "#2f9e44",
    "workspace": "#8a8f98",
}
_SHORT = ("weights", "grads", "states", "activ.", "work")


def room(device: Device) -> int:
    """Bytes of a device that a run may use."""
    return int(device.memory * _SHARE[device.type])


@dataclass(frozen=True)
class Report:
    """The plan of one request.

    Attributes:
        rows: a prediction for each policy.
        chosen: the fastest whose peak fits; None where none does.
        largest_batch, largest_length: under the chosen policy, the other as asked; of each
            adapter, where there are several.
        remedies: single changes that make it fit, where nothing does, each with its peak.
        hours: of ``examples`` sequences ``epochs`` times, under the chosen policy.
        notes: what was taken otherwise than it is.
    """

    request: Request
    device: Device
    ceilings: str
    room: int
    rows: list[Prediction]
    chosen: Prediction | None
    largest_batch: int | None
    largest_length: int | None
    remedies: list[tuple[str, int]]
    hours: float | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, bytes and seconds."""

        def plain(row: Prediction) -> dict[str, Any]:
            return {**dataclasses.asdict(row), "tokens_per_s": row.tokens_per_s}

        cfg = self.request.cfg
        return {
            "model": cfg.model,
            "method": self.request.method,
            "optim": self.request.optim_of(cfg),
            "adapters": len(self.request.cfgs),
            "device": self.device.name,
            "gpus": self.request.gpus,
            "memory": self.device.memory,
            "room": self.room,
            "rates": self.ceilings,
            "policies": [plain(row) for row in self.rows],
            "chosen": self.chosen.policy if self.chosen else None,
            "largest_batch": self.largest_batch,
            "largest_length": self.largest_length,
            "remedies": [{"change": what, "peak": peak} for what, peak in self.remedies],
            "hours": self.hours,
            "notes": self.notes,
        }


def report(
    request: Request,
    device: Device,
    ceilings: Ceilings | None = None,
    examples: int | None = None,
    epochs: float = 1.0,
) -> Report:
    """Predicts every policy and what follows from it."""
    if not (epochs > 0 and math.isfinite(epochs)):
        raise ConfigError("fastft plan", "epochs", expected="a number above 0", got=str(epochs))
    planner = Planner(request, device, ceilings)
    request = planner.request
    rows = [planner.predict(policy) for policy in planner.policies]
    allowed = room(device)
    fitting = [row for row in rows if row.peak <= allowed]
    chosen = min(fitting, key=lambda row: row.seconds, default=None)
    batch = length = hours = None
    remedies: list[tuple[str, int]] = []
    if chosen is None:
        remedies = changes(request, device, allowed)
    else:
        most = planner.largest(allowed, chosen.policy, "batch")
        longest = planner.largest(allowed, chosen.policy, "length")
        batch = most.batch // len(request.cfgs) if most else None
        length = longest.length if longest else None
        if examples is not None:
            tokens = examples * epochs * chosen.length
            hours = tokens / chosen.tokens_per_s / request.gpus / 3600
    source = "measured on this machine" if ceilings else device.source
    return Report(
        request,
        device,
        source,
        allowed,
        rows,
        chosen,
        batch,
        length,
        remedies,
        hours,
        planner.notes,
    )


def changes(
    request: Request, device: Device, allowed: int, policy: str | None = None
) -> list[tuple[str, int]]:
    """Single changes to a run that make it fit under ``policy``; None: under the best."""
    cfg = request.cfg
    length = max(c.max_length for c in request.cfgs)
    tried: list[tuple[str, Request]] = []

    def with_cfg(what: str, **new: Any) -> None:
        tried.append((what, request.each(lambda _: new)))

    if any(c.per_device_train_batch_size > 1 for c in request.cfgs):

        def by_ones(c: TrainConfig) -> dict[str, Any]:
            steps = c.gradient_accumulation_steps * c.per_device_train_batch_size
            return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}

        single = request.each(by_ones)
        steps = ", ".join(str(c.gradient_accumulation_steps) for c in single.cfgs)
        what = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {steps}"
        tried.append((what, single))
    narrow = f"{request.optim_of(cfg)}8bit"
    if narrow in OPTIMIZERS and request.method == "full":
        tried.append((f"optim: {narrow}", dataclasses.replace(request, optim=narrow)))
    movable = device.type == "cuda" and not request.keeps_matrices_whole
    alone = movable and request.gpus == 1  # states of shards stay on their device
    if alone and cfg.optim_states == "device" and request.method == "full":
        with_cfg("optim_states: host", optim_states="host")
    if length > 512:
        with_cfg(f"max_length: {length // 2}", max_length=length // 2)
    if request.method == "full":
        tried.append(("method lora", dataclasses.replace(request, method="lora")))
    if request.method == "lora" and device.type == "cuda":
        with_cfg("load_in_4bit: true", load_in_4bit=True)
    if request.method == "full" and device.type == "cuda" and not request.others:
        tried.append(("method qlora", dataclasses.replace(request, method="qlora")))
    for gpus in (2, 4, 8):
        shared = movable and cfg.optim_states != "host" and not request.others
        if shared and gpus > request.gpus:
            tried.append((f"{gpus} GPUs", dataclasses.replace(request, gpus=gpus)))
    found = []
    for what, other in tried:
        planner = Planner(other, device)
        tested = (policy,) if policy else planner.policies[-2:]
        peak = min(planner.predict(p).peak for p in tested)
        if peak <= allowed:
            found.append((what, peak))
    return found


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def show(found: Report, console: Any = None) -> None:
    """The report as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    request, cfg = found.request, found.request.cfg
    first = found.rows[0]
    ranks = ", ".join(str(c.r) for c in request.cfgs)
    what = request.method if request.method == "full" else f"{request.method} r={ranks}"
    gpus = f"{request.gpus} x " if request.gpus > 1 else ""
    console.print(
        f"{cfg.model}: {first.parameters / 1e6:,.0f} M parameters, {first.trainable / 1e6:,.1f} M "
        f"trained ({what}, {request.optim_of(cfg)}); {first.batch} x {first.length} tokens on "
        f"{gpus}{found.device.name}, {_size(found.device.memory)}; rates: {found.ceilings}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(
        title="GB on each device", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("policy")
    offloads = any(row.host for row in found.rows)
    for name in (*_SHORT, "peak", *(["host"] if offloads else []), "", "tokens/s"):
        table.add_column(name, justify="right")
    for row in found.rows:
        fits = row.peak <= found.room
        table.add_row(
            row.policy,
            *(f"{getattr(row, part) / 1e9:.2f}" for part in PARTS),
            f"{row.peak / 1e9:.2f}",
            *([f"{row.host / 1e9:.2f}"] if offloads else []),
            "[green]fits[/green]" if fits else "[red]no[/red]",
            f"{row.tokens_per_s * request.gpus:,.0f}",
        )
    console.print(table)
    for line in advice(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def advice(found: Report) -> list[str]:
    """What the table comes to, in sentences."""
    if found.chosen is None:
        least = min(row.peak for row in found.rows)
        lines = [f"Nothing fits: {_size(least)} at least, {_size(found.room)} can be used."]
        lines += [f"It fits with {what}: {_size(peak)}." for what, peak in found.remedies]
        if not found.remedies:
            lines.append("No single change makes it fit: a smaller model, or several of these.")
        return [*lines, *found.notes]
    chosen = found.chosen
    each = " of each adapter" if found.request.others else ""
    lines = [
        f"Fastest that fits: {chosen.policy}. With it the batch{each} can be "
        f"{found.largest_batch}, or the sequence {found.largest_length} tokens."
    ]
    if found.hours is not None:
        lines.append(f"The whole run: {found.hours:.1f} hours.")
    return [*lines, *found.notes]


def picture(found: Report, path: Path) -> None:
    """Stacked bars of the peak under each policy, and the device's memory, as an SVG."""
    from fastft.train.charts import stacked_bars

    bars = {row.policy: {part: getattr(row, part) / 1e9 for part in PARTS} for row in found.rows}
    limit = found.device.memory / 1e9
    svg = stacked_bars(bars, PARTS, "GB at the peak", limit, found.device.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, svg)
    except OSError as error:
        raise FastftError(
            "fastft plan",
            "picture",
            expected="a path that can be written",
            got=f"{path}: {error.strerror}",
        ) from error
