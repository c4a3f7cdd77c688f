"""Command line of the benchmarks: ``python -m bench SUITE [options]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import (
    adapters,
    block,
    curves,
    e2e,
    experts,
    factored,
    full,
    host,
    layer,
    lora,
    loss,
    memory,
    optim,
    plan,
    qlora,
    ways,
)
from .declare import Options, Suite
from .ledger import write_atomically
from .records import Record, pick_dtype
from .report import show
from .runner import run_suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        lora.SUITE,
        qlora.SUITE,
        layer.SUITE,
        ways.SUITE,
        experts.SUITE,
        adapters.SUITE,
        block.SUITE,
        loss.SUITE,
        optim.SUITE,
        factored.SUITE,
    )
}
# Suites that run a model, each in its own way.
WHOLE = {
    e2e.NAME: e2e.run,
    curves.NAME: curves.run,
    full.NAME: full.run,
    plan.NAME: plan.run,
    memory.NAME: memory.run,
    host.NAME: host.run,
}
ROUNDS = {e2e.NAME: 3, curves.NAME: 1, full.NAME: 1, plan.NAME: 1, memory.NAME: 2, host.NAME: 3}
STEPS = {e2e.NAME: 2, curves.NAME: 100, full.NAME: 200, plan.NAME: 3, memory.NAME: 3}
DEFAULT_ROUNDS = 7


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="fastft beside its peers, on the same inputs. A wrong result gives no number.",
    )
    parser.add_argument("suite", choices=[*SUITES, *WHOLE, "all"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=int, help="rounds of each case (7; e2e: 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--json", type=Path, help="write one JSON object a line to this file")
    parser.add_argument("--impls", help="only these implementations, separated by commas")
    parser.add_argument(
        "--model", default="default", help=f"e2e: a folder, 'random', or '{e2e.SHAPED}LAYERS'"
    )
    parser.add_argument("--checkpointing", action="store_true", help="e2e: recompute each layer")
    parser.add_argument("--batch", type=int, help="e2e: sequences of a step (4)")
    parser.add_argument("--tokens", type=int, help="e2e: tokens of a sequence (512)")
    parser.add_argument("--steps", type=int, help="steps (e2e: 2 timed; curves: 100; full: 200)")
    parser.add_argument("--no-optimizer", action="store_true", help="e2e: leave AdamW out")
    found = parser.parse_args(arguments)
    for name in ("rounds", "batch", "tokens", "steps"):
        value = getattr(found, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    known = {impl.name for suite in SUITES.values() for impl in suite.impls}
    known |= {impl.name for impl in (*e2e.IMPLS, *memory.IMPLS, *host.IMPLS)}
    unknown = sorted(set(found.impls.split(",") if found.impls else ()) - known)
    if unknown:
        parser.error(f"--impls: no {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return found


def options_for(name: str, found: argparse.Namespace) -> Options:
    device = torch.device(found.device)
    default_rounds = 2 if found.quick else ROUNDS.get(name, DEFAULT_ROUNDS)
    return Options(
        device=device,
        dtype=pick_dtype(found.dtype, device),
        rounds=found.rounds or default_rounds,
        quick=found.quick,
        model=found.model,
        batch=found.batch or (1 if found.quick else 4),
        tokens=found.tokens or (128 if found.quick else 512),
        steps=found.steps or (1 if found.quick else STEPS.get(name, 2)),
        optimizer=not found.no_optimizer,
        checkpointing=found.checkpointing,
        impls=tuple(found.impls.split(",")) if found.impls else (),
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites asked for; 1 if fastft has no number anywhere it should have one."""
    found = parse(arguments)
    console = Console(stderr=True)
    records: list[Record] = []

    def emit(record: Record) -> None:
        records.append(record)
        value = "no number" if record.value is None else f"{record.value:,.4g} {record.unit}"
        console.print(f"{record.case}: {record.impl} {record.metric} {value}", highlight=False)
        if found.json is None:
            print(record.to_json(), flush=True)
        else:  # a run that is stopped keeps what it measured
            write(found.json, records)

    for name in [*SUITES, *WHOLE] if found.suite == "all" else [found.suite]:
        options = options_for(name, found)
        if name in WHOLE:
            WHOLE[name](options, emit)
        else:
            run_suite(SUITES[name], options, emit)
    show(records, console)
    asked = not found.impls or "fastft" in found.impls.split(",")
    return int(asked and any(r.impl == "fastft" and r.value is None for r in records))


def write(path: Path, records: list[Record]) -> None:
    """One JSON object a line, under a temporary name first: a stopped run leaves no half file."""
    write_atomically(path, "".join(record.to_json() + "\n" for record in records))


if __name__ == "__main__":
    sys.exit(main())
