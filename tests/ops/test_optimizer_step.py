from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from harness import Rejected, assert_rejected

from fastft import errors, native, ops
from fastft.cpu import optimizer_step as cpu
from fastft.reference import optimizer_step as reference
from tests.kernels.step_cases import BF16, F32, MIXED, SEED, STEP_CASES, StepCase, assert_step

ISAS = native.build_info()["instruction_sets_usable"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", STEP_CASES)
def test_against_float64(name: str, isa: str) -> None:
    assert_step(STEP_CASES[name], functools.partial(cpu.step, isa=isa))


@pytest.mark.parametrize("name", ["adamw-8bit-stochastic", "lion", "adamw-compensated"])
def test_the_same_bits_whatever_the_threads(name: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = STEP_CASES[name].make()
        ops.optimizer_step(state.tensors, state.grads, state.hyper, state.stats, seed=3)
        results.append({**state.named(), "stats": state.stats})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("step", [*(functools.partial(cpu.step, isa=isa) for isa in ISAS),
                                  reference.step])  # fmt: skip
def test_tensors_with_momentum_beside_some_without(step: Any, bits: int) -> None:
    """The bits of both apart."""
    states = [StepCase("sgd", bits).make() for _ in range(3)]
    halves = (slice(0, None, 2), slice(1, None, 2))
    for state in states:
        state.hyper[halves[1], 1:3] = 0.0
    together, *apart = states
    momenta = [m if i % 2 == 0 else None for i, m in enumerate(together.tensors.states[0])]
    mixed = ops.StepTensors("sgd", together.tensors.params, together.tensors.steps, [momenta],
                            keys=together.tensors.keys)  # fmt: skip
    options = {"max_norm": 0.0, "needs_norm": False, "seed": SEED}
    step(mixed, together.grads, together.hyper, together.stats, **options)
    for state, half, kept in zip(apart, halves, (True, False), strict=True):
        old = state.tensors
        momenta_apart = [old.states[0][half]] if kept else []
        own = ops.StepTensors(
            "sgd", old.params[half], old.steps[half], momenta_apart, keys=old.keys[half]
        )
        step(own, state.grads[half], state.hyper[half].contiguous(), state.stats, **options)
        for p, q in zip(together.tensors.params[half], own.params, strict=True):
            assert torch.equal(p, q)
        for m, n in zip(momenta[half], own.states[0] if kept else (), strict=kept):
            assert torch.equal(m, n)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing_and_are_counted(backend: str, poison: float) -> None:
    state = STEP_CASES["adamw-8bit"].make()
    state.grads[0][17] = poison
    before = state.copy()
    for _ in range(2):
        ops.optimizer_step(state.tensors, state.grads, state.hyper, state.stats, backend=backend)
    for key, value in before.named().items():
        assert torch.equal(state.named()[key], value), key
    assert state.stats[2].item() == 2
    assert state.stats[1].item() == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_loss_scales_and_infinities_found_elsewhere(backend: str) -> None:
    plain, scaled = STEP_CASES["adamw-clip"].make(), STEP_CASES["adamw-clip"].make()
    scaled.grads = [g * 1024 if g.dtype == F32 else g for g in scaled.grads]
    plain.grads = [g / 1 if g.dtype == F32 else g / 1024 for g in plain.grads]
    scaled.stats[3] = 1 / 1024
    for state in (plain, scaled):
        ops.optimizer_step(
            state.tensors, state.grads, state.hyper, state.stats, max_norm=1.0, backend=backend
        )
    for key, value in plain.named().items():
        torch.testing.assert_close(scaled.named()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(scaled.stats[0], plain.stats[0])
    before = scaled.copy()
    scaled.stats[4] = 1.0
    ops.optimizer_step(
        scaled.tensors, scaled.grads, scaled.hyper, scaled.stats, needs_norm=False, backend=backend
    )
    assert scaled.stats[2].item() == 1
    assert all(torch.equal(scaled.named()[k], v) for k, v in before.named().items())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_a_norm_the_step_is_taken_all_the_same(backend: str) -> None:
    a, b = STEP_CASES["lion"].make(), STEP_CASES["lion"].make()
    ops.optimizer_step(a.tensors, a.grads, a.hyper, a.stats, backend=backend)
    ops.optimizer_step(b.tensors, b.grads, b.hyper, b.stats, needs_norm=False, backend=backend)
    for key, value in a.named().items():
        assert torch.equal(b.named()[key], value), key
    assert b.stats[0].item() == 0


@pytest.mark.parametrize("state_bits", [32, 16])
def test_random_bits_do_not_depend_on_how_a_tensor_is_cut(state_bits: int) -> None:
    whole = StepCase("adamw", state_bits, "stochastic", ((5003, BF16, BF16),)).make()
    cut = [1, 700, 2311]
    bounds = list(zip([0, *cut], [*cut, 5003], strict=True))
    tensors, old = [], whole.tensors
    for start, end in reversed(bounds):  # and not on the order
        tensors.append(
            ops.StepTensors(
                "adamw",
                [old.params[0][start:end].clone()],
                [old.steps[0].clone()],
                [[s[0][start:end].clone()] for s in old.states],
                rounding="stochastic",
                keys=[1],
                offsets=[start],
            )
        )
    ops.optimizer_step(whole.tensors, whole.grads, whole.hyper, whole.stats, seed=SEED)
    parts = []
    for (start, end), part in zip(reversed(bounds), tensors, strict=True):
        grads = [whole.grads[0][start:end].clone()]
        ops.optimizer_step(part, grads, whole.hyper, ops.new_stats(CPU), seed=SEED)
        parts.insert(0, [part.params[0], *(state[0] for state in part.states)])
    for cut_up, kept in zip(
        zip(*parts, strict=True), [old.params[0], *(state[0] for state in old.states)], strict=True
    ):
        assert torch.equal(torch.cat(cut_up), kept)


def test_stochastic_rounding_is_unbiased_and_needs_no_state() -> None:
    value = torch.full((100_000,), 1.0 + 2**-10)
    bits = reference.random_bits(value.numel(), 5, 1, 2, 3)
    rounded = reference.round_stochastic(value, bits).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    # Up with probability 1/8: five standard deviations of the mean of 100,000 draws.
    assert abs(float((rounded > 1).float().mean()) - 1 / 8) < 5 * (1 / 8 * 7 / 8 / 1e5) ** 0.5
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38])
    kept = reference.round_stochastic(special, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(kept[:2].float(), special[:2])
    assert kept[2].isnan()
    other = reference.random_bits(100, 5, 2, 2, 3)
    assert not torch.equal(other, bits[:100])


class TestDynamicCodes:
    """The closed form in csrc/include/fastft/dynamic8.h against the map itself."""

    @staticmethod
    def recode(values: torch.Tensor, signed: bool, isa: str) -> torch.Tensor:
        """Writes values as states in 8 bits: a Lion or AdamW step with b2 = 0 stores the gradient
        (its square) as the new state."""
        n = values.numel()
        rule = "lion" if signed else "adamw"
        grads = [values if signed else values.sqrt()]
        count = 1 if signed else 2
        codes = [[torch.zeros(n, dtype=torch.uint8)] for _ in range(count)]
        scales = [[torch.zeros(-(-n // 256))] for _ in range(count)]
        tensors = ops.StepTensors(rule, [torch.zeros(n)], [torch.zeros(())], codes, scales)
        hyper = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
        cpu.step(
            tensors, grads, hyper, ops.new_stats(CPU), max_norm=0.0, needs_norm=False, seed=0,
            isa=isa,
        )  # fmt: skip
        return tensors.states[-1][0]

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("signed", [True, False])
    def test_every_value_of_the_map_has_its_code(self, signed: bool, isa: str) -> None:
        values = reference.dynamic_map(signed)
        expected = torch.arange(256, dtype=torch.uint8)
        if not signed:
            expected[0] = 1  # a second moment is never rounded to 0
        assert torch.equal(self.recode(values, signed, isa), expected)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("signed", [True, False])
    def test_the_nearest_value_is_taken(self, signed: bool, isa: str) -> None:
        torch.manual_seed(0)
        values = 10 ** (torch.rand(1 << 16) * 7 - 7)
        values = values * torch.where(torch.rand(1 << 16) < 0.5, -1, 1) if signed else values
        values[::256] = 1.0
        got = self.recode(values, signed, isa).int()
        expected = reference.encode8(values, signed)[0].int()
        assert (got - expected).abs().max() <= 1
        assert (got != expected).sum() <= 8, "only at the middles of neighbours"

    @pytest.mark.parametrize("signed", [True, False])
    def test_the_tables_of_a_gpu_hold_the_same_codes(self, signed: bool) -> None:
        """``dynamic8_words``, looked up as csrc/cuda/optimizer_step.cu does it, at every border of
        two codes and of two words, just below and just above."""
        words = np.array(native.module().dynamic8_words(), np.uint32)
        at, steps, bits = (0, 512, 6) if signed else (256, 512 + 22 * 64 + 1, 7)
        values = reference.dynamic_map(signed)
        np.testing.assert_allclose(
            words[at : at + 256].view(np.float32), values, rtol=5e-7, atol=1e-12
        )
        middles = ((values[1:].double() + values[:-1].double()) / 2).float().numpy()
        edges = np.arange(105 << bits, 127 << bits, dtype=np.uint32) << np.uint32(23 - bits)
        a = np.concatenate([middles[middles > 0], edges.view(np.float32)])
        a = np.concatenate([a, np.nextafter(a, 0), np.nextafter(a, 2), [1.0, np.nextafter(1, 2)]])
        a = np.maximum(a[a <= 1.0000002].astype(np.float32), np.float32(2.0**-22))
        raw = a.view(np.uint32)
        sums = words[steps + (raw >> (23 - bits)) - (105 << bits)] + (raw << (bits + 1))
        got = (sums >> 24).astype(int)
        exact = values.double().numpy()
        near = np.abs(exact[None, :] - np.minimum(a, 1).astype(float)[:, None])
        if not signed:
            near[:, 0] = np.inf  # no second moment is rounded to 0
        least = near.min(1)
        chosen = near[np.arange(a.size), got]
        assert np.all(chosen <= least + 2e-6 * a), "the nearest value, or one as near"
        assert len(set(got)) == (129 if signed else 255)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_every_code_is_read_as_what_it_stands_for(self, dtype: torch.dtype, isa: str) -> None:
        """b1 = b2 = 1 leaves the states what they were read as; written again they are the same."""
        codes = torch.arange(256, dtype=torch.uint8).repeat(3)
        first, second = codes.clone(), codes.clone()
        scales = [torch.full((3,), 0.3), torch.full((3,), 7e-5)]
        tensors = ops.StepTensors(
            "adamw", [torch.zeros(768, dtype=dtype)], [torch.zeros(())], [[first], [second]],
            [[scales[0].clone()], [scales[1].clone()]],
        )  # fmt: skip
        hyper = torch.tensor([[0.0, 1.0, 1.0, 1e-8, 0.0, 0.0, 1.0]])
        cpu.step(
            tensors, [torch.zeros(768, dtype=dtype)], hyper, ops.new_stats(CPU), max_norm=0.0,
            needs_norm=False, seed=0, isa=isa,
        )  # fmt: skip
        assert torch.equal(first, codes)
        # A second moment of 0 is written as the smallest there is.
        assert torch.equal(second, codes.clamp(min=1))
        for old, new in zip(scales, tensors.absmax, strict=True):
            torch.testing.assert_close(new[0], old)

    @pytest.mark.parametrize("isa", ISAS)
    def test_momentum_that_is_zero_stays_zero_beside_momentum_that_is_not(self, isa: str) -> None:
        p, gradient = torch.zeros(4096), torch.ones(4096)
        gradient[1::2] = 0
        tensors = ops.StepTensors(
            "lion", [p], [torch.zeros(())], [[torch.full((4096,), 127, dtype=torch.uint8)]],
            [[torch.zeros(16)]],
        )  # fmt: skip
        hyper = torch.tensor([[0.1, 0.9, 0.99, 0.0, 0.0, 0.0, 1.0]])
        for _ in range(4):
            cpu.step(
                tensors, [gradient], hyper, ops.new_stats(CPU), max_norm=0.0, needs_norm=False,
                seed=0, isa=isa,
            )  # fmt: skip
        assert not p[1::2].any()
        torch.testing.assert_close(p[::2], torch.full((2048,), -0.4))

    @pytest.mark.parametrize("signed", [True, False])
    def test_zeros_and_tiny_blocks(self, signed: bool) -> None:
        for value in (0.0, 1e-40):
            codes = self.recode(torch.full((256,), value), signed, "")
            assert codes.unique().numel() == 1
            decoded = reference.decode8(codes, torch.zeros(1), signed, F32)
            assert torch.equal(decoded, torch.zeros(256))

    def test_the_maps_are_bitsandbytes(self) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        for signed in (True, False):
            theirs = functional.create_dynamic_map(signed=signed)
            assert torch.equal(theirs, reference.dynamic_map(signed))


def _rejected() -> list[Rejected]:
    def build(**changes: Any) -> Any:
        old = StepCase("adamw", shapes=MIXED[:2]).make().tensors
        given = {
            "rule": "adamw", "params": old.params, "steps": old.steps, "states": old.states,
            "absmax": old.absmax, **changes,
        }  # fmt: skip
        return lambda: ops.StepTensors(**given)

    def call(**changes: Any) -> Any:
        state = StepCase("adamw").make()
        given = {"grads": state.grads, "hyper": state.hyper, "stats": state.stats, **changes}
        return lambda: ops.optimizer_step(state.tensors, **given)

    state = StepCase("adamw").make()
    old = StepCase("adamw", shapes=MIXED[:2]).make().tensors
    square = torch.randn(64, 64)
    sparse = [*state.grads]
    sparse[0] = sparse[0].to_sparse()
    return [
        Rejected("rule", build(rule="adam"), errors.ArgumentError, ["rule", "adamw or lion"]),
        Rejected("rounding", build(rounding="up"), errors.ArgumentError, ["rounding", "nearest"]),
        Rejected("states", build(states=old.states[:1]), errors.ShapeError, ["states", "2"]),
        Rejected("no state", build(states=[old.states[0], [None, None]]), errors.ArgumentError,
                 ["states", "None"]),
        Rejected("count", build(steps=old.steps[:1]), errors.ShapeError, ["as many"]),
        Rejected("dtype", build(params=[p.long() for p in old.params]), errors.DtypeError,
                 ["params", "int64"]),
        Rejected("strides", lambda: ops.StepTensors(
            "sgd", [square.t()], [torch.zeros(())], []), errors.ShapeError, ["contiguous"]),
        Rejected("8-bit schedule-free", StepCase("schedule_free", 8).make, errors.ArgumentError,
                 ["absmax", "schedule_free"]),
        Rejected("compensation", build(rounding="compensated"), errors.ArgumentError,
                 ["compensation"]),
        Rejected("grads", call(grads=state.grads[:2]), errors.ShapeError, ["grads", "2 for 8"]),
        Rejected("grad dtype", call(grads=[g.long() for g in state.grads]), errors.DtypeError,
                 ["grads", "int64"]),
        Rejected("sparse", call(grads=sparse), errors.DtypeError, ["grads", "dense"]),
        Rejected("hyper", call(hyper=torch.zeros(2, 5)), errors.ShapeError, ["hyper", "(8, 7)"]),
        Rejected("max_norm", call(max_norm=-1.0), errors.ArgumentError, ["max_norm", "-1.0"]),
        Rejected("norm", call(max_norm=1.0, needs_norm=False), errors.ArgumentError,
                 ["needs_norm"]),
    ]  # fmt: skip


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
