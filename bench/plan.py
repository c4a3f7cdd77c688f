"""The planner beside what it predicts: peak memory and time of a step, trained in its own process.

Models are real configurations with random weights. The process is measured from before its model is
built, after a tiny model has loaded its code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .declare import Options
from .records import Record, make
from .worker import run_worker

NAME = "plan"
TIMEOUT = 900

# Published configurations.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Llama-2-13B": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120,
        "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One configuration that is predicted and trained. further: ranks of more adapters of the job,
    with a batch each."""

    model: str
    batch: int
    length: int
    policy: str = "none"
    method: str = "lora"
    optim: str = "AdamW"
    r: int = 16
    dropout: float = 0.0
    further: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        ranks = ", ".join(map(str, (self.r, *self.further)))
        what = self.method if self.method == "full" else f"{self.method} r={ranks}"
        dropout = f" dropout {self.dropout}" if self.dropout else ""
        return f"{self.model} {what}{dropout} {self.optim} {self.batch}x{self.length} {self.policy}"


CPU_RUNS = (
    Run("SmolLM2-135M", 4, 512),
    Run("SmolLM2-135M", 4, 512, "lora"),
    Run("SmolLM2-135M", 4, 512, "attention"),
    Run("SmolLM2-135M", 4, 512, "full"),
    Run("SmolLM2-135M", 1, 2048, "lora"),
    Run("SmolLM2-135M", 2, 512, "none", r=64, dropout=0.05),
    Run("SmolLM2-135M", 1, 512, "attention", further=(8, 32)),
    Run("SmolLM2-135M", 1, 512, "none", "full"),
    Run("SmolLM2-135M", 2, 512, "full", "full", "AdamW8bit"),
    Run("Qwen2.5-0.5B", 2, 512),
    Run("Qwen2.5-0.5B", 4, 512, "attention"),
    Run("Qwen2.5-0.5B", 1, 512, "lora", "full", "Lion"),
    Run("Llama-3.2-1B", 1, 512),
    Run("Llama-3.2-1B", 2, 512, "lora"),
    Run("Llama-3.2-1B", 1, 1024, "full", r=8),
)
_GPU_SIZES = ((1, 2048), (4, 2048), (1, 16384))
_GPU_POLICIES = ("lora", "attention", "full", "offload")
GPU_RUNS = (
    Run("Llama-2-13B", 4, 1024, "lora"),
    *(Run("Llama-3.1-8B", *size, policy) for size in _GPU_SIZES for policy in _GPU_POLICIES),
)


def run(options: Options, emit: Callable[[Record], None]) -> list[Record]:
    """Predicts and trains each configuration; a record each of bytes and seconds."""
    from fastft.memory.ceilings import measure
    from fastft.train.config import TrainConfig
    from fastft.train.plan import Planner
    from fastft.train.plan_device import device_of
    from fastft.train.plan_model import Request

    records: list[Record] = []
    ceilings = measure(options.device, str(options.device), options.dtype)
    device = device_of(str(options.device))
    runs = CPU_RUNS if options.device.type == "cpu" else GPU_RUNS
    if options.quick:
        runs = runs[:2]
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        for case in runs:
            place = Path(folder) / case.model
            place.mkdir(exist_ok=True)
            (place / "config.json").write_text(json.dumps(MODELS[case.model]))
            cfg = TrainConfig(
                model=str(place), r=case.r, lora_alpha=2 * case.r, lora_dropout=case.dropout,
                optim=case.optim, dtype=options.dtype_name,
                per_device_train_batch_size=case.batch, max_length=case.length,
            )  # fmt: skip
            others = tuple(cfg.replace(r=r, lora_alpha=2 * r) for r in case.further)
            request = Request(cfg, case.method, case.policy, others=others)
            predicted = Planner(request, device, ceilings).predict()
            job = {
                "cfgs": [each.to_dict() for each in request.cfgs],
                "method": case.method, "policy": case.policy,
                "device": str(options.device), "dtype": options.dtype_name,
                "steps": options.steps, "threads": torch.get_num_threads(),
            }  # fmt: skip
            measured, reason = _trained(job)
            pairs = (
                ("peak_bytes", "bytes", predicted.peak, measured.get("peak_bytes")),
                ("step_seconds", "s", predicted.seconds, measured.get("step_seconds")),
            )
            for metric, unit, expected, found in pairs:
                for impl, value in (("predicted", expected), ("measured", found)):
                    record = make(
                        options, NAME, case.name, impl, metric, value, unit, False,
                        reason=reason if value is None else None,
                    )  # fmt: skip
                    records.append(record)
                    emit(record)
    return records


def _trained(job: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    try:
        return run_worker("plan_worker", job, TIMEOUT), None
    except RuntimeError as error:
        return {}, str(error)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: predictions beside measurements, from the suite's JSON lines."""
    cases: dict[str, dict[tuple[str, str], float]] = {}
    for line in lines:
        if line["suite"] == NAME and line["value"] is not None:
            cases.setdefault(line["case"], {})[line["impl"], line["metric"]] = line["value"]
    rows = [
        "| run | predicted | measured | | predicted | measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in cases.items():
        if len(found) < 4:
            continue
        cells = [name]
        for metric, unit, scale, digits in (
            ("peak_bytes", "MB", 1e6, 0), ("step_seconds", "s", 1, 2),
        ):  # fmt: skip
            expected, real = found["predicted", metric], found["measured", metric]
            cells += [f"{v / scale:.{digits}f} {unit}" for v in (expected, real)]
            cells.append(f"{expected / real - 1:+.1%}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
