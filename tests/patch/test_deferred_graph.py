"""Deferred logits are a tensor like another to autograd, which C++ asks without asking Python:
whatever is done to them gives the gradients that real logits give."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.nn import DeferredLogits, FusedHead, call_counts
from fastft.nn import head as head_module
from tests.integration import tiny

CLASSES = 50


class Square(torch.autograd.Function):
    """A loss that a user wrote: C++ asks its argument for a node."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.float().pow(2).mean()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return (d * 2 * z / z.numel()).to(z.dtype)


square: Callable[[Tensor], Tensor] = Square.apply


def nll(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.float().reshape(-1, z.shape[-1]), labels.reshape(-1))


def capped(z: Tensor) -> Tensor:
    return torch.tanh((z / 3).float()) * 3


def of_a_batch(z: Tensor, labels: Tensor) -> Tensor:
    return torch.vmap(lambda a: (a**2).sum())(z).sum() + nll(z, labels)


def caught_by_a_batch(z: Tensor, labels: Tensor) -> Tensor:
    return torch.vmap(lambda a: (a * z).sum())(torch.ones(3, *z.shape)).sum()


def remembered(z: Tensor, labels: Tensor) -> Tensor:
    bias = torch.ones(z.shape[-1])
    mask = torch.arange(labels.numel()).view(labels.shape) % 3 > 0
    made = [capped(z), z + bias, z[mask], z[:, 1:].reshape(-1, z.shape[-1]), z[:, 1:].contiguous()]
    made += [z[:, 1:-1], z.view(-1, z.shape[-1])[2:], z.bfloat16().float(), z.to(torch.float64)]
    return sum((square(t) + (t**3).mean() for t in made), torch.zeros(()))


def changed_in_place(z: Tensor, labels: Tensor) -> Tensor:
    copies, flat = [z.to(torch.float64), z * 2], z.view(-1, z.shape[-1])
    some = z[:, :-1]
    flat[3:5] = 0.0
    z[..., 3] = 7.0
    z.mul_(1.5)
    return sum((square(t) + (t**3).mean() for t in [*copies, flat, some, z]), torch.zeros(()))


def hooked(z: Tensor, labels: Tensor) -> Tensor:
    twice, some, known = z * 2, z[:, 1:], square(z)
    z.register_hook(lambda d: 3 * d)
    return known + nll(twice, labels) + nll(some, labels[:, 1:]) + (z**3).mean()


def differentiated(z: Tensor, labels: Tensor) -> Tensor:
    """A second derivative, by way of the logits and of a view of them."""
    some = capped(z)[:, 1:]
    loss = square(z).exp() + (some**3).sum()
    return sum((d.square().sum() for d in torch.autograd.grad(loss, [z, some], create_graph=True)),
               torch.zeros(()))  # fmt: skip


def seen_without_gradients(z: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        z.argmax(-1)
    with torch.no_grad():
        constant = z[:, 1:].to(torch.float64)
    return nll(z, labels) + nll(constant, labels[:, 1:]) + (z**3).mean()


def fused_then_read(z: Tensor, labels: Tensor) -> Tensor:
    return nll(z, labels) + z.logsumexp(-1).square().mean()


def read_then_fused(z: Tensor, labels: Tensor) -> Tensor:
    return z.logsumexp(-1).square().mean() + nll(z, labels)


def capped_square(z: Tensor, labels: Tensor) -> Tensor:
    return square(capped(z)[:, 1:])


def checkpointed(use: Callable[..., Tensor], reentrant: bool) -> Callable[..., Tensor]:
    return lambda z, labels: checkpoint(use, z, labels, use_reentrant=reentrant)  # type: ignore[no-any-return]


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function": lambda z, labels: square(z),
    "function and loss": lambda z, labels: square(z) + nll(z, labels),
    **{use.__name__: use for use in (
        of_a_batch, caught_by_a_batch, remembered, changed_in_place, hooked, differentiated,
        seen_without_gradients)},
    **{f"{use.__name__} checkpointed, reentrant={reentrant}": checkpointed(use, reentrant)
       for use in (nll, fused_then_read, read_then_fused, capped_square)
       for reentrant in (True, False)},
}  # fmt: skip


def plain_head() -> nn.Module:
    return nn.Linear(16, CLASSES)


def fused(head: nn.Module) -> Any:
    head = copy.deepcopy(head)
    head.__class__ = FusedHead
    return head


def logits(head: Any, hidden: Tensor) -> Any:
    with head_module.deferring(head):
        return head(hidden)


def gradients(head: nn.Module, use: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(2, 7, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(CLASSES, (2, 7))
    loss = use(logits(head, hidden * 1), labels)
    loss.backward()
    found = [hidden, *head.parameters()]
    return [loss.detach(), *(t.grad for t in found if t.grad is not None)]


@pytest.mark.parametrize("name", USES)
def test_what_users_do_to_logits(name: str) -> None:
    torch.manual_seed(0)
    head = plain_head()
    want = gradients(copy.deepcopy(head), USES[name], torch.float32)
    got = gradients(fused(head), USES[name], torch.float32)
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["function and loss", "of_a_batch", "capped_square checkpointed, "
                                  "reentrant=True"])  # fmt: skip
def test_under_autocast_as_well(name: str) -> None:
    """Torch asks for the values from inside an operation, where autocast does nothing any more."""
    torch.manual_seed(0)
    head, use = plain_head(), USES[name]

    def outside(z: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return use(z, labels)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = gradients(copy.deepcopy(head), outside, torch.float32)
        got = gradients(fused(head), outside, torch.float32)
    for a, b in zip(got, want, strict=True):
        # bfloat16 has 2^-8, and gradients are sums of a few dozen such roundings.
        assert float((a - b).norm()) <= 2**-6 * float(b.norm())


@pytest.mark.parametrize("use", [USES["function and loss"], of_a_batch, checkpointed(nll, True)])
def test_an_adapter_of_the_head(use: Callable[..., Tensor]) -> None:
    plain = tiny.peft_model("llama", target_modules=["q_proj", "lm_head"])
    model = fastft.accelerate(copy.deepcopy(plain))
    given, found = tiny.inputs("llama"), []
    for m in (plain, model):
        out = m(**given)
        (out.loss + use(out.logits, given["labels"])).backward()
        found.append([p.grad for p in m.parameters() if p.requires_grad])
    assert type(out.logits) is DeferredLogits
    for a, b in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_torch_says_of_them_in_the_graph() -> None:
    torch.manual_seed(0)
    head = plain_head()
    for z in (logits(head, torch.randn(2, 7, 16)), logits(fused(head), torch.randn(2, 7, 16))):
        assert (z.requires_grad, z.is_leaf, z.retains_grad) == (True, False, False)
        assert z[:, 1:]._is_view()
        assert z.mul_(2) is z
        assert z._version == 1
        with torch.no_grad():
            assert not z.to(torch.float64).requires_grad
    with torch.no_grad():
        z = logits(fused(head), torch.randn(2, 7, 16))
    z.requires_grad_()
    nll(z, torch.zeros(2, 7, dtype=torch.int64)).backward()
    assert bool(z.grad.abs().sum() > 0)


def test_a_change_that_a_graph_would_not_see_is_refused() -> None:
    z = logits(fused(plain_head()), torch.randn(2, 7, 16))
    loss = (z**2).sum()
    with torch.no_grad():
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    head = fused(plain_head())
    loss = square(logits(head, torch.randn(2, 7, 16)))
    with torch.no_grad():
        head.weight.zero_()
    with pytest.raises(fastft.errors.ArgumentError, match="in-place change"):
        loss.backward()


def test_a_graph_holds_no_logits_that_nobody_read() -> None:
    head = fused(plain_head())
    z = logits(head, torch.randn(2, 7, 16))
    made = [z, z.to(torch.float64), z[:, 1:], capped(z)]
    loss = nll(z, torch.zeros(2, 7, dtype=torch.int64)) + z.mean()
    assert all(t.requires_grad and t._value is None for t in made)
    assert not call_counts(head).fallback
    gone = [weakref.ref(t) for t in made]
    gc.disable()  # they are freed without
    try:
        del z, made
        assert all(t() is None for t in gone)
    finally:
        gc.enable()
    loss.backward()


def test_a_compiled_loss_over_deferred_logits() -> None:
    torch.manual_seed(0)
    head = plain_head()
    compiled = torch.compile(lambda z, labels: nll(z, labels) + square(z), backend="eager")
    want = gradients(copy.deepcopy(head), USES["function and loss"], torch.float32)
    got = gradients(fused(head), compiled, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("change", ["data", "numpy"])
def test_a_change_without_a_version_is_seen_after_a_fused_loss(change: str) -> None:
    plain = tiny.peft_model("llama", target_modules=["q_proj"])
    given, found = tiny.inputs("llama"), []
    for model in (plain, fastft.accelerate(copy.deepcopy(plain))):
        out = model(**given)
        if change == "data":
            out.logits.data.div_(3.0)
        else:
            out.logits.detach().numpy()[..., 4:] = -50.0
        found.append(nll(out.logits, given["labels"]))
    torch.testing.assert_close(*found)


def test_a_checkpoint_that_read_reads_again_though_a_sibling_went_without() -> None:
    model = fastft.accelerate(tiny.peft_model("llama", target_modules=["q_proj"]))
    given = tiny.inputs("llama")
    labels = given["labels"]
    with fastft.losses.deferred_logits():
        z = model(input_ids=given["input_ids"]).logits
    y, total = z.double(), z.sum()

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1))

    read = checkpoint(loss, z, use_reentrant=False)
    (loss(y) + read + 0 * total).backward()
