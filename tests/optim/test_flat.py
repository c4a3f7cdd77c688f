from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import optim

KINDS: dict[str, Any] = {
    "AdamW": (optim.AdamW, {}),
    "AdamW8bit": (optim.AdamW8bit, {"rounding": "nearest", "min_8bit_size": 300}),
    "Lion": (optim.Lion, {}),
    "SGD": (optim.SGD, {"momentum": 0.9}),
    "ScheduleFreeAdamW": (optim.ScheduleFreeAdamW, {}),
    "kahan": (optim.AdamWBF16, {"kahan": True}),
}


def _models(kind: str, count: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "kahan" else torch.float32
    model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 7)).to(dtype)
    return [copy.deepcopy(model) for _ in range(count)]


def _make(kind: str, model: nn.Module, **more: Any) -> Any:
    make, options = KINDS[kind]
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 2e-2}, {"params": rest}]
    return make(groups, lr=1e-2, max_grad_norm=0.5, **options, **more)


def _step(model: nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 20, generator=generator).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def _same(one: nn.Module, two: nn.Module) -> None:
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_parameters_apart(kind: str) -> None:
    one, two = _models(kind)
    plain, flat = _make(kind, one), _make(kind, two, flat=True)
    for step in range(4):
        _step(one, plain, step)
        _step(two, flat, step)
    _same(one, two)
    assert flat.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-2)
    storages = {p.untyped_storage().data_ptr() for p in two[2].parameters()}
    assert len(storages) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_the_same_either_way(kind: str) -> None:
    one, two = _models(kind)
    plain, flat = _make(kind, one), _make(kind, two, flat=True)
    _step(one, plain, 0)
    _step(two, flat, 0)
    to_flat, to_plain = copy.deepcopy(plain.state_dict()), copy.deepcopy(flat.state_dict())
    assert to_flat["state"].keys() == to_plain["state"].keys()
    assert all(to_flat["state"][i].keys() == to_plain["state"][i].keys() for i in range(4))
    plain.load_state_dict(to_plain)
    flat.load_state_dict(to_flat)
    for step in (1, 2):
        _step(one, plain, step)
        _step(two, flat, step)
    _same(one, two)


def test_addresses_stay_and_gradients_from_elsewhere_move_in() -> None:
    (model,) = _models("AdamW", 1)
    optimizer = _make("AdamW", model, flat=True)
    _step(model, optimizer, 0)
    before = [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()]  # type: ignore[union-attr]
    _step(model, optimizer, 1)
    assert [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()] == before  # type: ignore[union-attr]
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    model.zero_grad()  # sets to None, past the optimizer
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()] == before  # type: ignore[union-attr]
    del other


def test_moved_parameters_are_laid_out_again() -> None:
    one, two = _models("AdamW")
    plain, flat = _make("AdamW", one), _make("AdamW", two, flat=True)
    for step in range(3):
        _step(one, plain, step)
        _step(two, flat, step)
        for p in two.parameters():
            p.data = p.data.clone()
    _same(one, two)


def test_copies_go_on() -> None:
    (model,) = _models("AdamW", 1)
    optimizer = _make("AdamW", model, flat=True)
    _step(model, optimizer, 0)
    twin_model, twin = copy.deepcopy((model, optimizer))
    _step(model, optimizer, 1)
    _step(twin_model, twin, 1)
    _same(model, twin_model)


def test_peft_saves_flat_adapters(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    from tests.integration import tiny

    model = tiny.peft_model("llama")
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, flat=True)
    model(**tiny.inputs("llama")).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(saved) == len(trained)
    for name, value in saved.items():
        own: Tensor = trained[name.replace(".weight", ".default.weight")]
        assert torch.equal(value, own)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: optim.AdamWBF16([p[0].detach().bfloat16().requires_grad_()], flat=True),
        lambda p: optim.Muon(p, flat=True),
        lambda p: optim.Adafactor(p, flat=True),
    ],
)
def test_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="flat"):
        build([torch.zeros(2, 2, requires_grad=True)])


@pytest.mark.parametrize("how", ["cleared", "deleted", "replaced", "set back", "another group"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_user_does_to_states_and_groups_counts(kind: str, how: str) -> None:
    one, two = _models(kind)
    optimizers = [_make(kind, one), _make(kind, two, flat=True)]
    for step in range(5):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            _step(model, optimizer, step)
            if step != 2:
                continue
            if how == "another group":
                optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.1}
            if how == "cleared":
                optimizer.state.clear()
            if how == "deleted":
                del optimizer.state[next(model.parameters())]
            for state in optimizer.state.values():
                for name, value in state.items():
                    if how in ("replaced", "set back"):
                        state[name] = value.clone()
                    if how == "replaced" and name in ("exp_avg", "momentum_buffer"):
                        state[name] *= 0.5
    _same(one, two)
    saved = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for index, state in saved[0].items():
        assert int(saved[1][index]["step"]) == int(state["step"])


def test_frozen_parameters_step_by_the_gradients_they_have() -> None:
    """As in torch; each counts its own steps, and zero_grad drops its gradient."""
    (plain, flat), ends = _models("AdamW"), []
    for model, more in ((plain, {}), (flat, {"flat": True})):
        optimizer = _make("AdamW", model, **more)
        _step(model, optimizer, 0)
        for p in list(model.parameters())[1:]:
            p.requires_grad_(False)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in list(model.parameters())[1:])
        ends.append([int(state["step"]) for state in optimizer.state_dict()["state"].values()])
    _same(plain, flat)
    assert ends[0] == ends[1] == [2] * 4


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.Lion8bit, optim.AdamWBF16])
def test_what_is_not_rounded_at_random_may_be_flat(kind: Any) -> None:
    """Stochastic rounding, their default, is of bfloat16 alone."""
    (one, two), more = _models("AdamW"), {"lr": 1e-2, "state_bits": 32}
    for model, flat in ((one, False), (two, True)):
        optimizer = kind(model.parameters(), flat=flat, **more)
        for step in range(3):
            _step(model, optimizer, step)
    _same(one, two)


def test_what_is_rounded_at_random_is_refused_whenever_it_comes() -> None:
    """With what to do, and leaving the optimizer as it was."""
    half = torch.ones(300, dtype=torch.bfloat16, requires_grad=True)
    (model,) = _models("AdamW", 1)
    optimizer = optim.AdamW8bit(model.parameters(), flat=True)
    with pytest.raises(ValueError, match=r'flat.*bfloat16.*rounding="nearest"'):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1
    _step(model, optimizer, 0)
    # A frozen one lies apart, and draws bits by its own key.
    optimizer.add_param_group({"params": [half.requires_grad_(False)]})
    half.grad = torch.ones_like(half)
    optimizer.step()
    half.requires_grad_(True)
    with pytest.raises(ValueError, match=r'rounding="nearest"'):
        optimizer.step()
    half.requires_grad_(False)
    model.bfloat16()
    with pytest.raises(ValueError, match=r'rounding="nearest"'):
        optimizer.step()
    optim.AdamW8bit([half.requires_grad_(True)], flat=True, rounding="nearest").step()
