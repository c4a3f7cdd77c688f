"""States in host memory, on a device that is late: copies happen as late as the events allow, and
still every bit is what it is with the states on the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import optim
from fastft.errors import ArgumentError, DtypeError
from fastft.optim import _saved
from fastft.optim._ring import Ring
from tests.memory.test_host import LateEngine

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {}),
    "AdamW8bit": (optim.AdamW8bit, {"min_8bit_size": 600}),
    "AdamWBF16": (optim.AdamWBF16, {"seed": 5}),
    "kahan": (optim.AdamWBF16, {"kahan": True}),
    "Lion": (optim.Lion, {}),
    "SGD": (optim.SGD, {"momentum": 0.9}),
    "SGD without momentum": (optim.SGD, {}),
    "SGD, half": (optim.SGD, {}),
    "ScheduleFreeAdamW": (optim.ScheduleFreeAdamW, {"warmup_steps": 2}),
    "not measured": (optim.AdamW, {"skip_nonfinite": False}),
}
# Bytes: several tensors a piece, and the largest tensor in several.
PIECE = 8192


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[LateEngine]:
    """The engines of every ring that is made, as on a GPU, whose memory here is the host's too."""
    made: list[LateEngine] = []

    def new_ring(device: torch.device) -> Ring:
        made.extend(LateEngine(len(made) + seed) for seed in (1, 2))
        ring = Ring(*made[-2:], device)
        ring.piece_bytes = PIECE
        return ring

    monkeypatch.setattr(_saved, "new_ring", new_ring)
    return made


def _params(kind: str) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind in ("AdamWBF16", "kahan") else torch.float32
    shapes = {"a": (3,), "b": (70, 61), "c": (1, 1), "d": (300, 7), "e": (0, 4), "f": (2, 40, 3, 5)}
    made = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }
    made["f"].data = made["f"].data.to(memory_format=torch.channels_last)
    made["g"] = nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype)[:, :11])
    return made


def _train(params: dict[str, nn.Parameter], optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for name, p in params.items():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if name == "d" and step == 1 else grad  # another set of parameters
            if step == 2 and name == "b":
                p.grad[0, 0] = float("nan")
        optimizer.step()


def _make(kind: str, params: dict[str, nn.Parameter], **more: Any) -> Any:
    make, options = KINDS[kind]
    named = list(params.items())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 3e-2}]
    if kind == "SGD, half":
        groups[1]["momentum"] = 0.9
    return make(groups, **{"lr": 1e-2, **options, **more})


def _states(optimizer: Any) -> list[Tensor]:
    optimizer.wait_for_states()
    return [v for s in optimizer.state.values() for _, v in sorted(s.items())]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_on_the_device(kind: str, engines: list[LateEngine]) -> None:
    plain, hosted = _params(kind), _params(kind)
    expected = _make(kind, plain)
    _train(plain, expected, range(5))
    assert not engines
    optimizer = _make(kind, hosted, states="host")
    _train(hosted, optimizer, range(5))
    assert _same(list(hosted.values()), list(plain.values()))
    assert _same(_states(optimizer), _states(expected))
    assert optimizer.skipped_steps == expected.skipped_steps
    inward, outward = engines
    assert inward.launched == outward.launched
    if kind not in ("SGD without momentum", "SGD, half"):
        assert inward.launched > 4 * 3
        pinned = [t.untyped_storage().data_ptr() for t in inward.pinned]
        states = [s[n] for s in optimizer.state.values() for n in optimizer.state_names if n in s]
        assert all(s.untyped_storage().data_ptr() in pinned for s in states if s.numel())


def test_the_clip_and_the_norm(engines: list[LateEngine]) -> None:
    """The norm is summed before, by torch: it may differ from the step's own by a rounding."""
    plain, hosted = _params("AdamW"), _params("AdamW")
    expected = _make("AdamW", plain, max_grad_norm=0.1)
    optimizer = _make("AdamW", hosted, max_grad_norm=0.1, states="host")
    for steps in (range(2), range(3, 4)):  # the last one's gradients are finite
        _train(plain, expected, steps)
        _train(hosted, optimizer, steps)
    assert float(expected.grad_norm) > 10
    torch.testing.assert_close(optimizer.grad_norm, expected.grad_norm)
    for p, q in zip(hosted.values(), plain.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_neighbours_in_host_memory_are_one_copy(engines: list[LateEngine]) -> None:
    params = [nn.Parameter(torch.randn(5)) for _ in range(40)]
    optimizer = optim.AdamW(params, states="host")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert engines[0].launched == 1, "two states of 40 tensors, interleaved in one arena"


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "kahan"])
def test_saved_and_loaded(kind: str, engines: list[LateEngine]) -> None:
    whole = _params(kind)
    optimizer = _make(kind, whole, states="host")
    _train(whole, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    params = {name: nn.Parameter(p.detach().clone()) for name, p in whole.items()}
    _train(whole, optimizer, range(3, 6))
    for states in ("host", "device", "paged"):
        again = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        resumed = _make(kind, again, states=states)
        resumed.load_state_dict(copy.deepcopy(saved))
        _train(again, resumed, range(3, 6))
        assert _same(list(again.values()), list(whole.values())), states


def test_copies_and_added_groups(engines: list[LateEngine]) -> None:
    params = _params("AdamW")
    optimizer = _make("AdamW", params, states="host")
    _train(params, optimizer, range(2))
    copied = copy.deepcopy(optimizer)
    assert copied.states == "host"
    assert _same(_states(copied), _states(optimizer))
    for group in copied.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    copied.step()
    again = next(iter(copied._rings.values())).inward
    held = [s["exp_avg"] for s in copied.state.values()]
    assert all(again.holds(t) for t in held if t.numel()), "a copy's states are pinned too"
    late = nn.Parameter(torch.ones(50, 50))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones_like(late)
    optimizer.step()
    assert float(late.detach().max()) < 1


def test_formats_and_dtypes_beside_each_other(engines: list[LateEngine]) -> None:
    """Each piece is stepped by who can: float64 goes to the reference, 8 bits do not come first."""

    def run(states: str) -> list[Tensor]:
        torch.manual_seed(0)
        wide = nn.Parameter(torch.randn(3000))
        found = [wide, nn.Parameter(torch.randn(2000, dtype=torch.float64))]
        narrow = nn.Parameter(torch.randn(5000))
        first = optim.AdamW(found, lr=1e-2, states=states, skip_nonfinite=False)
        groups = [{"params": [wide], "state_bits": 32}, {"params": [narrow]}]
        second = optim.AdamW8bit(groups, lr=1e-2, states=states, skip_nonfinite=False)
        for _ in range(3):
            for p in (*found, narrow):
                p.grad = torch.sin(p.detach() * 7)
            first.step()
            second.step()
        return [p.detach() for p in (*found, narrow)]

    for ours, theirs in zip(run("host"), run("device"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_schedule_free_evaluates_what_has_arrived(engines: list[LateEngine]) -> None:
    plain, hosted = _params("AdamW"), _params("AdamW")
    for params, more in ((plain, {}), (hosted, {"states": "host"})):
        optimizer = _make("ScheduleFreeAdamW", params, **more)
        _train(params, optimizer, range(2))
        optimizer.eval()
    assert _same(list(hosted.values()), list(plain.values()))


def test_a_batch_that_is_replaced_keeps_its_slots_till_they_are_read(
    engines: list[LateEngine],
) -> None:
    a, b = nn.Parameter(torch.randn(60)), nn.Parameter(torch.randn(1900))
    optimizer = optim.AdamW([a, b], states="host")
    for used in ((a,), (a, b), (a,)):
        a.grad = b.grad = None
        for p in used:
            p.grad = torch.ones_like(p)
        optimizer.step()
    a.data = a.data.clone()
    optimizer.step()
    optimizer.wait_for_states()


def test_step_in_backward(engines: list[LateEngine]) -> None:
    def run(**more: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, **more)
        optim.StepInBackward(optimizer)
        for _ in range(3):
            model(torch.ones(4, 30)).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert _same(run(states="host"), run())


def test_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ArgumentError, match=r"states.*device or host or paged.*'disk'"):
        optim.AdamW([p], states="disk")
    with pytest.raises(ArgumentError, match=r"states: expected 'device', got 'host'"):
        optim.Adafactor([p], states="host")
    with pytest.raises(ArgumentError, match=r"states.*capturable"):
        optim.AdamW([p], states="host", capturable=True)
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(DtypeError, match="sparse"):
        optim.AdamW([p], states="host").step()
    with pytest.raises(ArgumentError, match=r"states.*flat"):
        optim.AdamW([p], states="host", flat=True)
