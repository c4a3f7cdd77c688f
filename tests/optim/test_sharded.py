"""FSDP2, ZeRO's sharded states and checkpoints across world sizes: gloo processes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastft import optim
from tests.ranks import end_rank

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"
)
STEPS = 4
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {"max_grad_norm": 0.1}),
    "AdamWBF16": (optim.AdamWBF16, {"max_grad_norm": 0.1, "seed": 5}),
    "kahan": (optim.AdamWBF16, {"kahan": True}),
    "Lion": (optim.Lion, {"lr": 1e-3}),
    "AdamW8bit": (optim.AdamW8bit, {"min_8bit_size": 1}),
    "Lion8bit": (optim.Lion8bit, {"min_8bit_size": 1, "lr": 1e-3}),
}
# Biases keep float32 states.
WIDE = {
    name: (kind, {**KINDS[name][1], "min_8bit_size": 100, "saved_bits": 32})
    for name, kind in (("AdamW8bit", optim.AdamW8bit), ("Lion8bit", optim.Lion8bit))
}
KINDS_AND_WIDE = KINDS | {f"{name} wide": wide for name, wide in WIDE.items()}


def _model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    # 33 rows: shares of 17 and 16.
    model = nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 8))
    return model.to(torch.bfloat16 if kind in ("AdamWBF16", "kahan") else torch.float32)


def _optimizer(kind: str, model: nn.Module) -> Any:
    make, options = KINDS_AND_WIDE[kind]
    return make(model.named_parameters(), **{"lr": 1e-2, **options})


def _train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 24, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().sum().backward()
        optimizer.step()


def _whole(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def _start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)


def _sharded(kind: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = _model(kind)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def _fsdp(rank: int, world: int, kind: str, folder: str) -> None:
    _start(rank, world, folder)
    model = _sharded(kind)
    optimizer = _optimizer(kind, model)
    _train(model, optimizer, range(STEPS))
    whole = _whole(model)
    if rank == 0:
        torch.save((whole, optimizer.grad_norm), f"{folder}/whole.pt")
    end_rank()


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_is_one_process(kind: str, tmp_path: Path) -> None:
    """The norm is the one over all shards; random bits are those of the whole tensor. 8-bit states
    are blocks of the part that is here, so theirs differ by quanta."""
    mp.spawn(_fsdp, args=(2, kind, str(tmp_path)), nprocs=2)
    model = _model(kind)
    optimizer = _optimizer(kind, model)
    _train(model, optimizer, range(STEPS))
    whole, norm = torch.load(tmp_path / "whole.pt")
    for p, q in zip(model.parameters(), whole, strict=True):
        if kind == "AdamW8bit":
            torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        elif kind == "Lion8bit":  # whose updates are signs: a quantum may turn one
            assert float(((p - q).abs() > 1e-6).float().mean()) < 0.02
        elif p.dtype == torch.bfloat16:
            # Gradients are sums over two processes: a rounding of theirs may turn one of p's.
            assert float((p != q).float().mean()) < 0.02
        else:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert float(norm) == pytest.approx(float(optimizer.grad_norm), rel=0.02)


def _saves(rank: int, world: int, kind: str, folder: str) -> None:
    _start(rank, world, folder)
    whole = _saved(_sharded(kind), kind, folder)
    if rank == 0:
        torch.save(whole, f"{folder}/saved.pt")
    end_rank()


def _saved(model: nn.Module, kind: str, folder: str) -> list[torch.Tensor]:
    """Saves after two steps; the parameters after all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    optimizer = _optimizer(kind, model)
    _train(model, optimizer, range(2))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=f"{folder}/checkpoint")
    _train(model, optimizer, range(2, STEPS))
    return _whole(model)


def _resumes(rank: int, world: int, kind: str, folder: str) -> None:
    _start(rank, world, folder)
    whole = _resumed(_sharded(kind), kind, folder)
    if rank == 0:
        torch.save(whole, f"{folder}/resumed.pt")
    end_rank()


def _resumed(model: nn.Module, kind: str, folder: str) -> list[torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = _optimizer(kind, model)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": states}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    if kind.endswith("wide"):
        formats = {state["state1"].dtype for state in optimizer.state.values()}
        assert formats == {torch.uint8, torch.float32}
    _train(model, optimizer, range(2, STEPS))
    return _whole(model)


@pytest.mark.parametrize("kind", ["AdamW", "AdamWBF16", "Lion", "AdamW8bit"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(kind: str, tmp_path: Path) -> None:
    mp.spawn(_saves, args=(2, kind, str(tmp_path)), nprocs=2)
    mp.spawn(_resumes, args=(1, kind, str(tmp_path)), nprocs=1)
    saved, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("saved", "resumed"))
    for p, q in zip(saved, resumed, strict=True):
        if kind == "AdamW8bit":  # other shards, other blocks
            torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        elif p.dtype == torch.bfloat16:
            assert float((p != q).float().mean()) < 0.02
        else:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_eight_bit_states_go_on_with_the_same_bits_in_the_same_shards(
    kind: str, tmp_path: Path
) -> None:
    for job in (_saves, _resumes):
        mp.spawn(job, args=(2, kind, str(tmp_path)), nprocs=2)
        (tmp_path / "store2").unlink()
    saved, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("saved", "resumed"))
    assert all(map(torch.equal, saved, resumed))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", ["sharded, then whole", "whole, then sharded", "whole, twice"])
@pytest.mark.parametrize("kind", WIDE)
def test_eight_bit_states_go_on_with_fsdp2_or_without(kind: str, way: str, tmp_path: Path) -> None:
    """``saved_bits=32``; a process that shards nothing needs no process group."""
    first, second = way.split(", ")
    folder, name = str(tmp_path), f"{kind} wide"
    if first == "sharded":
        mp.spawn(_saves, args=(2, name, folder), nprocs=2)
        saved = torch.load(tmp_path / "saved.pt")
    else:
        saved = _saved(_model(name), name, folder)
    if second == "then sharded":
        mp.spawn(_resumes, args=(2, name, folder), nprocs=2)
        resumed = torch.load(tmp_path / "resumed.pt")
    else:
        resumed = _resumed(_model(name), name, folder)
    for p, q in zip(saved, resumed, strict=True):
        if way == "whole, twice":  # the same codes
            assert torch.equal(p, q)
        elif kind == "AdamW8bit":  # other shards, other blocks
            torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        else:  # whose updates are signs: a quantum may turn one
            assert float(((p - q).abs() > 1e-6).float().mean()) < 0.02


def _zero(rank: int, world: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    _start(rank, world, folder)
    model = nn.parallel.DistributedDataParallel(_model("AdamW"))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=optim.AdamW, lr=1e-2, skip_nonfinite=False
    )
    _train(model, optimizer, range(STEPS))
    own = sum(t.numel() for s in optimizer.optim.state.values() for t in s.values())
    torch.save((_whole(model), own), f"{folder}/{rank}.pt")
    end_rank()


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    mp.spawn(_zero, args=(2, str(tmp_path)), nprocs=2)
    model = _model("AdamW")
    _train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(STEPS))
    total = 2 * sum(p.numel() for p in model.parameters())
    for rank in range(2):
        whole, own = torch.load(tmp_path / f"{rank}.pt")
        assert own < 0.9 * total
        for p, q in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
