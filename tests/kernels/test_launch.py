"""Prepared launches, on CPU tensors before a stand-in for a GPU: what is passed on without Triton's
look at the arguments is what Triton passes on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

import torch
from fastft_kernels import _launch, border, glu, lora_linear, rms_norm, rope, ways
from fastft_kernels._common import INTERPRETED
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.stand_in import Launch, Launches, stand_in

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

TOKENS, FEATURES, WIDTH, R = 96, 64, 128, 16
BF16 = torch.bfloat16


class Given:
    """The tensors of calls, and a name for each."""

    def __init__(self, siblings: int = 2, dropout: float = 0.0, biased: bool = False) -> None:
        n = siblings
        self.biases = [torch.zeros(WIDTH, dtype=BF16) if biased else None for _ in range(n)]
        self.x, self.dx = self._wide(FEATURES), self._wide(FEATURES)
        self.ys, self.dys = ([self._wide(WIDTH) for _ in range(n)] for _ in range(2))
        self.weights = [torch.zeros(WIDTH, FEATURES, dtype=BF16) for _ in range(n)]
        self.a, self.da = ([torch.zeros(R, FEATURES) for _ in range(n)] for _ in range(2))
        self.b, self.db = ([torch.zeros(WIDTH, R) for _ in range(n)] for _ in range(2))
        self.ss = [torch.zeros(TOKENS, R, dtype=BF16) for _ in range(n)]
        bits = torch.zeros(TOKENS, FEATURES // 8, dtype=torch.uint8)
        self.masks = [bits.clone() if dropout else None for _ in range(n)]
        self.ps, self.scalings, self.owners = [dropout] * n, [0.5] * n, list(range(n))
        self.spans = [(0, TOKENS)] * n
        self.seed = torch.zeros(1, dtype=torch.int64)

    def _wide(self, features: int) -> torch.Tensor:
        return torch.zeros(TOKENS, features, dtype=BF16)

    def forward(self) -> None:
        lora_linear.fwd(
            self.ys, self.ss, self.x, self.weights, self.biases, self.a, self.b,
            self.scalings, self.masks, self.ps, self.owners, self.spans,
        )  # fmt: skip

    def backward(self) -> None:
        lora_linear.bwd(
            self.dx, list(self.da), list(self.db), self.dys, self.x, self.ss, self.weights, self.a,
            self.b, self.scalings, self.masks, self.ps, self.owners, self.spans,
        )  # fmt: skip

    def unit(self) -> None:
        glu.fwd(self.dys[0], self.ys[0], self.ys[1], activation="silu")
        glu.bwd(*self.dys, self.x.new_zeros(TOKENS, WIDTH), *self.ys, activation="silu")
        found = lora_linear.glu_bwd(
            self.dys[0], self.ys[0], self.ys[1], self.x, self.ss, self.weights, self.a, self.b,
            self.scalings, self.masks, gate_first=True, activation="silu",
        )  # fmt: skip
        assert found is not None

    def norm(self) -> None:
        rstd, weight = torch.zeros(TOKENS), torch.zeros(FEATURES, dtype=BF16)
        facts = {"offset": 1.0}
        rms_norm.fwd(self.dx, rstd, self.x, weight, eps=1e-6, round_first=True, **facts)
        more = (torch.zeros_like(self.x), torch.zeros_like(self.x))
        rms_norm.fwd(self.dx, rstd, self.x, weight, *more, eps=1e-6, round_first=True, **facts)
        rms_norm.bwd(self.dx, None, self.x, self.x, weight, rstd, **facts)
        rms_norm.bwd(self.dx, None, self.x, self.x, weight, rstd, more[0], **facts)

    def rotary(self) -> None:
        q, k = (t.view(2, TOKENS // 2, -1, 32).transpose(1, 2) for t in (self.ys[0], self.x))
        table = torch.zeros(1, TOKENS // 2, 32, dtype=BF16)
        kinds = {"interleaved": False, "half_tables": False}
        for backward in (False, True):
            rope.fwd([q.clone(), k.clone()], [q, k], table, table, backward=backward, **kinds)
        rope.fwd([k.clone()], [k], table, table, backward=False, **kinds)

    def mask(self) -> None:
        lora_linear.dropout_mask(torch.zeros(TOKENS, 8, dtype=torch.uint8), self.seed, 0.1)


def plainly(launches: list[Launch]) -> list[tuple[Any, ...]]:
    """Launches with what tells tensors apart but for their addresses."""
    return [
        (
            launch.kernel,
            launch.hash,
            launch.grid,
            [_plainly(argument) for argument in launch.arguments],
        )
        for launch in launches
    ]


def _plainly(argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    if isinstance(argument, TensorDescriptor):
        rest = {name: v for name, v in vars(argument).items() if name != "base"}
        rest |= {"shape": list(argument.shape), "strides": list(argument.strides)}
        return "descriptor", _plainly(argument.base), rest
    return type(argument), argument


def forget() -> None:
    """Forgets what was prepared: for another device, or none."""
    for found in gc.get_objects():
        if type(found) is _launch.Prepared:
            found._runs.clear()


@pytest.fixture
def device() -> Iterator[Launches]:
    """The stand-in, with nothing prepared before it or after."""
    forget()
    with stand_in() as launches:
        launches.keep = True
        yield launches
    forget()


CALLS: dict[str, Callable[[], Any]] = {
    "forward": lambda: Given().forward,
    "forward of one": lambda: Given(1).forward,
    "forward with biases": lambda: Given(1, biased=True).forward,
    "forward of three under dropout": lambda: Given(3, 0.1).forward,
    "backward": lambda: Given().backward,
    "backward of three under dropout": lambda: Given(3, 0.1).backward,
    "gated unit": lambda: Given().unit,
    "norm": lambda: Given().norm,
    "rotary": lambda: Given().rotary,
    "mask": lambda: Given().mask,
}


@pytest.mark.parametrize("way", [None, *ways.WAYS])
@pytest.mark.parametrize("name", CALLS)
def test_repeated_it_passes_what_triton_passes(
    name: str, way: str | None, device: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """way: forced, LoRA's calls are not the plain ones."""
    asked: list[str] = []
    real = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self.__name__)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    call = CALLS[name]()
    given: Given = call.__self__
    held = border.make(given.weights, [R] * len(given.weights)) if way == "border" else None
    given.weights = given.weights if held is None else held.weights

    def launched() -> list[tuple[Any, ...]]:
        device.kept.clear()
        if way is None:
            call()
        else:
            with ways.force(way):
                call()
        return plainly(device.kept)

    launched()
    forget()
    first = launched()
    assert len(asked) > 0
    asked.clear()
    second = launched()
    assert first == second
    assert len(first) > 0
    assert not asked


def test_an_address_that_is_not_aligned_has_a_kernel_of_its_own(device: Launches) -> None:
    given = Given(1)
    given.forward()
    given.forward()
    aligned = [launch.hash for launch in device.kept[-2:]]
    buffer = torch.zeros(TOKENS * FEATURES + 1, dtype=BF16)
    given.x = buffer[1:].view(TOKENS, FEATURES)
    given.forward()
    given.forward()
    shrink, expand = device.kept[-2:]
    assert shrink.arguments[0] is given.x
    assert shrink.hash != aligned[0]
    assert expand.hash == aligned[1]


def test_another_dtype_has_a_kernel_of_its_own(device: Launches) -> None:
    given = Given(1)
    for _ in range(2):
        given.forward()
    first = [launch.hash for launch in device.kept[-2:]]
    given.b = [b.to(BF16) for b in given.b]
    for _ in range(2):
        given.forward()
    assert [launch.hash for launch in device.kept[-2:]] == [first[0], device.kept[-1].hash]
    assert device.kept[-1].hash != first[1]


def test_the_plain_call_launches_what_the_general_one_does(device: Launches) -> None:
    """In another order: each layer's term comes after its own product."""
    for given in (Given(), Given(3), Given(2, 0.1)):
        for call in (given.forward, given.backward):
            device.kept.clear()
            call()
            plain = sorted(map(repr, plainly(device.kept)))
            device.kept.clear()
            with ways.force("expand"):
                call()
            assert plain == sorted(map(repr, plainly(device.kept)))
