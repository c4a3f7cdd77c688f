"""Workers and their spares: one job a process, the same results and errors, none left behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import worker
from bench.plan import MODELS

ROOT = Path(__file__).resolve().parents[2]
# A worker that imports nothing heavy. It says who runs it and when its module was imported.
TOY = """
import json, os, signal, sys, time
imported = time.time()
if os.environ.get("TOY_BROKEN"):
    raise ImportError("no toy here")
def main():
    job = json.loads(sys.argv[1])
    print("a line before")
    if job["do"] == "interrupt":  # as Ctrl-C, once the job runs
        os.kill(os.getppid(), signal.SIGINT)
    if job["do"] in ("sleep", "interrupt"):
        time.sleep(60)
    if job["do"] == "fail":
        raise ValueError("the job is wrong")
    if job["do"] == "die":
        os._exit(3)
    found = {"pid": os.getpid(), "imported": imported, "modules": list(sys.modules)}
    print(json.dumps({**found, "word": job.get("word"), "arguments": len(sys.argv)}))
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose package bench has the toy worker, and spares of it that import one module."""
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "toy.py").write_text(TOY)
    shutil.copy(ROOT / "bench" / "spare.py", folder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(worker, "ROOT", tmp_path)
    monkeypatch.setattr(worker, "PRELOAD", ("colorsys", "no_such_module"))
    yield tmp_path
    worker.end_spares()


def pids() -> list[int]:
    return [process.pid for process in worker._waiting]


def gone(pid: int, within: float = 10.0) -> bool:
    """Whether the process ends in that time; a zombie has ended."""
    end = time.monotonic() + within
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z" or time.monotonic() > end:
            return state == "Z"
        time.sleep(0.02)


@pytest.mark.usefixtures("toy")
def test_a_spare_serves_one_job_and_imports_before_it_has_it() -> None:
    first = worker.run_worker("toy", {"do": "tell", "word": "ä\n"}, 30, spares=2)
    assert (first["word"], first["arguments"]) == ("ä\n", 2)
    assert "colorsys" in first["modules"]
    waiting = pids()
    assert len(waiting) == 2
    assert first["pid"] not in waiting
    time.sleep(1)
    handed = time.time()
    second = worker.run_worker("toy", {"do": "tell"}, 30, spares=2)
    assert second["pid"] == waiting[0]
    assert second["imported"] < handed
    assert pids()[0] == waiting[1]
    assert len(pids()) == 2
    assert gone(second["pid"], 0)


@pytest.mark.usefixtures("toy")
def test_without_spares_nothing_waits() -> None:
    found = worker.run_worker("toy", {"do": "tell", "word": "x", "device": "cpu"}, 30)
    assert (found["word"], found["arguments"]) == ("x", 2)
    assert "colorsys" not in found["modules"]
    assert pids() == []


@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.usefixtures("toy")
def test_errors_are_those_of_the_job(spares: int) -> None:
    with pytest.raises(RuntimeError, match=r"^ValueError: the job is wrong$"):
        worker.run_worker("toy", {"do": "fail"}, 30, spares=spares)
    with pytest.raises(RuntimeError, match=r"^exit status 3$"):
        worker.run_worker("toy", {"do": "die"}, 30, spares=spares)
    assert worker.run_worker("toy", {"do": "tell"}, 30, spares=spares)["pid"]


@pytest.mark.usefixtures("toy")
def test_a_worker_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_BROKEN", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^ImportError: no toy here$"):
            worker.run_worker("toy", {"do": "tell"}, 30, spares=1)
    monkeypatch.delenv("TOY_BROKEN")
    # The spares that ended without a job are not given one.
    assert all(gone(pid) for pid in pids())
    assert worker.run_worker("toy", {"do": "tell"}, 30, spares=1)["pid"]


@pytest.mark.usefixtures("toy")
def test_a_job_that_takes_too_long_is_ended() -> None:
    worker.run_worker("toy", {"do": "tell"}, 30, spares=1)
    (pid,) = pids()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.run_worker("toy", {"do": "sleep"}, 0.5, spares=1)
    assert gone(pid, 0)
    assert worker.run_worker("toy", {"do": "tell"}, 30, spares=1)["pid"] != pid


def test_spares_of_another_worker_are_ended(toy: Path) -> None:
    shutil.copy(toy / "bench" / "toy.py", toy / "bench" / "other.py")
    worker.run_worker("toy", {"do": "tell"}, 30, spares=2)
    before = pids()
    worker.run_worker("other", {"do": "tell"}, 30, spares=1)
    assert all(gone(pid, 0) for pid in before)
    assert len(pids()) == 1


PARENT = """
import os, pathlib, signal, sys
from bench import worker
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
worker.ROOT, worker.PRELOAD = pathlib.Path(sys.argv[1]), ()
os.environ["PYTHONPATH"] = sys.argv[1]
worker.run_worker("toy", {"do": "tell"}, 30, spares=2)
print(*[process.pid for process in worker._waiting], flush=True)
"""
ENDS = {
    "its end": ("", 0),
    "an error": ("raise ValueError", 1),
    "Ctrl-C in a job": (
        'worker.run_worker("toy", {"do": "interrupt"}, 30, spares=2)',
        -signal.SIGINT,
    ),
    "a kill": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_no_spare_outlives_its_parent(end: str, toy: Path) -> None:
    code, status = ENDS[end]
    done = subprocess.run(
        [sys.executable, "-c", PARENT + code, str(toy)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 2
    assert all(gone(pid) for pid in left)


def test_spares_are_for_gpus_with_cores_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert worker.spares_for("cuda") == worker.spares_for("cuda:1") == worker.SPARES
    assert worker.spares_for("cpu") == 0
    cores = 2
    assert worker.spares_for("cuda") == 0


def test_what_spares_import_is_there_and_leaves_the_gpu_alone() -> None:
    missing = [name for name in worker.PRELOAD if importlib.util.find_spec(name) is None]
    assert missing == []
    code = "import importlib, sys, torch\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "assert not torch.cuda.is_initialized()"
    workers = [f"bench.{name}_worker" for name in ("e2e", "memory", "plan")]
    subprocess.run(
        [sys.executable, "-c", code, *worker.PRELOAD, *workers],
        cwd=ROOT,
        check=True,
    )


@pytest.mark.slow
def test_a_spare_measures_what_a_fresh_process_does(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    job = {
        "config": {**MODELS["SmolLM2-135M"], **small, **heads}, "fused": True, "policy": "lora",
        "way": None, "batch": 1, "tokens": 32, "steps": 1, "device": "cpu", "dtype": "float32",
        "threads": 1,
    }  # fmt: skip
    gradients = []
    try:
        for spares in (0, 1):
            file = tmp_path / f"{spares}.pt"
            found = worker.run_worker(
                "memory_worker", {**job, "gradient": str(file)}, 120, spares=spares
            )
            assert len(found["step_seconds"]) == 1
            gradients.append(torch.load(file))
    finally:
        worker.end_spares()
    assert torch.equal(*gradients)
