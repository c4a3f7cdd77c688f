"""The output folder of a run: whether it can be written, and which checkpoint in it is whole.
Transformers writes a checkpoint file by file; killed in between, it leaves a folder that looks
like one. After each save the names and sizes of its files are put in
``complete.json`` (written last, renamed into place), and only such folders are resumed from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastft.errors import ConfigError, FastftError
from fastft.files import write_text
from fastft.train.config import TrainConfig, load_config

__all__ = [
    "MarkComplete",
    "check_history",
    "check_writable",
    "checkpoints",
    "is_whole",
    "remove_partial",
    "resolve_resume",
    "save_failed",
    "write_config",
]

MARK = "complete.json"
CONFIG_FILE = "train_config.yaml"
# A resumed run must be the one that was stopped: these decide its parameters and batches.
FIXED_ON_RESUME = (
    "model",
    "data",
    "eval_data",
    "eval_fraction",
    "max_train_samples",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "loraplus_lr_ratio",
    "max_length",
    "padding",
    "overlong",
    "group_by_length",
    "completion_only_loss",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "dtype",
    "autocast",
    "fused",
)


class MarkComplete(TrainerCallback):
    """Marks each checkpoint when all of it is on the disk, and then removes those before the last
    ``limit`` (None: none). Transformers' own limit would remove them before it is known."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            saved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            mark(saved)
            if self._limit:
                _remove_older(saved, self._limit - 1)


def _remove_older(saved: Path, keep: int) -> None:
    """Removes the whole checkpoints beside ``saved`` but the ``keep`` that were marked last. A run
    that goes on from an earlier one may have later steps beside it."""
    whole = [path for path in checkpoints(saved.parent) if path != saved and is_whole(path)]
    whole.sort(key=lambda path: (path / MARK).stat().st_mtime_ns)
    for path in whole[: max(0, len(whole) - keep)]:
        shutil.rmtree(path, ignore_errors=True)


def mark(folder: Path) -> None:
    sizes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MARK:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
    write_text(folder / MARK, json.dumps(sizes, indent=2) + "\n")


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


def remove_partial(output_dir: str | Path, step: int) -> None:
    """Deletes the checkpoint of this step, whose save failed, where it is not whole. Others without
    a mark are another program's."""
    path = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if not is_whole(path):
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


def check_history(cfg: TrainConfig, output: Path, resume: Path | None) -> None:
    """Refuses a folder with another run's checkpoints, and a resumed run that is not that one."""
    if resume is None:
        if left := checkpoints(output):
            raise ConfigError(
                "TrainConfig",
                "output_dir",
                expected="a folder without checkpoints of another run",
                got=f"{output} with {left[-1].name}",
                remedy="Set resume_from_checkpoint: last to go on, or choose another folder.",
            )
        return
    written = resume.parent / CONFIG_FILE
    if not written.is_file():
        return
    before = load_config(written)
    for name in FIXED_ON_RESUME:
        if getattr(before, name) != getattr(cfg, name):
            raise ConfigError(
                "TrainConfig",
                name,
                expected=f"{getattr(before, name)!r}, as in the run that is resumed",
                got=repr(getattr(cfg, name)),
            )


def save_failed(cfg: TrainConfig, error: Exception) -> FastftError:
    """The error for a disk that took no more."""
    whole = [path.name for path in checkpoints(cfg.output_dir) if is_whole(path)]
    remedy = "Make room and start again."
    if whole:
        remedy = f"{whole[-1]} is whole: make room and set resume_from_checkpoint: last."
    return FastftError(
        "train",
        cfg.output_dir,
        expected="room for a checkpoint on the disk",
        got=str(error),
        remedy=remedy,
    )


def write_config(cfg: TrainConfig) -> None:
    """``cfg`` beside its checkpoints."""
    import yaml

    path = Path(cfg.output_dir) / CONFIG_FILE
    try:
        write_text(path, yaml.safe_dump(cfg.to_dict(), sort_keys=False))
    except OSError as error:
        raise save_failed(cfg, error) from error
