"""The output folder of a run: whether it can be written, and that it is this run's alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastft.errors import ConfigError
from fastft.train.checkpoints import whole_ones
from fastft.train.processes import first_process

__all__ = ["check_new", "check_writable", "output_folder"]


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Makes the folder; inside, no other run of fastft can have it. One that is still empty at the
    end (of a run that was refused) goes again.

    Raises:
        ConfigError: it cannot be written, or another run has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        check_writable(folder)
        with _locked(folder):
            yield
    finally:
        for path in made:
            with suppress(OSError):  # of one that is not empty
                path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder itself, which goes with the process; where there are no such locks
    (Windows, some network file systems) nothing is held. The first process of a run has it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    if not first_process():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "TrainConfig",
                "output_dir",
                expected="a folder of its own for each run",
                got=f"{str(folder)!r}, in which one is running",
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written, before an hour of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastft-"):
            pass
    except OSError as error:
        raise ConfigError(
            "TrainConfig",
            "output_dir",
            expected="a folder that can be written",
            got=f"{str(folder)!r}: {error.strerror or error}",
        ) from error


def check_new(folder: Path) -> None:
    """Refuses a folder that has an adapter: a run that begins anew would put its own there."""
    adapter = folder / "adapter"
    if adapter.exists():
        go_on = "set resume_from_checkpoint: last" if whole_ones(folder) else "move it away"
        raise ConfigError(
            "TrainConfig",
            "output_dir",
            expected="a folder without an adapter of another run",
            got=str(adapter),
            remedy=f"Choose another folder, or {go_on}.",
        )
