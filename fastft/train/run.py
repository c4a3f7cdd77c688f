"""``train(cfg)``: one LoRA fine-tuning through ``transformers.Trainer``."""

from __future__ import annotations

import errno
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from fastft.errors import ConfigError
from fastft.train.adapters import reload_max_diff, save_adapter
from fastft.train.callbacks import (
    BatchLog,
    Interrupted,
    StepEvent,
    StepReporter,
    StopOnInterrupt,
    StopOnNan,
)
from fastft.train.checkpoints import (
    MarkComplete,
    check_history,
    check_writable,
    remove_partial,
    resolve_resume,
    save_failed,
    write_config,
)
from fastft.train.config import TrainConfig
from fastft.train.data import DataSplits, collator, load_data
from fastft.train.fit import Halving, check_fit
from fastft.train.lora_setup import add_lora, apply_memory_policy, check_targets
from fastft.train.machine import native_bfloat16, working_device
from fastft.train.models import load_model, load_tokenizer

if TYPE_CHECKING:
    import torch

__all__ = ["Prepared", "TrainResult", "prepare", "train"]

DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG}
)


class FastftTrainer(Trainer):
    """The Trainer as it is, which also notes how many tokens a step had and their hash, and takes
    PEFT's LoRA+ optimizer where ``cfg`` asks for it."""

    def __init__(
        self, cfg: TrainConfig, notice: Callable[[str], None] | None = None, **kwargs: Any
    ) -> None:
        chosen = optimizer_options(cfg) if cfg.fused else None
        super().__init__(optimizer_cls_and_kwargs=chosen, **kwargs)
        self.cfg, self.batches = cfg, BatchLog()
        self.halving = Halving(notice or (lambda text: None))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        ratio = self.cfg.loraplus_lr_ratio
        if ratio is None:
            made: torch.optim.Optimizer = super().create_optimizer(model)
            return made
        from peft.optimizers import create_loraplus_optimizer

        model = self.model if model is None else model
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, model
        )
        made = create_loraplus_optimizer(
            model,
            # By the names of 8-bit optimizers PEFT knows bitsandbytes', and asks it.
            type(f"Fused{kind.__name__}", (kind,), {}) if self.cfg.fused else kind,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.cfg.weight_decay,
            **options,
        )
        made.__class__ = kind
        made._patch_step_function()  # as torch does for a class it has not seen: hooks of steps
        self.optimizer: torch.optim.Optimizer = made
        return made

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        ids: torch.Tensor = inputs["input_ids"]
        self.batches.tokens += ids.numel()
        digest = hashlib.sha256(self.batches.digest.encode() + ids.cpu().numpy().tobytes())
        self.batches.digest = digest.hexdigest()
        usual = super().training_step

        def step(part: dict[str, Any], share: float) -> Any:
            # Where losses are means, not sums over a known number of tokens, each has its share.
            accumulation: int = self.current_gradient_accumulation_steps  # type: ignore[has-type]
            self.current_gradient_accumulation_steps = accumulation * share  # type: ignore[assignment]
            try:
                return usual(model, part, *args, **kw)
            finally:
                self.current_gradient_accumulation_steps = accumulation

        return self.halving.run(model, inputs, step)


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
    """What a run made."""

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
        report: called with a ``StepEvent`` each ``cfg.logging_steps``.
        notice: called with a line of text now and then.
        force: train even where the plan says that it does not fit.

    Raises:
        ConfigError, DataError, AdapterError: with nothing trained, or with the previous adapter
            in place.
        Interrupted: after Ctrl-C, when a whole checkpoint is on the disk.
    """
    notice = notice or (lambda text: None)
    prepared = prepare(cfg, callbacks, report, notice, force)
    for note in prepared.data.notes:
        notice(note)
    state = run_trainer(prepared)
    # Saved before anything else can go wrong.
    adapter = save_adapter(prepared.model, Path(cfg.output_dir) / "adapter")
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
    output = Path(cfg.output_dir)
    check_writable(output)
    resume = resolve_resume(cfg.resume_from_checkpoint, output)
    check_history(cfg, output, resume)
    tokenizer = load_tokenizer(cfg)
    data = load_data(cfg, tokenizer)
    notice = notice or (lambda text: None)
    check_fit([cfg], [data.longest], notice, force)
    model = load_model(cfg)
    check_targets(model, cfg)
    model.config.use_cache = False  # generation's cache, of no use in training
    model = add_lora(model, cfg)
    interrupt = StopOnInterrupt(notice)
    apply_memory_policy(model, cfg)
    trainer = FastftTrainer(
        cfg,
        notice,
        model=model,
        args=training_arguments(cfg, data.eval is not None),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=collator(cfg, tokenizer),
        callbacks=[interrupt, StopOnNan(), MarkComplete(cfg.save_total_limit), *callbacks],
    )
    _quiet(trainer)
    if cfg.fused:
        _learn_siblings(model, trainer.args.device)
    if report is not None:
        trainer.add_callback(StepReporter(report, trainer.batches))
    return Prepared(cfg, model, tokenizer, data, trainer, interrupt, resume)


def run_trainer(prepared: Prepared) -> Any:
    """Trains; returns Transformers' ``TrainOutput``."""
    cfg, trainer = prepared.cfg, prepared.trainer
    write_config(cfg)
    resume = str(prepared.resume) if prepared.resume else None
    try:
        with prepared.interrupt.watching():
            output = trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        if not _is_disk_error(error):
            raise
        remove_partial(cfg.output_dir, trainer.state.global_step)
        raise save_failed(cfg, error) from error
    # A signal during the last step changes nothing: the run is over.
    if prepared.interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(trainer.state.global_step, str(resolve_resume("last", cfg.output_dir)))
    return output


def _is_disk_error(error: Exception) -> bool:
    """Whether writing failed: safetensors and torch.save have errors of their own for it."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    return type(error).__module__.startswith("safetensors") or "PytorchStreamWriter" in str(error)


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


def optimizer_options(cfg: TrainConfig) -> tuple[type, dict[str, Any]]:
    """The fused optimizer, in the form the Trainer takes."""
    import fastft.optim

    kwargs: dict[str, Any] = {
        "lr": cfg.learning_rate,
        "betas": (cfg.adam_beta1, cfg.adam_beta2),
        "max_grad_norm": cfg.max_grad_norm or None,
        "states": cfg.optim_states,
    }
    if cfg.optim.startswith("AdamW"):
        kwargs["eps"] = cfg.adam_epsilon
    return getattr(fastft.optim, cfg.optim), kwargs


def training_arguments(cfg: TrainConfig, evaluates: bool) -> TrainingArguments:
    """``cfg`` in Transformers' terms."""
    device_type = working_device().type
    if cfg.autocast and device_type != "cpu" and not native_bfloat16(device_type):
        raise ConfigError(
            "TrainConfig",
            "autocast",
            expected="false on a GPU that does not multiply bfloat16",
            got="true",
            remedy="Use dtype: float32 or, on CUDA, float16.",
        )
    renamed: dict[str, Any] = {}
    if cfg.gradient_checkpointing:
        # Transformers is renaming it; each version takes its own name without a warning.
        newer = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
        name = "activation_checkpointing" if newer else "gradient_checkpointing"
        renamed = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=cfg.output_dir,
        use_cpu=device_type == "cpu",
        per_device_train_batch_size=cfg.per_device_train_batch_size,
        per_device_eval_batch_size=cfg.per_device_eval_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        max_steps=cfg.max_steps,
        num_train_epochs=cfg.num_train_epochs,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=cfg.lr_scheduler_type,
        warmup_steps=cfg.warmup_steps,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        adam_epsilon=cfg.adam_epsilon,
        # The fused optimizer clips in its own call.
        max_grad_norm=0.0 if cfg.fused else cfg.max_grad_norm,
        bf16=cfg.autocast and cfg.dtype != "float16",
        fp16=cfg.dtype == "float16",
        seed=cfg.seed,
        data_seed=cfg.seed,
        logging_steps=cfg.logging_steps,
        logging_first_step=True,
        # A NaN must be seen, not replaced by the mean so far.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if cfg.eval_steps and evaluates else "no",
        eval_steps=cfg.eval_steps or None,
        save_strategy="steps" if cfg.save_steps else "no",
        save_steps=cfg.save_steps or 1,
        prediction_loss_only=True,
        label_names=["labels"],
        train_sampling_strategy="group_by_length" if cfg.group_by_length else "random",
        report_to=cfg.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=device_type == "cuda",
        **renamed,
    )


def _quiet(trainer: Trainer) -> None:
    """Without the callback that prints each log as a dict: ``report`` says it better."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
