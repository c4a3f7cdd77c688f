"""Who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Part of fastft -> the parts it may import. Nothing imports upwards.
BASE = {"errors", "files", "native", "_version"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "_version": set(),
    "native": {"errors"},
    "streams": {"errors"},
    "backends": {"errors"},
    "reference": set(),
    "cpu": {"native", "cpu", "errors"},
    "cuda": {"native", "cuda", "errors"},
    "ops": {"ops", "backends", "reference", *BASE},
    "optim": {"optim", "ops", "reference", "streams", *BASE},
    "nn": {"nn", "ops", "backends", *BASE},
    "losses": {"losses", "nn", "ops", *BASE},
    "memory": {"memory", "nn", "ops", "backends", "streams", *BASE},
    "patch": {"patch", "memory", "nn", "ops", "backends", *BASE},
    "train": {
        "__init__",
        "train",
        "patch",
        "memory",
        "losses",
        "nn",
        "optim",
        "ops",
        "backends",
        *BASE,
    },
    "doctor": {"__init__", "train", "backends", *BASE},
    "commands": {"__init__", "train", "doctor", *BASE},
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": {"losses", "memory", "patch", "nn", "optim", "ops", "backends", *BASE},
}
# Outside package -> the parts of fastft that may import it.
THIRD_PARTY = {
    "peft": {"nn", "patch", "train", "doctor"},
    "transformers": {"nn", "patch", "train", "doctor"},
    "trl": {"train", "doctor"},
    "datasets": {"train"},
    "triton": set(),
    "matplotlib": {"train"},
    "typer": {"commands"},
}
# Pointer tables are torch alone, shared by the Triton and the CUDA launcher.
KERNEL_USERS = {("cuda", "fastft_kernels.multi_tensor"), ("doctor", "fastft_kernels")}
FILES = sorted((ROOT / "fastft").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "fastft").with_suffix("").parts[0]


def imported(path: Path) -> list[tuple[str, int]]:
    """Absolute module names, with ``from fastft import x`` as ``fastft.x``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "fastft":
                found += [(f"fastft.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((str(node.module), node.lineno))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in LAYERS, f"{part} is new: give it its place in LAYERS"
    wrong = []
    for name, line in imported(path):
        top, _, rest = name.partition(".")
        if top == "fastft":
            target = rest.split(".")[0] or "__init__"
            public = {"__version__": "_version", "accelerate": "patch", "lora": "patch"}
            target = public.get(target, target)
            if target not in LAYERS[part] and target != part:
                wrong.append(f"line {line}: {part} may not import {name}")
        elif top in THIRD_PARTY and part not in THIRD_PARTY[top]:
            wrong.append(f"line {line}: {part} may not import {name}")
        elif top == "fastft_kernels" and (part, name) not in KERNEL_USERS:
            wrong.append(f"line {line}: launchers are found by fastft.backends, not imported")
    assert not wrong, "\n".join(wrong)


def test_only_native_names_the_compiled_module() -> None:
    users = [p.name for p in FILES if '"fastft._C"' in p.read_text(encoding="utf-8")]
    assert [u for u in users if u not in ("native.py", "doctor.py")] == []


def test_reference_imports_torch_only() -> None:
    for path in (ROOT / "fastft" / "reference").glob("*.py"):
        names = {name for name, _ in imported(path) if not name.startswith("fastft.reference.")}
        tops = {name.split(".")[0] for name in names}
        assert tops <= {"torch", "__future__", "collections", "functools", "math", "typing"}, (
            path.name,
            tops,
        )


def test_kernels_never_import_fastft_and_have_no_package_of_their_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels" / "fastft_kernels").rglob("*.py"):
        tops = {name.split(".")[0] for name, _ in imported(path)}
        assert "fastft" not in tops, path


def test_no_assert_in_shipped_code_and_no_file_past_400_lines() -> None:
    shipped = [*FILES, *(ROOT / "kernels").rglob("*.py")]
    for path in shipped:
        text = path.read_text(encoding="utf-8")
        asserts = [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
        assert not asserts, f"{path}: assert at {asserts}"
        assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines: split it"


def test_every_operation_has_every_part() -> None:
    """An operation is a reference, an op, a test and a launcher for CPUs and for GPUs."""
    elsewhere = {"attention"}  # GPUs have torch's own flash attention
    ops = sorted(p.stem for p in (ROOT / "fastft" / "reference").glob("[!_]*.py"))
    assert ops
    for op in ops:
        assert (ROOT / "fastft" / "ops" / f"{op}.py").exists(), op
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists(), op
        assert (ROOT / "fastft" / "cpu" / f"{op}.py").exists(), op
        folders = (ROOT / "kernels" / "fastft_kernels", ROOT / "fastft" / "cuda")
        on_gpus = any((folder / f"{op}.py").exists() for folder in folders)
        assert on_gpus is (op not in elsewhere), op
