"""Every GPU backend, through fastft.ops, against float64: the cases the interpreter proves the
kernels on, and sizes like those of real models, where the real code paths are."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastft_kernels import ways
from torch import Tensor

from bench import ledger
from fastft import backends, ops
from fastft.ops.lora_linear import lora_linear_siblings
from fastft.reference import lora_grouped_linear as grouped_reference
from fastft.reference import lora_linear as lora_reference
from tests.kernels.block_cases import BLOCK_CASES, LARGE_BLOCK_CASES
from tests.kernels.bounds import assert_as_accurate, relative_errors
from tests.kernels.cases import (
    BF16,
    DIVERGENCE_CASES,
    DORA_CASES,
    F16,
    F32,
    GLU_CASES,
    IGNORED,
    LORA_CASES,
    LOSS_CASES,
    NORM_CASES,
    DivergenceCase,
    DoraCase,
    GluCase,
    LoraCase,
    LoraInputs,
    LossCase,
    LossInputs,
    NormCase,
)
from tests.kernels.step_cases import MIXED, STEP_CASES, StepCase, StepState, assert_step

pytestmark = pytest.mark.gpu

NOT_OFFERED = "not offered"  # see conftest.py
REHEARSAL = bool(os.environ.get("FASTFT_REHEARSAL"))  # see conftest.py
KERNELS = list(ledger.kernels())
LARGE_LORA = {
    "attention-bf16": LoraCase(
        2048, 2048, (2048, 512, 512), (16, 16, 16), BF16, F32, (0.05, 0.05, 0.05), bias=False
    ),
    "siblings-bf16-no-dropout": LoraCase(
        2048, 2048, (2048, 512, 512), (16, 16, 16), BF16, F32, bias=False
    ),
    "wide-bf16-no-dropout": LoraCase(1030, 4096, (4104,), (16,), BF16, F32),
    "mlp-r64-bf16": LoraCase(1024, 2048, (5632, 5632), (64, 64), BF16, F32, (0.1, 0.1)),
    "parts-f16": LoraCase(515, 1096, (1024, 512), (16, 5), F16, F32, (0.1, 0.3), bias=False),
    "odd-f16": LoraCase(777, 1001, (2047,), (33,), F16, F32),
    "r256-f32": LoraCase(513, 1030, (640,), (256,)),
}
LARGE_DIVERGENCE = {
    "reverse-32000-bf16": DivergenceCase("reverse_kl", BF16, 300, 512, 32000, 100, 2.0),
    "jensen-shannon-50257-f16": DivergenceCase("jensen_shannon", F16, 101, 128, 50257, 101),
}
LARGE_LOSS = {
    "vocabulary-32000-bf16": LossCase(1024, 512, 32000, BF16, False, 300),
    "vocabulary-50257-f32": LossCase(200, 257, 50257, F32, True, 64),
    "vocabulary-32001-f16": LossCase(301, 128, 32001, F16, True, 301),
    "vocabulary-32000-options": LossCase(
        512, 512, 32000, BF16, True, 200, 0.7, 30.0, 0.1, 1e-3, weighted=True
    ),
}
LARGE_GLU = {
    "llama-8b-bf16": GluCase(2048, 14336, BF16),
    "gemma-f16": GluCase(333, 6912, F16, "gelu_tanh", halves=True),
}
LARGE_NORM = {
    "llama-8b-bf16": NormCase(4096, 4096, BF16),
    "gemma-f16": NormCase(777, 1152, F16, 1.0, False),
    "16384-f32": NormCase(300, 16384, F32),
}
LARGE_DORA = {
    "llama-8b-bf16": DoraCase(4096, 4096, BF16),
    "odd-f16": DoraCase(777, 1001, F16, True),
}
LARGE_STEP = (
    *MIXED,
    (3_000_001, F32, F32),
    (1_000_003, BF16, BF16),
    (65_536, BF16, F32),
    *[(4096, F32, F32)] * 300,
)
if REHEARSAL:  # the interpreter is slow
    for table in (
        LARGE_LORA, LARGE_DIVERGENCE, LARGE_LOSS, LARGE_GLU, LARGE_NORM, LARGE_DORA,
        LARGE_BLOCK_CASES,
    ):  # fmt: skip
        table.clear()


def of(op: str) -> Any:
    """Parametrizes a test over the GPU kernels of ``op``."""
    return pytest.mark.parametrize("kernel", [k for k in KERNELS if k.endswith(f"/{op}")])


def backend_of(kernel: str, **facts: Any) -> str:
    """The backend's name; a skip where this build lacks it, and no other reason is accepted."""
    name, op = kernel.split("/")
    reason = dict(backends.explain_op(op, **facts))[name]
    if reason is not None and "built without CUDA" in reason:
        pytest.skip(reason)
    assert reason is None, f"{kernel} must run here: {reason}"
    return name


def compare(
    observed: Any,
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
    logits: torch.dtype | None = None,
    terms: int = 1,
) -> None:
    for name, value in got.items():
        rounded_to = logits if name == "loss" else None
        assert_as_accurate(name, value, plain[name], truth[name], rounded_to, terms)
        kind = f"{name.rstrip('0123456789')} {str(value.dtype).removeprefix('torch.')}"
        observed.saw(kind, relative_errors(value, truth[name])[1])


def median_ms(run: Callable[[], None], rounds: int = 20) -> float:
    """Median of single runs, each between two events, after a warm-up and with a cold L2."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def lora_launcher(inputs: LoraInputs, backend: str) -> Any:
    """The module of ``backend`` that serves this case."""
    adapter = inputs.lora_as[0]
    facts = {"dtype": inputs.x.dtype, "adapter_dtype": adapter.dtype, "r": adapter.shape[0]}
    return backends.select("lora_linear", backend, device_type=inputs.x.device.type, **facts)[1]


def lora_through_op(inputs: LoraInputs, backend: str, products: bool = True) -> dict[str, Tensor]:
    """ys and gradients from the public operation; ``inputs.masks`` become the masks it drew.

    products: its own, else the library's, to whose results ``lora_add`` adds.
    """
    torch.manual_seed(7)
    launcher, drawn = lora_launcher(inputs, backend), []

    def dropout_mask(out: Tensor, seed: Tensor, p: float) -> None:
        draw(out, seed, p)
        drawn.append(out)

    draw, launcher.dropout_mask = launcher.dropout_mask, dropout_mask
    x = inputs.x.detach().requires_grad_()
    lora_as = [a.detach().requires_grad_() for a in inputs.lora_as]
    lora_bs = [b.detach().requires_grad_() for b in inputs.lora_bs]
    adapters = {
        "scalings": inputs.scalings, "dropout_ps": inputs.ps, "owners": inputs.owners,
        "spans": inputs.spans, "backend": backend,
    }  # fmt: skip
    layers = zip(inputs.weights, inputs.biases, strict=True)
    try:
        if products:
            weights, biases = inputs.weights, inputs.biases
            ys = lora_linear_siblings(x, weights, lora_as, lora_bs, biases=biases, **adapters)
        else:
            ys = [torch.nn.functional.linear(x, w, bias) for w, bias in layers]
            ys = ops.lora_add_siblings(ys, x, lora_as, lora_bs, overwrite=True, **adapters)
    finally:
        launcher.dropout_mask = draw
    left = iter(drawn)
    inputs.masks = [next(left) if p else None for p in inputs.ps]
    gradients = torch.autograd.grad(ys, [x, *lora_as, *lora_bs], inputs.dys)
    n = len(lora_as)
    names = ["dx", *(f"da{i}" for i in range(n)), *(f"db{i}" for i in range(n))]
    results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return {**results, **dict(zip(names, gradients, strict=True))}


@of("lora_linear")
@pytest.mark.parametrize("name", [*LORA_CASES, *LARGE_LORA])
def test_lora_linear(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    case = {**LORA_CASES, **LARGE_LORA}[name]
    facts = {"dtype": case.dtype, "adapter_dtype": case.adapter_dtype, "r": max(case.ranks)}
    backend = backend_of(kernel, device_type=device.type, **facts)
    inputs = case.inputs(device)
    got = lora_through_op(inputs, backend)
    terms = max(inputs.x.shape)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    compare(observed, got, plain, truth, terms=terms)


@of("lora_linear")
@pytest.mark.parametrize("name", [*LORA_CASES, *LARGE_LORA])
def test_lora_add(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    """The same, the frozen products from elsewhere."""
    case = {**LORA_CASES, **LARGE_LORA}[name]
    facts = {"dtype": case.dtype, "adapter_dtype": case.adapter_dtype, "r": max(case.ranks)}
    backend = backend_of(kernel, device_type=device.type, **facts)
    inputs = case.inputs(device)
    got = lora_through_op(inputs, backend, products=False)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    compare(observed, got, plain, truth, terms=max(inputs.x.shape))


# Rows of whole vectors, where every way can run, and one that only the library's takes.
WAY_CASES = [*(name for name in LORA_CASES if name.startswith("aligned")), "siblings-bf16"]


@of("lora_linear")
@pytest.mark.parametrize("way", ["border", "gemm"])
@pytest.mark.parametrize("name", [*WAY_CASES, *LARGE_LORA])
def test_lora_linear_ways(
    kernel: str,
    name: str,
    way: str,
    device: torch.device,
    observed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each way on every case it can take; where it cannot, the others serve."""
    case = {**LORA_CASES, **LARGE_LORA}[name]
    facts = {"dtype": case.dtype, "adapter_dtype": case.adapter_dtype, "r": max(case.ranks)}
    backend = backend_of(kernel, device_type=device.type, **facts)
    inputs = case.inputs(device)
    held = lora_launcher(inputs, backend).lay_out(inputs.weights, case.ranks[: len(case.widths)])
    inputs.weights = held.weights
    before = [w.clone() for w in inputs.weights]
    taken, pick = [], ways.pick
    monkeypatch.setattr(
        ways, "pick", lambda *a: taken.append((way in a[2], pick(*a))) or taken[-1][1]
    )
    with ways.force(way):
        got = lora_through_op(inputs, backend)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    compare(observed, got, plain, truth, terms=max(inputs.x.shape))
    assert all(chosen == way for possible, chosen in taken if possible)
    whole = not case.owners
    if way == "border" and whole:
        assert [chosen for _, chosen in taken] == ["border", "border"]
    if name in ("siblings-bf16-no-dropout", "aligned-siblings"):
        assert [chosen for _, chosen in taken] == [way, way], "where every way can run"
    assert all(torch.equal(w, old) for w, old in zip(inputs.weights, before, strict=True))


@of("lora_linear")
@pytest.mark.parametrize("way", ["expand", "border", "gemm"])
def test_lora_linear_ways_same_inputs_same_bits(
    kernel: str, way: str, device: torch.device
) -> None:
    backend = backend_of(kernel, device_type=device.type, dtype=BF16, adapter_dtype=F32, r=16)
    inputs = LORA_CASES["aligned-siblings"].inputs(device)
    held = lora_launcher(inputs, backend).lay_out(
        inputs.weights, LORA_CASES["aligned-siblings"].ranks
    )
    inputs.weights = held.weights
    with ways.force(way):
        first, second = (lora_through_op(inputs, backend) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@of("lora_linear")
def test_lora_linear_same_inputs_same_bits(kernel: str, gpu: torch.device) -> None:
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16, adapter_dtype=F32, r=16)
    inputs = LARGE_LORA["attention-bf16"].inputs(gpu)
    first, second = (lora_through_op(inputs, backend) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@of("lora_linear")
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_keeps_the_fraction_asked_for(kernel: str, p: float, device: torch.device) -> None:
    backend = backend_of(kernel, device_type=device.type, dtype=BF16, adapter_dtype=F32, r=16)
    inputs = LoraCase(1, 8, (8,), (1,), BF16).inputs(device)
    launcher = lora_launcher(inputs, backend)
    mask = torch.empty((1000, 513), dtype=torch.uint8, device=device)
    launcher.dropout_mask(mask, torch.tensor([12345], device=device), p)
    kept = lora_reference.unpack_mask(mask, 8 * 513).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / (1000 * 513 * 8)) ** 0.5


@of("lora_linear")
@pytest.mark.parametrize("r", [16, 64])
def test_lora_linear_time(kernel: str, r: int, gpu: torch.device, observed: Any) -> None:
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16, adapter_dtype=F32, r=r)
    inputs = LoraCase(8192, 4096, (4096,), (r,), BF16, F32, bias=False).inputs(gpu)
    lora_through_op(inputs, backend)
    name = f"forward+backward 8192x4096x4096 bf16 r={r}"
    observed.time_ms[name] = median_ms(lambda: lora_through_op(inputs, backend))
    assert observed.time_ms[name] > 0


def loss_through_op(
    inputs: LossInputs, backend: str, chunk: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_()
    loss, accuracy = ops.linear_cross_entropy(
        hidden, weight, inputs.labels, ignore_index=IGNORED, reduction="sum",
        return_accuracy=True, backend=backend, chunk=chunk, **inputs.options(),
    )  # fmt: skip
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return {"loss": loss.detach()[None], "d_hidden": d_hidden, "d_weight": d_weight}, accuracy


@of("linear_cross_entropy")
@pytest.mark.parametrize("name", [*LOSS_CASES, *LARGE_LOSS])
def test_linear_cross_entropy(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    case = {**LOSS_CASES, **LARGE_LOSS}[name]
    backend = backend_of(kernel, device_type=device.type, dtype=case.dtype)
    inputs = case.inputs(device)
    got, accuracy = loss_through_op(inputs, backend, case.chunk)
    truth = inputs.autograd(torch.float64)
    compare(observed, got, inputs.autograd(case.dtype), truth, case.dtype)
    counted = int((inputs.labels != IGNORED).sum())
    # The library may round a logit the other way in another slab: a tie may fall either way.
    assert abs(float(accuracy) * counted - inputs.n_correct()) <= 1.5


@of("linear_cross_entropy")
@pytest.mark.parametrize("name", [*DIVERGENCE_CASES, *LARGE_DIVERGENCE])
def test_linear_divergence(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    case = {**DIVERGENCE_CASES, **LARGE_DIVERGENCE}[name]
    backend = backend_of(kernel, device_type=device.type, dtype=case.dtype)
    inputs = case.inputs(device)
    truth = inputs.autograd(torch.float64)
    compare(observed, inputs.through_op(backend), inputs.autograd(case.dtype), truth, case.dtype)


@of("linear_cross_entropy")
def test_compaction_of_ignored_tokens(kernel: str, gpu: torch.device, observed: Any) -> None:
    """Above the size where ignored tokens are dropped first: same results, zeros where ignored."""
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16)
    inputs = LossCase(4096, 2048, 32000, BF16, False, 2048).inputs(gpu)
    got, _ = loss_through_op(inputs, backend, 2048)
    assert not got["d_hidden"][inputs.labels == IGNORED].any()
    compare(observed, got, inputs.autograd(BF16), inputs.autograd(torch.float64), BF16)


@of("linear_cross_entropy")
def test_linear_cross_entropy_time(kernel: str, gpu: torch.device, observed: Any) -> None:
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16)
    inputs = LossCase(8192, 2048, 32000, BF16, False, 2048).inputs(gpu)

    def run() -> None:
        hidden = inputs.hidden.detach().requires_grad_()
        loss = ops.linear_cross_entropy(hidden, inputs.weight, inputs.labels, backend=backend)
        loss.backward()

    name = "loss+d_hidden 8192x2048x32000 bf16, a third ignored"
    observed.time_ms[name] = median_ms(run)
    assert observed.time_ms[name] > 0


@of("glu")
@pytest.mark.parametrize("name", [*GLU_CASES, *LARGE_GLU])
def test_glu(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    case = {**GLU_CASES, **LARGE_GLU}[name]
    backend = backend_of(kernel, device_type=device.type, dtype=case.dtype)
    inputs = case.inputs(device)
    gate, up = (t.detach().requires_grad_() for t in (inputs.gate, inputs.up))
    y = ops.glu(gate, up, case.activation, backend=backend)
    d_gate, d_up = torch.autograd.grad(y, (gate, up), inputs.dy)
    got = {"y": y.detach(), "d_gate": d_gate, "d_up": d_up}
    compare(observed, got, inputs.autograd(case.dtype), inputs.autograd(torch.float64))


@of("glu")
def test_glu_time(kernel: str, gpu: torch.device, observed: Any) -> None:
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16)
    inputs = GluCase(8192, 14336, BF16).inputs(gpu)
    gate, up = (t.detach().requires_grad_() for t in (inputs.gate, inputs.up))
    forward, both = "forward 8192x14336 bf16", "forward+backward 8192x14336 bf16"
    observed.time_ms[forward] = median_ms(lambda: ops.glu(gate, up, backend=backend))
    observed.time_ms[both] = median_ms(
        lambda: torch.autograd.grad(ops.glu(gate, up, backend=backend), (gate, up), inputs.dy)
    )
    assert 0 < observed.time_ms[forward] < observed.time_ms[both]


@of("rms_norm")
@pytest.mark.parametrize("name", [*NORM_CASES, *LARGE_NORM])
def test_rms_norm(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    case = {**NORM_CASES, **LARGE_NORM}[name]
    backend = backend_of(kernel, device_type=device.type, dtype=case.dtype)
    inputs = case.inputs(device)
    x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))
    y = ops.rms_norm(
        x, weight, inputs.eps, offset=case.offset, round_first=case.round_first, backend=backend
    )
    dx, dw = torch.autograd.grad(y, (x, weight), inputs.dy)
    got = {"y": y.detach(), "dx": dx, "dw": dw}
    compare(observed, got, inputs.autograd(case.dtype), inputs.autograd(torch.float64))


def _block_test(op: str) -> Any:
    names = [n for n, c in {**BLOCK_CASES, **LARGE_BLOCK_CASES}.items() if c.op == op]

    @of(op)
    @pytest.mark.parametrize("name", names)
    def test(kernel: str, name: str, device: torch.device, observed: Any) -> None:
        case = {**BLOCK_CASES, **LARGE_BLOCK_CASES}[name]
        backend = backend_of(kernel, device_type=device.type, dtype=case.dtype)
        got, plain, truth = (
            case.results(b, d, device)
            for b, d in ((backend, None), (None, None), (None, torch.float64))
        )
        compare(observed, got, plain, truth, case.dtype)

    return test


test_rope = _block_test("rope")
test_layer_norm = _block_test("layer_norm")
test_embedding = _block_test("embedding")
test_norm_of_a_residual_stream = _block_test("rms_norm")


@of("rms_norm")
def test_rms_norm_time(kernel: str, gpu: torch.device, observed: Any) -> None:
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16)
    inputs = NormCase(8192, 4096, BF16).inputs(gpu)
    x, weight = inputs.x.detach().requires_grad_(), inputs.weight
    forward, both = "forward 8192x4096 bf16", "forward+backward 8192x4096 bf16"
    observed.time_ms[forward] = median_ms(lambda: ops.rms_norm(x, weight, backend=backend))
    observed.time_ms[both] = median_ms(
        lambda: torch.autograd.grad(ops.rms_norm(x, weight, backend=backend), x, inputs.dy)
    )
    assert 0 < observed.time_ms[forward] < observed.time_ms[both]


@of("dora_scale")
@pytest.mark.parametrize("name", [*DORA_CASES, *LARGE_DORA])
def test_dora_scale(kernel: str, name: str, device: torch.device, observed: Any) -> None:
    case = {**DORA_CASES, **LARGE_DORA}[name]
    backend = backend_of(kernel, device_type=device.type, dtype=case.dtype)
    inputs = case.inputs(device)
    z, scale = (t.detach().requires_grad_() for t in (inputs.z, inputs.scale))
    y = ops.dora_scale(z, scale, inputs.bias, backend=backend)
    dz, d_scale = torch.autograd.grad(y, (z, scale), inputs.dy)
    got = {"y": y.detach(), "dz": dz, "d_scale": d_scale}
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(torch.float64)
    compare(observed, got, plain, truth, terms=z.shape[0])


@of("dora_scale")
def test_dora_scale_time(kernel: str, gpu: torch.device, observed: Any) -> None:
    backend = backend_of(kernel, device_type=gpu.type, dtype=BF16)
    inputs = DoraCase(8192, 4096, BF16).inputs(gpu)
    z, scale = (t.detach().requires_grad_() for t in (inputs.z, inputs.scale))
    name = "forward+backward 8192x4096 bf16"
    observed.time_ms[name] = median_ms(
        lambda: torch.autograd.grad(
            ops.dora_scale(z, scale, backend=backend), (z, scale), inputs.dy
        )
    )
    assert observed.time_ms[name] > 0


def step_backend(kernel: str, case: StepCase, device: torch.device) -> str:
    """The backend of a kernel; a skip for what its backend does not offer, or the build lacks."""
    backend = kernel.split("/")[0]
    launcher = backends.launcher("optimizer_step", backend)
    reason = launcher if isinstance(launcher, str) else launcher.supports(
        device_type=device.type, dtype=F16, rule=case.rule, state_bits=case.state_bits,
        rounding=case.rounding,
    )  # fmt: skip
    if reason is not None:
        pytest.skip(f"{NOT_OFFERED}: {reason}" if "no Triton kernel for" in reason else reason)
    return backend


def take_step(state: StepState, backend: str, **options: Any) -> None:
    ops.optimizer_step(
        state.tensors, state.grads, state.hyper, state.stats, backend=backend, **options
    )


@of("optimizer_step")
@pytest.mark.parametrize("large", [False] if REHEARSAL else [False, True])
@pytest.mark.parametrize("name", STEP_CASES)
def test_optimizer_step(
    kernel: str, name: str, large: bool, device: torch.device, observed: Any
) -> None:
    case = STEP_CASES[name]
    if large:
        case = replace(case, shapes=LARGE_STEP)
    backend = step_backend(kernel, case, device)
    found = assert_step(case, functools.partial(_step_with, backend), device)
    for key, truth in found["truth"].items():
        if key.startswith("p"):
            error = relative_errors(found["own"][key], truth.double())[0]
            observed.error["p"] = max(observed.error.get("p", 0.0), error)


def _step_with(backend: str, tensors: Any, grads: Any, hyper: Any, stats: Any, **more: Any) -> None:
    ops.optimizer_step(tensors, grads, hyper, stats, backend=backend, **more)


@of("optimizer_step")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_is_skipped_on_the_device(kernel: str, bad: float, gpu: torch.device) -> None:
    case = STEP_CASES["adamw-clip"]
    backend = step_backend(kernel, case, gpu)
    state = case.make(gpu)
    state.grads[0][-1] = bad
    before = state.copy()
    # Tables for these addresses go up first; the step itself may not wait for the device.
    take_step(state, backend, max_norm=1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(state, backend, max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(state.stats[2]) == 2.0
    for name, value in before.named().items():
        assert torch.equal(state.named()[name], value), name


@of("optimizer_step")
def test_a_step_on_another_stream(kernel: str, gpu: torch.device) -> None:
    """The update runs on the current stream: work before it there is seen, without a sync."""
    case = StepCase("adamw", shapes=((1_000_000, F32, F32),))
    backend = step_backend(kernel, case, gpu)
    expected, own = case.make(gpu), case.make(gpu)
    final = own.grads[0].clone()
    take_step(expected, backend)
    own.grads[0].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        own.grads[0].copy_(final)
        take_step(own, backend)
    torch.cuda.synchronize()
    assert torch.equal(own.tensors.params[0], expected.tensors.params[0])


@of("optimizer_step")
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit-stochastic"])
def test_a_step_is_captured(kernel: str, name: str, gpu: torch.device) -> None:
    """A CUDA graph replays steps: counts, corrections and random bits move on. Gradients lie
    elsewhere than before, so that tables are made in the capture, and go up at each replay."""
    shapes = ((100_000, BF16, BF16), (300, F32, F32), (20_000, BF16, BF16))
    case = replace(STEP_CASES[name], shapes=shapes)
    backend = step_backend(kernel, case, gpu)
    eager, graphed = case.make(gpu), case.make(gpu)
    for _ in range(4):
        take_step(eager, backend, seed=5)
    take_step(graphed, backend, seed=5)
    graphed.grads = [g.clone() for g in graphed.grads]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take_step(graphed, backend, seed=5)
    used = [torch.full((1 << 16,), -1, dtype=torch.int64).pin_memory() for _ in range(64)]
    for _ in range(3):
        graph.replay()
    del used
    torch.cuda.synchronize()
    for key, value in eager.named().items():
        assert torch.equal(graphed.named()[key], value), key


@of("optimizer_step")
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit-stochastic"])
def test_step_time(kernel: str, name: str, gpu: torch.device, observed: Any) -> None:
    dtype = BF16 if "8bit" in name else F32
    case = replace(STEP_CASES[name], shapes=((65_536, dtype, dtype),) * 448)
    backend = step_backend(kernel, case, gpu)
    state = case.make(gpu)
    label = f"{name}, 448 tensors of 65536"
    observed.time_ms[label] = median_ms(lambda: take_step(state, backend, max_norm=1.0))
    assert observed.time_ms[label] > 0


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_lora_grouped_linear(adapter: torch.dtype, device: torch.device) -> None:
    """Grouped products of torch's own: no kernel of the ledger, but the layouts PEFT has."""
    sizes, k, n, r = (0, 300, 1, 0, 723), 512, 640, 16
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) / 8).to(dtype)

    ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
    weight, dy = draw(len(sizes), n, k), draw(sum(sizes), n)
    b = draw(n, r, len(sizes), dtype=adapter).permute(2, 0, 1)
    given = (draw(sum(sizes), k), draw(len(sizes), r, k, dtype=adapter), b)

    def run(call: Callable[..., Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
        y = call(leaves[0], weight.to(leaves[0].dtype), *leaves[1:], ends)
        gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("dx", "da", "db"), gradients, strict=True))}

    fused = functools.partial(ops.lora_grouped_linear, scaling=0.5, backend="triton")
    plain = functools.partial(grouped_reference.lora_grouped_linear, scaling=0.5)
    got, own, truth = run(fused, None), run(plain, BF16), run(plain, torch.float64)
    for name, value in got.items():
        assert_as_accurate(name, value, own[name], truth[name])


def test_every_gpu_kernel_is_tested() -> None:
    tested = {
        "adafactor_step",  # test_gpu_factored.py
        "lora_linear",
        "linear_cross_entropy",
        "optimizer_step",
        "glu",
        "rms_norm",
        "dora_scale",
    }
    tested |= {"rope", "layer_norm", "embedding"}
    assert {kernel.split("/")[1] for kernel in KERNELS} == tested
