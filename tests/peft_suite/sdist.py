"""PEFT's source distribution from PyPI: its wheel has no tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"


def obtain(cache: Path) -> Path:
    """The folder of the unpacked sdist, downloaded with pip at the first call.

    Raises:
        RuntimeError: pip could not download it, or the file is not the one published.
    """
    folder = cache / f"peft-{VERSION}"
    if folder.is_dir():
        return folder
    scratch = cache / f".peft-{os.getpid()}"
    try:
        archive = _download(scratch)
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        unpacked = scratch / f"peft-{VERSION}"
        # Its test modules import one another as a package, whose marker the sdist lacks.
        (unpacked / "tests" / "__init__.py").touch()
        # The installed PEFT is the one under test.
        shutil.rmtree(unpacked / "src")
        os.replace(unpacked, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "peft", "--dest", str(scratch), f"peft=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = scratch / f"peft-{VERSION}.tar.gz"
    if done.returncode or not archive.is_file():
        raise RuntimeError(f"pip could not download peft=={VERSION}: {done.stderr.strip()[-500:]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"peft-{VERSION}.tar.gz: expected sha256 {SHA256}, got {found}")
    return archive
