"""Loss curves of fastft and of PEFT, beside what rounding alone does to PEFT's own.

The same 100 steps of SmolLM2-135M on real text, four times: PEFT, PEFT on a model whose hidden and
intermediate features are permuted (the same function, its sums in another order), twice, and
fastft. Two curves differ by the root mean square over the steps of their relative difference.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import e2e_worker as worker
from .declare import Options
from .peers import missing
from .records import Record, make

NAME = "curves"
# Modules by what their weight's rows (out) and columns (in) stand for.
READS_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITES_HIDDEN = ("o_proj", "down_proj")
WRITES_INNER, READS_INNER = ("gate_proj", "up_proj"), ("down_proj",)
PERMUTATIONS = 2


def run(options: Options, emit: Callable[[Record], None]) -> list[Record]:
    """Trains four times and hands its records to `emit`."""
    from .e2e import _model

    folder, model_name = _model(options)
    batch, tokens = min(options.batch, 2), min(options.tokens, 128)
    case = f"{model_name} r=16 all-linear {batch}x{tokens}, {options.steps} steps"
    records: list[Record] = []

    def out(impl: str, metric: str, value: float | None, unit: str, **more: Any) -> None:
        record = make(options, NAME, case, impl, metric, value, unit, False, **more)
        records.append(record)
        emit(record)

    reason = missing("peft")
    if reason is not None:
        out("fastft", "loss_difference", None, "relative", reason=reason)
        return records
    ids = text(folder, batch, tokens, options.steps)
    plain = curve(options, folder, ids, fused=False)
    others = {
        f"peft permuted {seed}": curve(options, folder, ids, fused=False, permutation=seed)
        for seed in range(1, PERMUTATIONS + 1)
    }
    others["fastft"] = curve(options, folder, ids, fused=True)
    for impl, losses in others.items():
        relative = (losses - plain).abs() / plain
        detail = {"losses": losses.tolist(), "peft_losses": plain.tolist()}
        rms = float(relative.square().mean().sqrt())
        out(impl, "loss_difference", rms, "relative", detail=detail)
        out(impl, "largest_loss_difference", float(relative.max()), "relative")
    return records


def text(folder: str, batch: int, tokens: int, steps: int) -> list[torch.Tensor]:
    """Token ids (batch, tokens) of each step: source text of the standard library."""
    if folder == "random":
        vocabulary = worker.SHAPE["vocab_size"]
        return worker.batches(vocabulary, batch, tokens, steps, torch.device("cpu"))
    import argparse
    import ast
    import datetime
    import decimal
    import inspect as own
    import pathlib
    import typing

    from transformers import AutoTokenizer

    modules = (argparse, datetime, own, pathlib, typing, ast, decimal)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = "\n".join(inspect.getsource(module) for module in modules)
    ids = tokenizer(source, return_tensors="pt", verbose=False).input_ids[0]
    ids = ids.repeat(-(-steps * batch * tokens // ids.numel()))
    return list(ids[: steps * batch * tokens].view(steps, batch, tokens))


def curve(
    options: Options,
    folder: str,
    ids: list[torch.Tensor],
    *,
    fused: bool,
    permutation: int | None = None,
) -> torch.Tensor:
    """The loss of every step, float64 (steps,)."""
    model = worker.add_adapters(worker.load(folder, options.dtype, options.device), "float32")
    if permutation is not None:
        permute(model, permutation)
    if fused:
        import fastft

        model = fastft.accelerate(model)
    step = worker.make_step({"adapters": "float32", "optimizer": True, "fused": fused}, model)
    losses = []
    for number, batch in enumerate(ids):
        losses.append(float(step(batch.to(options.device))))
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{len(ids)} {losses[-1]:.4f}", end="", file=sys.stderr)
    return torch.tensor(losses, dtype=torch.float64)


@torch.no_grad()
def permute(model: Any, seed: int) -> None:
    """Permutes hidden and intermediate features of a Llama model with adapters, in place: every
    output is the same but for the order of sums."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    hidden = torch.randperm(config.hidden_size, generator=generator)
    inner = torch.randperm(config.intermediate_size, generator=generator)
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if hasattr(module, "lora_A"):
            base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
            for leaves, order, parts, dim in (
                (READS_HIDDEN, hidden, (base, a), 1),
                (READS_INNER, inner, (base, a), 1),
                (WRITES_HIDDEN, hidden, (base, b), 0),
                (WRITES_INNER, inner, (base, b), 0),
            ):
                for part in parts if leaf in leaves else ():
                    part.weight.copy_(part.weight.index_select(dim, order.to(part.weight.device)))
        elif leaf == "embed_tokens":  # the head shares it
            module.weight.copy_(module.weight[:, hidden])
        elif "norm" in leaf and hasattr(module, "weight"):
            module.weight.copy_(module.weight[hidden])
