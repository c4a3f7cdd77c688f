"""Memory policies on a GPU: the same bits, less memory, and no race where copies are late."""

from __future__ import annotations

import pytest
import torch

from fastft import memory
from fastft.memory._host import HostRing
from fastft.streams import CudaEngine
from tests.memory.models import VOCABULARY, llama

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def step(model, tokens=2048):
    """Loss and gradients, and the peak above what was held."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (1, tokens), device="cuda")
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], peak


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_policies_change_no_bit_and_keep_less(dropout, device):
    model = llama(dropout=dropout, dtype=torch.bfloat16, fused=False, **SHAPE).cuda()
    import fastft

    fastft.accelerate(model)
    step(model)
    expected, most = step(model)
    peaks = {}
    for policy in ("lora", "attention", "full", "offload"):
        memory.checkpoint(model, policy)
        for _ in range(2):
            got, peaks[policy] = step(model)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), policy
    assert most > peaks["lora"] > peaks["attention"] > peaks["full"]
    assert peaks["offload"] < peaks["attention"]


def test_sequences_in_a_row_see_only_themselves(device):
    """A batch without padding, each sequence by itself, against the model's own mask."""
    import fastft

    model = llama(dtype=torch.bfloat16, fused=False, **SHAPE).cuda()
    torch.manual_seed(1)
    lengths = (700, 1100, 248)
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), device="cuda")
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0).int()
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
    rest = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}

    def trained(**kwargs):
        model.zero_grad(set_to_none=True)
        loss = model(**rest, **kwargs).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = trained()
    fastft.accelerate(model)
    got = trained(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    calls = [m.fused_calls for m in fastft.explain(model).modules if m.kind == "attention"]
    assert calls == [1] * SHAPE["num_hidden_layers"]
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 0.03 * b.double().norm()


def test_late_copies_and_poisoned_memory(device):
    """The side stream sleeps before each copy, and memory that is let go is overwritten at once."""

    class Late(CudaEngine):
        def copy(self, target, source):
            with torch.cuda.stream(self._side):
                torch.cuda._sleep(20_000_000)
            return super().copy(target, source)

    ring = HostRing(Late(torch.device("cuda")))
    for _ in range(3):
        expected, parked = [], []
        for _ in range(6):
            x = torch.randn(1 << 20, device="cuda")
            expected.append(x.double().sum())
            parked.append(ring.park(x))
            del x
            torch.full((1 << 20,), float("nan"), device="cuda")
        while parked:
            got = ring.fetch(parked.pop())
            assert torch.equal(got.double().sum(), expected.pop())
            del got
            torch.full((1 << 20,), float("nan"), device="cuda")
