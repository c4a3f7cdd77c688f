"""What does not count has no say: batches of which nothing counts, and values at masked places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastft
from fastft import losses, ops
from tests.integration import tiny

TOKENS, HIDDEN, VOCABULARY = 5, 8, 7


def head() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    return hidden, torch.randn(VOCABULARY, HIDDEN, requires_grad=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "smoothing": {"label_smoothing": 0.1},
    "class weights": {"class_weight": torch.rand(VOCABULARY)},
    "shift": {"shift": True},
    "no items": {"num_items_in_batch": 0},
    "no items, a tensor": {"num_items_in_batch": torch.tensor(0)},
    "none": {"reduction": "none", "num_items_in_batch": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_token_counts(name: str) -> None:
    """torch's own gradients are zero, its mean is NaN."""
    hidden, weight = head()
    found = ops.linear_cross_entropy(hidden, weight, torch.full((TOKENS,), -100), **OPTIONS[name])
    assert found.isnan().all()
    for gradient in torch.autograd.grad(found.sum(), (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_no_token_of_a_divergence_counts(kind: str) -> None:
    hidden, weight = head()
    teacher, mask = torch.randn(TOKENS, VOCABULARY), torch.zeros(TOKENS, dtype=torch.bool)
    found = ops.linear_divergence(hidden, weight, teacher, kind=kind, mask=mask)
    assert found.isnan()
    for gradient in torch.autograd.grad(found, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_model_whose_labels_are_all_ignored() -> None:
    """One such batch must not turn the weights into NaN at the next step."""
    model = fastft.accelerate(tiny.peft_model("llama"))
    batch = tiny.inputs("llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(g.any() for g in gradients)


def test_shift_of_no_token() -> None:
    hidden, weight = torch.randn(2, 0, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    labels = torch.empty(2, 0, dtype=torch.int64)
    found = ops.linear_cross_entropy(hidden, weight, labels, shift=True, reduction="sum")
    assert found == 0


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_classes_that_neither_model_has(kind: str) -> None:
    """A padded vocabulary: -inf in both. As without those classes."""
    torch.manual_seed(0)
    teacher = torch.randn(TOKENS, VOCABULARY)
    found = []
    for padded in (False, True):
        logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))
        logits.requires_grad_()
        pad = (0, 3) if padded else (0, 0)
        both = [functional.pad(t, pad, value=-torch.inf) for t in (logits, teacher)]
        loss = ops.divergence(*both, kind=kind)
        found.append((loss, *torch.autograd.grad(loss, logits)))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 200.0])
def test_masked_logits_of_a_divergence(bad: float) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, TOKENS, VOCABULARY)
    mask = torch.arange(TOKENS) != 2
    found = []
    for value in (0.0, bad):
        own = logits.clone()
        own[2] = value
        own.requires_grad_()
        loss = ops.divergence(own, teacher, mask=mask)
        found.append((loss, *torch.autograd.grad(loss, own)))
    for got, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 200.0])
def test_masked_log_probabilities_of_grpo(bad: float, level: str) -> None:
    torch.manual_seed(0)
    log_probs, old, reference = -torch.rand(3, 2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    found = []
    for value in (0.0, bad):
        given = [torch.where(mask != 0, t, value * s)
                 for t, s in ((log_probs, 1), (old, -1), (reference, -1))]  # fmt: skip
        given[0].requires_grad_()
        loss = losses.grpo_loss(
            given[0], torch.tensor([1.0, -1.0]), mask, old=given[1], reference=given[2], beta=0.1,
            importance_sampling_level=level,
        )  # fmt: skip
        found.append((loss, *torch.autograd.grad(loss, given[0])))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected)
