"""``transformers.Trainer`` as a run needs it, with its arguments and optimizer."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastft.errors import ConfigError
from fastft.train.callbacks import BatchLog
from fastft.train.checkpoints import saving
from fastft.train.config import TrainConfig
from fastft.train.fit import Halving
from fastft.train.machine import native_bfloat16, working_device
from fastft.train.models import first_line
from fastft.train.processes import average_gradients, sum_of_processes

__all__ = ["FastftTrainer", "check_report_to", "training_arguments"]


# Of `report_to`, what names no tracker.
ANY = ("none", "all")


class LengthGroups(LengthGroupedSampler):
    """Transformers' own, in the order of a seed and the epoch as its random sampler is, not of what
    the global state happens to be: a resumed run, and an adapter among others, see that order."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())


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
        # Of several processes each has the model as it is, see ``fastft.train.processes``.
        self.accelerator.prepare_model = functools.partial(
            self.accelerator.prepare_model, evaluation_mode=True
        )
        # It prints each log as a dict: ``report`` says it better.
        self.remove_callback(PrinterCallback)

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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return LengthGroups(sampler.batch_size, sampler.lengths, self.cfg.seed)
        return sampler

    def _run_epoch(self, *args: Any, **kw: Any) -> None:
        # The Trainer looks for the end behind a step: a run resumed at its end would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kw)

    def _save_checkpoint(self, *args: Any, **kw: Any) -> None:
        with saving(self.args.output_dir or "", self.state.global_step):
            super()._save_checkpoint(*args, **kw)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        ids: torch.Tensor = inputs["input_ids"]
        self.batches.here += ids.numel()
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

        loss = self.halving.run(model, inputs, step)
        if self.accelerator.sync_gradients:  # behind the last micro-batch of an update
            average_gradients(model)
            self.batches.tokens += sum_of_processes(self.batches.here, self.args.device)
            self.batches.here = 0
        return loss


def check_report_to(cfg: TrainConfig) -> None:
    """Refuses trackers that Transformers does not know, or whose package is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    names = [cfg.report_to] if isinstance(cfg.report_to, str) else cfg.report_to
    try:
        for tracker in get_reporting_integration_callbacks([n for n in names if n not in ANY]):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            "TrainConfig", "report_to", expected="'none' or installed trackers",
            got=f"{cfg.report_to!r}: {first_line(error)}",
        ) from error  # fmt: skip


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
