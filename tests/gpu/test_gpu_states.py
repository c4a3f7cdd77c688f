"""Optimizer states in host memory and in managed memory: the bits of states on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastft import native, optim
from fastft.optim import _saved
from fastft.optim._ring import Ring
from fastft.streams import CudaEngine

pytestmark = pytest.mark.gpu
KINDS = {
    "AdamW": (optim.AdamW, {}, torch.float32),
    "AdamW8bit": (optim.AdamW8bit, {}, torch.bfloat16),
    "kahan": (optim.AdamWBF16, {"kahan": True}, torch.bfloat16),
    "Lion8bit": (optim.Lion8bit, {}, torch.float32),
}


class Late(CudaEngine):
    """Each copy sleeps first: what does not wait for it reads what was there before."""

    def copy(self, target, source):
        with torch.cuda.stream(self._side):
            torch.cuda._sleep(2_000_000)
        return super().copy(target, source)


def params(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4096, 1024), (33,), (1000, 777), (5000, 3), (1,), (64, 64)]
    return [nn.Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in shapes]


def train(made, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator).to("cuda", p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in made]


@pytest.mark.parametrize("states", ["host", "paged"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind, states, device, monkeypatch):
    if not native.build_info().get("cuda"):
        pytest.skip("built without CUDA")
    make, options, dtype = KINDS[kind]

    def new_ring(where):
        ring = Ring(Late(where), Late(where), where)
        ring.piece_bytes = 1 << 20
        return ring

    monkeypatch.setattr(_saved, "new_ring", new_ring)
    plain, moved = params(dtype), params(dtype)
    expected = train(plain, make(plain, lr=1e-2, **options), 3)
    optimizer = make(moved, lr=1e-2, states=states, **options)
    got = train(moved, optimizer, 3)
    assert all(map(torch.equal, got, expected))
    state = optimizer.state[moved[0]][optimizer.state_names[0]]
    assert state.is_pinned() if states == "host" else state.is_cuda


def test_states_in_host_memory_leave_the_gpu_to_others(device):
    if not native.build_info().get("cuda"):
        pytest.skip("built without CUDA")
    p = nn.Parameter(torch.zeros(1 << 28, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    optimizer = optim.AdamWBF16([p], states="host")
    optimizer.step()
    assert torch.cuda.memory_allocated() - before < 300 << 20, "2 GB of states are elsewhere"
    assert float(optimizer.state_dict()["state"][0]["exp_avg"].float().mean()) > 0
