"""TRL's trainers that distil (GKD, GOLD, IW-OPD) over accelerated models: no logits are made."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fastft
from fastft.nn import call_counts
from tests.integration import tiny
from tests.integration.test_trainer import STEPS, arguments, losses, tokenizer  # noqa: F401
from tests.integration.test_trl import assert_as_exact, head_of

pytest.importorskip("trl")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def trl(name: str) -> Any:
    """A module of TRL's, where the installed version has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"trl.experimental.{name}")


def distilled(
    student: Any,
    teacher: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,  # noqa: F811
    **changed: Any,
) -> Any:
    gkd = trl("gkd")
    words = ["adapter", "model", "small", "learns", "words"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"the {a} of {b}"},
                {"role": "assistant", "content": f"{b} forgets a {a} " + "few " * n},
            ]
        }
        for n, a in enumerate(words)
        for b in words
    ]
    tokenizer.chat_template = TEMPLATE
    options = {"bf16": False, "gradient_checkpointing": False, "max_length": 16, "lmbda": 0.0}
    torch.manual_seed(5)
    made = gkd.GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=gkd.GKDConfig(**arguments(folder, **options, **changed)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.train()
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.5, 0.0, 1.0])
def test_gkd_makes_no_logits(
    beta: float,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,  # noqa: F811
) -> None:
    """The losses are those of TRL over plain PEFT; student and teacher keep their logits."""
    plain, teacher = tiny.peft_model("llama"), tiny.peft_model("qwen2").unload()
    fused, fused_teacher = (fastft.accelerate(copy.deepcopy(m)) for m in (plain, teacher))
    gkd = trl("gkd")  # imported when the context opens
    models = {
        "a": (plain, teacher),
        "b": (tiny.in_float64(plain), tiny.in_float64(teacher)),
    }
    with fastft.losses.deferred_in_trl():
        trainer = distilled(fused, fused_teacher, tmp_path, tokenizer, beta=beta)
    theirs, truth = (
        losses(distilled(*pair, tmp_path / key, tokenizer, beta=beta))
        for key, pair in models.items()
    )
    assert len(truth) == STEPS
    assert_as_exact(losses(trainer), theirs, truth)
    counts = call_counts(head_of(fused))
    assert counts.fused >= STEPS
    assert not counts.fallback
    assert not call_counts(fused_teacher.get_output_embeddings()).fallback
    assert not hasattr(gkd.GKDTrainer.generalized_jsd_loss, "__wrapped__")


CASES: list[dict[str, Any]] = [
    {},
    {"labels": None},
    {"reduction": "sum", "beta": 0},
    {"beta": 1, "num_items_in_batch": torch.tensor(7.0)},
    {"beta": 0.3, "temperature": 1.7, "num_items_in_batch": 3},
    {"reduction": "mean", "temperature": 0.5},  # as TRL has it: over words, too
    {"reduction": "none"},
    {"labels": torch.full((2, 8), -100)},
]


ALL = [("gkd.gkd_trainer.GKDTrainer", case) for case in CASES]
ALL += [
    (f"{name}Trainer", CASES[4])
    for name in ("gold.gold_trainer.GOLD", "iw_opd.iw_opd_trainer.IWOPD")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("teacher", ["deferred", "logits"])
@pytest.mark.parametrize(("name", "case"), ALL)
def test_divergences_of_deferred_logits(name: str, case: dict[str, Any], teacher: str) -> None:
    """TRL's function of deferred logits is TRL's function of their values, and so its gradient."""
    module, trainer = name.rsplit(".", 1)
    kind = getattr(trl(module), trainer)
    plain = tiny.peft_model("gemma3", target_modules=["q_proj", "lm_head"])
    models = [fastft.accelerate(copy.deepcopy(plain)), plain, tiny.in_float64(plain)]
    other = tiny.peft_model("llama").unload()
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    options = {"labels": ids[:, 1:].masked_fill(ids[:, 1:] % 3 == 0, -100), **case}
    found = []
    for n, model in enumerate(models):
        if n == 0 and teacher == "deferred":
            of = fastft.accelerate(copy.deepcopy(other))
        else:
            of = other if n < 2 else tiny.in_float64(other)
        with fastft.losses.deferred_in_trl():
            student = model(input_ids=ids).logits[:, :-1]
            with torch.no_grad():
                goal = of(input_ids=ids).logits[:, :-1]
            loss = kind.generalized_jsd_loss(student, goal, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        (loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum().backward()
        found.append([loss.detach(), *(p.grad for p in trained)])
    for got, theirs, truth in zip(*found, strict=True):
        assert_as_exact(*(t.double().reshape(-1) for t in (got, theirs, truth)))
    fused = case.get("reduction", "sum") == "sum"
    assert (call_counts(head_of(models[0])).fused > 0) == fused


def heads_module() -> Any:
    """That of ``DistillationTrainer``, where its loss is one that is known."""
    module = pytest.importorskip("trl.trainer.distillation_trainer")
    if "chunk_size" in inspect.signature(module._chunked_divergence_loss).parameters:
        pytest.skip("TRL before 1.15")
    return module


def test_a_divergence_of_some_words_is_trls() -> None:
    """IW-OPD's ``top_k`` and GOLD's probabilities are no divergence of the whole distributions."""
    gold, iw_opd = trl("gold.gold_trainer"), trl("iw_opd.iw_opd_trainer")
    model = fastft.accelerate(tiny.peft_model("llama"))
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    goal: Tensor = torch.randn(2, 9, tiny.VOCABULARY)
    for kind, options in (
        (gold.GOLDTrainer, {"logits_are_probs": True}),
        (iw_opd.IWOPDTrainer, {"top_k": 4}),
    ):
        with fastft.losses.deferred_in_trl():
            logits = model(input_ids=ids).logits
            got = kind.generalized_jsd_loss(logits.softmax(-1), goal.softmax(-1), **options)
            lazy = kind.generalized_jsd_loss(model(input_ids=ids).logits, goal, **options)
        want = kind.generalized_jsd_loss(logits.softmax(-1).detach(), goal.softmax(-1), **options)
        torch.testing.assert_close(got.detach(), want)
        want = kind.generalized_jsd_loss(logits.detach().clone(), goal, **options)
        torch.testing.assert_close(lazy.detach(), want)
    assert call_counts(head_of(model)).fused == 0


def test_what_trl_has_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its argument by position, a teacher that learns, and a version that knows no other mean."""
    kind, utils = trl("gkd.gkd_trainer").GKDTrainer, importlib.import_module("trl.trainer.utils")
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5, requires_grad=True)
    call = (student, teacher, None, 0.5, 1.0, "batchmean", 3)
    want = kind.generalized_jsd_loss(*call)
    model, ids = fastft.accelerate(tiny.peft_model("llama")), torch.randint(3, 50, (2, 9))
    learns = torch.randn(2, 9, tiny.VOCABULARY, requires_grad=True)
    with fastft.losses.deferred_in_trl():
        torch.testing.assert_close(kind.generalized_jsd_loss(*call), want)
        kind.generalized_jsd_loss(model(input_ids=ids).logits, learns).backward()
    assert learns.grad is not None

    def older(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Any = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
    ) -> Tensor:
        return student_logits.sum()

    monkeypatch.setattr(kind, "generalized_jsd_loss", staticmethod(older))
    monkeypatch.setattr(
        "trl.trainer.utils.selective_log_softmax", lambda logits, index: logits.sum() + index.sum()
    )
    with fastft.losses.deferred_in_trl():
        assert kind.generalized_jsd_loss(student, teacher) == student.sum()
        assert utils.selective_log_softmax(student, ids) == student.sum() + ids.sum()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_divergence_is_trls() -> None:
    """``torch_compile=True`` traces the trainer's loss with the model."""
    module = heads_module()
    hidden, weight = torch.randn(2, 8, 16), torch.randn(50, 16)
    mask = torch.ones(2, 8, dtype=torch.int64)

    def run() -> Tensor:
        heads = (hidden, hidden * 2, weight, weight, mask, 0.5)
        return module._chunked_divergence_loss(*heads)[0] * 2

    want = run()
    with fastft.losses.deferred_in_trl():
        torch.testing.assert_close(torch.compile(run, backend="eager")(), want)


HEADS: list[dict[str, Any]] = [
    {"beta": 1.0},
    {"beta": 0.0, "num_items_in_batch": torch.tensor(9.0), "student_logit_scale": 1.5},
    {"beta": 0.3, "temperature": 1.7, "num_items_in_batch": 4, "teacher_logit_scale": 0.5},
    {"beta": 0.5, "student_final_logit_softcapping": 4.0, "teacher_final_logit_softcapping": 3.0},
    {"beta": 0.5, "completion_mask": torch.zeros(2, 8, dtype=torch.int64)},
]


@pytest.mark.parametrize("case", HEADS)
def test_the_divergence_of_distillation_trainer(case: dict[str, Any]) -> None:
    """Of heads with their bias: TRL's loss, entropies and gradients."""
    module = heads_module()
    hidden, weight, bias = torch.randn(2, 8, 16), torch.randn(50, 16), torch.randn(50)
    of_teacher = torch.randn(2, 8, 24), torch.randn(50, 24)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    theirs = module._chunked_divergence_loss

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        options = {
            "completion_mask": mask,
            "student_lm_head_bias": leaves[2],
            "teacher_lm_head_bias": bias.to(dtype),
            **case,
        }
        h, w = (t.to(dtype) for t in of_teacher)
        loss, entropy, number = module._chunked_divergence_loss(
            leaves[0], h, leaves[1], w, **options
        )
        assert not entropy.requires_grad
        return [loss, entropy, number, *torch.autograd.grad(loss * 3, leaves)]

    with fastft.losses.deferred_in_trl():
        assert module._chunked_divergence_loss is not theirs
        ours = run(torch.float32)
    assert module._chunked_divergence_loss is theirs
    exact = run(torch.float64)  # TRL's sums of these are float32, too
    for got, plain, truth in zip(ours, run(torch.float32), exact, strict=True):
        torch.testing.assert_close(got, truth.to(got.dtype), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_distillation_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:  # noqa: F811
    """Its first loss, of what the student generates, is that of TRL over plain PEFT; and it comes
    out of the operation."""
    heads_module()
    from trl import DistillationConfig, DistillationTrainer

    plain, teacher = tiny.peft_model("llama"), tiny.peft_model("qwen2").unload()
    tokenizer.padding_side = "left"
    rows = [{"prompt": f"the {word} of"} for word in ("adapter", "model", "words", "small")]
    calls, run = [], fastft.losses.trl.linear_divergence

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return run(*args, **kwargs)

    def trained(model: Any, folder: Path) -> dict[str, Any]:
        options = {"bf16": False, "gradient_checkpointing": False, "max_steps": 2}
        torch.manual_seed(5)
        made = DistillationTrainer(
            model=model,
            teacher_model=teacher,
            args=DistillationConfig(**arguments(folder, **options), max_completion_length=6),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        made.train()
        return made.state.log_history[0]

    theirs = trained(copy.deepcopy(plain), tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch, fastft.losses.deferred_in_trl():
        patch.setattr(fastft.losses.trl, "linear_divergence", counted)
        ours = trained(fastft.accelerate(plain), tmp_path / "b")
    assert len(calls) == 4
    for name in ("loss", "entropy", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
