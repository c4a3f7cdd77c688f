"""``train_together``: several adapters of one frozen model in one job.

Every adapter has its own data, rank, schedule and optimizer state, as in a run of its own; only
the model's forward and backward are shared. A step takes one batch of each, pads them to one
length and runs them as one mixed batch, in which each sample goes through its own adapter; the
losses stay apart, so each adapter gets the gradient that its own run would give it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import ConfigError, FastftError
from fastft.nn.mixed import mixed_batch
from fastft.train.adapters import save_adapter
from fastft.train.callbacks import Interrupted, StopOnInterrupt
from fastft.train.checkpoints import check_history, remove_unfinished, write_config
from fastft.train.config import TrainConfig
from fastft.train.data import DataSplits, check_sizes, collator, load_data, positions
from fastft.train.fit import check_fit
from fastft.train.lora_setup import (
    adapter_names,
    add_adapters,
    apply_memory_policy,
    check_targets,
)
from fastft.train.losses_apart import LossesApart, losses_apart
from fastft.train.models import check_4bit, load_model, load_tokenizer, refusing
from fastft.train.output import check_new, output_folder
from fastft.train.processes import process_count
from fastft.train.run import TrainResult, reload_difference
from fastft.train.trainer import FastftTrainer, check_report_to, training_arguments

if TYPE_CHECKING:
    import torch

__all__ = ["TogetherEvent", "check_together", "train_together"]

_WHERE = "train_together"
# One model, one forward: what must be the same in every configuration.
SHARED = (
    *("model", "dtype", "load_in_4bit", "autocast"),
    *("gradient_checkpointing", "memory_policy", "strict"),
)
# What a run has that several together have not: its name, the value it must have, why.
FIXED: tuple[tuple[str, Any, str], ...] = (
    ("fused", True, "mixed batches are trained through fastft's layers"),
    ("resume_from_checkpoint", None, "a job of several adapters writes no checkpoints"),
    ("use_dora", False, "PEFT has no DoRA in mixed batches"),
    ("modules_to_save", None, "only LoRA layers hold several adapters"),
    ("eval_steps", 0, "each adapter is evaluated at the end"),
)


@dataclass(frozen=True)
class TogetherEvent:
    """One step of all adapters. ``losses`` and ``learning_rates`` are in the order of the
    configurations, NaN for one that has finished; ``tokens`` counts padding, ``seconds`` is
    forward, backward and updates since the last event."""

    step: int
    max_steps: int
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    tokens: int
    seconds: float


@dataclass
class _Run:
    """One adapter of the job."""

    cfg: TrainConfig
    name: str
    data: DataSplits
    trainer: FastftTrainer
    max_steps: int = 0
    losses: list[float] = field(default_factory=list)


def train_together(
    cfgs: Sequence[TrainConfig],
    report: Callable[[TogetherEvent], None] | None = None,
    notice: Callable[[str], None] | None = None,
    *,
    force: bool = False,
) -> list[TrainResult]:
    """Fine-tunes one adapter for each configuration, all on one copy of the frozen model.

    Args:
        cfgs: the runs; ``SHARED`` fields must agree and output folders differ. ``save_steps``
            saves the adapter itself (a job of several adapters cannot be resumed).
        report: called with a ``TogetherEvent`` each ``logging_steps`` of the first configuration.
        notice: called with a line of text now and then.
        force: train even where the plan says that it does not fit.

    Returns:
        one result for each configuration, its adapter in ``<output_dir>/adapter``.

    Losses are those of separate runs up to the rounding of a larger product; with dropout the
    masks differ.

    Raises:
        ConfigError, DataError, AdapterError: as ``train``.
        Interrupted: after Ctrl-C; every adapter as it then was is saved.
    """
    notice = notice or (lambda text: None)
    check_together(cfgs)
    with contextlib.ExitStack() as folders:
        for cfg in cfgs:
            output = Path(cfg.output_dir)
            folders.enter_context(output_folder(output))
            check_new(output)
            check_history(cfg, output, None)
        return _train(cfgs, report, notice, force)


def _train(
    cfgs: Sequence[TrainConfig],
    report: Callable[[TogetherEvent], None] | None,
    notice: Callable[[str], None],
    force: bool,
) -> list[TrainResult]:
    model, runs = _prepare(cfgs, notice, force)
    for cfg in cfgs:
        remove_unfinished(cfg.output_dir)
        write_config(cfg)
    for run in runs:
        for note in run.data.notes:
            notice(f"{run.cfg.output_dir}: {note}")
    interrupt = StopOnInterrupt(notice)
    step = 0
    with interrupt.watching(), losses_apart(model) as losses_of:
        for step in _steps(model, runs, losses_of, report):
            for run in runs:
                every = run.cfg.save_steps
                if every and step % every == 0 and step < run.max_steps:
                    _save(model, run)
            if interrupt.requested:
                break
    adapters = [_save(model, run) for run in runs]
    if step < max(run.max_steps for run in runs):
        raise Interrupted(step, None)
    return [_finish(model, run, adapter) for run, adapter in zip(runs, adapters, strict=True)]


def check_together(cfgs: Sequence[TrainConfig]) -> None:
    """Refuses configurations that cannot run as one job (``ConfigError``)."""
    if process_count() > 1:
        raise ConfigError(
            _WHERE, "processes", expected="one: only jobs of one adapter run in several",
            got=str(process_count()), remedy="Start it without torchrun, or each file by itself.",
        )  # fmt: skip
    if not cfgs:
        raise ConfigError(_WHERE, "cfgs", expected="one configuration or more", got="none")
    folders = [Path(cfg.output_dir).absolute() for cfg in cfgs]
    for i, cfg in enumerate(cfgs):
        if folders.index(folders[i]) != i:
            raise ConfigError(
                _WHERE, "output_dir", expected="a folder of its own for each", got=cfg.output_dir
            )
        for name in SHARED:
            if getattr(cfg, name) != getattr(cfgs[0], name):
                expected = f"{getattr(cfgs[0], name)!r}, as in {cfgs[0].output_dir}"
                got = f"{getattr(cfg, name)!r} in {cfg.output_dir}"
                raise ConfigError(_WHERE, name, expected=expected, got=got)
        for name, value, why in FIXED:
            if getattr(cfg, name) != value:
                got = f"{getattr(cfg, name)!r} in {cfg.output_dir}"
                expected = f"{value!r}: {why}"
                raise ConfigError(_WHERE, name, expected=expected, got=got)
        if cfg.padding == "none":
            expected = "longest or max_length: a mixed batch has one row a sample"
            raise ConfigError(_WHERE, "padding", expected=expected, got="'none'")
        if cfg.dtype == "float16":
            expected = "a dtype that needs no loss scaling"
            raise ConfigError(_WHERE, "dtype", expected=expected, got="'float16'")


def _prepare(
    cfgs: Sequence[TrainConfig], notice: Callable[[str], None], force: bool
) -> tuple[Any, list[_Run]]:
    """The model with all adapters, and each adapter's trainer with its optimizer."""
    import torch

    import fastft

    for cfg in cfgs:
        check_report_to(cfg)
    check_4bit(cfgs[0])
    tokenizer = load_tokenizer(cfgs[0])
    data = [load_data(cfg, tokenizer) for cfg in cfgs]
    check_fit(cfgs, [splits.longest for splits in data], notice, force)
    base = load_model(cfgs[0])
    most = positions(base)
    for cfg, splits in zip(cfgs, data, strict=True):
        check_sizes(splits, base, tokenizer, cfg)
        check_targets(base, cfg)
    base.config.use_cache = False
    names = adapter_names(len(cfgs))
    model: Any = add_adapters(base, cfgs)
    fastft.accelerate(model, strict=cfgs[0].strict)
    apply_memory_policy(model, cfgs[0])
    runs = []
    for name, cfg, splits in zip(names, cfgs, data, strict=True):
        model.set_adapter(name)  # the optimizer takes what is trained
        trainer = FastftTrainer(
            cfg,
            model=model,
            args=training_arguments(cfg, splits.eval is not None),
            train_dataset=splits.train,
            eval_dataset=splits.eval,
            processing_class=tokenizer,
            data_collator=collator(cfg, tokenizer, most),
        )
        run = _Run(cfg, name, splits, trainer)
        run.max_steps = _max_steps(run)
        trainer.create_optimizer_and_scheduler(run.max_steps)
        runs.append(run)
    model.base_model.set_adapter(names)
    ids = torch.zeros(len(names), 2, dtype=torch.long, device=runs[0].trainer.args.device)
    model.eval()
    # PEFT says only in a forward which of its layers take no mixed batch.
    with (
        refusing(_WHERE, "adapters that mixed batches can go through", ValueError),
        torch.no_grad(),
        mixed_batch(model, names),
    ):
        model(input_ids=ids)
    model.train()
    return model, runs


def _updates_per_epoch(run: _Run) -> int:
    batches = len(run.trainer.get_train_dataloader())
    return max(1, math.ceil(batches / run.cfg.gradient_accumulation_steps))


def _max_steps(run: _Run) -> int:
    if run.cfg.max_steps > 0:
        return run.cfg.max_steps
    return math.ceil(run.cfg.num_train_epochs * _updates_per_epoch(run))


def _batches(run: _Run) -> Iterator[tuple[list[dict[str, torch.Tensor]], Any]]:
    """The Trainer's own order: for each update its micro-batches and the tokens in them."""
    trainer, loader = run.trainer, run.trainer.get_train_dataloader()
    left, updates = run.max_steps, _updates_per_epoch(run)
    for epoch in itertools.count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(updates):
            if left == 0:
                return
            left -= 1
            size = run.cfg.gradient_accumulation_steps
            yield trainer.get_batch_samples(batches, size, trainer.args.device)


def _steps(
    model: Any,
    runs: list[_Run],
    losses_of: LossesApart,
    report: Callable[[TogetherEvent], None] | None,
) -> Iterator[int]:
    """Trains; yields the number of each step when it is done."""
    sources = [_batches(run) for run in runs]
    last = max(run.max_steps for run in runs)
    every, tokens, started = runs[0].cfg.logging_steps, 0, time.perf_counter()
    for step in range(1, last + 1):
        updates = [next(source, None) for source in sources]
        alive = [(run, update) for run, update in zip(runs, updates, strict=True) if update]
        totals: dict[str, Any] = {run.name: 0.0 for run, _ in alive}
        for micro in itertools.zip_longest(*(batches for _, (batches, _) in alive)):
            parts = [
                _Part(run.name, batch, count, len(batches))
                for (run, (batches, count)), batch in zip(alive, micro, strict=True)
                if batch is not None
            ]
            tokens += _forward_backward(model, runs[0].trainer, parts, losses_of)
            for name, loss in losses_of.take().items():
                totals[name] = totals[name] + loss
        for run, _ in alive:
            _update(run, float(totals[run.name]), step)
        if report is not None and (step == 1 or step % every == 0 or step == last):
            report(_event(runs, step, last, tokens, time.perf_counter() - started))
            tokens, started = 0, time.perf_counter()
        yield step


@dataclass
class _Part:
    """One adapter's micro-batch. ``count``: the tokens its update's loss is divided by; None for
    the mean over the ``micro_batches``, where the model takes no count."""

    name: str
    batch: dict[str, torch.Tensor]
    count: Any
    micro_batches: int


def _forward_backward(
    model: Any, trainer: FastftTrainer, parts: list[_Part], losses_of: LossesApart
) -> int:
    """One mixed batch; returns its tokens."""
    import torch

    length = max(part.batch["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": trainer.processing_class.pad_token_id or 0, "labels": -100}
    for part in parts:  # what has no padding has no mask
        part.batch.setdefault("attention_mask", torch.ones_like(part.batch["input_ids"]))
    names = ("input_ids", "attention_mask", "labels")
    inputs = {
        name: torch.cat(
            [
                torch.nn.functional.pad(
                    batch[name], (0, length - batch[name].shape[1]), value=fill.get(name, 0)
                )
                for batch in (part.batch for part in parts)
            ]
        ).to(trainer.args.device)
        for name in names
    }
    sizes = [part.batch["input_ids"].shape[0] for part in parts]
    losses_of.expect(
        [(p.name, n, p.count, p.micro_batches) for p, n in zip(parts, sizes, strict=True)]
    )
    adapters = [part.name for part, n in zip(parts, sizes, strict=True) for _ in range(n)]
    with mixed_batch(model, adapters):
        with trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        loss.backward()
    return int(inputs["input_ids"].numel())


def _update(run: _Run, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FastftError(
            "train",
            "loss",
            expected="a finite value",
            got=f"{loss} at step {step} of {run.cfg.output_dir}",
            remedy="Lower learning_rate, or set dtype: float32.",
        )
    run.losses.append(loss)
    run.trainer.optimizer.step()
    run.trainer.lr_scheduler.step()
    run.trainer.optimizer.zero_grad()


def _event(runs: list[_Run], step: int, last: int, tokens: int, seconds: float) -> TogetherEvent:
    losses = [run.losses[-1] if step <= run.max_steps else math.nan for run in runs]
    rates = [float(run.trainer.optimizer.param_groups[0]["lr"]) for run in runs]
    return TogetherEvent(step, last, tuple(losses), tuple(rates), tokens, seconds)


def _save(model: Any, run: _Run) -> Path:
    return save_adapter(model, Path(run.cfg.output_dir) / "adapter", run.name)


def _finish(model: Any, run: _Run, adapter: Path) -> TrainResult:
    """Evaluates one adapter by itself and reads its file back."""
    import fastft

    model.set_adapter(run.name)
    eval_loss = None
    if run.data.eval is not None:
        eval_loss = float(run.trainer.evaluate()["eval_loss"])
    return TrainResult(
        adapter=adapter,
        steps=run.max_steps,
        train_loss=sum(run.losses) / len(run.losses),
        eval_loss=eval_loss,
        adapter_reload_max_diff=reload_difference(model, run.trainer, run.data, adapter, run.name),
        explanation=dict(fastft.explain(model).to_dict()),
        notes=run.data.notes,
    )
