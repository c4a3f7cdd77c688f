"""Deferred logits where torch would do something that is easily lost: each found by a reader."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastft
from fastft import errors
from fastft.nn import DeferredLogits, FusedHead, call_counts
from fastft.nn import head as head_module
from tests.integration import tiny


def heads() -> tuple[nn.Linear, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(16, 50)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedHead
    return plain, fused, torch.randn(2, 7, 16), torch.randint(50, (14,))


def logits(head: Any, hidden: Tensor) -> Tensor:
    with head_module.deferring(head):
        return head(hidden)


def both(use: Any) -> None:
    """The same result and the same gradient of the head's weight."""
    plain, fused, hidden, labels = heads()
    found = []
    for head in (plain, fused):
        loss = use(logits(head, hidden), labels)
        found.append([loss, *torch.autograd.grad(loss, [head.weight])])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def edited(z: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z[..., 3] = -1e9
    return F.cross_entropy(z.view(-1, 50), labels)


def edited_behind_a_view(z: Tensor, labels: Tensor) -> Tensor:
    some = z[:, :-1]
    with torch.no_grad():
        z[..., 3] = -1e9
    return F.cross_entropy(some.reshape(-1, 50), labels[:12])


def read_first(z: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z.argmax(-1)
    return F.cross_entropy(z.view(-1, 50), labels)


def probabilities_each(z: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels, 50).float()
    each = F.cross_entropy(z.view(-1, 50), target, reduction="none")
    return (each * torch.arange(14.0)).sum()


def mean_of_some(z: Tensor, labels: Tensor) -> Tensor:
    return (z[:, 1:] * 1.5).float().mean()


def mean_under_a_cap(z: Tensor, labels: Tensor) -> Tensor:
    return (torch.tanh(z / 3) * 3).mean()


def mean_of_none(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, 50), labels) + z[:0].mean().nan_to_num()


def behind_a_mask_of_no_dimensions(z: Tensor, labels: Tensor) -> Tensor:
    return z[torch.tensor(True)].square().sum()


def beside_a_detached(z: Tensor, labels: Tensor) -> Tensor:
    known = z.detach()
    return F.cross_entropy(known.view(-1, 50), labels) * F.cross_entropy(z.view(-1, 50), labels)


@pytest.mark.parametrize(
    "use",
    [
        edited,
        edited_behind_a_view,
        read_first,
        probabilities_each,
        mean_of_some,
        mean_under_a_cap,
        mean_of_none,
        behind_a_mask_of_no_dimensions,
        beside_a_detached,
    ],
)
def test_a_trained_head_over_frozen_hidden_states(use: Any) -> None:
    both(use)


def test_means_make_none_and_in_a_trainer_of_trl_s_detached_logits_neither() -> None:
    _, fused, hidden, labels = heads()
    assert logits(fused, hidden).mean().requires_grad
    with head_module.fleeting_logits():
        z = logits(fused, hidden)
    assert not z.detach().mean().requires_grad
    assert not F.cross_entropy(z.detach().view(-1, 50), labels).requires_grad
    assert not call_counts(fused).fallback
    assert z.mean(-1).shape == (2, 7)
    assert call_counts(fused).fallback == {"logits were read": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_under_a_cap_makes_none_where_it_needs_no_gradient(dtype: torch.dtype) -> None:
    plain, fused, hidden, _ = heads()
    with head_module.fleeting_logits():
        z = torch.tanh(logits(fused.to(dtype), hidden.to(dtype)) / 0.5) * 0.5
    found = z[:1, 1:].detach().mean()
    assert found.dtype == dtype
    assert not found.requires_grad
    assert not call_counts(fused).fallback
    want = (torch.tanh(plain(hidden[:1, 1:]) / 0.5) * 0.5).mean()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    )
    torch.testing.assert_close(found.float(), want.detach(), **tolerance)


def test_detached_logits_are_a_picture_of_what_they_were() -> None:
    _, fused, hidden, _ = heads()
    z = logits(fused, hidden)
    kept, want = z.detach(), F.linear(hidden, fused.weight, fused.bias)
    with torch.no_grad():
        fused.weight.mul_(2)
    torch.testing.assert_close(kept, want)
    assert kept.grad_fn is None
    assert type(kept) is Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_made_without_gradients_get_none_later(mode: Any) -> None:
    _, fused, hidden, labels = heads()
    with mode():
        z = logits(fused, hidden)
    assert not z.mean().requires_grad
    assert not F.cross_entropy(z.view(-1, 50), labels).requires_grad


def test_the_mean_over_an_adapter_of_the_head() -> None:
    model = tiny.peft_model("llama", target_modules=["lm_head"])
    given = {"input_ids": tiny.inputs("llama")["input_ids"]}
    want = model(**given).logits.mean()
    fused = fastft.accelerate(copy.deepcopy(model))
    with fastft.losses.deferred_logits():
        got = fused(**given).logits.mean()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    name = "base_model.model.lm_head.lora_A.default.weight"
    gradients = [
        torch.autograd.grad(y, dict(m.named_parameters())[name])[0]
        for y, m in ((got, fused), (want, model))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert not call_counts(fused.get_base_model().lm_head).fallback


def test_probabilities_that_require_a_gradient_get_it() -> None:
    _, fused, hidden, _ = heads()
    target = torch.randn(14, 50, requires_grad=True)
    loss = F.cross_entropy(logits(fused, hidden).view(-1, 50), target.softmax(-1))
    assert bool(torch.autograd.grad(loss, target)[0].abs().sum() > 0)


def test_what_they_are_made_of_may_not_change() -> None:
    _, fused, hidden, labels = heads()
    z = logits(fused, hidden)
    with torch.no_grad():
        fused.weight.mul_(2)
    with pytest.raises(errors.ArgumentError, match="in-place change"):
        z.sum()
    z = logits(fused, hidden)
    hidden.mul_(3)
    with pytest.raises(errors.ArgumentError, match="in-place change"):
        F.cross_entropy(z.view(-1, 50), labels)
    z = logits(fused, hidden)
    fused.weight.data.untyped_storage().resize_(0)  # as FSDP does after a forward
    with pytest.raises(errors.ArgumentError, match="freed"):
        z.sum()


@torch.no_grad()
def test_a_mask_and_a_bias_are_those_of_the_call() -> None:
    """Changed in place before anybody looks, after somebody looked at what they were taken of."""
    plain, fused, hidden, _ = heads()
    found = []
    for head in (plain, fused):
        mask, bias = torch.arange(14).view(2, 7) % 3 == 0, torch.ones(50)
        z = logits(head, hidden)
        masked, twice = z[mask], (z + bias) + bias
        z.argmax(-1)
        mask.logical_not_()
        bias.zero_()
        found.append((masked * 1, twice * 1))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want)


def test_the_loss_under_autocast_is_float32() -> None:
    _, fused, hidden, labels = heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(logits(fused, hidden).view(-1, 50), labels)
    assert loss.dtype == torch.float32
    assert call_counts(fused).fused == 1


def test_another_thread_defers_nothing_here() -> None:
    _, fused, hidden, _ = heads()
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with head_module.deferring(fused):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert type(fused(hidden)) is Tensor
    done.set()
    thread.join()
    assert type(logits(fused, hidden)) is DeferredLogits


class ChannelsFirst(nn.LayerNorm):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(nn.LayerNorm):
    def forward(self, hidden_states: Tensor, scale: float | None = None) -> Tensor:
        y = super().forward(hidden_states)
        return y if scale is None else y * scale


def test_layer_norms_that_take_something_else() -> None:
    holder = nn.ModuleDict({"images": ChannelsFirst(8), "scaled": Scaled(8)})
    plain = copy.deepcopy(holder)
    fastft.accelerate(holder)
    pixels, x = torch.randn(2, 8, 3, 3), torch.randn(4, 8)
    assert torch.equal(holder["images"](pixels), plain["images"](pixels))
    torch.testing.assert_close(holder["scaled"](x), plain["scaled"](x))
    assert call_counts(holder["scaled"]).fused == 1
    assert torch.equal(holder["scaled"](hidden_states=x), plain["scaled"](x))
    assert torch.equal(holder["scaled"](x, scale=2.0), plain["scaled"](x, scale=2.0))


def test_a_layer_norm_under_autocast_keeps_its_dtype() -> None:
    norm = nn.ModuleDict({"n": nn.LayerNorm(8)})
    fused, x = fastft.accelerate(copy.deepcopy(norm)), torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = norm["n"](x), fused["n"](x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
