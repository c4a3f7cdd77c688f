"""Deferred logits are those of the forward, whatever happens until they are read; and a head that
torch asks for more than its value and gradients defers nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastft
from fastft import errors
from fastft.nn import DeferredLogits, call_counts
from tests.integration import tiny

LOSS_ONLY = {"lora": False, "embedding": False, **tiny.LORA_ONLY}
ON_THE_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def twins(accelerated: dict[str, Any] | None = None, **config: Any) -> tuple[Any, Any]:
    plain = tiny.peft_model("llama", **config)
    plain.set_attn_implementation("eager")  # torch's own attention has no second derivative
    return plain, fastft.accelerate(copy.deepcopy(plain), **(accelerated or {}))


def head_of(model: Any) -> Any:
    return model.get_base_model().get_output_embeddings()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


HOOKS: dict[str, Callable[..., Any]] = {
    "register_forward_pre_hook": lambda module, given: (0.5 * given[0],),
    "register_forward_hook": lambda module, given, out: 0.5 * out,
    "register_full_backward_pre_hook": lambda module, given: (0.5 * given[0],),
    "register_full_backward_hook": lambda module, given, _: (0.5 * given[0],),
}


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("config", [{}, ON_THE_HEAD], ids=["plain", "adapter"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_head_run(kind: str, config: dict[str, Any], before: bool) -> None:
    """Registered before or after ``accelerate``."""
    plain, fused = tiny.peft_model("llama", **config), tiny.peft_model("llama", **config)
    if not before:
        fastft.accelerate(fused)
    for model in (plain, fused):
        getattr(head_of(model), kind)(HOOKS[kind])
    if before:
        fastft.accelerate(fused)
    for model in (plain, fused):
        model(**tiny.inputs("llama")).loss.backward()
    for a, b in zip(trained(fused).values(), trained(plain).values(), strict=True):
        same(a.grad, b.grad)
    (report,) = [m for m in fastft.explain(fused).modules if m.kind == "loss"]
    if before:
        assert report.reason == "hooks on the head"
    else:
        assert call_counts(head_of(fused)).fallback["hooks on the head"] == 1


def scaled(model: Any) -> None:
    head_of(model).set_scale("default", 5.0)


def stepped(model: Any) -> None:
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mode": lambda model: model.train(),
    "scaling": scaled,
    "step": stepped,
    "adapters off": lambda model: model.disable_adapter_layers(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_of_the_head_is_that_of_the_forward(name: str) -> None:
    plain, fused = twins(lora_dropout=0.5, **ON_THE_HEAD)
    plain.eval(), fused.eval()
    want = plain(**tiny.inputs("llama")).logits
    got = fused(**tiny.inputs("llama")).logits
    assert type(got) is DeferredLogits
    CHANGES[name](fused)
    same(got.clone(), want)


def test_a_merge_is_refused() -> None:
    _, fused = twins(**ON_THE_HEAD)
    logits = fused(**tiny.inputs("llama")).logits
    fused.merge_adapter()
    with pytest.raises(errors.ArgumentError, match="merge"):
        logits.argmax(-1)


def test_a_bias_that_has_changed_is_refused() -> None:
    head = nn.Linear(16, 50)
    head.__class__ = fastft.nn.FusedHead
    with fastft.nn.head.deferring(head):
        logits = head(torch.randn(2, 7, 16))
    with torch.no_grad():
        head.bias.add_(1)
    with pytest.raises(errors.ArgumentError, match="in-place change"):
        logits.sum()


def test_dropout_of_the_head_is_drawn_once_and_in_the_forward() -> None:
    """Loss and logits have one mask, and it is PEFT's; reading draws nothing."""
    plain, fused = twins(lora_dropout=0.5, target_modules=["lm_head"])
    given = tiny.inputs("llama")
    found = []
    for model in (plain, fused):
        torch.manual_seed(3)
        out = model(**given)
        state = torch.get_rng_state()
        found.append([out.loss, out.logits.clone(), *torch.autograd.grad(
            out.loss, list(trained(model).values()), retain_graph=True)])  # fmt: skip
        found[-1] += [out.logits.mean(), out.logits[:, :-1].mean()]
        assert torch.equal(torch.get_rng_state(), state)
    for got, want in zip(found[1], found[0], strict=True):
        same(got, want)
    assert call_counts(head_of(fused)).fallback == {"logits were read": 1}


def zeroed_slice(z: Tensor) -> Tensor:
    z[:, :-1].zero_()
    return z


def through_two_views(z: Tensor) -> Tensor:
    flat = z.view(-1, z.shape[-1])
    flat[3:5][1:] = 9
    return z


def through_a_copy(z: Tensor) -> Tensor:
    z[:, :-1].contiguous().zero_()
    z[:, 1:].reshape(-1, z.shape[-1]).zero_()
    z[torch.ones(z.shape[:-1], dtype=torch.bool)].zero_()
    z.float().double().zero_()
    return z


def copied_before(z: Tensor) -> Tensor:
    mask = torch.ones(z.shape[:-1], dtype=torch.bool)
    copies = [z[:, :-1].contiguous(), z[:, 1:].reshape(-1, z.shape[-1]), z[mask]]
    z.zero_()
    return torch.cat([t.reshape(-1) for t in copies])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use", [zeroed_slice, through_two_views, through_a_copy, copied_before])
def test_views_are_views_and_copies_are_copies(
    use: Callable[[Tensor], Tensor], mode: Callable[[], Any]
) -> None:
    plain, fused = twins()
    with mode():
        want, got = (use(model(**tiny.inputs("llama")).logits) for model in (plain, fused))
    same(got.clone(), want)


@pytest.mark.parametrize(
    "ask",
    [
        lambda out: out.logits.retain_grad(),
        lambda out: out.logits.register_hook(print),
        lambda out: torch.autograd.grad(out.loss, out.logits),
        lambda out: out.loss.backward(inputs=[out.logits]),
    ],
    ids=["retain_grad", "register_hook", "grad", "backward"],
)
def test_gradients_of_logits_that_their_loss_went_without(ask: Callable[[Any], Any]) -> None:
    plain, fused = twins()
    given = tiny.inputs("llama")
    with torch.no_grad():
        fused(**given).loss.item()  # says nothing of the next
    out = fused(**given)
    with pytest.raises(errors.ArgumentError, match="computed without them"):
        ask(out)
    expected = plain(**given)
    facts = [(o.logits.requires_grad, o.logits.is_leaf) for o in (expected, out)]
    assert facts[0] == facts[1]
    with torch.no_grad():
        assert not fused(**given).logits.requires_grad


def test_gradients_of_logits_whose_loss_comes_later() -> None:
    _, fused = twins()
    given = tiny.inputs("llama")
    labels = given.pop("labels")
    with fastft.losses.deferred_logits():
        logits = fused(**given).logits
    logits.retain_grad()
    F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1)).backward()
    assert bool(logits.grad.abs().sum() > 0)


def save_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
def test_a_checkpoint_around_the_whole_model(selective: bool) -> None:
    plain, fused = twins()
    given = {**tiny.inputs("llama"), "use_cache": False}
    plain(**given).loss.backward()
    options = {}
    if selective:
        contexts = functools.partial(create_selective_checkpoint_contexts, save_products)
        options["context_fn"] = contexts
    checkpoint(lambda: fused(**given).loss, use_reentrant=False, **options).backward()
    for a, b in zip(trained(fused).values(), trained(plain).values(), strict=True):
        same(a.grad, b.grad)


def of_parameters(model: Any, p: dict[str, Tensor], ids: Tensor) -> Tensor:
    given = {"input_ids": ids, "labels": ids, "use_cache": False}
    return torch.func.functional_call(model, p, (), given).loss


def gradient(model: Any, p: dict[str, Tensor], ids: Tensor) -> Any:
    return torch.func.grad(functools.partial(of_parameters, model))(p, ids)


def each_sample(model: Any, p: dict[str, Tensor], ids: Tensor) -> Any:
    of_one = torch.func.grad(lambda p, row: of_parameters(model, p, row[None]))
    return torch.func.vmap(of_one, in_dims=(None, 0))(p, ids)


def tangent(model: Any, p: dict[str, Tensor], ids: Tensor) -> Any:
    return torch.func.jvp(lambda p: of_parameters(model, p, ids), (p,), (p,))


def dual(model: Any, p: dict[str, Tensor], ids: Tensor) -> Any:
    embeds = model.get_input_embeddings()(ids).detach()
    with forward_ad.dual_level():
        made = forward_ad.make_dual(embeds, embeds)
        loss = model(inputs_embeds=made, labels=ids, use_cache=False).loss
        return forward_ad.unpack_dual(loss).tangent


def penalty(model: Any, p: dict[str, Tensor], ids: Tensor) -> Any:
    """A second derivative, of the hidden states' embeddings."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
    (first,) = torch.autograd.grad(loss, embeds, create_graph=True)
    return first, torch.autograd.grad(first.square().sum(), embeds)[0]


def batched(model: Any, p: dict[str, Tensor], ids: Tensor) -> Any:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return torch.autograd.grad(
        loss, list(trained(model).values()), torch.tensor([1.0, 3.0]), is_grads_batched=True
    )


@pytest.mark.parametrize("what", [gradient, each_sample, tangent, dual, penalty, batched])
def test_what_torch_makes_of_a_loss(what: Callable[..., Any]) -> None:
    plain, fused = twins(LOSS_ONLY)
    ids = tiny.inputs("llama")["input_ids"]
    found = []
    for model in (plain, fused):
        p = {name: t.detach() for name, t in trained(model).items()}
        found.append(torch.utils._pytree.tree_leaves(what(model, p, ids)))
    for got, want in zip(found[1], found[0], strict=True):
        same(got, want)


def test_logits_of_a_call_with_other_parameters() -> None:
    """They are gone when it returns."""
    _, fused = twins()
    head, given = head_of(fused), tiny.inputs("llama")
    other = {"base_model.model.lm_head.weight": 2 * head.weight.detach()}
    want = 2 * fused(**given).logits
    same(torch.func.functional_call(fused, other, (), given).logits.clone(), want)
