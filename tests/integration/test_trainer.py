"""transformers.Trainer and TRL's SFTTrainer, unchanged, over fused layers beside plain PEFT.

Losses of a whole run are compared with the same run in float64: the fused run may stray from it
a few times as far as plain PEFT in float32 does.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import fastft
from tests.integration import tiny

TEXT = "the adapter of a small model learns few words in many steps and forgets none"
WORDS = TEXT.split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
STEPS = 6
# Six steps of Adam magnify a difference of rounding; twice the usual factor.
STRAY_FACTOR = 2 * tiny.ERROR_FACTOR


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *dict.fromkeys(WORDS)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def texts(count: int = 24) -> list[str]:
    """Sentences of different lengths, so that batches are padded."""
    turns = itertools.cycle(range(3, 11))
    return [" ".join((WORDS * 2)[i % 7 :][: next(turns)]) for i in range(count)]


def tokenized(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    rows = [tokenizer(text, padding="max_length", max_length=12)["input_ids"] for text in texts()]
    labels = [[-100 if t == 0 else t for t in row] for row in rows]
    masks = [[int(t != 0) for t in row] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": masks, "labels": labels})


def arguments(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
        **changed,
    }


def losses(trainer: Trainer) -> torch.Tensor:
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(found, dtype=torch.float64)


def train(
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    resume: str | None = None,
    **changed: Any,
) -> Trainer:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **changed)),
        train_dataset=tokenized(tokenizer),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_follows(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    """Ours strays from the truth at most a few times as far as plain PEFT's does."""
    assert len(ours) == len(theirs) == len(truth)
    assert len(ours) > 1
    # The log rounds nothing, but a mean over few labels may by chance be exact.
    eps = torch.finfo(torch.float32).eps
    bound = STRAY_FACTOR * max(float(((theirs - truth) / truth).abs().max()), eps)
    assert float(((ours - truth) / truth).abs().max()) <= bound


def assert_all_fused(model: Any) -> None:
    found = fastft.explain(model).to_dict()
    assert found["calls"]["fused"] > 0
    assert not found["calls"]["fallback"]
    assert all(m["fused"] and m["fused_calls"] for m in found["modules"])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
    ],
    ids=["accumulation", "checkpointing-reentrant", "checkpointing", "bf16-autocast"],
)
def test_trainer(
    changed: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    ours = losses(train(fused, tmp_path, tokenizer, **changed))
    theirs = losses(train(plain, tmp_path, tokenizer, **changed))
    truth = losses(train(exact, tmp_path, tokenizer, **{**changed, "bf16": False}))
    assert_follows(ours, theirs, truth)
    assert float(ours[-1]) < float(ours[0]), "nothing was learnt"
    assert_all_fused(fused)


def test_trainer_with_our_optimizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """optimizer_cls_and_kwargs is the Trainer's door for an optimizer of one's own."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    options = {"lr": 1e-2, "weight_decay": 0.0, "max_grad_norm": 1.0}
    trainer = Trainer(
        model=fused,
        args=TrainingArguments(**arguments(tmp_path, max_grad_norm=0.0)),
        train_dataset=tokenized(tokenizer),
        optimizer_cls_and_kwargs=(fastft.optim.AdamW, options),
    )
    trainer.train()
    theirs = losses(train(plain, tmp_path, tokenizer))
    truth = losses(train(exact, tmp_path, tokenizer))
    assert_follows(losses(trainer), theirs, truth)


@pytest.mark.parametrize("door", ["optimizer_cls_and_kwargs", "optimizers"])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion"])
def test_trainer_with_any_of_our_optimizers(
    name: str, door: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Through either door of the Trainer, saved and resumed."""
    from fastft import optim

    kind, lr = getattr(optim, name), {"AdamW8bit": 1e-2, "Lion": 2e-3}[name]

    def trainer(folder: str) -> Trainer:
        model = fastft.accelerate(tiny.peft_model("llama"))
        given: dict[str, Any] = {door: (kind, {"lr": lr, "max_grad_norm": 1.0})}
        if door == "optimizers":
            made = kind(optim.param_groups(model, lr, loraplus_ratio=2.0), max_grad_norm=1.0)
            given = {door: (made, None)}
        changed = arguments(
            tmp_path / folder, max_grad_norm=0.0, save_strategy="steps", save_steps=3
        )
        return Trainer(
            model=model, args=TrainingArguments(**changed), train_dataset=tokenized(tokenizer),
            **given,
        )  # fmt: skip

    whole, resumed = trainer("whole"), trainer("again")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert float(losses(whole)[-1]) < float(losses(whole)[0])
    last = (losses(whole)[-1], losses(resumed)[-1])
    assert float(last[1]) == pytest.approx(float(last[0]), rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume(dropout: float, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A run resumed from the checkpoint of its third step goes on as the one that did not stop.

    Not to the bit: layers that share an input find each other anew, and until then the three
    gradients of that input are summed in another order. A mask or a batch of its own would show
    in the third digit.
    """
    saving = {"save_strategy": "steps", "save_steps": 3}

    def start() -> PeftModel:
        return fastft.accelerate(tiny.peft_model("llama", dropout=dropout))

    whole = train(start(), tmp_path / "whole", tokenizer, **saving)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(start(), tmp_path / "again", tokenizer, checkpoint, **saving)
    ours, expected = losses(resumed), losses(whole)
    assert len(ours) == len(expected) == STEPS
    assert float(((ours - expected) / expected).abs().max()) < 1e-5
    again = train(start(), tmp_path / "twice", tokenizer, checkpoint, **saving)
    assert torch.equal(losses(again), ours)


def test_checkpoint_of_a_fused_run_continues_in_plain_peft(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    fused = fastft.accelerate(tiny.peft_model("llama"))
    train(fused, tmp_path / "fused", tokenizer, save_strategy="steps", save_steps=3)
    plain, exact = tiny.peft_model("llama"), tiny.in_float64(tiny.peft_model("llama"))
    checkpoint = str(tmp_path / "fused" / "checkpoint-3")
    theirs = losses(train(plain, tmp_path / "plain", tokenizer, checkpoint))
    truth = losses(train(exact, tmp_path / "exact", tokenizer))
    assert torch.isfinite(theirs).all()
    assert float(((theirs - truth) / truth).abs().max()) < 1e-4


def test_evaluation_sees_the_logits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """compute_metrics gets the logits that training did without."""
    plain = tiny.peft_model("llama")
    fused = fastft.accelerate(copy.deepcopy(plain))
    seen = []
    for model in (plain, fused):
        kept: list[Any] = []

        def metrics(prediction: Any, kept: list[Any] = kept) -> dict[str, float]:
            kept.append(torch.from_numpy(prediction.predictions))
            return {"rows": float(len(prediction.predictions))}

        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments(tmp_path)),
            eval_dataset=tokenized(tokenizer),
            compute_metrics=metrics,
        )
        seen.append((trainer.evaluate(), kept[0]))
    (theirs, their_logits), (ours, our_logits) = seen
    assert ours["eval_rows"] == theirs["eval_rows"] == len(texts())
    assert our_logits.shape == their_logits.shape
    assert torch.allclose(our_logits, their_logits, rtol=1e-4, atol=1e-5)
    assert abs(ours["eval_loss"] - theirs["eval_loss"]) <= 1e-5 * theirs["eval_loss"]


def test_label_smoothing_sees_the_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The Trainer then computes the loss itself, from the logits, and their gradient must flow."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    runs = [
        losses(train(model, tmp_path, tokenizer, label_smoothing_factor=0.1))
        for model in (fused, plain, exact)
    ]
    assert_follows(*runs)
    assert float(runs[0][-1]) < float(runs[0][0]), "nothing was learnt"


def sft(
    model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast, *, peft: bool, **changed: Any
) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"bf16": False, "gradient_checkpointing": False, "max_length": 16, **changed}
    torch.manual_seed(5)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(folder, **options)),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer,
        peft_config=config if peft else None,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changed",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=["accumulation", "checkpointing", "bf16-autocast"],
)
def test_sft_trainer(
    changed: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """An accelerated PeftModel handed to TRL."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    ours = losses(sft(fused, tmp_path, tokenizer, peft=False, **changed))
    theirs = losses(sft(plain, tmp_path, tokenizer, peft=False, **changed))
    truth = losses(sft(exact, tmp_path, tokenizer, peft=False, **{**changed, "bf16": False}))
    assert_follows(ours, theirs, truth)
    found = fastft.explain(fused).to_dict()
    layers = [m for m in found["modules"] if m["kind"] == "lora"]
    assert all(m["fused_calls"] for m in layers)
    assert not any(m["fallback_calls"] for m in layers)
    # TRL 1.16 has a fused head of its own, which fastft stands in for; one of 1.14 stays TRL's.
    (head,) = [m for m in found["modules"] if m["kind"] == "loss"]
    if hasattr(importlib.import_module("trl.trainer.utils"), "_use_triton"):
        assert head["fused_calls"]
        assert set(head["fallback_calls"]) <= {"logits were read"}
    else:
        assert set(head["fallback_calls"]) <= {"this version of TRL has another fused head"}


def test_sft_trainer_makes_its_adapters_under_patch_peft(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """peft_config=: TRL calls get_peft_model itself."""
    torch.manual_seed(0)
    base = tiny.ARCHITECTURES["llama"].build()
    exact = copy.deepcopy(base).double()
    twin = copy.deepcopy(base)
    fastft.patch_peft()
    try:
        trainer = sft(base, tmp_path, tokenizer, peft=True)
    finally:
        fastft.unpatch_peft()
    layers = [m for m in fastft.explain(trainer.model).to_dict()["modules"] if m["kind"] == "lora"]
    assert layers
    assert all(m["fused"] and m["fused_calls"] for m in layers)
    theirs = losses(sft(twin, tmp_path, tokenizer, peft=True))
    # Float64 adapters, drawn in float32 as the others' are.
    truth = losses(sft(exact, tmp_path, tokenizer, peft=True))
    assert_follows(losses(trainer), theirs, truth)
