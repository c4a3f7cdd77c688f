"""The cheapest mix within a budget: exact, printed, kept to."""

from __future__ import annotations

import itertools
import pickle
import random
from pathlib import Path

import pytest
import torch

from fastft import memory, ops, optim
from fastft.errors import ArgumentError
from fastft.memory import _auto
from fastft.memory._auto import Choice, cheapest
from fastft.memory._saved import saving
from tests.memory.models import llama, same, steps


def peak(mix: tuple[Choice, ...]) -> int:
    return sum(c.kept for c in mix) + max(c.held for c in mix)


def test_the_choice_is_the_best_of_all() -> None:
    draw = random.Random(0)
    for _ in range(60):
        layers = []
        for _ in range(draw.randint(1, 5)):
            kept = sorted((draw.randint(1, 40) for _ in range(3)), reverse=True)
            costs = sorted(draw.randint(0, 20) for _ in range(3))
            held = [0, kept[0], kept[0]]
            names = ("none", "attention", "full")
            layers.append([Choice(*c) for c in zip(names, kept, held, costs, strict=True)])
        budget = draw.randint(5, 160)
        fitting = [mix for mix in itertools.product(*layers) if peak(mix) <= budget]
        found = cheapest(layers, budget)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert peak(tuple(found)) <= budget
        best = min(sum(c.cost for c in mix) for mix in fitting)
        assert sum(c.cost for c in found) == best


@pytest.mark.parametrize(
    ("budget", "mix"),
    [
        (1 << 30, "4 x none"),
        (430_000, "3 x attention"),
        (350_000, "x attention"),
        (225_000, "full"),
    ],
)
def test_a_smaller_budget_keeps_less_and_changes_no_bit(
    budget: int, mix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = memory.checkpoint(llama(), "auto", budget=budget)
    assert same(steps(model, 3), steps(llama(), 3))
    assert mix in memory.explain(model), memory.explain(model)
    told = capsys.readouterr().err
    assert told.count("fastft.memory:") == 1
    assert "48 tokens" in told


def test_a_larger_batch_is_planned_anew(capsys: pytest.CaptureFixture[str]) -> None:
    model = memory.checkpoint(llama(), "auto", budget=500_000)
    steps(model, 2, tokens=8)
    assert memory.explain(model) == "4 x none"
    steps(model, 2, tokens=24)
    assert memory.explain(model) != "4 x none"
    assert capsys.readouterr().err.count("fastft.memory:") == 2


def test_no_budget_means_free_memory(capsys: pytest.CaptureFixture[str]) -> None:
    model = memory.checkpoint(llama(), "auto")
    steps(model, 2)
    assert memory.explain(model) == "4 x none"
    assert "GiB" in capsys.readouterr().err


def test_too_small_a_budget_says_what_is_needed() -> None:
    model = memory.checkpoint(llama(), "auto", budget=1000)
    with pytest.raises(ArgumentError, match="all layers under 'full', 48 tokens") as caught:
        steps(model, 2)
    assert "offload" not in str(caught.value)  # on a CPU it keeps more


def test_states_are_reserved_until_an_optimizer_has_its_own() -> None:
    model = llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    stepped = _auto._Stepped()
    assert _auto.reserved_bytes(model, stepped.seen) == 12 * count
    optimizer = optim.AdamW(trained, lr=1e-3)
    for p in trained:
        p.grad = torch.zeros_like(p)
    assert _auto.reserved_bytes(model, stepped.seen) == 8 * count
    optimizer.step()
    assert _auto.reserved_bytes(model, stepped.seen) == 0
    optimizer.zero_grad(set_to_none=True)
    assert _auto.reserved_bytes(model, stepped.seen) == 4 * count
    del stepped
    optimizer.step()


@pytest.mark.parametrize("version", [1, 2])
def test_file_cache_in_a_container_is_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "memory" if version == 1 else tmp_path
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    group.mkdir(exist_ok=True)
    (group / f"memory.{names[0]}").write_text("1000\n")
    (group / f"memory.{names[1]}").write_text("700\n")
    monkeypatch.setattr(_auto, "_CGROUP", tmp_path)
    assert _auto._container_room() == [300]
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(
        f"anon 500\n{prefix}inactive_file 150\n{prefix}active_file 50\n"
    )
    assert _auto._container_room() == [500]


def test_random_numbers_are_as_if_nothing_had_been_measured() -> None:
    model = memory.checkpoint(llama(dropout=0.2), "auto", budget=700_000)
    torch.manual_seed(3)
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    after = torch.rand(1)
    plain = llama(dropout=0.2)
    torch.manual_seed(3)
    plain(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(after, torch.rand(1))


def test_inside_somebody_elses_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    model = memory.checkpoint(llama(fused=False, dropout=0.0), "auto", budget=1 << 30)
    for _ in range(3):
        ids = torch.arange(8).view(1, 8)
        loss = checkpoint(lambda i: model(input_ids=i, labels=i).loss, ids, use_reentrant=False)
        loss.backward()


def test_layers_that_all_differ_are_solved_quickly() -> None:
    draw = random.Random(1)
    layers = []
    for _ in range(60):
        kept = sorted((draw.randint(1, 1 << 30) for _ in range(4)), reverse=True)
        costs = sorted(draw.random() for _ in range(4))
        names = ("none", "lora", "attention", "full")
        held = (0, 0, kept[0], kept[0])
        layers.append([Choice(*c) for c in zip(names, kept, held, costs, strict=True)])
    found = cheapest(layers[:12], 6 << 30)
    assert found is not None
    assert peak(tuple(found)) <= 6 << 30


def test_hidden_states_passed_by_name_and_pickles() -> None:
    model = llama(fused=False, dropout=0.0)
    for layer in model.base_model.model.model.layers:
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: ((), {"hidden_states": args[0], **kwargs}) if args else None,
            with_kwargs=True,
        )
    model = memory.checkpoint(model, "auto", budget=1 << 30)
    steps(model, 2)
    assert memory.explain(model) == "4 x none"


def test_a_pickle_keeps_the_policies_it_was_made_with() -> None:
    model = memory.checkpoint(llama(fused=False), "auto", budget=1 << 30)
    steps(model, 2)
    assert memory.explain(pickle.loads(pickle.dumps(model))) == "4 x none"


def test_a_result_made_again_costs_the_bytes_that_takes() -> None:
    """S is small, but x is read for it; each is told of once, whoever else saves it."""
    x, w = torch.randn(40, 64, requires_grad=True), torch.randn(32, 64)
    a, b = torch.randn(16, 64, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    moved: list[int] = []
    with saving(recipes=True, remade=moved.append):
        y = ops.lora_linear(x, w, a, b, scaling=1.0)
        z = ops.rms_norm(y, torch.ones(32))
        (z * z).sum()
    s = 4 * 40 * 16
    assert moved == [x.nbytes + a.nbytes + s, 2 * y.nbytes + 4 * 32]
