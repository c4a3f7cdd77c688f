"""The losses' arithmetic, beside formulas written another way and beside TRL's own methods."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import errors, losses

F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return (-3 * torch.rand(*shape, dtype=F64) - 0.01).requires_grad_()


def same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    pulls = torch.randn(got.shape, dtype=F64)
    for a, b in zip(
        torch.autograd.grad((got * pulls).sum(), leaves, allow_unused=True),
        torch.autograd.grad((want * pulls).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


DPO: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "sigmoid": ({}, lambda h: -log_sigmoid(0.3 * h)),
    "smoothed": (
        {"label_smoothing": 0.2},
        lambda h: -0.8 * log_sigmoid(0.3 * h) - 0.2 * log_sigmoid(-0.3 * h),
    ),
    "hinge": ({"loss_type": "hinge"}, lambda h: (1 - 0.3 * h).clamp(min=0)),
    "ipo": ({"loss_type": "ipo"}, lambda h: (h - 1 / 0.6) ** 2),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo(name: str) -> None:
    options, formula = DPO[name]
    c, r, rc, rr = (draw(7) for _ in range(4))
    got = losses.dpo_loss(c, r, rc, rr, beta=0.3, **options)
    same(got, formula(c - rc - r + rr), [c, r, rc, rr])


def test_orpo_and_simpo_are_trls() -> None:
    c, r, nll = draw(7), draw(7), draw(7)
    log_odds = torch.log(c.exp() / (1 - c.exp())) - torch.log(r.exp() / (1 - r.exp()))
    same(losses.orpo_loss(c, r, nll, beta=0.2), nll - 0.2 * log_sigmoid(log_odds), [c, r, nll])
    got = losses.simpo_loss(c, r, beta=2.0, gamma=0.5, label_smoothing=0.1)
    h = 2.0 * (c - r) - 0.5
    same(got, -0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h), [c, r])
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    own = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    ratio = orpo.ORPOTrainer.odds_ratio_loss(own, c, r)[0]
    torch.testing.assert_close((nll - ratio).float(), losses.orpo_loss(c, r, nll, beta=0.2).float())
    own = SimpleNamespace(
        beta=2.0, alpha=0.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.1,
        accelerator=own.accelerator,
    )  # fmt: skip
    torch.testing.assert_close(cpo.CPOTrainer.cpo_loss(own, c, r)[0], got)


def test_orpo_of_a_certain_completion_is_finite() -> None:
    c = torch.tensor([-1e-9, 0.0, -80.0], requires_grad=True)
    r = torch.tensor([-80.0, -1.0, -1e-9], requires_grad=True)
    loss = losses.orpo_loss(c, r, torch.tensor(0.0))
    gradients = torch.autograd.grad(loss.sum(), [c, r])
    assert all(bool(torch.isfinite(t).all()) for t in (loss, *gradients))


def test_kto() -> None:
    p, reference, kl = draw(8), draw(8), torch.tensor(0.7, dtype=F64, requires_grad=True)
    desirable = torch.arange(8) % 3 == 0
    got = losses.kto_loss(
        p, reference, desirable, kl=kl, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5
    )
    z = 0.4 * (p - reference - kl.detach())
    want = torch.where(desirable, 1.5 * (1 - torch.sigmoid(z)), 0.5 * (1 - torch.sigmoid(-z)))
    same(got, want, [p, reference])
    assert torch.autograd.grad(got.sum(), kl, allow_unused=True)[0] is None


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo(loss_type: str, level: str) -> None:
    p, old, reference = draw(4, 6), draw(4, 6).detach(), draw(4, 6).detach()
    advantages = torch.randn(4, dtype=F64)
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 1, 5])[:, None]
    got = losses.grpo_loss(
        p, advantages, mask, old=old, reference=reference, beta=0.1, epsilon=0.2,
        epsilon_high=0.4, loss_type=loss_type, importance_sampling_level=level,
        max_completion_length=9, num_items_in_batch=21,
    )  # fmt: skip
    total, means = torch.zeros((), dtype=F64), []
    for i in range(4):  # a token at a time
        n = int(mask[i].sum())
        whole = torch.exp((p[i, :n] - old[i, :n]).mean())
        terms = []
        for t in range(n):
            w = whole if level == "sequence" else torch.exp(p[i, t] - old[i, t])
            a = advantages[i]
            term = -torch.min(w * a, w.clamp(0.8, 1.4) * a)
            ratio = torch.exp(reference[i, t] - p[i, t])
            terms.append(term + 0.1 * (ratio - torch.log(ratio) - 1))
        total = total + sum(terms)
        means.append(sum(terms) / n)
    count = mask.sum()
    want = {"grpo": sum(means) / 4, "bnpo": total / count, "dr_grpo": total / 36,
            "dapo": total / 21}[loss_type]  # fmt: skip
    same(got, want, [p])


def test_grpo_without_old_log_probabilities_has_their_gradient() -> None:
    p, mask = draw(2, 3), torch.ones(2, 3)
    loss = losses.grpo_loss(p, torch.tensor([1.0, -2.0], dtype=F64), mask, loss_type="bnpo")
    (gradient,) = torch.autograd.grad(loss, p)
    want = torch.tensor([[-1.0] * 3, [2.0] * 3], dtype=F64) / 6
    torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_takes_anything_beneath_its_mask(level: str) -> None:
    p, old, reference, advantages = draw(3, 4), draw(3, 4).detach(), draw(3, 4).detach(), draw(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])

    def loss(fill: float) -> torch.Tensor:
        filled = (t.masked_fill(mask == 0, fill) for t in (p, advantages.detach(), old, reference))
        log_probs, a, *rest = filled
        options = dict(zip(("old", "reference"), rest, strict=True))
        return losses.grpo_loss(
            log_probs, a, mask, beta=0.1, importance_sampling_level=level, **options
        )

    same(loss(float("nan")), loss(0.0), [p])


PAIR = (torch.zeros(3), torch.zeros(3))
REFUSED = {
    "shapes": (lambda: losses.dpo_loss(*PAIR, torch.zeros(2), torch.zeros(3)),
               errors.ShapeError, ["reference_chosen", "(2,)"]),
    "beta": (lambda: losses.dpo_loss(*PAIR, *PAIR, beta=0.0), errors.ArgumentError,
             ["beta", "above 0"]),
    "type": (lambda: losses.dpo_loss(*PAIR, *PAIR, loss_type="dpo"), errors.ArgumentError,
             ["loss_type", "'hinge'"]),
    "smoothing": (lambda: losses.simpo_loss(*PAIR, label_smoothing=0.6), errors.ArgumentError,
                  ["label_smoothing", "0.6"]),
    "gamma": (lambda: losses.simpo_loss(*PAIR, gamma=-1.0), errors.ArgumentError, ["gamma"]),
    "orpo": (lambda: losses.orpo_loss(torch.zeros(3), torch.zeros(2), torch.zeros(())),
             errors.ShapeError, ["rejected"]),
    "kto": (lambda: losses.kto_loss(*PAIR, torch.zeros(2).bool()), errors.ShapeError,
            ["desirable"]),
    "grpo": (lambda: losses.grpo_loss(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 4)),
             errors.ShapeError, ["mask", "(2, 4)"]),
    "grpo reference": (
        lambda: losses.grpo_loss(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3), beta=0.1),
        errors.ArgumentError, ["reference"]),
    "grpo type": (
        lambda: losses.grpo_loss(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3),
                                 loss_type="ppo"),
        errors.ArgumentError, ["loss_type", "'dapo'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
