"""FSDP2 and DDP around an accelerated model: two gloo processes on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ranks import end_rank

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"
)


def _wrapped(kind: str, model: Any) -> Any:
    if kind.startswith("ddp"):
        unused = kind == "ddp, unused parameters"  # as the Trainer sets it for PEFT's models
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _loss(kind: str, wrapped: Any, given: dict[str, Any]) -> torch.Tensor:
    """The model's own; where DDP looks for a graph in its outputs, with a term of its logits."""
    found = wrapped(**given)
    if kind != "ddp, unused parameters":
        return found.loss
    return found.loss + 0.01 * found.logits.float().logsumexp(-1).square().mean()


def _worker(rank: int, kind: str, folder: str) -> None:
    from test_patch import batch, llama

    import fastft

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    expected, losses = [], []
    for accelerated in (False, True):
        model = llama()
        if accelerated:
            fastft.accelerate(model)
        wrapped = _wrapped(kind, model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = _loss(kind, wrapped, batch())
            loss.backward()
            optimizer.step()
            (losses if accelerated else expected).append(loss.item())
        if accelerated:
            calls = fastft.explain(model).to_dict()["calls"]
            if kind == "ddp, unused parameters":
                given = {"input_ids": batch()["input_ids"]}
                with fastft.losses.deferred_logits():
                    assert type(wrapped(**given).logits) is torch.Tensor
                reasons = fastft.explain(model).to_dict()["calls"]["fallback"]
                assert reasons["DDP that finds unused parameters"] == 1
    torch.save((expected, losses, calls), f"{folder}/{rank}.pt")
    end_rank()


@pytest.mark.parametrize("kind", ["ddp", "ddp, unused parameters", "fsdp2"])
def test_training_is_peft_s(kind: str, tmp_path: Path) -> None:
    mp.spawn(_worker, args=(kind, str(tmp_path)), nprocs=2)
    for rank in range(2):
        expected, losses, calls = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert expected[-1] < expected[0]
        read = {"logits were read": 3} if kind == "ddp, unused parameters" else {}
        assert calls["fallback"] == read
        assert calls["fused"] >= 3 * 14
