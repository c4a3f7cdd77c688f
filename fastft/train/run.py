"""``train(cfg)``: one LoRA fine-tuning through ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from fastft.train.adapters import reload_max_diff, save_adapter
from fastft.train.callbacks import (
    Interrupted,
    StepEvent,
    StepReporter,
    StopOnInterrupt,
    StopOnNan,
)
from fastft.train.checkpoints import (
    MarkComplete,
    check_data,
    check_history,
    remove_unfinished,
    resolve_resume,
    write_config,
)
from fastft.train.config import TrainConfig
from fastft.train.data import DataSplits, check_sizes, collator, load_data, positions
from fastft.train.fit import check_fit
from fastft.train.lora_setup import add_lora, apply_memory_policy, check_targets
from fastft.train.models import check_4bit, load_model, load_tokenizer
from fastft.train.output import check_new, check_writable, output_folder
from fastft.train.packing import check_packing
from fastft.train.processes import (
    check_count,
    check_launcher,
    first_process,
    process_prefix,
    same_parameters,
    wait_for_all,
)
from fastft.train.trainer import FastftTrainer, check_report_to, training_arguments

if TYPE_CHECKING:
    import torch

__all__ = ["Prepared", "TrainResult", "prepare", "train"]


@dataclass
class Prepared:
    """Everything a run needs, loaded and checked, before the first step."""

    cfg: TrainConfig
    model: Any
    tokenizer: Any
    data: DataSplits
    trainer: FastftTrainer
    interrupt: StopOnInterrupt
    resume: Path | None


@dataclass
class TrainResult:
    """What a run made. ``train_loss`` is the mean over the steps of this call: of a resumed run,
    those after the checkpoint."""

    adapter: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    adapter_reload_max_diff: float
    explanation: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)


def train(
    cfg: TrainConfig,
    callbacks: Sequence[TrainerCallback] = (),
    report: Callable[[StepEvent], None] | None = None,
    notice: Callable[[str], None] | None = None,
    *,
    force: bool = False,
) -> TrainResult:
    """Fine-tunes LoRA adapters on ``cfg.model`` and saves them to ``<output_dir>/adapter``.

    Args:
        cfg: the run.
        callbacks: ``TrainerCallback`` instances, given to the Trainer as they are.
        report: called with a ``StepEvent`` each ``cfg.logging_steps``, in the first process.
        notice: called with a line of text now and then, in the first process; in each of several
            where its own memory runs out.
        force: train even where the plan says that it does not fit.

    Raises:
        ConfigError, DataError, AdapterError: with nothing trained, or with the previous adapter
            in place.
        Interrupted: after Ctrl-C, when a whole checkpoint is on the disk.
    """
    notice = notice or (lambda text: None)
    output = Path(cfg.output_dir)
    with output_folder(output):
        if cfg.resume_from_checkpoint is None:
            check_new(output)
        prepared = prepare(cfg, callbacks, report, notice, force)
        if first_process():
            for note in prepared.data.notes:
                notice(note)
        state = run_trainer(prepared)
        # Saved before anything else can go wrong.
        adapter = (output / "adapter").absolute()
        if first_process():
            save_adapter(prepared.model, adapter)
        wait_for_all(prepared.trainer.args.device)
        eval_loss = evaluate(prepared)
        return TrainResult(
            adapter=adapter,
            steps=state.global_step,
            train_loss=float(state.training_loss),
            eval_loss=eval_loss,
            adapter_reload_max_diff=adapter_difference(prepared, adapter),
            explanation=explanation(prepared),
            notes=prepared.data.notes,
        )


def prepare(
    cfg: TrainConfig,
    callbacks: Sequence[TrainerCallback] = (),
    report: Callable[[StepEvent], None] | None = None,
    notice: Callable[[str], None] | None = None,
    force: bool = False,
) -> Prepared:
    """Loads and checks all there is to check, the cheapest first; writes only to see that
    ``cfg.output_dir`` can be written."""
    check_launcher()
    output = Path(cfg.output_dir)
    check_writable(output)
    resume = resolve_resume(cfg.resume_from_checkpoint, output)
    check_history(cfg, output, resume)
    check_report_to(cfg)
    check_4bit(cfg)
    tokenizer = load_tokenizer(cfg)
    data = load_data(cfg, tokenizer)
    check_data(data.digest, resume)
    said = notice or (lambda text: None)
    notice = said if first_process() else (lambda text: None)
    args = training_arguments(cfg, data.eval is not None)
    check_count(args.world_size)
    check_fit([cfg], [data.longest], notice, force)
    wait_for_all(args.device)  # each looks at the free memory before one takes of it
    model = load_model(cfg)
    check_sizes(data, model, tokenizer, cfg)
    collate = collator(cfg, tokenizer, positions(model))
    check_targets(model, cfg)
    model.config.use_cache = False  # generation's cache, of no use in training
    model = add_lora(model, cfg)
    interrupt = StopOnInterrupt(notice)
    apply_memory_policy(model, cfg)
    trainer = FastftTrainer(
        cfg,
        lambda text: said(process_prefix() + text),
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=[interrupt, StopOnNan(), MarkComplete(cfg.save_total_limit), *callbacks],
    )
    if cfg.fused:
        _learn_siblings(model, args.device)
    if cfg.padding == "none":
        check_packing(model, trainer.data_collator, args.device)
    if report is not None and first_process():
        trainer.add_callback(StepReporter(report, trainer.batches))
    return Prepared(cfg, model, tokenizer, data, trainer, interrupt, resume)


def run_trainer(prepared: Prepared) -> Any:
    """Trains; returns Transformers' ``TrainOutput``."""
    cfg, trainer = prepared.cfg, prepared.trainer
    if first_process():
        if prepared.resume is None:
            remove_unfinished(cfg.output_dir)
        write_config(cfg, prepared.data.digest)
    same_parameters(prepared.model)
    resume = str(prepared.resume) if prepared.resume else None
    with prepared.interrupt.watching():
        output = trainer.train(resume_from_checkpoint=resume)
    # A signal during the last step changes nothing: the run is over.
    if prepared.interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(trainer.state.global_step, str(resolve_resume("last", cfg.output_dir)))
    return output


def evaluate(prepared: Prepared) -> float | None:
    """Mean loss on the evaluation split, or None without one."""
    if prepared.data.eval is None:
        return None
    return float(prepared.trainer.evaluate()["eval_loss"])


def adapter_difference(prepared: Prepared, adapter: Path) -> float:
    """``reload_max_diff`` on the first example of the data."""
    return reload_difference(prepared.model, prepared.trainer, prepared.data, adapter, "default")


def reload_difference(
    model: Any, trainer: FastftTrainer, data: DataSplits, adapter: Path, name: str
) -> float:
    """``reload_max_diff`` of the adapter ``name``, the active one, on the data's first example."""
    rows = data.eval if data.eval is not None else data.train
    row = {column: rows[0][column] for column in ("input_ids", "labels")}
    batch = trainer.data_collator([row])
    device = next(model.parameters()).device
    # Without labels: the logits are compared, and a fused loss would not make them.
    inputs = {
        key: value.to(device) if hasattr(value, "to") else value
        for key, value in batch.items()
        if key != "labels"
    }
    return reload_max_diff(model, adapter, inputs, name)


def explanation(prepared: Prepared) -> dict[str, Any] | None:
    """What is fused and what is not, or None for plain PEFT."""
    if not prepared.cfg.fused:
        return None
    import fastft

    return dict(fastft.explain(prepared.model).to_dict())


def _learn_siblings(model: Any, device: torch.device) -> None:
    """One short forward, so that layers which share an input are known before the first step: it
    then rounds like all others, and a resumed run repeats the uninterrupted one bit for bit."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    model.train(training)
