"""The optimizers against torch's own, its test inputs among them, and what they promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal import common_optimizers

from fastft import optim
from fastft.cpu import optimizer_step as cpu
from tests.optim.pairs import ALL, gradients, models, same

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Pair:
    """An optimizer here and torch's of the same mathematics."""

    own: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: str
    # What an entry of torch's table must not ask for.
    refused: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


PAIRS = {
    "AdamW": Pair(optim.AdamW, torch.optim.AdamW, "adamw", ("amsgrad",)),
    "SGD": Pair(optim.SGD, torch.optim.SGD, "sgd"),
    "Adafactor": Pair(optim.Adafactor, torch.optim.Adafactor, "adafactor"),
}


def _entries(pair: Pair, errors: bool = False) -> list[Any]:
    kind = "error_inputs" if errors else "inputs"
    function = getattr(common_optimizers, f"optim_{kind}_func_{pair.inputs}")
    return [
        e for e in function("cpu", F32) if errors or not any(e.kwargs.get(k) for k in pair.refused)
    ]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", PAIRS)
def test_torch_s_own_inputs(name: str, dtype: torch.dtype) -> None:
    pair = PAIRS[name]
    entries = _entries(pair)
    assert len(entries) >= 4
    for entry in entries:
        mine, theirs = models(dtype, name)
        if "capturable" in entry.kwargs:
            continue  # torch's own wants a GPU for it
        own, plain = pair.own(mine, **entry.kwargs), pair.theirs(theirs, **entry.kwargs)
        for _ in range(5):
            gradients(mine, theirs)
            own.step()
            plain.step()
        try:
            same(mine, theirs, 4e-6 if dtype == F32 else 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{entry.desc}: {error}") from error


@pytest.mark.parametrize("name", PAIRS)
def test_torch_s_own_error_inputs(name: str) -> None:
    pair = PAIRS[name]
    entries = _entries(pair, errors=True)
    assert len(entries) >= 5
    for entry in entries:
        given = entry.optimizer_error_input
        params = given.params
        if params is None:
            params = [torch.randn(2, 3, requires_grad=True)]
        if issubclass(entry.error_type, Warning):
            with pytest.warns(entry.error_type, match=entry.error_regex):
                pair.own(params, **given.kwargs)
            continue
        with pytest.raises(entry.error_type, match=entry.error_regex):
            pair.own(params, **given.kwargs).step()


def test_groups_scheduler_clip_and_missing_gradients() -> None:
    mine, theirs = models()
    fused = optim.AdamW(
        [{"params": mine[:2], "lr": 3e-2}, {"params": mine[2:], "weight_decay": 0.3}],
        lr=1e-2,
        max_grad_norm=1.0,
    )
    plain = torch.optim.AdamW(
        [{"params": theirs[:2], "lr": 3e-2}, {"params": theirs[2:], "weight_decay": 0.3}], lr=1e-2
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (fused, plain)
    ]
    for step in range(6):
        gradients(mine, theirs, skip=4 if step in (1, 2) else None)
        torch.nn.utils.clip_grad_norm_([q for q in theirs if q.grad is not None], 1.0)
        for optimizer, schedule in zip((fused, plain), schedules, strict=True):
            optimizer.step()
            schedule.step()
        same(mine, theirs)
    extra = torch.randn(4, requires_grad=True)
    twin = extra.detach().clone().requires_grad_()
    fused.add_param_group({"params": [extra]})
    plain.add_param_group({"params": [twin]})
    for p in (*mine, *theirs):
        p.grad = None
    extra.grad, twin.grad = torch.ones(4), torch.ones(4)
    fused.step()
    torch.nn.utils.clip_grad_norm_([twin], 1.0)
    plain.step()
    torch.testing.assert_close(extra, twin)


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_are_interchangeable_with_torch_s(name: str) -> None:
    more = {"momentum": 0.9} if name == "SGD" else {}
    mine, theirs = models(name=name)
    fused = PAIRS[name].own(mine, lr=1e-2, **more)
    plain = PAIRS[name].theirs(theirs, lr=1e-2, **more)
    for _ in range(3):
        gradients(mine, theirs)
        fused.step()
        plain.step()
    from_fused, from_plain = copy.deepcopy(fused.state_dict()), copy.deepcopy(plain.state_dict())
    fused.load_state_dict(from_plain)
    plain.load_state_dict(from_fused)
    for _ in range(2):
        gradients(mine, theirs)
        fused.step()
        plain.step()
    same(mine, theirs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_saved_and_resumed_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    mine, _ = models(dtype)
    torch.manual_seed(1)
    gradients = [[torch.randn_like(p) for p in mine] for _ in range(6)]

    def run(optimizer: Any, params: list[Tensor], steps: slice) -> None:
        for step in gradients[steps]:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()

    whole = ALL[name](mine)
    run(whole, mine, slice(0, 3))
    params = [p.detach().clone().requires_grad_() for p in mine]
    saved = copy.deepcopy(whole.state_dict())
    resumed = ALL[name](params)
    resumed.load_state_dict(saved)
    run(whole, mine, slice(3, 6))
    run(resumed, params, slice(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(mine, params, strict=True))
    for key, state in whole.state_dict()["state"].items():
        for part, value in state.items():
            other = resumed.state_dict()["state"][key][part]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (key, part)


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_go_on_alike(name: str) -> None:
    p = torch.ones(5000, dtype=BF16, requires_grad=True)
    optimizer = ALL[name]([p], max_grad_norm=0.5, seed=9)
    p.grad = torch.full((5000,), float("nan"), dtype=BF16)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    p.grad = torch.linspace(-1, 1, 5000, dtype=BF16)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert (twin.max_grad_norm, twin.skipped_steps, twin.seed) == (0.5, 1, 9)
    q = twin.param_groups[0]["params"][0]
    q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", ALL)
def test_descends_and_closures_count(name: str) -> None:
    torch.manual_seed(0)
    target = torch.randn(5000)
    p = (2 * target).requires_grad_()
    optimizer = ALL[name]([p], lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.grad_norm.item() == pytest.approx(p.grad.norm().item(), rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ALL)
def test_maximize_clip_and_skip_are_global_over_groups(name: str) -> None:
    p, q = (torch.ones(4, requires_grad=True) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "maximize": True}]
    optimizer = ALL[name](groups, max_grad_norm=1.0, lr=0.1)
    p.grad, q.grad = torch.full((4,), 3.0), torch.full((4,), 4.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(10.0)
    assert bool((p < 1).all())
    assert bool((q > 1).all())
    before = q.detach().clone()
    p.grad[0] = float("inf")
    optimizer.step()
    assert torch.equal(q, before)
    assert optimizer.skipped_steps == 1


def test_one_call_a_step_and_tables_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = models()
    optimizer = optim.AdamW(mine)
    calls: list[Any] = []
    original = cpu.step
    monkeypatch.setattr(cpu, "step", lambda t, *a, **k: calls.append(t) or original(t, *a, **k))
    for _ in range(3):
        gradients(mine, theirs)
        optimizer.step()
    assert [len(t.params) for t in calls] == [len(mine)] * 3
    assert calls[0] is calls[1] is calls[2]


def test_parameters_whose_memory_moves_are_followed() -> None:
    """As FSDP, model.to() and p.data = ... do."""
    mine, theirs = models()
    mine.append(torch.randn(6, 4).t().requires_grad_())
    theirs.append(mine[-1].detach().clone().requires_grad_())
    fused, plain = optim.AdamW(mine, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(4):
        gradients(mine, theirs)
        fused.step()
        plain.step()
        if step == 1:
            for p in mine:
                p.data = p.data.clone()
    same(mine, theirs)


def test_states_cleared_and_momentum_begun_are_noticed() -> None:
    mine, theirs = models()
    fused, plain = optim.SGD(mine, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    for step in range(6):
        for optimizer in (fused, plain):
            optimizer.param_groups[0]["momentum"] = 0.9 if step > 1 else 0.0
            if step == 4:
                optimizer.state.clear()
        gradients(mine, theirs)
        fused.step()
        plain.step()
    same(mine, theirs)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(F32, {}), (F32, {"flat": True}), (F32, {"state_bits": 16}), (F64, {})],
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_some_groups_and_steps_alone(
    nesterov: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """A buffer is its first gradient whenever it begins, whatever the dampening, and waits where
    there is no momentum."""
    mine, theirs = models(dtype)
    fused, plain = (
        kind([{"params": params[:3]}, {"params": params[3:], "momentum": 0.5}], lr=0.1, **more)
        for kind, params, more in (
            (optim.SGD, mine, options), (torch.optim.SGD, theirs, {}))
    )  # fmt: skip
    for step in range(8):
        for optimizer in (fused, plain):
            for group, on in zip(optimizer.param_groups, (step in (2, 3, 6, 7), step != 4)):
                group["momentum"] = 0.9 if on else 0.0
                group["dampening"] = 0.0 if nesterov else 0.5
                group["nesterov"] = nesterov and on
        gradients(mine, theirs)
        fused.step()
        plain.step()
        if step == 0:
            kept = ["momentum_buffer" in fused.state[p] for p in mine]
            assert kept == [False] * 3 + [True] * 3
    same(mine, theirs, 2e-2 if options.get("state_bits") else 4e-6)


def test_states_are_neighbours_in_one_arena() -> None:
    mine, theirs = models()
    optimizer = optim.AdamW8bit(mine)
    gradients(mine, theirs)
    optimizer.step()
    for name, dtype in (("state1", torch.uint8), ("absmax1", F32)):
        found = [s[name] for s in optimizer.state.values() if name in s and s[name].dtype == dtype]
        assert len({t.untyped_storage().data_ptr() for t in found}) == 1
        assert all(t.data_ptr() % 16 == 0 for t in found)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_states_saved_in_float32_are_the_same_codes_again(name: str, flat: bool) -> None:
    """Tensors that torch.distributed.checkpoint takes: of parameters that lie as they do."""
    torch.manual_seed(0)
    kind: Any = getattr(optim, name)
    params = [torch.randn(4, 25, 8, 8).to(memory_format=torch.channels_last), torch.randn(70, 80),
              torch.randn(17)]  # fmt: skip
    params = [p.requires_grad_() for p in params]
    optimizer = kind(params, lr=1e-2, saved_bits=32, flat=flat)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    saved = copy.deepcopy(copy.deepcopy(optimizer).state_dict())
    for p, state in zip(params, saved["state"].values(), strict=True):
        assert state.keys() == {"step", *kind.state_names}
        assert all(isinstance(v, Tensor) and v.dtype == F32 for v in state.values())
        assert state["state1"].shape == p.shape
    other = kind(params, lr=1e-2, saved_bits=32, flat=flat)
    other.load_state_dict(saved)
    for p in params:
        own, found = optimizer.state[p], other.state[p]
        assert own.keys() == found.keys()
        assert all(torch.equal(own[key], found[key]) for key in own)
        assert (found["state1"].dtype == torch.uint8) == (p.numel() > 4096)


def test_small_tensors_and_groups_that_say_so_keep_float32_states() -> None:
    small, large, table = (torch.randn(n, requires_grad=True) for n in (4095, 4096, 8192))
    optimizer = optim.AdamW8bit([{"params": [small, large]}, {"params": [table], "state_bits": 32}])
    for p in (small, large, table):
        p.grad = torch.randn_like(p)
    optimizer.step()
    dtypes = [optimizer.state[p]["state1"].dtype for p in (small, large, table)]
    assert dtypes == [F32, torch.uint8, F32]
    bytes_per_param = (
        sum(t.numel() * t.element_size() for t in optimizer.state[large].values()) / large.numel()
    )
    assert bytes_per_param == pytest.approx(2.03, abs=0.01)


def test_states_stay_float32_for_bfloat16_parameters_across_a_reload() -> None:
    p = torch.randn(300, dtype=BF16, requires_grad=True)
    optimizer = optim.AdamW([p], lr=1e-2)
    p.grad = torch.randn(300, dtype=BF16)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["exp_avg"].dtype == F32
    assert torch.equal(optimizer.state[p]["exp_avg"], saved["state"][0]["exp_avg"])


def test_any_memory_format() -> None:
    torch.manual_seed(0)
    mine = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    other = torch.randn(20, 30).t().detach().requires_grad_()
    twins = [p.detach().clone().requires_grad_() for p in (mine, other)]
    fused, plain = optim.AdamW([mine, other], lr=0.1), torch.optim.AdamW(twins, lr=0.1)
    for _ in range(3):
        gradients([mine, other], twins)
        mine.grad = mine.grad.contiguous()  # type: ignore[union-attr]
        fused.step()
        plain.step()
    same([mine, other], twins)
    assert optimizer_strides(fused, mine) == mine.stride()
    saved = copy.deepcopy(plain.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].contiguous()
    fused.load_state_dict(saved)
    gradients([mine, other], twins)
    fused.step()
    plain.step()
    same([mine, other], twins)


def optimizer_strides(optimizer: Any, p: Tensor) -> tuple[int, ...]:
    return optimizer.state[p]["exp_avg"].stride()


def test_the_gradient_scaler_s_scale_and_infinities() -> None:
    mine, theirs = models()
    fused, plain = optim.AdamW(mine, lr=1e-2, max_grad_norm=1.0), torch.optim.AdamW(theirs, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        gradients(mine, theirs)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for p in mine:
            p.grad *= 256.0  # type: ignore[operator]
        if step == 2:
            mine[1].grad[0] = float("inf")  # type: ignore[index]
        scaler.scale(torch.zeros(()))
        scaler.step(fused)
        scaler.update(256.0)
        if step != 2:
            plain.step()
    same(mine, theirs)
    assert fused.skipped_steps == 1
    for p in mine:
        p.grad /= 256.0  # type: ignore[operator]
    mine[1].grad[0] = 0.0  # type: ignore[index]
    fused.step()
    assert fused.grad_norm.item() == pytest.approx(
        torch.nn.utils.get_total_norm([p.grad for p in mine]).item(),
        rel=1e-5,  # type: ignore[misc]
    )


def test_an_element_draws_the_same_bits_whatever_the_order_of_tensors() -> None:
    torch.manual_seed(0)
    start = {f"layer.{i}": torch.randn(300, dtype=BF16) for i in range(4)}
    gradients = {name: torch.randn(300, dtype=BF16) for name in start}
    results = []
    for names in (list(start), list(reversed(start))):
        named = [(name, start[name].clone().requires_grad_()) for name in names]
        optimizer = optim.AdamWBF16(named, lr=1e-2, seed=3)
        for name, p in named:
            p.grad = gradients[name].clone()
        optimizer.step()
        results.append(dict(named))
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())
    other = [(n, p.clone().requires_grad_()) for n, p in start.items()]
    reseeded = optim.AdamWBF16(other, lr=1e-2, seed=4)
    for name, p in other:
        p.grad = gradients[name].clone()
    reseeded.step()
    assert not all(torch.equal(p, results[0][name]) for name, p in other)


def _trajectory(optimizer: Any, p: Tensor, curvature: Tensor, steps: int) -> Tensor:
    """Gradient steps on a quadratic bowl with noise that every run draws alike."""
    noise = torch.Generator().manual_seed(5)
    seen = []
    for _ in range(steps):
        g = curvature * p.detach().double() + torch.randn(
            p.shape, generator=noise, dtype=F64) * 0.01  # fmt: skip
        p.grad = g.to(p.dtype)
        optimizer.step()
        seen.append(p.detach().double().clone())
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [("AdamW", F32, 2e-5), ("SGD", F32, 2e-5), ("Lion", F32, 2e-3),
     ("ScheduleFreeAdamW", F32, 2e-5), ("AdamW8bit", F32, 0.02), ("AdamWBF16", BF16, 0.02)],
)  # fmt: skip
def test_a_thousand_steps_beside_float64(name: str, dtype: torch.dtype, bound: float) -> None:
    """``bound`` is on the root mean square over all steps of the distance from the float64 run,
    relative to how far that one moved: float32 rounding, 8-bit states or bfloat16 parameters. Lion
    steps by signs: where rounding turns one, the runs are 2 lr apart until the next."""
    torch.manual_seed(0)
    start, curvature = torch.randn(8192, dtype=F64), torch.rand(8192, dtype=F64) + 0.1
    start = start.to(dtype).double()
    kind = ALL[name]
    exact = start.clone().requires_grad_()
    reference = {"AdamW8bit": optim.AdamW, "AdamWBF16": optim.AdamW}.get(name, kind)
    truth = _trajectory(reference([exact], lr=5e-3), exact, curvature, 1000)
    p = start.to(dtype).requires_grad_()
    own = _trajectory(kind([p], lr=5e-3), p, curvature, 1000)
    distance = (own - truth).square().mean().sqrt() / (truth - start).square().mean().sqrt()
    assert distance <= bound


def test_bfloat16_without_stochastic_rounding_stalls_and_with_it_does_not() -> None:
    """What the rounding is for: a step of 1e-4 at 1.0, where bfloat16 is 2^-8 apart."""

    def moved(**options: Any) -> float:
        p = torch.ones(4096, dtype=BF16, requires_grad=True)
        optimizer = optim.AdamW([p], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        rest = optimizer.state[p].get("compensation", torch.zeros_like(p))
        return float(1 - (p.detach().double() + rest.double()).mean())

    assert moved(rounding="nearest") == 0.0
    assert moved(rounding="stochastic") == pytest.approx(50e-4, rel=0.1)
    assert moved(rounding="compensated") == pytest.approx(50e-4, rel=0.02)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: optim.AdamW(p, lr=-1.0), ["lr", ">= 0", "-1.0"]),
        (lambda p: optim.AdamW(p, betas=(0.9, 1.0)), ["betas", "[0, 1)"]),
        (lambda p: optim.AdamW(p, max_grad_norm=0.0), ["max_grad_norm", "> 0"]),
        (lambda p: optim.AdamW(p, amsgrad=True), ["amsgrad", "not offered"]),
        (lambda p: optim.AdamW(p, rounding="up"), ["rounding", "nearest"]),
        (lambda p: optim.AdamW8bit(p, state_bits=4), ["state_bits", "8, 16 or 32"]),
        (lambda p: optim.SGD(p, nesterov=True), ["nesterov", "momentum"]),
        (lambda p: optim.Lion(p, differentiable=True), ["differentiable"]),
        (lambda p: optim.AdamW(p, lr="1e-3"), ["lr", "a number", "'1e-3'", "1.0e-3"]),
        (lambda p: optim.AdamW([{"params": p, "lr": "1e-3"}]), ["lr", "a number", "'1e-3'"]),
        (lambda p: optim.AdamW([{"params": p, "betas": ("0.9", 0.9)}]), ["betas", "numbers"]),
        (lambda p: optim.AdamW([{"params": p, "betas": (0.9,)}]), ["betas", "two numbers"]),
        (lambda p: optim.AdamW(p, betas=0.9), ["betas", "two numbers", "0.9"]),
        (lambda p: optim.AdamW(p, max_grad_norm="1"), ["max_grad_norm", "> 0", "'1'"]),
        (lambda p: optim.AdamW(p, lr=None), ["lr", "a number", "None"]),
        (lambda p: optim.AdamW(p, weight_decay="0.1"), ["weight_decay", "a number"]),
        (lambda p: optim.AdamW(p, eps="1e-8"), ["eps", "a number"]),
        (lambda p: optim.AdamW(p, betas=("0.9", 0.999)), ["betas", "numbers", "'0.9'"]),
        (lambda p: optim.SGD(p, momentum="0.9"), ["momentum", "a number"]),
        (lambda p: optim.ScheduleFreeAdamW(p, capturable=True), ["capturable", "False", "graph"]),
        (lambda p: optim.ScheduleFreeAdamW(p, betas=(0.0, 0.9)), ["betas", "beta1 above 0"]),
        (lambda p: optim.ScheduleFreeAdamW(p, betas=("0.9", 0.9)), ["betas", "numbers"]),
        (lambda p: optim.AdamW8bit(p, saved_bits=16), ["saved_bits", "8 or 32", "16"]),
        (lambda p: optim.AdamW8bit(p, seed=-1), ["seed", "2**64", "-1"]),
        (lambda p: optim.AdamW8bit(p, seed=2**64), ["seed", "2**64", str(2**64)]),
        (lambda p: optim.AdamW8bit(p, seed=1.5), ["seed", "1.5"]),
    ],
)
def test_rejected(build: Callable[[Any], Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"fastft\.optim") as caught:
        build([torch.zeros(2, requires_grad=True)])
    assert all(word in str(caught.value) for word in words)


def test_a_seed_may_have_64_bits() -> None:
    p = torch.ones(8, dtype=BF16, requires_grad=True)
    p.grad = torch.ones_like(p)
    optim.AdamWBF16([p], seed=2**64 - 1).step()
    assert bool((p < 1).any())


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_are_refused_aloud(kind: str) -> None:
    p = torch.zeros(4, dtype=torch.complex64 if kind == "complex" else F32, requires_grad=True)
    p.grad = torch.ones(4).to_sparse() if kind == "sparse" else torch.ones(4, dtype=p.dtype)
    with pytest.raises(TypeError, match=kind):
        optim.AdamW([p]).step()


@pytest.mark.parametrize("name", ALL)
def test_a_nan_that_none_looks_for_shows(name: str) -> None:
    """In the reference; the compiled Lion steps by no sign there, and its momentum is NaN."""
    p = torch.ones(4, dtype=F64, requires_grad=True)
    p.grad = torch.tensor([float("nan"), 1.0, 1.0, 1.0], dtype=F64)
    ALL[name]([p], skip_nonfinite=False).step()
    assert bool(p[0].isnan())


@pytest.mark.parametrize("options", [{}, {"rounding": "compensated"}])
def test_adafactor_of_parameters_that_lie_otherwise(options: dict[str, Any]) -> None:
    """Rows and columns are those of the parameter, not of its memory."""
    torch.manual_seed(0)
    dtype = BF16 if options else F32
    plain = torch.randn(12, 30, dtype=dtype, requires_grad=True)
    turned = plain.detach().t().contiguous().t().requires_grad_()
    assert not turned.is_contiguous()
    one, two = optim.Adafactor([plain], **options), optim.Adafactor([turned], **options)
    for _ in range(3):
        gradients([plain], [turned])
        one.step()
        two.step()
    assert torch.equal(plain, turned)
    for name, value in one.state[plain].items():
        assert torch.equal(value, two.state[turned][name]), name
