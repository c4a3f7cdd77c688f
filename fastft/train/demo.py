"""``fastft demo``: the same fine-tuning with plain PEFT and with fastft, one after the other, each
in a process of its own, from the same seed over the same batches, and a report at the end."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastft.errors import ConfigError, FastftError
from fastft.files import write_text
from fastft.train.config import DEFAULT_DATA, DEFAULT_MODEL, TrainConfig

__all__ = [
    "SIDES",
    "DemoSettings",
    "SideRecord",
    "View",
    "read_report",
    "run_demo",
    "shell_command",
]

# PEFT in its default mode goes first, then fastft.
SIDES = ("peft", "fastft")

# 1,024 tokens a step and 22 steps: on two cores without bfloat16 plain PEFT takes about two and a
# half minutes for it. Most documented functions of the standard library fit in 128 tokens.
BATCH, LENGTH, STEPS = 8, 128, 22
EVAL_EXAMPLES = 32
# Two dozen steps of eight examples: a short run bears a larger rate than the customary 2e-4.
LEARNING_RATE = 1e-3
# On a slow or busy machine the default run ends early: plain PEFT after so many seconds, fastft
# after as many steps. Thus the whole demo stays under eight minutes.
TRAIN_SECONDS = 180.0
# The first steps fill caches and allocate; they do not count for the throughput.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class DemoSettings:
    """What the command line may change."""

    model: str = DEFAULT_MODEL
    data: str = DEFAULT_DATA
    out: Path = Path("out/demo")
    steps: int = STEPS
    train_seconds: float | None = TRAIN_SECONDS
    batch: int = BATCH
    length: int = LENGTH
    learning_rate: float = LEARNING_RATE
    dtype: str = "auto"
    seed: int = 42
    command: str = ""


@dataclass
class SideRecord:
    """All events of one side, as they came."""

    name: str
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "step"]

    def find(self, kind: str) -> dict[str, Any]:
        """The event of that kind, or an empty one."""
        return next((event for event in self.events if event["event"] == kind), {})


class View(Protocol):
    """Shows a demo as it goes."""

    def notice(self, text: str) -> None: ...

    def event(self, side: str, event: dict[str, Any]) -> None: ...


def side_config(settings: DemoSettings, side: str, model: str, data: dict[str, Any]) -> TrainConfig:
    """The run of one side; the two differ in ``fused`` and in where they write."""
    return TrainConfig(
        model=model,
        output_dir=str(settings.out / side),
        max_length=settings.length,
        overlong="drop",
        padding="max_length",
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        max_steps=settings.steps,
        max_eval_samples=EVAL_EXAMPLES,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(WARMUP_STEPS, settings.steps - 1),
        dtype=settings.dtype,  # type: ignore[arg-type]
        seed=settings.seed,
        logging_steps=1,
        save_steps=0,
        fused=side == "fastft",
        **data,
    )


def run_demo(settings: DemoSettings, view: View) -> Path:
    """Runs both sides and writes ``report.html`` and ``report.json`` to ``settings.out``.

    Returns the path of the HTML. Raises ``FastftError``, whatever went wrong in a side included.
    """
    from fastft.train.report import write_report

    started = time.perf_counter()
    if settings.steps < 2:
        raise ConfigError("fastft demo", "--steps", expected="at least 2", got=str(settings.steps))
    _check_out(settings.out)
    model = _model_folder(settings, view)
    data = _data_files(settings, view)
    records = [SideRecord(name) for name in SIDES]
    for record in records:
        cfg = side_config(settings, record.name, model, data)
        first = record is records[0]
        task = {
            "config": cfg.to_dict(),
            "sample": record is records[-1],
            "stop_steps": None if first else len(records[0].steps),
            "stop_seconds": settings.train_seconds if first else None,
        }
        view.event(record.name, {"event": "start"})
        for event in run_side(task, record.name, settings.out):
            record.events.append(event)
            view.event(record.name, event)
        view.event(record.name, {"event": "end"})
    seconds = time.perf_counter() - started
    return write_report(records, settings, seconds)


def _check_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".fastft-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            "fastft demo",
            "--out",
            expected="a folder that can be written",
            got=f"{str(out)!r}: {error.strerror or error}",
        ) from error


def _model_folder(settings: DemoSettings, view: View) -> str:
    if settings.model != DEFAULT_MODEL:
        return settings.model
    from fastft.train.models import obtain_default_model

    # Once here, so that the workers find it in the cache.
    return str(obtain_default_model(say=view.notice))


def _data_files(settings: DemoSettings, view: View) -> dict[str, Any]:
    """The default set is built once and given to both sides as files."""
    if settings.data != DEFAULT_DATA:
        return {"data": settings.data}
    from fastft.train.stdlib_data import messages_of, split_items, stdlib_items

    view.notice("building the data set from the Python standard library")
    splits = split_items(stdlib_items())
    folder = settings.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for split, items in splits.items():
        path = paths[split] = folder / f"{split}.jsonl"
        lines = [
            json.dumps({"messages": messages_of(i), "module": i.module, "name": i.name})
            for i in items
        ]
        write_text(path, "\n".join(lines) + "\n")
    sizes = ", ".join(f"{len(items)} {split}" for split, items in splits.items())
    view.notice(f"{sum(map(len, splits.values()))} documented functions: {sizes}; split by module")
    return {"data": str(paths["train"]), "eval_data": str(paths["test"])}


def run_side(task: dict[str, Any], name: str, out: Path) -> Iterator[dict[str, Any]]:
    """Starts the worker on ``task`` (see ``fastft.train.worker``) and yields its events; its
    stderr goes to ``<out>/<name>.log``."""
    log_path = out / f"{name}.log"
    with log_path.open("w", encoding="utf-8") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastft.train.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
        )
        problem: str | None = None
        try:
            if worker.stdin is None or worker.stdout is None:
                raise OSError("no pipe to the worker")
            worker.stdin.write(json.dumps(task))
            worker.stdin.close()
            for line in worker.stdout:
                event = json.loads(line)
                if event["event"] == "error":
                    problem = event["text"]
                yield event
            code = worker.wait()
        finally:
            # Ctrl-C, or a reader that stopped: no worker is left behind.
            if worker.poll() is None:
                worker.terminate()
                worker.wait()
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise _failure(name, code, problem, log_path)


def _failure(name: str, code: int, problem: str | None, log_path: Path) -> FastftError:
    if problem is None:
        lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        killed = " (killed: often too little memory)" if code == -9 else ""
        problem = f"exit code {code}{killed}" + (f": {lines[-1]}" if lines else "")
    return FastftError(
        "fastft demo",
        name,
        expected="a run to its end",
        got=problem.rstrip("."),
        remedy=f"All it said is in {log_path}.",
    )


def shell_command(arguments: list[str]) -> str:
    """The command line as one could type it again, from the arguments after the program's name."""
    return shlex.join(["fastft", *arguments])


def read_report(page: Path) -> dict[str, Any]:
    """The figures beside ``report.html``."""
    report: dict[str, Any] = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return report
