"""Log-probabilities and distillation of whole models, deferred and not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastft
from fastft import errors, losses
from fastft.nn import DeferredLogits, call_counts
from tests.integration import tiny

NAMES = ["llama", "gemma3", "opt"]


def pair(name: str) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    plain = tiny.peft_model(name)
    fused = fastft.accelerate(copy.deepcopy(plain))
    given = tiny.inputs(name)
    labels = given.pop("labels")
    return plain, fused, given, labels


def by_hand(model: Any, given: dict[str, Tensor], labels: Tensor, temperature: float) -> Tensor:
    logits = model(**given).logits[:, :-1].float() / temperature
    found = torch.log_softmax(logits, -1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    return torch.where(labels[:, 1:] == -100, 0.0, found)


def gradients(model: Any, loss: Tensor, **options: Any) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, **options))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_of_a_model(name: str, temperature: float) -> None:
    plain, fused, given, labels = pair(name)
    want = by_hand(plain, given, labels, temperature)
    for model in (plain, fused):
        got = losses.log_probs(model, labels, temperature=temperature, **given)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        pull = torch.linspace(-1, 1, want.numel()).view(want.shape)
        for a, b in zip(
            gradients(model, (got * pull).sum()),
            gradients(plain, (by_hand(plain, given, labels, temperature) * pull).sum()),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    head = fused.get_base_model().get_output_embeddings()
    assert (call_counts(head).fused, dict(call_counts(head).fallback)) == (1, {})
    assert type(fused(**given).logits) is Tensor  # outside, nothing is deferred


def test_a_step_of_dpo_is_the_plain_models() -> None:
    """The reference is the model with its adapter disabled: on the fly, or cached before."""
    plain, fused, given, labels = pair("llama")
    found = []
    for model in (plain, fused):
        reference = losses.reference_log_probs(model, labels, **given).sum(-1)
        assert not reference.requires_grad
        policy = losses.log_probs(model, labels, **given).sum(-1)
        assert not torch.allclose(policy, reference)
        loss = losses.dpo_loss(policy[:1], policy[1:], reference[:1], reference[1:]).mean()
        found.append([loss, *gradients(model, loss)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    base = plain.get_base_model()
    with plain.disable_adapter():
        torch.testing.assert_close(
            losses.reference_log_probs(fused, labels, reference_model=base, **given),
            losses.reference_log_probs(fused, labels, **given),
        )
    with pytest.raises(errors.ArgumentError, match="a PeftModel, or a reference_model"):
        losses.reference_log_probs(base, labels, **given)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("teacher_deferred", [False, True])
def test_distillation(kind: str, teacher_deferred: bool) -> None:
    plain, fused, given, _ = pair("gemma3")  # which caps its logits
    teacher = fastft.accelerate(tiny.peft_model("llama"))
    mask = torch.arange(tiny.TOKENS)[None].expand(tiny.BATCH, -1) > 2
    options: dict[str, Any] = {"kind": kind, "temperature": 2.0}
    with torch.no_grad():
        logits = teacher(**given).logits
    want = losses.distillation_loss(plain(**given).logits, logits, mask, **options)
    with losses.deferred_logits():
        student = fused(**given).logits
        if teacher_deferred:
            with torch.no_grad():
                logits = teacher(**given).logits
            assert type(logits) is DeferredLogits
    got = losses.distillation_loss(student, logits, mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(fused, got), gradients(plain, want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    head = fused.get_base_model().get_output_embeddings()
    assert not call_counts(head).fallback


def test_a_teacher_changed_since_is_refused() -> None:
    _, fused, given, _ = pair("llama")
    teacher = fastft.accelerate(tiny.peft_model("llama"))
    with losses.deferred_logits():
        student, logits = fused(**given).logits, teacher(**given).logits
    with torch.no_grad():
        teacher.get_base_model().lm_head.weight.mul_(3)
    with pytest.raises(errors.ArgumentError, match="in-place change"):
        losses.distillation_loss(student, logits)


def test_logits_that_were_changed_or_are_watched_are_read() -> None:
    plain, fused, given, labels = pair("llama")
    teacher = torch.randn(tiny.BATCH, tiny.TOKENS, tiny.VOCABULARY)
    found = []
    for model in (plain, fused):
        with losses.deferred_logits():
            logits, watched = model(**given).logits, model(**given).logits
        logits[..., 3] = -20.0
        watched.retain_grad()
        both = [losses.distillation_loss(logits, teacher), losses.token_log_probs(logits, labels)]
        loss = both[0] + both[1].sum() + losses.distillation_loss(watched, teacher)
        loss = loss + losses.token_log_probs(watched, labels).sum()
        found.append([loss, *gradients(model, loss, retain_graph=True)])
        loss.backward()
        found[-1].append(watched.grad)
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_an_adapter_on_the_head() -> None:
    config = {"target_modules": ["q_proj", "lm_head"]}
    plain = tiny.peft_model("llama", **config)
    fused = fastft.accelerate(copy.deepcopy(plain))
    given = tiny.inputs("llama")
    labels = given.pop("labels")
    teacher = torch.randn(tiny.BATCH, tiny.TOKENS, tiny.VOCABULARY)
    found = []
    for model in (plain, fused):
        with losses.deferred_logits():
            logits = model(**given).logits
        loss = losses.log_probs(model, labels, **given).sum()
        loss = loss + losses.distillation_loss(logits, teacher)
        found.append([loss, *gradients(model, loss)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    counts = call_counts(fused.get_base_model().get_output_embeddings())
    assert counts.fused >= 2
    assert "logits were read" not in counts.fallback


def test_a_teacher_with_an_adapter_on_its_head_is_read() -> None:
    config = {"target_modules": ["q_proj", "lm_head"]}
    plain = tiny.peft_model("llama", **config)
    fused = fastft.accelerate(copy.deepcopy(plain))
    teachers = (
        tiny.peft_model("qwen2", **config),
        fastft.accelerate(tiny.peft_model("qwen2", **config)),
    )
    given, found = tiny.inputs("llama"), []
    given.pop("labels")
    for model, teacher in zip((plain, fused), teachers, strict=True):
        with losses.deferred_logits():
            logits = model(**given).logits
            with torch.no_grad():
                of_teacher = teacher(**given).logits
        loss = losses.distillation_loss(logits, of_teacher)
        found.append([loss, *gradients(model, loss)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_refused() -> None:
    logits, labels = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    with pytest.raises(errors.ShapeError, match="labels"):
        losses.token_log_probs(logits, labels[:, 1:])
    with pytest.raises(errors.ArgumentError, match="temperature"):
        losses.token_log_probs(logits, labels, temperature=0.0)
    with pytest.raises(errors.ShapeError, match="teacher"):
        losses.distillation_loss(logits, logits[..., :8])
    unshifted = losses.token_log_probs(logits, labels, shift=False)
    torch.testing.assert_close(unshifted[:, 1], torch.log_softmax(logits, -1)[:, 1].gather(
        1, labels[:, 1:2])[:, 0])  # fmt: skip
