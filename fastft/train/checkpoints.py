"""The checkpoints of a run: which is whole, which a run may go on from, and what a failed save
leaves. Transformers writes a checkpoint file by file; killed in between, it leaves a folder that
looks like one. After each save the names and sizes of its files are put in ``complete.json``
(written last, renamed into place), and only such folders are resumed from."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastft.errors import ConfigError, FastftError
from fastft.files import write_text
from fastft.train.config import TrainConfig, load_config
from fastft.train.processes import process_count, wait_for_all

__all__ = [
    "MarkComplete",
    "check_data",
    "check_history",
    "checkpoints",
    "is_whole",
    "remove_partial",
    "remove_unfinished",
    "resolve_resume",
    "save_failed",
    "saving",
    "whole_ones",
    "write_config",
]

MARK = "complete.json"
CONFIG_FILE = "train_config.yaml"
DATA_FILE = "train_data.sha256"
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG}
)
# Of what torch.save raises where a write fails or comes out short; and the tokenizers, in Rust.
WRITERS_SAY = (
    "PytorchStreamWriter",
    "inline_container.cc",
    "basic_ios::clear",
    *(f"(os error {code})" for code in sorted(DISK_ERRORS)),
)
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
        wait_for_all(args.device)  # each writes its random state
        if state.is_world_process_zero and args.output_dir is not None:
            saved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with saving(args.output_dir, state.global_step):
                mark(saved)
            if self._limit:
                _remove_older(saved, self._limit - 1)


def _remove_older(saved: Path, keep: int) -> None:
    """Removes the whole checkpoints beside ``saved`` but the ``keep`` that were marked last. A run
    that goes on from an earlier one may have later steps beside it."""
    whole = [path for path in whole_ones(saved.parent) if path != saved]
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


def whole_ones(output_dir: str | Path) -> list[Path]:
    """Those of ``checkpoints`` that are whole."""
    return [path for path in checkpoints(output_dir) if is_whole(path)]


def remove_partial(output_dir: str | Path, step: int) -> None:
    """Deletes the checkpoint of this step, whose save failed, where it is not whole. Others without
    a mark are another program's."""
    path = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if not is_whole(path):
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(output_dir: str | Path) -> None:
    """Deletes what stopped runs of this folder left of checkpoints, before one begins anew. Of
    another program's nothing goes: it leaves no mark, and no configuration beside it."""
    ours = (Path(output_dir) / CONFIG_FILE).is_file()
    for path in checkpoints(output_dir):
        if not _usable(path) and (ours or (path / MARK).exists()):
            shutil.rmtree(path, ignore_errors=True)


def resolve_resume(choice: str | None, output_dir: str | Path) -> Path | None:
    """The folder that ``resume_from_checkpoint`` means: ``last`` is the newest whole one."""
    if choice is None:
        return None
    if choice != "last":
        folder = Path(choice)
        if _usable(folder):
            return _readable(folder)
        raise ConfigError(
            "TrainConfig",
            "resume_from_checkpoint",
            expected="'last' or the folder of a whole checkpoint",
            got=f"{choice!r}, which is {'not whole' if folder.is_dir() else 'no folder'}",
            remedy=_known(output_dir),
        )
    if whole := whole_ones(output_dir):
        return _readable(whole[-1])
    named = [str(path) for path in checkpoints(output_dir) if _usable(path)]
    raise ConfigError(
        "TrainConfig",
        "resume_from_checkpoint",
        expected=f"a whole checkpoint under {output_dir}",
        got=f"{named[-1]}, which has no {MARK}" if named else "none",
        remedy=f"Name it (resume_from_checkpoint: {named[-1]}) if its run was not cut off."
        if named
        else "Leave resume_from_checkpoint out to start from the beginning.",
    )


def _usable(folder: Path) -> bool:
    """Whether it is whole. One that plain Transformers wrote has no mark, and is taken on trust."""
    if (folder / MARK).exists():
        return is_whole(folder)
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    return all((folder / name).is_file() for name in needed)


def _readable(folder: Path) -> Path:
    """``folder``, or which of its files is corrupt: of the right size, it shows when it is read."""
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):  # torch's are zip files with checksums
                with zipfile.ZipFile(path) as file:
                    if (name := file.testzip()) is not None:
                        raise zipfile.BadZipFile(f"{name} fails its checksum")
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
            raise ConfigError(
                "TrainConfig",
                "resume_from_checkpoint",
                expected="a checkpoint whose files can be read",
                got=f"{path}: {error}",
                remedy=_known(folder.parent, but=folder) or "Start from the beginning, elsewhere.",
            ) from error
    return folder


def _known(output_dir: str | Path, but: Path | None = None) -> str | None:
    names = [str(path) for path in whole_ones(output_dir) if path != but]
    return f"Whole ones are: {', '.join(names)}." if names else None


def check_history(cfg: TrainConfig, output: Path, resume: Path | None) -> None:
    """Refuses a folder with another run's checkpoints, and a resumed run that is not that one."""
    if resume is None:
        if left := [path for path in checkpoints(output) if _usable(path)]:
            choice = "last" if whole_ones(output) else left[-1]
            raise ConfigError(
                "TrainConfig",
                "output_dir",
                expected="a folder without checkpoints of another run",
                got=f"{output} with {left[-1].name}",
                remedy=f"Set resume_from_checkpoint: {choice} to go on, or choose another folder.",
            )
        return
    # Each of several has its random state in a file of its own.
    processes = len(list(resume.glob("rng_state_*.pth"))) or 1
    if processes != process_count():
        raise ConfigError(
            "TrainConfig",
            "resume_from_checkpoint",
            expected=f"as many processes as wrote {resume}: {processes}",
            got=str(process_count()),
            remedy="A step's batch is that of all processes.",
        )
    state = json.loads((resume / "trainer_state.json").read_text(encoding="utf-8"))
    if 0 < cfg.max_steps < state["global_step"]:
        raise ConfigError(
            "TrainConfig",
            "max_steps",
            expected=f"at least {state['global_step']}, the step of {resume}",
            got=str(cfg.max_steps),
        )
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


def check_data(digest: str, resume: Path | None) -> None:
    """Refuses to go on with other examples than the run that is resumed had."""
    written = None if resume is None else resume.parent / DATA_FILE
    if written is not None and written.is_file() and written.read_text("utf-8").strip() != digest:
        raise ConfigError(
            "TrainConfig",
            "data",
            expected="the examples of the run that is resumed",
            got="others, or other tokens",
            remedy="Bring back its file and tokenizer, or start from the beginning, elsewhere.",
        )


@contextmanager
def saving(output_dir: str | Path, step: int) -> Iterator[None]:
    """A checkpoint for which there is no room goes again, with an error that says so."""
    try:
        yield
    except Exception as error:
        if not _is_disk_error(error):
            raise
        remove_partial(output_dir, step)
        raise save_failed(output_dir, error) from error


def _is_disk_error(error: BaseException | None) -> bool:
    """Whether writing failed: safetensors and torch.save have errors of their own for it, and
    raise some while they handle the first."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return True
        text = str(error)
        if isinstance(error, SafetensorError) or any(said in text for said in WRITERS_SAY):
            return True
        error = error.__cause__ or error.__context__
    return False


def save_failed(output_dir: str | Path, error: Exception) -> FastftError:
    """The error for a disk that took no more."""
    whole = [path.name for path in whole_ones(output_dir)]
    remedy = "Make room and start again."
    if whole:
        remedy = f"{whole[-1]} is whole: make room and set resume_from_checkpoint: last."
    return FastftError(
        "train",
        str(output_dir),
        expected="room for a checkpoint on the disk",
        got=str(error),
        remedy=remedy,
    )


def write_config(cfg: TrainConfig, digest: str | None = None) -> None:
    """``cfg`` beside its checkpoints, and the digest of its examples."""
    import yaml

    folder = Path(cfg.output_dir)
    try:
        write_text(folder / CONFIG_FILE, yaml.safe_dump(cfg.to_dict(), sort_keys=False))
        if digest is not None:
            write_text(folder / DATA_FILE, digest + "\n")
    except OSError as error:
        raise save_failed(folder, error) from error
