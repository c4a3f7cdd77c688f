"""Which checkpoint is whole. Transformers writes a checkpoint file by file; killed in between, it
leaves a folder that looks like one. After each save the names and sizes of its files are put in
``complete.json`` (written last, renamed into place), and only such folders are resumed from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastft.errors import ConfigError

__all__ = ["MarkComplete", "checkpoints", "is_whole", "remove_partial", "resolve_resume"]

MARK = "complete.json"


class MarkComplete(TrainerCallback):
    """Marks each checkpoint when all of it is on the disk."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            mark(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def mark(folder: Path) -> None:
    sizes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MARK:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
    temporary = folder / f".{MARK}"
    temporary.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MARK)


def is_whole(folder: Path) -> bool:
    """Whether every file of the checkpoint is there, with the size it had when it was written."""
    try:
        sizes = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return bool(sizes) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders under ``output_dir``, whole or not, by step."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def remove_partial(output_dir: str | Path) -> None:
    """Deletes checkpoints that a failed save left unfinished."""
    for path in checkpoints(output_dir):
        if not (path / MARK).exists():
            shutil.rmtree(path, ignore_errors=True)


def resolve_resume(choice: str | None, output_dir: str | Path) -> Path | None:
    """The folder that ``resume_from_checkpoint`` means: ``last`` is the newest whole one."""
    if choice is None:
        return None
    if choice != "last":
        folder = Path(choice)
        # One that plain Transformers wrote has no mark, and is taken on trust.
        whole = is_whole(folder) if (folder / MARK).exists() else _looks_whole(folder)
        if whole:
            return folder
        raise ConfigError(
            "TrainConfig",
            "resume_from_checkpoint",
            expected="'last' or the folder of a whole checkpoint",
            got=f"{choice!r}, which is {'not whole' if folder.is_dir() else 'no folder'}",
            remedy=_known(output_dir),
        )
    for folder in reversed(checkpoints(output_dir)):
        if is_whole(folder):
            return folder
    raise ConfigError(
        "TrainConfig",
        "resume_from_checkpoint",
        expected=f"a whole checkpoint under {output_dir}",
        got="none",
        remedy="Leave resume_from_checkpoint out to start from the beginning.",
    )


def _looks_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("trainer_state.json", "optimizer.pt"))


def _known(output_dir: str | Path) -> str | None:
    names = [str(path) for path in checkpoints(output_dir) if is_whole(path)]
    return f"Whole ones are: {', '.join(names)}." if names else None
