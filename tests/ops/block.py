"""What holds for every case of ``tests.kernels.block_cases``, as tests of one operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import assert_as_good_as_torch, poisoned
from torch import Tensor

from tests.kernels.block_cases import BLOCK_CASES

F64 = torch.float64


def as_good_as_torch(op: str) -> Callable[..., None]:
    """By every CPU backend, with every output poisoned."""

    @pytest.mark.parametrize("name", [n for n, c in BLOCK_CASES.items() if c.op == op])
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test(backend: str, name: str) -> None:
        case = BLOCK_CASES[name]
        with poisoned():
            got = case.results(backend)
        plain, truth = case.results(None), case.results(None, F64)
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in plain.items()}
        values = [[found[n] for n in case.names] for found in (got, plain, truth)]
        assert_as_good_as_torch(case.names, *values, case.dtype)

    return test


def compiled_and_the_same(op: str) -> Callable[..., None]:
    """In one graph."""
    names = [n for n, c in BLOCK_CASES.items() if c.op == op]

    @pytest.mark.parametrize("name", names)
    def test(name: str) -> None:
        case = BLOCK_CASES[name]
        tensors = [t.to(case.dtype).requires_grad_() for t in case.draw()]

        def run(*given: Tensor) -> list[Tensor]:
            return case.run(list(given), "cpu")

        torch._dynamo.reset()  # each case compiles the same code
        expected = run(*tensors)
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
        pulls = [torch.randn_like(t) for t in expected]
        for a, b in zip(
            [*got, *torch.autograd.grad(got, tensors, pulls)],
            [*expected, *torch.autograd.grad(expected, tensors, pulls)],
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    return test


def same_bits_for_any_number_of_threads(name: str) -> Callable[..., None]:
    """With one thread and with two."""

    def test() -> None:
        case = BLOCK_CASES[name]
        found, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                found.append(case.results("cpu"))
            finally:
                torch.set_num_threads(before)
        assert all(torch.equal(found[0][n], found[1][n]) for n in case.names)

    return test
