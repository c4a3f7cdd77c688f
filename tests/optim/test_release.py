from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft import optim

KINDS: dict[str, Callable[..., Any]] = {
    "AdamW": optim.AdamW,
    "AdamW8bit": lambda p, **more: optim.AdamW8bit(p, min_8bit_size=1, **more),
    "ScheduleFreeAdamW": optim.ScheduleFreeAdamW,
    "Adafactor": optim.Adafactor,
    "SGD": lambda p, **more: optim.SGD(p, momentum=0.9, **more),
}


class Model(nn.Module):
    def __init__(self, reentrant: bool | None = None, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.drop, self.reentrant, self.shared = nn.Dropout(0.2), reentrant, shared

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *(self.layers[:1] if self.shared else ())]:

            def block(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return self.drop(torch.tanh(layer(x)))

            x = block(x) if self.reentrant is None else checkpoint(
                block, x, use_reentrant=self.reentrant)  # fmt: skip
        return x.square().sum()


def _twins(kind: str, **options: Any) -> tuple[Model, Any, Model, Any]:
    one, two = Model(**{k: options.pop(k) for k in ("reentrant", "shared") if k in options}), None
    two = copy.deepcopy(one)
    first = KINDS[kind](one.parameters(), lr=0.01, **options)
    return one, first, two, KINDS[kind](two.parameters(), lr=0.01, **options)


def _inputs(seed: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _same(one: Model, two: Model, exactly: bool = True) -> None:
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        if exactly:
            assert torch.equal(p, q)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_an_ordinary_step(kind: str, reentrant: bool | None) -> None:
    one, plain, two, released = _twins(kind, reentrant=reentrant)
    optim.StepInBackward(released)
    for step in range(3):
        for model, optimizer in ((one, plain), (two, released)):
            torch.manual_seed(step)
            model(_inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    _same(one, two)


def test_no_gradient_outlives_its_step() -> None:
    model = Model()
    optimizer = optim.AdamW(model.parameters())
    optim.StepInBackward(optimizer)
    gradients: list[weakref.ref[Tensor]] = []
    for p in model.parameters():
        p.register_hook(lambda g: gradients.append(weakref.ref(g)) or None)
    model(_inputs(0)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert len(gradients) == 6
    assert sum(g() is not None for g in gradients) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_step_once_by_their_sum(kind: str) -> None:
    one, plain, two, released = _twins(kind)
    release = optim.StepInBackward(released)
    for step in range(2):
        for micro in range(3):
            torch.manual_seed(10 * step + micro)
            one(_inputs(micro)).backward()
        plain.step()
        plain.zero_grad()
        with release.accumulating():
            for micro in range(2):
                torch.manual_seed(10 * step + micro)
                two(_inputs(micro)).backward()
        torch.manual_seed(10 * step + 2)
        two(_inputs(2)).backward()
        released.step()
        assert all(p.grad is None for p in two.parameters())
    _same(one, two)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_global_clip_is_exact(kind: str, held: bool) -> None:
    one, plain, two, released = _twins(kind, max_grad_norm=0.5)
    release = optim.StepInBackward(released)
    for step in range(3):
        torch.manual_seed(step)
        loss = one(_inputs(step))
        loss.backward()
        if held:
            one(_inputs(9)).backward()
        plain.step()
        plain.zero_grad()
        torch.manual_seed(step)
        if held:
            with release.accumulating():
                two(_inputs(step)).backward()

        def closure(step: int = step) -> Tensor:
            loss = two(_inputs(9 if held else step))
            loss.backward()
            return loss

        own = release.step(closure)
        if not held:
            # The second pass draws the first one's dropout masks.
            torch.testing.assert_close(own, loss, rtol=1e-5, atol=0)
        assert all(p.grad is None for p in two.parameters())
        assert released.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-5)
    _same(one, two, exactly=False)


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    model = Model()
    optimizer = optim.AdamW(model.parameters(), max_grad_norm=1.0)
    release = optim.StepInBackward(optimizer)
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        loss = model(_inputs(0)) * float("nan")
        loss.backward()
        return loss

    release.step(closure)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_it_refuses() -> None:
    model = Model(reentrant=True, shared=True)
    optim.StepInBackward(optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(_inputs(0)).backward()
    model = Model(reentrant=False, shared=True)
    optim.StepInBackward(optim.AdamW(model.parameters()))
    model(_inputs(0)).backward()
    model = Model()
    optim.StepInBackward(optim.AdamW(model.parameters(), max_grad_norm=1.0))
    with pytest.raises(ValueError, match="closure"):
        model(_inputs(0)).backward()
    with pytest.raises(ValueError, match="optimizer"):
        optim.StepInBackward(torch.optim.AdamW(model.parameters()))


def test_muon_of_matrices() -> None:
    """Alone each is orthogonalized in a stack of its own, whose products may round otherwise."""
    one, two = Model(), Model()

    def muon(model: Model) -> optim.Muon:
        return optim.Muon([layer.weight for layer in model.layers], lr=0.01)

    plain, released = muon(one), muon(two)
    optim.StepInBackward(released)
    for step in range(3):
        for model, optimizer in ((one, plain), (two, released)):
            torch.manual_seed(step)
            model(_inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(one.layers[0].weight, Model().layers[0].weight)
    for mine, theirs in zip(one.layers, two.layers, strict=True):
        # The step is 3 x 0.01 in all; the iteration runs in bfloat16.
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=3e-4)


def test_removed() -> None:
    model = Model()
    release = optim.StepInBackward(optim.AdamW(model.parameters()))
    release.remove()
    model(_inputs(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_plain_step_after_a_clip_is_not_clipped_by_it() -> None:
    one, plain, two, released = _twins("SGD", max_grad_norm=0.5)
    release = optim.StepInBackward(released)
    for model, step in ((one, plain.step), (two, release.step)):

        def closure(model: Model = model) -> Tensor:
            torch.manual_seed(0)
            loss = model(_inputs(0))
            loss.backward()
            return loss

        step(closure)
    release.remove()
    assert released.grad_norm > 0.5
    for model, optimizer in ((one, plain), (two, released)):
        optimizer.zero_grad()
        torch.manual_seed(1)
        model(_inputs(1)).backward()
        optimizer.max_grad_norm = None
        optimizer.step()
    assert released.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-5)
    _same(one, two, exactly=False)


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_all_gradients(kind: str, options: dict[str, Any]) -> None:
    """Also of those that were held, and that no later backward reached. The squares are summed one
    by one here, in blocks there."""
    one, plain, two, released = _twins(kind, **options)
    release = optim.StepInBackward(released)
    for step in range(3):
        torch.manual_seed(step)
        one(_inputs(step)).backward()
        one.layers[0](_inputs(9)).sum().backward()
        plain.step()
        plain.zero_grad()
        torch.manual_seed(step)
        with release.accumulating():
            two(_inputs(step)).backward()
        two.layers[0](_inputs(9)).sum().backward()
        released.step()
        assert (float(plain.grad_norm) > 0) == (not options)
        assert float(released.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-5)
    _same(one, two)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e30])
def test_the_norm_of_gradients_of_any_size(size: float) -> None:
    """One of a parameter that is left as it is counts: the norm says that something was."""
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([p, q], lr=1e-3)
    optim.StepInBackward(optimizer)
    (p.sum() * size + q.sum()).backward()
    optimizer.step()
    finite = size == 1e30
    assert optimizer.skipped_steps == (not finite)
    assert bool((p == 1).all()) != finite
    assert bool((q < 1).all())
    norm = float(optimizer.grad_norm)
    assert norm == pytest.approx(3**0.5 * size, rel=1e-5) if finite else not norm < float("inf")
    (p.sum() + q.sum()).backward()
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(6**0.5, rel=1e-5)
