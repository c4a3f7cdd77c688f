"""From the recorded events of both sides to ``report.json`` and one self-contained
``report.html``."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import platform
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from fastft.errors import FastftError
from fastft.files import write_text
from fastft.train.charts import bar_chart, line_chart
from fastft.train.demo import SIDES, WARMUP_STEPS, DemoSettings, SideRecord
from fastft.train.machine import package_version
from fastft.train.report_page import PAGE

__all__ = ["make_report", "write_report"]

# Environment variables that change how fast or how large a run is.
SPEED_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "CUDA_", "PYTORCH_", "TRITON_")
PACKAGES = ("fastft", "torch", "triton", "transformers", "peft", "accelerate", "datasets")


def make_report(
    records: list[SideRecord], settings: DemoSettings, seconds: float
) -> dict[str, Any]:
    """The figures, ready for JSON. Everything in it was measured in the run or is a setting."""
    sides = {record.name: record for record in records}
    for name in SIDES:
        if name not in sides or not sides[name].steps or not sides[name].find("trained"):
            raise FastftError("report", name, expected="the events of a whole run", got="too few")
    losses = {name: [step["loss"] for step in sides[name].steps] for name in SIDES}
    fused = sides["fastft"]
    modules = (fused.find("trained").get("explanation") or {}).get("modules", [])
    evaluated = {name: sides[name].find("evaluated") for name in SIDES}
    before, after = evaluated["fastft"].get("before"), evaluated["fastft"].get("after")
    loaded = fused.find("loaded")
    return {
        "tokens_per_s": {name: _throughput(sides[name].steps) for name in SIDES},
        "peak_extra_bytes": {name: sides[name].find("trained")["extra_bytes"] for name in SIDES},
        "loss": losses,
        "loss_max_rel_diff": _max_rel_diff(losses["peft"], losses["fastft"]),
        "eval_loss": {
            "before": before,
            "after": after,
            "after_peft": evaluated["peft"].get("after"),
        },
        "perplexity": {"before": _exp(before), "after": _exp(after)},
        "adapter_reload_max_diff": fused.find("saved").get("reload_max_diff"),
        "fused_modules": sum(bool(module["fused"]) for module in modules),
        "fallback_modules": sum(not module["fused"] for module in modules),
        "fallback_reasons": dict(
            Counter(str(module["reason"]) for module in modules if not module["fused"])
        ),
        "fallback_calls": (fused.find("trained").get("explanation") or {})
        .get("calls", {})
        .get("fallback", {}),
        "same_batches": _digests(sides["peft"]) == _digests(fused),
        "sample": {k: v for k, v in fused.find("sampled").items() if k != "event"},
        "steps": {
            name: [{"tokens": s["tokens"], "seconds": s["seconds"]} for s in sides[name].steps]
            for name in SIDES
        },
        "train_seconds": {name: sides[name].find("trained")["seconds"] for name in SIDES},
        "seconds": seconds,
        "memory_method": fused.find("trained").get("memory_method"),
        "device": loaded.get("device"),
        "dtype": loaded.get("dtype"),
        "parameters": loaded.get("parameters"),
        "trainable_parameters": loaded.get("trainable"),
        "train_examples": loaded.get("train_examples"),
        "eval_examples": loaded.get("eval_examples"),
        "notes": loaded.get("notes", []),
        "settings": {
            "model": settings.model,
            "data": settings.data,
            "steps": settings.steps,
            "batch": settings.batch,
            "length": settings.length,
            "learning_rate": settings.learning_rate,
            "seed": settings.seed,
            "warmup_steps_not_timed": _untimed(len(losses["fastft"])),
        },
        "command": settings.command,
        "versions": {"python": platform.python_version(), **_versions()},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(SPEED_VARIABLES)
        },
    }


def write_report(records: list[SideRecord], settings: DemoSettings, seconds: float) -> Path:
    """Writes both files to ``settings.out``, each renamed into place; returns the HTML's path."""
    report = make_report(records, settings, seconds)
    page = settings.out / "report.html"
    _replace(settings.out / "report.json", json.dumps(report, indent=2) + "\n")
    _replace(page, render_html(report))
    return page


def _replace(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise FastftError(
            "report", str(path), expected="a file that can be written", got=str(error)
        ) from error


def _untimed(steps: int) -> int:
    """Warm-up steps left out of the throughput: at least one step is always timed."""
    return min(WARMUP_STEPS, steps - 1)


def _throughput(steps: list[dict[str, Any]]) -> float:
    """Median over the steps after the warm-up of tokens / seconds."""
    timed = steps[_untimed(len(steps)) :]
    return statistics.median(step["tokens"] / step["seconds"] for step in timed)


def _max_rel_diff(a: list[float], b: list[float]) -> float:
    """max |a_i - b_i| / |a_i|."""
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in zip(a, b, strict=True))


def _exp(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None else None


def _digests(record: SideRecord) -> list[str]:
    return [step["batch_sha256"] for step in record.steps]


def _versions() -> dict[str, str | None]:
    return {name: package_version(name) for name in PACKAGES}


def render_html(report: dict[str, Any]) -> str:
    """The page: no script, no outside reference, figures as data URIs."""
    speed, memory = report["tokens_per_s"], report["peak_extra_bytes"]
    rates = {side: [s["tokens"] / s["seconds"] for s in report["steps"][side]] for side in SIDES}
    skipped = report["settings"]["warmup_steps_not_timed"]
    charts = {
        "chart_loss": line_chart(report["loss"], "training loss"),
        "chart_speed": line_chart(rates, "tokens/s", from_zero=True, skip=skipped),
        "chart_memory": bar_chart(
            {side: memory[side] / 2**20 for side in SIDES},
            "peak extra memory, MB",
            lambda v: f"{v:,.0f}",
        ),
    }
    values = {name: _image(svg) for name, svg in charts.items()}
    values |= {
        "headline": _headline(report),
        "figures": _figures_table(report),
        "sample": _sample(report["sample"]),
        "fused": _fused_text(report),
        "facts": _facts_table(report),
        "command": html.escape(report["command"]),
        "skipped": str(skipped),
        "memory_how": html.escape(_memory_how(report["memory_method"])),
        "speed_peft": f"{speed['peft']:,.0f}",
        "speed_fastft": f"{speed['fastft']:,.0f}",
        "examples": f"{report['eval_examples']:,}",
        "tokens": f"{report['steps']['fastft'][0]['tokens']:,}",
    }
    # One pass: a value that looks like a mark (it may hold anyone's code) stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], PAGE)


def _image(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _headline(report: dict[str, Any]) -> str:
    speed, memory = report["tokens_per_s"], report["peak_extra_bytes"]
    text = f"fastft trained at {speed['fastft'] / speed['peft']:.2f} times the speed of plain PEFT"
    if memory["peft"]:
        text += f", with {memory['fastft'] / memory['peft']:.2f} times its extra memory"
    same = "the same batches" if report["same_batches"] else "DIFFERENT batches"
    return html.escape(
        f"{text}, from the same seed over {same}; their losses differ by at most "
        f"{report['loss_max_rel_diff']:.1e} (relative)."
    )


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "not measured"


def _figures_table(report: dict[str, Any]) -> str:
    held, memory = report["eval_loss"], report["peak_extra_bytes"]
    base = _number(held["before"], ".4f")
    rows = [
        ("", "before", "PEFT", "fastft"),
        (
            "tokens/s, median of the timed steps",
            "",
            *(f"{report['tokens_per_s'][s]:,.1f}" for s in SIDES),
        ),
        ("peak extra memory, MB", "", *(f"{memory[s] / 2**20:,.0f}" for s in SIDES)),
        ("training loss, last step", "", *(f"{report['loss'][s][-1]:.4f}" for s in SIDES)),
        ("held-out loss", base, _number(held["after_peft"], ".4f"), _number(held["after"], ".4f")),
        (
            "held-out perplexity",
            _number(report["perplexity"]["before"], ".2f"),
            _number(_exp(held["after_peft"]), ".2f"),
            _number(report["perplexity"]["after"], ".2f"),
        ),
        ("training time, seconds", "", *(f"{report['train_seconds'][s]:.1f}" for s in SIDES)),
    ]
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    for first, *cells in body:
        tail = "".join(f"<td>{html.escape(c)}</td>" for c in cells)
        lines.append(f"<tr><th>{html.escape(first)}</th>{tail}</tr>")
    return "\n".join(lines)


def _sample(sample: dict[str, str]) -> str:
    if not sample:
        return "<p>The data has no held-out example.</p>"
    parts = []
    for key, title in (
        ("prompt", "Asked"),
        ("before", "Answer before"),
        ("after", "Answer after"),
        ("reference", "What its author wrote"),
    ):
        parts.append(f"<h3>{title}</h3><pre>{html.escape(sample[key]) or '(nothing)'}</pre>")
    return "\n".join(parts)


def _fused_text(report: dict[str, Any]) -> str:
    lines = [f"{report['fused_modules']} modules ran fused, {report['fallback_modules']} did not."]
    for reason, count in report["fallback_reasons"].items():
        lines.append(f"{count} not fused: {reason}.")
    for reason, count in report["fallback_calls"].items():
        lines.append(f"{count} calls fell back: {reason}.")
    return "<br>".join(html.escape(line) for line in lines)


def _memory_how(method: str | None) -> str:
    return {
        "torch.cuda.max_memory_allocated": "torch's peak of allocated GPU memory, less what was "
        "allocated after loading",
        "VmHWM": "the process's peak resident size during training (VmHWM), less its resident "
        "size after loading",
        "getrusage": "the process's lifetime peak resident size (getrusage), less its resident "
        "size after loading",
    }.get(method or "", "not known")


def _facts_table(report: dict[str, Any]) -> str:
    settings = report["settings"]
    facts = {
        "device": report["device"],
        "model": f"{settings['model']} ({report['parameters']:,} parameters, "
        f"{report['trainable_parameters']:,} of them trained), {report['dtype']}",
        "data": f"{settings['data']}: {report['train_examples']:,} training and "
        f"{report['eval_examples']:,} held-out examples used",
        "schedule": f"{len(report['loss']['fastft'])} steps "
        f"(planned: {settings['steps']}) of {settings['batch']} x {settings['length']} "
        f"tokens, learning rate {settings['learning_rate']:g}, seed {settings['seed']}",
        "adapter read back": f"largest difference of logits "
        f"{_number(report['adapter_reload_max_diff'], 'g')}",
        "versions": ", ".join(
            f"{name} {version}" for name, version in report["versions"].items() if version
        ),
        "environment": ", ".join(f"{k}={v}" for k, v in report["environment"].items())
        or "no setting that matters",
        "whole demo": f"{report['seconds']:.0f} seconds",
        "left out": "; ".join(report["notes"]) or "nothing",
    }
    return "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
