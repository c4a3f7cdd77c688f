from __future__ import annotations

import copy

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected
from torch import Tensor

import fastft
from fastft import errors, native, ops

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = [(3,), (1000, 17), (1,), (0,), (5, 5), (40001,)]


class State:
    """The arguments of one call."""

    def __init__(self, param: torch.dtype, grad: torch.dtype) -> None:
        self.params = [torch.randn(s).to(param) for s in SHAPES]
        self.grads = [torch.randn(s).to(grad) for s in SHAPES]
        self.exp_avgs = [torch.randn(s) * 0.1 for s in SHAPES]
        self.exp_avg_sqs = [torch.rand(s) * 0.1 for s in SHAPES]
        n = len(SHAPES)
        self.steps = torch.arange(n, dtype=F32)
        self.hyper = torch.tensor([[1e-2 * (i + 1), 0.9, 0.99, 1e-6, 0.1] for i in range(n)])
        self.stats = torch.zeros(3)

    def widened(self) -> State:
        other = copy.deepcopy(self)
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
            setattr(other, name, [t.double() for t in getattr(self, name)])
        other.hyper, other.stats = self.hyper.double(), self.stats.double()
        other.steps = self.steps.double()
        return other

    def run(self, **options: object) -> None:
        ops.adamw(*self.arguments(), **options)  # type: ignore[arg-type]

    def arguments(self) -> tuple[object, ...]:
        return (
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            self.hyper,
            self.stats,
        )

    def results(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize(("param", "grad"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(
    backend: str, param: torch.dtype, grad: torch.dtype, max_norm: float, maximize: bool
) -> None:
    from fastft.reference import adamw as reference

    state = State(param, grad)
    truth, plain = state.widened(), copy.deepcopy(state)
    reference.step(*truth.arguments(), max_norm=max_norm, maximize=maximize)  # type: ignore[arg-type]
    reference.step(*plain.arguments(), max_norm=max_norm, maximize=maximize)  # type: ignore[arg-type]
    state.run(backend=backend, max_norm=max_norm, maximize=maximize)
    names = [str(i) for i in range(len(state.results()))]
    for i, name in enumerate(names):
        dtype = state.results()[i].dtype
        assert_as_good_as_torch(
            [name], [state.results()[i]], [plain.results()[i]], [truth.results()[i]], dtype
        )
    assert torch.equal(state.steps.double(), truth.steps)
    torch.testing.assert_close(state.stats.double(), truth.stats, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing_and_are_counted(backend: str, poison: float) -> None:
    state = State(F32, F32)
    state.grads[1][3, 4] = poison
    before = copy.deepcopy(state)
    state.run(backend=backend)
    state.run(backend=backend)
    for a, b in zip(state.results(), before.results(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state.steps, before.steps)
    assert state.stats[2].item() == 2


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set_and_thread_count(isa: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        p, g, m, v = (torch.rand(50_000) for _ in range(4))
        table = torch.tensor([[t.data_ptr() for t in (p, g, m, v)] + [50_000, 0, 0]])
        steps, stats = torch.zeros(1), torch.zeros(3)
        hyper = torch.tensor([[1e-2, 0.9, 0.99, 1e-6, 0.1]])
        native.module().adamw(
            table.data_ptr(), steps.data_ptr(), hyper.data_ptr(), 1, 1.0, False,
            stats.data_ptr(), isa=isa,
        )  # fmt: skip
        results.append((p, m, v, stats))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _models() -> tuple[list[Tensor], list[Tensor]]:
    mine = [torch.randn(s, requires_grad=True) for s in SHAPES]
    return mine, [p.detach().clone().requires_grad_() for p in mine]


def _gradients(mine: list[Tensor], theirs: list[Tensor], skip: int | None = None) -> None:
    for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
        p.grad = None if i == skip else torch.randn_like(p)
        q.grad = None if i == skip else p.grad.clone()  # type: ignore[union-attr]


def _same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_is_torch_s_adamw_with_groups_scheduler_clip_and_missing_gradients() -> None:
    mine, theirs = _models()
    fused = fastft.optim.AdamW(
        [{"params": mine[:2], "lr": 3e-2}, {"params": mine[2:], "weight_decay": 0.3}],
        lr=1e-2,
        max_grad_norm=1.0,
    )
    plain = torch.optim.AdamW(
        [{"params": theirs[:2], "lr": 3e-2}, {"params": theirs[2:], "weight_decay": 0.3}], lr=1e-2
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (fused, plain)
    ]
    for step in range(6):
        _gradients(mine, theirs, skip=4 if step in (1, 2) else None)
        torch.nn.utils.clip_grad_norm_([q for q in theirs if q.grad is not None], 1.0)
        for optimizer, schedule in zip((fused, plain), schedules, strict=True):
            optimizer.step()
            schedule.step()
        _same(mine, theirs)
    extra = torch.randn(4, requires_grad=True)
    twin = extra.detach().clone().requires_grad_()
    fused.add_param_group({"params": [extra]})
    plain.add_param_group({"params": [twin]})
    extra.grad = torch.ones(4)
    twin.grad = torch.ones(4)
    for p in (*mine, *theirs):
        p.grad = None
    fused.step()
    torch.nn.utils.clip_grad_norm_([twin], 1.0)
    plain.step()
    torch.testing.assert_close(extra, twin)


def test_state_dicts_are_interchangeable_with_torch_s() -> None:
    mine, theirs = _models()
    fused, plain = fastft.optim.AdamW(mine, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for _ in range(3):
        _gradients(mine, theirs)
        fused.step()
        plain.step()
    from_fused, from_plain = copy.deepcopy(fused.state_dict()), copy.deepcopy(plain.state_dict())
    fused.load_state_dict(from_plain)
    plain.load_state_dict(from_fused)
    for _ in range(2):
        _gradients(mine, theirs)
        fused.step()
        plain.step()
    _same(mine, theirs)


def test_states_stay_float32_for_bfloat16_parameters_across_a_reload() -> None:
    p = torch.randn(300, dtype=BF16, requires_grad=True)
    optimizer = fastft.optim.AdamW([p], lr=1e-2)
    p.grad = torch.randn(300, dtype=BF16)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["exp_avg"].dtype == F32
    assert torch.equal(optimizer.state[p]["exp_avg"], saved["state"][0]["exp_avg"])


def test_closure_counts_and_deepcopy() -> None:
    p = torch.ones(4, requires_grad=True)
    optimizer = fastft.optim.AdamW([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert optimizer.grad_norm.item() == pytest.approx(p.grad.norm().item())
    assert optimizer.skipped_steps == 0
    p.grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    copy.deepcopy(optimizer).step()


def test_a_copy_keeps_its_clip_and_counts() -> None:
    p = torch.ones(4, requires_grad=True)
    optimizer = fastft.optim.AdamW([p], max_grad_norm=0.5)
    p.grad = torch.full((4,), float("nan"))
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert (twin.max_grad_norm, twin.skipped_steps) == (0.5, 1)


def test_clip_and_skip_are_global_over_directions() -> None:
    """maximize needs a call of its own; the norm is still the one of all gradients."""
    p, q = (torch.ones(4, requires_grad=True) for _ in range(2))
    optimizer = fastft.optim.AdamW(
        [{"params": [p]}, {"params": [q], "maximize": True}], max_grad_norm=1.0, lr=0.1
    )
    p.grad, q.grad = torch.full((4,), 3.0), torch.full((4,), 4.0)
    optimizer.step()
    scale = 1 / (100.0**0.5 + 1e-6)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * scale * p.grad)
    torch.testing.assert_close(optimizer.state[q]["exp_avg"], -0.1 * scale * q.grad)
    assert optimizer.grad_norm.item() == pytest.approx(10.0)
    before = q.detach().clone()
    p.grad[0] = float("inf")
    optimizer.step()
    assert torch.equal(q, before)
    assert optimizer.skipped_steps == 1


def test_one_call_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = _models()
    optimizer = fastft.optim.AdamW(mine)
    calls: list[int] = []
    original = ops.adamw
    monkeypatch.setattr(ops, "adamw", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k))
    _gradients(mine, theirs)
    optimizer.step()
    assert calls == [len(SHAPES)]


def test_registered_operation_passes_opcheck() -> None:
    state = State(F32, F32)
    arguments = (*state.arguments(), 1.0, False, "cpu")
    torch.library.opcheck(torch.ops.fastft.adamw_step.default, arguments)


def _rejected() -> list[Rejected]:
    def call(name: str, value: object) -> object:
        state = State(F32, F32)
        setattr(state, name, value)
        return state.run

    def optimizer(**options: object) -> object:
        return lambda: fastft.optim.AdamW([torch.zeros(2, requires_grad=True)], **options)  # type: ignore[arg-type]

    state = State(F32, F32)
    transposed = [*state.grads]
    transposed[1] = torch.randn(17, 1000).t()
    sparse = [*state.grads]
    sparse[0] = state.grads[0].to_sparse()
    cases = [
        ("count", call("grads", state.grads[:2]), errors.ShapeError, ["as many", "[6, 2, 6, 6]"]),
        ("dtype", call("params", [t.long() for t in state.params]), errors.DtypeError,
         ["params", "int64"]),
        ("grad dtype", call("grads", [t.bfloat16() for t in state.grads]), errors.DtypeError,
         ["grads", "bfloat16"]),
        ("contiguous", call("grads", transposed), errors.ShapeError, ["grads", "contiguous"]),
        ("sparse", call("grads", sparse), errors.DtypeError, ["grads", "dense"]),
        ("state", call("exp_avgs", [t.double() for t in state.exp_avgs]), errors.DtypeError,
         ["exp_avgs", "float32"]),
        ("hyper", call("hyper", torch.zeros(2, 5)), errors.ShapeError, ["hyper", "(6, 5)"]),
        ("max_norm", lambda: State(F32, F32).run(max_norm=-1.0), errors.ArgumentError,
         ["max_norm", "-1.0"]),
        ("lr", optimizer(lr=-1.0), errors.ArgumentError, ["lr", ">= 0", "-1.0"]),
        ("betas", optimizer(betas=(0.9, 1.0)), errors.ArgumentError, ["betas", "[0, 1)"]),
        ("max_grad_norm", optimizer(max_grad_norm=0.0), errors.ArgumentError, ["max_grad_norm"]),
    ]  # fmt: skip
    return [Rejected(n, c, e, words) for n, c, e, words in cases]  # type: ignore[arg-type]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
