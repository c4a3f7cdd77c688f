"""What goes into the sdist and what setup.py promises."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source checkout"
)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}


def test_sdist_holds_all_that_a_build_needs_and_nothing_built(sdist: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "kernels", "fastft", "setup.py", "pyproject.toml", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    missing = [f for f in tracked if f not in sdist and (ROOT / f).exists()]
    assert tracked
    assert not missing
    assert not [f for f in sdist if f.endswith((".so", ".o", ".pyc")) or f.startswith("tests/")]


def test_top_level_is_the_house_s() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    allowed = {
        ".ci", ".clang-format", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
        "MANIFEST.in", "Makefile", "README.md", "bench", "constraints.txt", "csrc", "docs",
        "fastft", "kernels", "pyproject.toml", "setup.py", "tests",
    }  # fmt: skip
    assert top <= allowed
    assert (ROOT / "setup.py").read_text().count("\n") <= 150


def test_cuda_demanded_and_missing_is_an_error(tmp_path: Path) -> None:
    hidden = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("c++", "g++", "gcc", "cc", "ld", "as", "x86_64-linux-gnu-gcc"):
        for folder in os.environ["PATH"].split(os.pathsep):
            if (Path(folder) / tool).exists() and not (bare / tool).exists():
                (bare / tool).symlink_to(Path(folder) / tool)
    hidden["PATH"] = str(bare)
    hidden["FASTFT_CUDA"] = "1"
    code = (
        "import runpy, sys; sys.path = [p for p in sys.path if 'nvidia' not in p];"
        "sys.argv = ['setup.py', '--version']; m = runpy.run_path('setup.py', run_name='s');"
        "print(m['find_nvcc']())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=hidden, capture_output=True, text=True
    )
    if found.stdout.strip().splitlines()[-1] != "None":
        pytest.skip(f"nvcc comes from a wheel here: {found.stdout.strip()}")
    result = subprocess.run(
        [
            sys.executable, "setup.py", "build_ext",
            "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"),
        ],
        cwd=ROOT, env=hidden, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "FASTFT_CUDA=1 but no nvcc" in result.stderr + result.stdout
