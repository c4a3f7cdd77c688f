"""Preference and policy losses, as arithmetic on log-probabilities.

They take what :mod:`fastft.losses.log_probs` makes without logits; everything here is a few numbers
a sequence or a token. Names and conventions are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastft.errors import ArgumentError, ShapeError

__all__ = ["dpo_loss", "grpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]


def _check(where: str, tensors: Mapping[str, Tensor | None], dims: int) -> None:
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given.values()))
    for name, tensor in given.items():
        if tensor.dim() != dims or tensor.shape != first.shape:
            what = "(batch,)" if dims == 1 else "(batch, tokens)"
            expected = f"{what}, the same for {', '.join(given)}"
            raise ShapeError(where, name, expected=expected, got=str(tuple(tensor.shape)))


def _check_range(where: str, name: str, value: float, fine: bool, expected: str) -> None:
    if not fine:
        raise ArgumentError(where, name, expected=expected, got=str(value))


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation of each pair.

        h = (chosen - reference_chosen) - (rejected - reference_rejected)
        sigmoid:  -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
        hinge:    max(0, 1 - beta h)
        ipo:      (h - 1 / (2 beta))^2

    (Rafailov et al. 2023, "Direct Preference Optimization"; Zhao et al. 2023, "SLiC-HF"; Azar et
    al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences".)

    Args:
        chosen, rejected: (batch,), log-probabilities of the completions: summed over their tokens,
            for "ipo" their means.
        reference_chosen, reference_rejected: (batch,), the reference model's.
        beta: above 0.
        label_smoothing: eps, the share of pairs whose order is wrong, 0 to 0.5; "sigmoid" only.

    Returns:
        (batch,).

    Raises:
        ShapeError: shapes that differ. ArgumentError: an unknown loss_type, or numbers outside
            their range.
    """
    where = "fastft.losses.dpo_loss"
    given = {"chosen": chosen, "rejected": rejected, "reference_chosen": reference_chosen,
             "reference_rejected": reference_rejected}  # fmt: skip
    _check(where, given, 1)
    _check_range(where, "beta", beta, beta > 0, "a number above 0")
    fine = 0 <= label_smoothing <= 0.5
    _check_range(where, "label_smoothing", label_smoothing, fine, "0 to 0.5")
    h = (chosen - reference_chosen) - (rejected - reference_rejected)
    if loss_type == "sigmoid":
        wrong = logsigmoid(-beta * h)
        return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * wrong
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)).square()
    expected = "'sigmoid', 'hinge' or 'ipo'"
    raise ArgumentError(where, "loss_type", expected=expected, got=repr(loss_type))


def orpo_loss(chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float = 0.1) -> Tensor:
    """Odds-ratio preference optimisation of each pair; it has no reference.

        chosen_nll - beta log sigmoid(log(odds(chosen) / odds(rejected))),  odds(p) = p / (1 - p)

    (Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model".)

    Args:
        chosen, rejected: (batch,), mean log-probabilities of the completions' tokens, below 0.
        chosen_nll: a scalar or (batch,), the language-modelling loss of the chosen ones.

    Returns:
        (batch,).

    Raises:
        ShapeError, ArgumentError: as for :func:`dpo_loss`.
    """
    where = "fastft.losses.orpo_loss"
    _check(where, {"chosen": chosen, "rejected": rejected}, 1)
    _check_range(where, "beta", beta, beta > 0, "a number above 0")
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return chosen_nll - beta * logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, right near 0 and far from it (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    # Each branch sees only what it is good for, so that the other's gradient is no NaN.
    a = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    b = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, a, b)


def kto_loss(
    log_probs: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation of each completion, of which none needs a partner.

        r = log_probs - reference
        desirable: lambda_D (1 - sigmoid(beta (r - kl)))
        else:      lambda_U (1 - sigmoid(beta (kl - r)))

    (Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".)

    Args:
        log_probs, reference: (batch,), of the completions, summed over their tokens.
        desirable: (batch,) bool.
        kl: what the batch's divergence from the reference is estimated at, at least 0; it gets no
            gradient. The paper takes mismatched pairs of prompt and completion for it.

    Returns:
        (batch,).

    Raises:
        ShapeError, ArgumentError: as for :func:`dpo_loss`.
    """
    where = "fastft.losses.kto_loss"
    _check(where, {"log_probs": log_probs, "reference": reference, "desirable": desirable}, 1)
    _check_range(where, "beta", beta, beta > 0, "a number above 0")
    if isinstance(kl, Tensor):
        kl = kl.detach()
    h = beta * (log_probs - reference - kl)
    gain = desirable_weight * torch.sigmoid(-h)  # 1 - sigmoid(h)
    return torch.where(desirable.bool(), gain, undesirable_weight * torch.sigmoid(h))


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimisation of each pair; it has no reference.

        h = beta (chosen - rejected) - gamma
        -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)

    (Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward".)

    Args:
        chosen, rejected: (batch,), mean log-probabilities of the completions' tokens.
        gamma: the margin, at least 0.

    Returns:
        (batch,).

    Raises:
        ShapeError, ArgumentError: as for :func:`dpo_loss`.
    """
    where = "fastft.losses.simpo_loss"
    _check(where, {"chosen": chosen, "rejected": rejected}, 1)
    _check_range(where, "beta", beta, beta > 0, "a number above 0")
    _check_range(where, "gamma", gamma, gamma >= 0, "a number of at least 0")
    fine = 0 <= label_smoothing <= 0.5
    _check_range(where, "label_smoothing", label_smoothing, fine, "0 to 0.5")
    h = beta * (chosen - rejected) - gamma
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


# How grpo_loss averages over (batch, tokens).
_AVERAGES = ("grpo", "bnpo", "dr_grpo", "dapo")


def grpo_loss(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Group-relative policy optimisation.

        w = exp(log_probs - old);   c = clip(w, 1 - epsilon, 1 + epsilon_high)
        l = -min(w A, c A) + beta (exp(d) - d - 1),   d = reference - log_probs
        grpo: mean over sequences of the mean over their tokens;  bnpo: mean over all tokens
        dr_grpo: sum / (batch max_completion_length);  dapo: sum / num_items_in_batch

    (Shao et al. 2024, "DeepSeekMath"; Liu et al. 2025, "Understanding R1-Zero-Like Training", for
    dr_grpo; Yu et al. 2025, "DAPO"; Zheng et al. 2025, "GSPO", for the sequence's weight.)

    Args:
        log_probs: (batch, tokens), of the completion's tokens.
        advantages: A: (batch,), or (batch, tokens).
        mask: (batch, tokens), true (or not 0) for tokens that count.
        old: (batch, tokens), when the completions were drawn; None: now, so that w is 1 with the
            gradient of log_probs.
        reference: (batch, tokens), for beta > 0.
        epsilon_high: None for epsilon.
        importance_sampling_level: "token", or "sequence": w is of the mean over its tokens.
        max_completion_length: for "dr_grpo"; None: tokens.
        num_items_in_batch: for "dapo"; None: the tokens that count here.

    Returns:
        a scalar.

    Raises:
        ShapeError: shapes that differ. ArgumentError: an unknown loss_type or level, or beta
            without a reference.
    """
    where = "fastft.losses.grpo_loss"
    given = {"log_probs": log_probs, "mask": mask, "old": old, "reference": reference}
    _check(where, given, 2)
    levels = ("token", "sequence")
    refusals = (
        ("loss_type", loss_type in _AVERAGES, " or ".join(map(repr, _AVERAGES)), repr(loss_type)),
        ("importance_sampling_level", importance_sampling_level in levels,
         " or ".join(map(repr, levels)), repr(importance_sampling_level)),
        ("reference", beta == 0 or reference is not None, "reference log-probabilities with beta",
         "None"),
    )  # fmt: skip
    for name, fine, expected, got in refusals:
        if not fine:
            raise ArgumentError(where, name, expected=expected, got=got)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    kept = mask.to(log_probs.dtype)
    # Where the mask is 0 log-probabilities and advantages may be anything.
    advantages = torch.where(mask != 0, advantages, 0.0)
    difference = log_probs - (log_probs.detach() if old is None else old)
    difference = torch.where(mask != 0, difference, 0.0)
    lengths = kept.sum(-1).clamp(min=1)
    if importance_sampling_level == "sequence":
        difference = ((difference * kept).sum(-1) / lengths)[:, None]
    weight = difference.exp()
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = weight.clamp(1 - epsilon, 1 + high)
    losses = -torch.minimum(weight * advantages, clipped * advantages)
    if reference is not None and beta != 0:
        d = torch.where(mask != 0, reference - log_probs, 0.0)
        losses = losses + beta * (d.exp() - d - 1)
    losses = losses * kept
    if loss_type == "grpo":
        return (losses.sum(-1) / lengths).mean()
    if loss_type == "bnpo":
        return losses.sum() / kept.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return losses.sum() / (losses.shape[0] * (max_completion_length or losses.shape[1]))
    count = kept.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / count
