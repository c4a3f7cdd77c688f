"""TRL's preference trainers over accelerated models: their fused head is fastft's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import fastft
from fastft.nn import call_counts
from tests.integration import tiny
from tests.integration.test_trainer import arguments, losses, tokenizer  # noqa: F401

utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "_use_triton"):
    pytest.skip("before TRL 1.15 each trainer has a head of its own", allow_module_level=True)


def head_of(model: nn.Module) -> Any:
    return model.get_base_model().get_output_embeddings()


def trained(
    trainer: Any,
    config: Any,
    model: Any,
    folder: Path,
    tokenizer: Any,  # noqa: F811
    **changed: Any,
) -> Any:
    """A trainer of TRL's that has run over preferences between sequences of colours and numbers."""
    words = ["red", "green", "blue", "one", "two", "three"]
    rows = [
        {"prompt": f"{a} {b}", "chosen": f" {b} {a} {a}", "rejected": f" {a}"}
        for a in words
        for b in words
    ]
    options = {"bf16": False, "gradient_checkpointing": False, "max_length": 16, **changed}
    torch.manual_seed(5)
    made = trainer(
        model=model,
        args=config(**arguments(folder, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.train()
    return made


def assert_as_exact(got: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Losses no further from the truth than TRL's over plain PEFT, but for rounding."""
    assert len(got) == len(theirs)
    plain_error = (theirs - truth).norm()
    bound = tiny.ERROR_FACTOR * max(plain_error, torch.finfo(torch.float32).eps * truth.norm())
    assert (got - truth).norm() <= bound, (got, theirs, truth)


def dpo(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast, **changed: Any) -> Any:  # noqa: F811
    from trl import DPOConfig, DPOTrainer

    return trained(DPOTrainer, DPOConfig, model, folder, tokenizer, max_steps=20, **changed)


@pytest.mark.parametrize(
    "changed",
    [{}, {"precompute_ref_log_probs": True}, {"loss_type": ["ipo"]}, {"bf16": True}],
    ids=["reference on the fly", "reference cached", "ipo", "bf16-autocast"],
)
def test_dpo_is_trls_own(
    changed: dict[str, Any],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,  # noqa: F811
) -> None:
    """20 steps: the losses are those of TRL over plain PEFT, the adapter disabled the reference."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    original = utils._ChunkedLogProbFunction
    ours = dpo(fused, tmp_path / "a", tokenizer, **changed)
    assert utils._ChunkedLogProbFunction is original  # only for the length of a forward
    assert utils._use_triton.__module__.startswith("trl")
    theirs = losses(dpo(plain, tmp_path / "b", tokenizer, **changed))
    truth = losses(dpo(exact, tmp_path / "c", tokenizer, **{**changed, "bf16": False}))
    assert_as_exact(losses(ours), theirs, truth)
    counts = call_counts(head_of(fused))
    assert counts.fused >= 20
    assert not counts.fallback


def test_dpo_with_a_trained_head(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:  # noqa: F811
    """modules_to_save: the policy's head is a trained copy, the reference's another, of an
    adapter that TRL adds after ``accelerate``."""
    plain = tiny.peft_model("llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    ours, theirs, truth = (
        losses(dpo(model, tmp_path / name, tokenizer))
        for name, model in {"a": fused, "b": plain, "c": exact}.items()
    )
    assert_as_exact(ours, theirs, truth)
    for module in head_of(fused).modules_to_save.values():
        assert call_counts(module).fused >= 20
        assert not call_counts(module).fallback


def by_logits(trainer: str, model: Any, folder: Path, tokenizer: Any, **changed: Any) -> Any:  # noqa: F811
    """A trainer of TRL's that asks the model for logits."""
    module = pytest.importorskip(f"trl.experimental.{trainer.lower()}")
    kinds = getattr(module, f"{trainer}Trainer"), getattr(module, f"{trainer}Config")
    return trained(*kinds, model, folder, tokenizer, max_steps=6, **changed)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("trainer", "changed"),
    [
        ("ORPO", {}),
        ("ORPO", {"bf16": True}),
        ("CPO", {}),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    ],
    ids=["orpo", "orpo, bf16-autocast", "cpo", "simpo"],
)
def test_trainers_that_ask_for_logits_get_none(
    trainer: str,
    changed: dict[str, Any],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,  # noqa: F811
) -> None:
    """The losses are those of TRL over plain PEFT, and no logits were made."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    original = utils.selective_log_softmax
    with fastft.losses.deferred_in_trl():
        ours = by_logits(trainer, fused, tmp_path / "a", tokenizer, **changed)
    assert utils.selective_log_softmax is original
    theirs = by_logits(trainer, plain, tmp_path / "b", tokenizer, **changed)
    wide = {**changed, "bf16": False}
    truth = losses(by_logits(trainer, exact, tmp_path / "c", tokenizer, **wide))
    assert len(losses(ours)) == 6
    assert_as_exact(losses(ours), losses(theirs), truth)
    counts = call_counts(head_of(fused))
    assert counts.fused >= 6
    assert not counts.fallback
    logged, wanted = (t.state.log_history[0] for t in (ours, theirs))
    for name in ("logits/chosen", "logits/rejected", "logps/chosen", "nll_loss"):
        assert logged[name] == pytest.approx(wanted[name], rel=0.02, abs=2e-3)


def test_open_twice_and_closed_once_is_still_open() -> None:
    original = utils.selective_log_softmax
    logits, index = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    with fastft.losses.deferred_in_trl():
        served = utils.selective_log_softmax
        assert served is not original
        with fastft.losses.deferred_in_trl():
            assert utils.selective_log_softmax is served
        assert utils.selective_log_softmax is served
        assert torch.equal(served(logits, index), original(logits, index))
    assert utils.selective_log_softmax is original


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("outputs", [("log_probs",), OUTPUTS], ids=["log-probs", "everything"])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 4.0, 1.5)], ids=["plain", "all"]
)
def test_the_stand_in_gives_what_trl_gives(
    temperature: float, softcap: float | None, scale: float, outputs: tuple[str, ...]
) -> None:
    from fastft.nn.trl_head import _log_probs

    hidden, weight = torch.randn(11, 16), torch.randn(50, 16)
    bias, labels = torch.randn(50), torch.randint(50, (11,))
    pulls = torch.randn(2, 11)

    def run(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        found = function(*leaves, labels, temperature, 32, softcap, scale, outputs)
        objective = (found[0] * pulls[0]).sum()
        if "entropy" in outputs:
            objective = objective + (found[1] * pulls[1]).sum()
        return [*found, *torch.autograd.grad(objective, leaves)]

    for got, want in zip(run(_log_probs), run(utils._ChunkedLogProbFunction.apply), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_other_models_keep_trls_head() -> None:
    """Inside the forward of an accelerated model, too: only its own head is served."""
    from fastft.nn import trl_head

    head, other = nn.Linear(8, 20, bias=False), torch.randn(20, 8)
    trl_head.begin(head)
    try:
        stand = utils._ChunkedLogProbFunction
        hidden, labels = torch.randn(5, 8), torch.randint(20, (5,))
        rest = (None, labels, 1.0, 32, None, 1.0, ("log_probs",))
        want = stand.original.apply(hidden, other, *rest)[0]
        torch.testing.assert_close(stand.apply(hidden, other, *rest)[0], want)
        assert call_counts(head).fused == 0
        stand.apply(hidden, head.weight, *rest)
        assert call_counts(head).fused == 1
        stand.apply(hidden.double(), head.weight, *rest[:-1], ("log_probs",))
        assert call_counts(head).fallback == {"mixed dtypes": 1}
    finally:
        trl_head.end()
    assert utils._ChunkedLogProbFunction is stand.original
