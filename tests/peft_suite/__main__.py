"""Runs PEFT's own LoRA tests with fused layers; see tests/peft_suite/expected.py for what and how.

``python -m tests.peft_suite``          the LoRA tests, patched
``python -m tests.peft_suite --full``   more files, plain and patched, outcome by outcome
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import hub, sdist
from .expected import DIFFERENT, FILES, OFFLINE, File

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "peft-suite"
EXTRAS = ("attr", "diffusers", "parameterized", "scipy", "xdist")
INI = "[pytest]\naddopts = -p no:cacheprovider\n"
TIMEOUT = 3600


@dataclass
class Run:
    """Outcomes by test id, and the calls counted in all processes."""

    outcomes: dict[str, str] = field(default_factory=dict)
    fused: int = 0
    fallback: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        return sum(found == outcome for found in self.outcomes.values())


def run(file: File, suite: Path, models: Path, jobs: int, *, patched: bool) -> Run:
    """One file of PEFT's tests in a pytest of its own, its working directory the models' folder.

    Raises:
        RuntimeError: pytest ended without an outcome for any test.
    """
    with tempfile.TemporaryDirectory(prefix="fastft-peft-suite-") as name:
        out = Path(name)
        (out / "pytest.ini").write_text(INI)
        environment = {
            **os.environ,
            "FASTFT_SUITE_OUT": name,
            "FASTFT_SUITE_PATCH": str(int(patched)),
            "FASTFT_SUITE_SELECT": file.select,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]
            ),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "plugin"]
        command += ["-c", str(out / "pytest.ini"), "--rootdir", str(suite), "-n", str(jobs)]
        command += ["-W", "ignore", "--maxfail=200", str(suite / "tests" / file.name)]
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=models, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        log = CACHE / "logs" / f"{file.name}.{'patched' if patched else 'plain'}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        found = Run(seconds=time.monotonic() - start)
        outcomes = out / "outcomes.json"
        if outcomes.exists():
            found.outcomes = json.loads(outcomes.read_text())
        if not found.outcomes:
            raise RuntimeError(f"{file.name}: no test ran, see {log}")
        for counts in out.glob("counts-*.json"):
            counted = json.loads(counts.read_text())
            found.fused += counted["fused"]
            for reason, number in counted["fallback"].items():
                found.fallback[reason] = found.fallback.get(reason, 0) + number
    return found


def complaints(file: File, found: Run, *, patched: bool) -> list[str]:
    """What about a run is not as stated in expected.py."""
    stated = {**OFFLINE, **(DIFFERENT if patched else {})}
    failed = {test for test, outcome in found.outcomes.items() if outcome == "failed"}
    unknown = sorted(t for t in failed if not any(re.search(p, t) for p in stated))
    wrong = [f"{file.name}: failed: {test}" for test in unknown]
    for pattern in stated:
        here = [test for test in found.outcomes if re.search(pattern, test)]
        if here and not any(test in failed for test in here):
            wrong.append(f"{file.name}: stated to fail and passes: {pattern}")
    if patched and found.fused < file.min_fused:
        wrong.append(
            f"{file.name}: {found.fused} calls ran fused, at least {file.min_fused} stated"
        )
    return wrong


def differences(file: File, plain: Run, patched: Run) -> list[str]:
    """Tests whose outcome fused layers changed, other than those stated."""
    found = []
    for test in sorted(set(plain.outcomes) | set(patched.outcomes)):
        before, after = plain.outcomes.get(test), patched.outcomes.get(test)
        if before != after and not any(re.search(p, test) for p in DIFFERENT):
            found.append(f"{file.name}: {before} in plain PEFT, {after} fused: {test}")
    return found


def report(file: File, found: Run, *, patched: bool) -> None:
    numbers = ", ".join(f"{found.count(o)} {o}" for o in ("passed", "skipped", "failed"))
    kind = "fused" if patched else "plain"
    print(f"{file.name} ({kind}): {numbers} in {found.seconds:.0f} s", flush=True)
    if patched:
        reasons = sorted(found.fallback.items(), key=lambda item: -item[1])
        others = "; ".join(f"{number:,} {reason}" for reason, number in reasons)
        print(f"    calls: {found.fused:,} fused; {others or 'none fell back'}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more files, plain and patched")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--only", help="regular expression over file names")
    options = parser.parse_args(arguments)
    absent = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if absent:
        print(f"not installed: {', '.join(absent)}; run: pip install 'fastft[peft-suite]'")
        return 2
    import peft

    if peft.__version__ != sdist.VERSION:
        print(f"these are the tests of peft {sdist.VERSION}, installed is {peft.__version__}")
        return 2
    CACHE.mkdir(parents=True, exist_ok=True)
    suite, models = sdist.obtain(CACHE), hub.make(CACHE / "hub")
    wrong: list[str] = []
    for file in FILES:
        if (file.full and not options.full) or not re.search(options.only or "", file.name):
            continue
        patched = run(file, suite, models, options.jobs, patched=True)
        report(file, patched, patched=True)
        wrong += complaints(file, patched, patched=True)
        if options.full:
            plain = run(file, suite, models, options.jobs, patched=False)
            report(file, plain, patched=False)
            wrong += complaints(file, plain, patched=False) + differences(file, plain, patched)
    print("\n".join(wrong) if wrong else "as stated")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
