"""The simulated step holds what the real one holds."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastft
from fastft import backends, memory
from fastft.cpu import products
from fastft.memory.simulate import Launchers, Meter, metered
from fastft.nn.deferred import DeferredLogits, only_shapes
from fastft.ops import _room
from tests.memory.models import VOCABULARY, llama


class Alive(TorchDispatchMode):
    """Bytes of tensors alive in a real step, by storage."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known: dict[int, Any] = dict.fromkeys(known)
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in () if only_shapes() else tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DeferredLogits):
                self.track(tensor.untyped_storage())
        return result

    def track(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def freed(_: Any) -> None:
            self.known.pop(key, None)
            self.live -= size

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", ["none", "lora", "attention", "full"])
def test_peak_and_kept_bytes_are_the_real_ones(
    policy: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = memory.checkpoint(llama(dropout=dropout), policy)
    # What comes from the pool is no operation of torch, which is what is watched here.
    monkeypatch.setattr(_room._Pool, "used", False)
    ids = torch.zeros(4, 256, dtype=torch.int64)
    real = {}
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        # Buffers that the CPU's launchers keep are the process's.
        scratch = products._scratch.buffers.values()
        held = (*model.parameters(), *model.buffers(), *scratch, ids)
        with Alive({t.untyped_storage()._cdata for t in held}) as alive:
            loss = model(input_ids=ids, labels=ids).loss
            real["kept"] = alive.live
            loss.backward()
            del loss
        real["peak"] = alive.peak

    meter = Meter()
    with torch.device("meta"):
        twin = llama(dropout=dropout, fused=False)
    with backends.planning(Launchers(meter, "cpu")):
        fastft.accelerate(twin)
    memory.checkpoint(twin, policy)
    meta = ids.to("meta")
    with metered(meter, "cpu"):
        meter.ignore([*twin.parameters(), *twin.buffers(), meta])
        for _ in range(2):
            twin.zero_grad(set_to_none=True)
            meter.start()
            before = meter.live
            loss = twin(input_ids=meta, labels=meta).loss
            kept = meter.live - before
            loss.backward()
            del loss
    # Small casts inside launchers, and the slab of logits, which the simulation keeps.
    slack = 64 * 1024 + 4 * 128 * VOCABULARY * 4
    assert abs(kept - real["kept"]) <= slack, (kept, real)
    assert abs(meter.peak - before - real["peak"]) <= slack + 0.02 * real["peak"]


def test_logits_that_are_not_made_take_no_memory() -> None:
    vocabulary, tokens = 50_000, 512
    meter = Meter()
    with torch.device("meta"):
        model = llama(fused=False, vocab_size=vocabulary, num_hidden_layers=1)
    with backends.planning(Launchers(meter, "cpu")):
        fastft.accelerate(model)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with metered(meter, "cpu"):
        meter.ignore([*model.parameters(), *model.buffers(), ids])
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            meter.start()
            model(input_ids=ids, labels=ids).loss.backward()
    logits = 4 * tokens * vocabulary
    assert meter.peak < logits / 2  # a slab of an eighth, and the layer


def test_gradients_of_one_tensor_are_summed_in_place() -> None:
    meter, n = Meter(), 1 << 20
    w = torch.empty(n, device="meta", requires_grad=True)
    with metered(meter, "cpu"):
        meter.ignore([w])
        loss = (w * 2).sum() + (w * 3).sum()
        meter.start()
        loss.backward()
    assert meter.peak == meter.resident
    assert 2 * 4 * n <= meter.peak < 2 * 4 * n + 4096


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_heap_and_pool_do_not_give_to_each_other(device_type: str) -> None:
    meter, n = Meter(), 1 << 20
    like = torch.empty(1, device="meta")
    with metered(meter, device_type):
        meter.ignore([like])
        for make in (lambda: _room.new_empty(like, (n,)), lambda: like.new_empty(n)):
            made = [make() for _ in range(2)]
            del made
    assert meter.peak == 2 * 4 * n
    assert meter.resident == (2 if device_type == "cpu" else 1) * meter.peak
    assert meter.taken == (1 if device_type == "cpu" else 2) * meter.peak
    assert meter.live == 0


def test_another_threads_results_are_not_looked_at() -> None:
    seen: list[int] = []
    like = torch.empty(1, device="meta")

    def make() -> None:
        _room.new_empty(like, (1 << 20,))

    with _room.looked_at(lambda tensor: seen.append(tensor.numel())):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert not seen
        make()
    make()
    assert seen == [1 << 20]


def test_products_are_counted() -> None:
    meter = Meter()
    x, w = torch.empty(8, 16, device="meta"), torch.empty(4, 16, device="meta")
    with metered(meter, "cpu"):
        torch.mm(x, w.t())
    (work,) = [item for item in meter.work if item.flops]
    assert work.flops == 2 * 8 * 16 * 4
    assert work.product == (8, 4, 16)


def test_planning_ends_with_its_block() -> None:
    meter = Meter()
    x = torch.empty(4, 8, device="meta")
    with backends.planning(Launchers(meter, "cuda")):
        assert backends.device_type_of(x) == "cuda"
        assert backends.select("rms_norm", device_type="meta", dtype=x.dtype)[0] == "triton"
        assert backends.select("attention", device_type="meta", dtype=x.dtype)[0] == "torch"
    assert backends.device_type_of(x) == "meta"
    assert backends.select("rms_norm", device_type="meta", dtype=x.dtype)[0] == "reference"
