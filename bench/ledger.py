"""The ledger of GPU runs: which kernel has run on which GPU since it last changed.

A kernel is named ``<backend>/<op>``. Its source hash covers the files it is compiled from: for
Triton the operation's module and every module of ``fastft_kernels`` it imports (its launch
configurations are one), for CUDA the ``.cu`` file, the headers it includes and its launcher. The
lists are read from the imports and includes themselves, so they cannot go stale.

    python -m bench.ledger          prints the state of every kernel
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastft.files import write_text

__all__ = ["LEDGER", "Entry", "Status", "kernels", "load", "record", "source_hash", "status"]

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "bench" / "results" / "verified.json"
_FORMAT = 1
_TRITON = Path("kernels/fastft_kernels")
_CUDA = Path("csrc/cuda")
_INCLUDE = Path("csrc/include")


@dataclass(frozen=True)
class Entry:
    """One kernel on one GPU: the last time all of its GPU tests passed.

    Args:
        source: hash of the kernel's sources at that time.
        device: the GPU's name.
        date: ISO date and time, UTC.
        commit: of the checkout; ends in ``-dirty`` where files differed.
        tests: how many tests passed.
        error: quantity -> largest error against float64, relative to the largest true value.
        time_ms: what was timed -> median milliseconds.
        versions: of torch, Triton, CUDA and the driver.
    """

    source: str
    device: str
    date: str
    commit: str
    tests: int = 0
    error: Mapping[str, float] = field(default_factory=dict)
    time_ms: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """Where a kernel stands: ``state`` is "verified", "changed" (since it was) or "never"."""

    kernel: str
    state: str
    entries: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        if self.state == "never":
            return f"{self.kernel}: never run on a GPU"
        runs = ", ".join(f"{e.device} ({e.date[:10]}, {e.commit})" for e in self.entries)
        if self.state == "verified":
            return f"{self.kernel}: verified on {runs}"
        return f"{self.kernel}: changed since it was verified on {runs}"


def kernels(root: Path = ROOT) -> dict[str, list[Path]]:
    """Kernel -> the files it is made of, relative to ``root``, sorted."""
    found: dict[str, list[Path]] = {}
    for op in _triton_ops(root):
        found[f"triton/{op}"] = sorted(set(_imported(root, _TRITON / f"{op}.py")))
    for source in sorted((root / _CUDA).glob("*.cu")):
        if "__global__" not in source.read_text(encoding="utf-8"):
            continue  # no kernel in it
        relative = source.relative_to(root)
        launcher = Path("fastft/cuda") / f"{source.stem}.py"
        files = {relative, *_included(root, relative)}
        if (root / launcher).is_file():
            files |= {launcher, *_imported(root, launcher)}
        found[f"cuda/{source.stem}"] = sorted(files)
    return found


def source_hash(files: list[Path], root: Path = ROOT) -> str:
    """A hash of names and contents."""
    digest = hashlib.sha256()
    for file in files:
        content = (root / file).read_bytes()
        digest.update(f"{file.as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def load(path: Path = LEDGER) -> dict[str, dict[str, Entry]]:
    """Kernel -> GPU -> entry; empty where there is no ledger yet.

    Raises:
        ValueError: the file is not a ledger. It is never overwritten then.
    """
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
        return {
            kernel: {device: Entry(**entry) for device, entry in devices.items()}
            for kernel, devices in document["kernels"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected a ledger of GPU runs, got: {error!r}") from error


def save(ledger: Mapping[str, Mapping[str, Entry]], path: Path = LEDGER) -> None:
    """Writes the ledger; the old one stays whole if that fails."""
    document = {
        "format": _FORMAT,
        "kernels": {
            kernel: {device: asdict(entry) for device, entry in sorted(devices.items())}
            for kernel, devices in sorted(ledger.items())
        },
    }
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def record(entries: Mapping[str, Entry], path: Path = LEDGER) -> None:
    """Adds entries (kernel -> entry), each in place of the same kernel's on the same GPU."""
    ledger = load(path)
    for kernel, entry in entries.items():
        ledger.setdefault(kernel, {})[entry.device] = entry
    save(ledger, path)


def status(path: Path = LEDGER, root: Path = ROOT) -> list[Status]:
    """The state of every kernel that there is now."""
    ledger = load(path)
    found = []
    for kernel, files in kernels(root).items():
        entries = sorted(ledger.get(kernel, {}).values(), key=lambda e: e.date, reverse=True)
        now = source_hash(files, root)
        current = tuple(e for e in entries if e.source == now)
        if current:
            found.append(Status(kernel, "verified", current))
        else:
            found.append(Status(kernel, "changed" if entries else "never", tuple(entries)))
    return found


def now() -> str:
    """The time, as entries hold it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` as a whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _triton_ops(root: Path) -> list[str]:
    """``OPS`` of fastft_kernels/__init__.py, without importing it."""
    for node in _parse(root, _TRITON / "__init__.py").body:
        target: Any = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "OPS":
            return list(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    raise ValueError(f"{_TRITON / '__init__.py'}: no OPS")


def _parse(root: Path, file: Path) -> ast.Module:
    return ast.parse((root / file).read_text(encoding="utf-8"))


def _imported(root: Path, file: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """``file`` and the modules of fastft_kernels it imports, directly or not."""
    seen = seen if seen is not None else set()
    if file in seen:
        return
    seen.add(file)
    yield file
    for node in ast.walk(_parse(root, file)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, _, module = node.module.partition(".")
        if package != "fastft_kernels":
            continue
        for name in [module] if module else [alias.name for alias in node.names]:
            target = _TRITON / f"{name}.py"
            if (root / target).is_file():
                yield from _imported(root, target, seen)


def _included(root: Path, file: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """Headers of csrc that ``file`` includes, directly or not."""
    seen = seen if seen is not None else set()
    text = (root / file).read_text(encoding="utf-8")
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        here = _INCLUDE / name
        header = here if (root / here).is_file() else _CUDA.parent / name
        if (root / header).is_file() and header not in seen:
            seen.add(header)
            yield header
            yield from _included(root, header, seen)


if __name__ == "__main__":
    for line in status():
        print(line)
