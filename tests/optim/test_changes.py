"""What may change between steps is noticed: sizes, dtypes, groups, states, formats, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import errors, optim
from tests.optim.pairs import ALL

BF16 = torch.bfloat16


def _step(optimizer: Any, p: Tensor, value: float = 1.0) -> None:
    p.grad = torch.full_like(p, value)
    optimizer.step()


def test_size_and_dtype_of_a_parameter() -> None:
    p = torch.zeros(1000, requires_grad=True)
    optimizer = optim.SGD([p], lr=1.0)
    _step(optimizer, p)
    room = torch.zeros(2000)
    p.grad, p.data = None, room[:10]
    _step(optimizer, p)
    assert torch.equal(room, torch.cat([torch.full((10,), -1.0), torch.zeros(1990)]))
    p.grad, p.data = None, p.data.double()
    _step(optimizer, p)
    assert torch.equal(p.detach(), torch.full((10,), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
@pytest.mark.parametrize("change", ["channels last", "transposed", "with gaps"])
def test_another_layout_of_a_parameter(name: str, change: str) -> None:
    """Gradients and states follow it; the steps are those of a parameter that stays as it was."""
    more = {"momentum": 0.9} if name == "SGD" else {}
    shapes = {"channels last": (8, 4, 3, 3), "transposed": (24, 40), "with gaps": (40,)}
    shape = shapes[change]
    values = torch.randn(shape)
    p, q = (values.clone().requires_grad_() for _ in range(2))
    optimizers = [getattr(optim, name)([t], lr=1e-2, **more) for t in (p, q)]
    for step in range(4):
        if step == 2 and change == "channels last":
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        elif step == 2 and change == "transposed":
            p.grad, p.data = None, p.data.t().contiguous().t()
        elif step == 2:
            p.data = torch.stack([p.data, p.data], 1)[:, 0]
        gradient = torch.randn(shape)
        for t, optimizer in zip((p, q), optimizers, strict=True):
            t.grad = torch.empty_like(t).copy_(gradient)
            optimizer.step()
    assert torch.equal(p, q)


# Whose state dicts are taken by whom: what keeps the same things, 8-bit ones also float32 states.
TAKEN = {
    "AdamW": ("AdamW", "torch AdamW"),
    "AdamW8bit": ("AdamW8bit", "AdamW", "torch AdamW"),
    "Lion": ("Lion",),
    "Lion8bit": ("Lion8bit", "Lion"),
    "SGD": ("SGD", "torch SGD", "SGD without", "torch SGD without"),
    "SGD without": ("SGD", "torch SGD", "SGD without", "torch SGD without"),
    "ScheduleFreeAdamW": ("ScheduleFreeAdamW",),
    "Adafactor": ("Adafactor", "torch Adafactor"),
    "Muon": ("Muon", "torch Muon"),
}
OF_TORCH = ("AdamW", "SGD", "SGD without", "Adafactor", "Muon")


def _trained(name: str) -> Any:
    library: Any = torch.optim if name.startswith("torch ") else optim
    p = torch.ones(70, 80, requires_grad=True)
    kind = name.removeprefix("torch ").removesuffix(" without")
    more = {"momentum": 0.9} if kind == "SGD" and "without" not in name else {}
    optimizer = getattr(library, kind)([p], lr=0.1, **more)
    _step(optimizer, p)
    return optimizer


@pytest.mark.parametrize("other", [*TAKEN, *(f"torch {name}" for name in OF_TORCH)])
@pytest.mark.parametrize("name", TAKEN)
def test_states_of_another_optimizer_are_refused(name: str, other: str) -> None:
    optimizer, source = _trained(name), _trained(other)
    before = copy.deepcopy(optimizer.state_dict())
    if other in TAKEN[name] or other == "torch SGD without":  # which keeps nothing
        optimizer.load_state_dict(source.state_dict())
        _step(optimizer, optimizer.param_groups[0]["params"][0])
        return
    with pytest.raises(errors.ArgumentError, match="state_dict"):
        optimizer.load_state_dict(source.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    "other", ["RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "Adamax", "NAdam"]
)
@pytest.mark.parametrize("name", TAKEN)
def test_states_that_no_optimizer_here_has_are_refused(name: str, other: str) -> None:
    """Whatever their names; nothing of them would be kept, or a part."""
    optimizer, source = _trained(name), _trained(f"torch {other}")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(errors.ArgumentError, match="state_dict"):
        optimizer.load_state_dict(source.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {"q": torch.ones(3)}, (1,)])
def test_a_state_too_many_is_refused_and_numbers_are_not(value: Any) -> None:
    optimizer = _trained("AdamW")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] |= {"rms": 0.5, "note": "mine", "nothing": None}
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.state_dict()["state"][0]["rms"] == 0.5
    saved["state"][0]["more"] = value
    with pytest.raises(errors.ArgumentError, match="got exp_avg, exp_avg_sq, more"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", TAKEN)
def test_bitsandbytes_nested_states_are_seen(name: str) -> None:
    """Its SGD's momentum has the name of its Lion's, and all 8-bit states lie a level deeper."""
    nested = {"state1": torch.zeros(70, 80, dtype=torch.uint8), "absmax1": torch.zeros(22)}
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.0), "eps": 0.0, "weight_decay": 0.0}
    saved = {"state": {0: {"step": 1, "__bnb_optimizer_quant_state__": nested}},
             "param_groups": [group]}  # fmt: skip
    optimizer = _trained(name)
    with pytest.raises(errors.ArgumentError, match="state_dict"):
        optimizer.load_state_dict(copy.deepcopy(saved))
    if name != "Lion8bit":
        return
    for wrong in ({"eps": 1e-8, "betas": (0.9, 0.99)}, {"betas": (0.9, 0.99, 0.999)}):
        with pytest.raises(errors.ArgumentError, match="state_dict"):
            optimizer.load_state_dict({**saved, "param_groups": [{**group, **wrong}]})
    optimizer.load_state_dict({**saved, "param_groups": [{**group, "betas": (0.9, 0.99)}]})
    p = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[p]["state1"], nested["state1"])


@pytest.mark.parametrize("flat", [False, True])
def test_torch_s_momentum_counts_no_steps(flat: bool) -> None:
    p = torch.ones(300, requires_grad=True)
    theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        _step(theirs, p)
    q = p.detach().clone().requires_grad_()
    ours = optim.SGD([q], lr=0.1, momentum=0.9, flat=flat)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert "momentum_buffer" in ours.state_dict()["state"][0]
    _step(theirs, p)
    _step(ours, q)
    torch.testing.assert_close(q, p)


@pytest.mark.parametrize("flat", [False, True])
def test_a_momentum_that_torch_has_not_begun(flat: bool) -> None:
    """Its first step takes the gradient whole, whatever the dampening."""
    p, q = (torch.ones(300, requires_grad=True) for _ in range(2))
    theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    ours = optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5, flat=flat)
    state_dict = copy.deepcopy(theirs.state_dict())
    state_dict["state"] = {0: {"momentum_buffer": None}}
    ours.load_state_dict(state_dict)
    for _ in range(2):
        _step(theirs, p)
        _step(ours, q)
    torch.testing.assert_close(q, p)


def test_groups_that_take_the_place_of_others() -> None:
    p = torch.zeros(3, requires_grad=True)
    optimizer = optim.SGD([p], lr=1.0)
    _step(optimizer, p)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [p], "lr": 0.0})
    _step(optimizer, p)
    assert torch.equal(p.detach(), torch.full((3,), -1.0))
    release = optim.StepInBackward(optim.SGD([p], lr=1.0))
    release.optimizer.load_state_dict(copy.deepcopy(release.optimizer.state_dict()))
    release.optimizer.param_groups[0]["lr"] = 0.0
    p.sum().backward()
    release.optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -1.0))


def test_states_put_elsewhere_and_back() -> None:
    p, q = (torch.ones(5, requires_grad=True) for _ in range(2))
    moved, plain = optim.AdamW([p], lr=0.1), optim.AdamW([q], lr=0.1)
    for _ in range(3):
        _step(moved, p)
        _step(plain, q)
        for key, value in moved.state[p].items():
            moved.state[p][key] = value.clone()
    assert torch.equal(p, q)
    assert moved.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("name", ["compensation", "absmax1", "absmax2"])
def test_what_states_are_made_of_may_be_replaced_alone(name: str) -> None:
    p, q = (torch.ones(5000, dtype=BF16, requires_grad=True) for _ in range(2))
    kind: Any = optim.AdamW8bit if name.startswith("absmax") else optim.AdamWBF16
    one, two = (kind([x], lr=0.1, rounding="compensated") for x in (p, q))
    for step in range(4):
        _step(one, p)
        _step(two, q)
        if step == 2:
            one.state[p][name] = one.state[p][name] * 0.5
            two.state[q][name] *= 0.5
    assert torch.equal(p, q)
    assert torch.equal(one.state[p][name], two.state[q][name])


def test_dampening_without_momentum_is_none() -> None:
    p, q = (torch.ones(5, requires_grad=True) for _ in range(2))
    for make, x in ((optim.SGD, p), (torch.optim.SGD, q)):
        optimizer = make([x], lr=0.1, dampening=0.5)
        for _ in range(3):
            _step(optimizer, x)
    torch.testing.assert_close(p, q)


def test_torch_s_states_in_the_parameters_dtype() -> None:
    p = torch.ones(5000, dtype=BF16, requires_grad=True)
    plain = torch.optim.AdamW([p], lr=0.1)
    _step(plain, p)
    for make in (optim.AdamW, optim.AdamW8bit):
        optimizer = make([p], lr=0.1)
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        _step(optimizer, p)
        first = next(v for k, v in optimizer.state[p].items() if k in ("exp_avg", "state1"))
        assert first.dtype == torch.float32
        torch.testing.assert_close(first, torch.full((5000,), 0.19), rtol=1e-2, atol=0)
        assert float(optimizer.state[p]["step"]) == 2


def test_flat_parameters_keep_the_format_of_loaded_states() -> None:
    for loaded, flat in ((8, 32), (32, 8)):
        p, q = (torch.ones(5000, requires_grad=True) for _ in range(2))
        one = optim.AdamW8bit([p], lr=0.1, state_bits=loaded, rounding="nearest")
        two = optim.AdamW8bit([q], lr=0.1, state_bits=flat, rounding="nearest", flat=True)
        _step(one, p)
        q.data.copy_(p.data)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        _step(one, p)
        _step(two, q)
        torch.testing.assert_close(p, q)


def test_flat_parameters_frozen_and_thawed() -> None:
    p, q = (torch.zeros(3, requires_grad=True) for _ in range(2))
    q.requires_grad_(False)
    optimizer = optim.SGD([p, q], lr=1.0, flat=True)
    _step(optimizer, p)
    q.requires_grad_(True)
    p.requires_grad_(False)
    p.grad = None
    _step(optimizer, q)
    assert torch.equal(p.detach(), torch.full((3,), -1.0))
    assert torch.equal(q.detach(), torch.full((3,), -1.0))


@pytest.mark.parametrize("rank", [1, 4])
def test_muon_stays_bounded_over_many_steps_of_a_singular_gradient(rank: int) -> None:
    torch.manual_seed(0)
    p = torch.zeros(16, 576, requires_grad=True)
    optimizer = optim.Muon([p], lr=1.0, weight_decay=0.0, ns_steps=12)
    p.grad = torch.randn(16, rank) @ torch.randn(rank, 576)
    optimizer.step()
    assert float(torch.linalg.matrix_norm(p.detach(), 2)) < 1.5


def test_hooks_on_loading_are_heard() -> None:
    p = torch.ones(5, requires_grad=True)
    optimizer = optim.AdamW([p])
    _step(optimizer, p)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {7: saved["state"][0]}
    saved["param_groups"][0]["params"] = [7, 8]

    def drop(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**state_dict["param_groups"][0], "params": [7]}]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(drop)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[p]["exp_avg"], saved["state"][7]["exp_avg"])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", [n for n in ALL if n != "Adafactor"])
def test_hooks_may_wrap_and_change_states(name: str, flat: bool) -> None:
    """In torch's order: what is saved is whole before hooks see it, and so is what was loaded."""
    p = torch.ones(5000, dtype=BF16, requires_grad=True)
    one, two = (ALL[name]([p], rounding="nearest", flat=flat) for _ in range(2))
    _step(one, p)
    plain = copy.deepcopy(one.state_dict())
    one.register_state_dict_post_hook(lambda _, saved: {"mine": saved})
    wrapped = copy.deepcopy(one.state_dict())
    assert wrapped.keys() == {"mine"}
    assert str(wrapped["mine"]) == str(plain)

    def clear(optimizer: Any) -> None:
        for key, value in optimizer.state[p].items():
            if key != "step":
                optimizer.state[p][key] = torch.full_like(value, 3)

    two.register_load_state_dict_pre_hook(lambda _, saved: saved["mine"])
    two.register_load_state_dict_post_hook(clear)
    two.load_state_dict(wrapped)
    assert int(two.state[p]["step"]) == 1
    for key, value in two.state[p].items():
        assert key == "step" or bool((value == 3).all())


def test_a_copy_made_after_a_scaled_step_steps_plainly() -> None:
    p = torch.zeros(3, requires_grad=True)
    optimizer = optim.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    p.grad = torch.full((3,), 1024.0)
    scaler.step(optimizer)
    twin = copy.deepcopy(optimizer)
    own = twin.param_groups[0]["params"][0]
    _step(twin, own)
    assert torch.equal(own.detach(), torch.full((3,), -2.0))


def test_what_step_in_backward_refuses_later() -> None:
    p, q = (torch.zeros(3, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="flat"):
        optim.StepInBackward(optim.SGD([p], flat=True))
    release = optim.StepInBackward(optim.SGD([p], lr=1.0))
    release.optimizer.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="another StepInBackward"):
        (p.sum() + q.sum()).backward()
    release.remove()
    release.remove()


def test_layer_decay_of_experts_and_of_two_stacks() -> None:
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(6))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)
            self.encoder = nn.ModuleList(Block() for _ in range(3))
            self.decoder = nn.ModuleList(Block() for _ in range(2))

    groups = optim.param_groups(Model(), 1.0, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert [rates[f"encoder.{i}.experts.5.weight"] for i in range(3)] == [0.25, 0.5, 1.0]
    assert [rates[f"decoder.{i}.experts.0.weight"] for i in range(2)] == [0.5, 1.0]
    assert rates["embed.weight"] == 0.125
