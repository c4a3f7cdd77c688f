"""Policies under FSDP2: two gloo processes on the CPU, each policy's gradients beside none's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastft import memory
from fastft.memory._layers import find_layers
from tests.memory.models import llama, same, steps
from tests.ranks import end_rank

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"
)
# Policy, dropout, tile.
CASES = [(p, 0.1, None) for p in ("none", "lora", "attention", "full", "offload", "auto")]
CASES += [("none", 0.0, None), ("full", 0.0, 20)]


def _worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        policy, dropout, tile = case
        model = llama(dropout=dropout)
        budget = 1 << 20 if policy == "auto" else None
        memory.checkpoint(model, policy, budget=budget, mlp_tile=tile)
        for layer in find_layers(model):
            fully_shard(layer)
        fully_shard(model)
        got = steps(model)
        assert policy in ("auto", *memory.explain(model).split())
        found[case] = [[getattr(t, "full_tensor", lambda t=t: t)() for t in one] for one in got]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    end_rank()


def test_every_policy_under_fsdp2(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for case in CASES[1:-2]:
        assert same(found[case], found[CASES[0]]), case
    for got, want in zip(found[CASES[-1]], found[CASES[-2]], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
