"""Full fine-tuning by optimizers that keep less than float32, beside float32 AdamW.

Every parameter of SmolLM2-135M trains on the same batches of real text. The loss of an optimizer
is its mean over the last tenth of the steps; its difference is relative to float32 AdamW's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from . import e2e_worker as worker
from .curves import text
from .declare import Options
from .records import Record, make

NAME = "full"
LR, MAX_NORM = 2e-5, 1.0
# impl -> dtype of the parameters, optimizer, its options; the first is what others are held to.
IMPLS: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "torch float32": (torch.float32, "torch.AdamW", {}),
    "fastft float32": (torch.float32, "AdamW", {}),
    "fastft 8-bit": (torch.float32, "AdamW8bit", {}),
    "fastft 8-bit bfloat16": (torch.bfloat16, "AdamW8bit", {}),
    "fastft bfloat16": (torch.bfloat16, "AdamWBF16", {}),
    "fastft bfloat16 kahan": (torch.bfloat16, "AdamWBF16", {"kahan": True}),
    "fastft bfloat16 nearest": (torch.bfloat16, "AdamW", {}),
}


def run(options: Options, emit: Callable[[Record], None]) -> list[Record]:
    """Trains once by each optimizer and hands its records to `emit`."""
    from .e2e import _model

    folder, model_name = _model(options)
    batch, tokens = min(options.batch, 2), min(options.tokens, 128)
    case = f"{model_name} full {batch}x{tokens}, {options.steps} steps"
    records: list[Record] = []

    def out(impl: str, metric: str, value: float, unit: str, **more: Any) -> None:
        record = make(options, NAME, case, impl, metric, value, unit, False, **more)
        records.append(record)
        emit(record)

    ids = text(folder, batch, tokens, options.steps)
    last = max(1, options.steps // 10)
    expected: float | None = None
    for impl in IMPLS:
        if expected is not None and options.left_out(impl):
            continue
        losses, state_bytes = curve(options, folder, ids, impl)
        end = float(losses[-last:].mean())
        expected = end if expected is None else expected
        out(impl, "last_losses", end, "nats", detail={"losses": losses.tolist()})
        out(impl, "loss_difference", end / expected - 1, "relative")
        out(impl, "state_bytes_per_param", state_bytes, "bytes")
    return records


def curve(
    options: Options, folder: str, ids: list[torch.Tensor], impl: str
) -> tuple[torch.Tensor, float]:
    """The loss of every step, float64 (steps,), and the bytes of state a parameter."""
    from fastft import optim

    dtype, kind, more = IMPLS[impl]
    model = worker.load(folder, dtype, options.device)
    model.requires_grad_(True)
    params = list(model.parameters())
    if kind == "torch.AdamW":
        optimizer: Any = torch.optim.AdamW(params, lr=LR)
    else:
        optimizer = getattr(optim, kind)(params, lr=LR, max_grad_norm=MAX_NORM, **more)
    losses = []
    for number, batch in enumerate(ids):
        batch = batch.to(options.device)
        mixed = dtype == torch.float32 and options.dtype == torch.bfloat16
        with torch.autocast(options.device.type, torch.bfloat16, enabled=mixed):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if kind == "torch.AdamW":
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if sys.stderr.isatty():
            print(f"\r{impl} {number + 1}/{len(ids)} {losses[-1]:.4f}", end="", file=sys.stderr)
    held = {id(t): t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)}
    total = sum(t.numel() * t.element_size() for t in held.values())
    return torch.tensor(losses, dtype=torch.float64), total / sum(p.numel() for p in params)
