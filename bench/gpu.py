"""``make gpu OUT=dir``: builds, tests and measures everything on the GPU of this machine.

    python -m bench.gpu OUT [--only tests,layer,e2e] [--seconds 400]

Writes OUT/gpu.json (versions, device, commit, every step, every kernel), OUT/tests.jsonl (every
GPU test with its errors and times), OUT/<suite>.jsonl (benchmarks) and a log of each step, copies
the benchmarks to bench/results/ under the GPU's name, and brings bench/results/verified.json and
kernels/fastft_kernels/ways.json up to date. Needs no network, and under nine minutes: each step has
a limit, and the steps share one.

Exit status: 0 all well; 1 a step failed (the others still ran); 2 nothing could be run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import ledger
from .ledger import ROOT, Entry, write_atomically

__all__ = ["STEPS", "Outcome", "Step", "collect", "main", "obstacles", "run_step"]

# All of it stays under nine minutes, with room to write results and to end a step that hangs.
TOTAL_LIMIT_S = 520.0
# A step that could get less than this is not worth starting.
_SHORTEST_S = 5.0
_REPORT = "FASTFT_GPU_REPORT"
# Steps whose lines are kept in bench/results.
SUITES = (
    *("ways", "layer", "optim", "e2e", "loss", "block", "lora", "memory"),
    *("e2e-checkpointed", "qlora"),
)


@dataclass(frozen=True)
class Step:
    """A command with a time limit; ``{out}`` in it is the output folder, ``{layers}`` how many
    layers of a model this GPU has room for (`layers_for`)."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "ok", "failed", "timed out" or "no time left"."""

    name: str
    state: str
    seconds: float
    command: str
    log: str


_PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
# Triton's compiler takes most of the tests' time, and one core of the host for each of them; what
# measures time runs after them, alone. A package that this machine lacks breaks the collection of
# some tests, not of the others.
_TESTS = ("--continue-on-collection-errors", "tests/gpu")
_PROCESSES = str(max(1, min(14, (os.cpu_count() or 1) - 2)))
_PARALLEL = ("-n", _PROCESSES, "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
_LINES = {_REPORT: "{out}/tests.jsonl"}
_BENCH = (sys.executable, "-m", "bench")


def _bench(suite: str, limit_s: float, *more: str, name: str | None = None) -> Step:
    name = name or suite
    command = (*_BENCH, suite, "--device", "cuda", "--json", f"{{out}}/{name}.jsonl", *more)
    return Step(name, command, limit_s)


# One round, of more steps than usual: a start takes longer than they do.
_E2E = (
    *("--model", "llama-3.1-8b:{layers}", "--batch", "2", "--tokens", "4096"),
    *("--rounds", "1", "--steps", "5", "--impls", "peft,peft-bf16,peft-bf16+liger,fastft"),
)

STEPS: tuple[Step, ...] = (
    Step(
        "build",
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        170,
        {"FASTFT_CUDA": "1"},
    ),
    Step("tests", (*_PYTEST, *_PARALLEL, "-k", "not _time", *_TESTS), 160, _LINES),
    Step("times", (*_PYTEST, "-k", "_time", *_TESTS), 40, _LINES),
    _bench("ways", 80, "--rounds", "5"),
    # What the ways took decides which of them the suites after it measure.
    Step("table", (sys.executable, "-m", "bench.ways", "{out}/ways.jsonl"), 20),
    _bench("layer", 60, "--rounds", "5"),
    _bench("optim", 40, "--rounds", "5"),
    _bench("e2e", 120, *_E2E),
    _bench("loss", 30, "--rounds", "5"),
    _bench("block", 30, "--rounds", "5"),
    _bench("lora", 40, "--rounds", "5"),
    _bench("memory", 90, "--quick", "--rounds", "1"),
    _bench("e2e", 90, *_E2E, "--checkpointing", name="e2e-checkpointed"),
    _bench("qlora", 40, "--rounds", "5"),
)


def layers_for(memory_bytes: int) -> int:
    """How many layers of Llama-3.1-8B e2e takes, so that every implementation has room.

    PEFT needs about 4.3 GB a layer at 2 x 4096 tokens without checkpoints, beside the weights and
    logits: 16 layers on a card of 130 GB and more, 8 on one of 80 GB.
    """
    return 16 if memory_bytes >= 130e9 else 8


def obstacles() -> list[str]:
    """What keeps the run from starting on this machine; empty where nothing does."""
    found = [
        f"the package {name!r} is missing: install it, or use the Python that has it"
        for name in ("torch", "triton", "pytest")
        if importlib.util.find_spec(name) is None
    ]
    if not any("'torch'" in text for text in found):
        import torch

        if torch.version.cuda is None:
            found.append(f"torch {torch.__version__} is built without CUDA")
        elif not torch.cuda.is_available():
            found.append("torch finds no CUDA device: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return found


def facts() -> dict[str, Any]:
    """Device, versions and commit of this run."""
    import torch

    from .records import commit, versions

    properties = torch.cuda.get_device_properties(0)
    known = dict(versions())
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if driver:
        known["driver"] = driver.splitlines()[0]
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "versions": known,
        "commit": commit(),
        "date": ledger.now(),
    }


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_step(step: Step, out: Path, deadline: float, environment: Mapping[str, str]) -> Outcome:
    """Runs one step in a process group of its own; its output goes to OUT/<name>.log."""
    command = [part.replace("{out}", str(out)) for part in step.command]
    log = out / f"{step.name}.log"
    limit = min(step.limit_s, deadline - time.monotonic())
    text = " ".join(command)
    if limit < _SHORTEST_S:
        return Outcome(step.name, "no time left", 0.0, text, log.name)
    own = {name: v.replace("{out}", str(out)) for name, v in step.environment.items()}
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, **own},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "ok" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            _end(process)
    return Outcome(step.name, state, round(time.monotonic() - begin, 1), text, log.name)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children: compilers and workers must not hold the GPU."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment_for(capability: str) -> dict[str, str]:
    """The environment of every step: this checkout, and machine code for this GPU only."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    chosen = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    suffix = "a" if capability.startswith("9.") else ""
    chosen.setdefault("TORCH_CUDA_ARCH_LIST", f"{capability}{suffix}")
    chosen.pop("TRITON_INTERPRET", None)
    return chosen


def collect(lines: Iterable[str], found: Mapping[str, Any]) -> dict[str, Entry]:
    """Entries of the kernels whose GPU tests all passed, from the lines of tests.jsonl.

    A line is {"kernel", "test", "outcome", "error": {...}, "time_ms": {...}}; its outcome is
    pytest's, "collected" before the test runs, or "not offered" by the backend. A kernel with a
    failed or skipped test, with one that did not come to its end, or with none, gets no entry: the
    ledger says nothing it has not seen.
    """
    tests: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line.strip():
            test = json.loads(line)
            tests.setdefault(test["kernel"], []).append(test)
    sources = ledger.kernels()
    entries = {}
    for kernel, found_of in tests.items():
        ended = [test for test in found_of if test["outcome"] != "collected"]
        begun = {test["test"] for test in found_of}
        results = [test for test in ended if test["outcome"] != "not offered"]
        whole = begun == {test["test"] for test in ended}
        passed = results and all(test["outcome"] == "passed" for test in results)
        if kernel not in sources or not whole or not passed:
            continue
        error: dict[str, float] = {}
        time_ms: dict[str, float] = {}
        for test in results:
            time_ms |= test.get("time_ms", {})
            for name, value in test.get("error", {}).items():
                error[name] = max(value, error.get(name, 0.0))
        entries[kernel] = Entry(
            source=ledger.source_hash(sources[kernel]),
            device=found["device"],
            date=found["date"],
            commit=found["commit"],
            tests=len(results),
            error=error,
            time_ms=time_ms,
            versions=found["versions"],
        )
    return entries


def run(
    out: Path,
    steps: Sequence[Step] = STEPS,
    results: Path | None = None,
    seconds: float = TOTAL_LIMIT_S,
) -> int:
    """These steps, one after another; returns the exit status. ``results`` is where the committed
    results lie."""
    results = results or ROOT / "bench" / "results"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [step.name for step in steps]
    # Lines of an earlier run of a step are not this run's.
    for old in chosen:
        (out / f"{old}.jsonl").unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    found = facts()
    environment = environment_for(found["capability"])
    print(f"{found['device']}, commit {found['commit']}", flush=True)
    outcomes = []
    layers = str(layers_for(found["memory_bytes"]))
    for step in steps:
        command = tuple(part.replace("{layers}", layers) for part in step.command)
        outcome = run_step(replace(step, command=command), out, deadline, environment)
        outcomes.append(outcome)
        print(f"{outcome.name:16} {outcome.state:12} {outcome.seconds:6.1f} s", flush=True)
        if outcome.state == "failed":
            print("".join(f"    {line}\n" for line in _tail(out / outcome.log)), end="", flush=True)
    tests = out / "tests.jsonl"
    tested = "tests" in chosen and tests.is_file()
    entries = collect(tests.read_text().splitlines(), found) if tested else {}
    ledger.record(entries, results / "verified.json")
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    for outcome in outcomes:
        measured = out / f"{outcome.name}.jsonl"
        # A suite that ran out of time has written what it had measured by then.
        if outcome.name in SUITES and measured.is_file():
            write_atomically(results / f"{slug}-{outcome.name}.jsonl", measured.read_text())
    document = {
        **found,
        "steps": [asdict(outcome) for outcome in outcomes],
        "kernels": {kernel: asdict(entry) for kernel, entry in entries.items()},
    }
    write_atomically(out / "gpu.json", json.dumps(document, indent=1) + "\n")
    shutil.copyfile(results / "verified.json", out / "verified.json")
    for line in ledger.status(results / "verified.json"):
        print(line)
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


def _tail(log: Path, lines: int = 15) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for results and logs")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", help=f"some of the steps: {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=TOTAL_LIMIT_S, help="for all of them")
    given = parser.parse_args(arguments)
    only = names if given.only is None else given.only.split(",")
    if unknown := set(only) - set(names):
        parser.error(f"--only: no step {sorted(unknown)}; there are {','.join(names)}")
    problems = obstacles()
    if problems:
        for problem in problems:
            print(f"bench.gpu: {problem}", file=sys.stderr)
        return 2
    return run(given.out, [step for step in STEPS if step.name in only], seconds=given.seconds)


if __name__ == "__main__":
    sys.exit(main())
