"""Cross-entropy of a language model's head, hidden states to gradients: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite, peak_bytes, time_ms

IGNORE_INDEX = -100
# (tokens, hidden, vocabulary)
CPU_SHAPES = ((1024, 1024, 32768), (1024, 576, 49152))
# The one that goals are stated for comes first: a run that is stopped has it.
CUDA_SHAPES = ((4096, 4096, 128256), (2048, 576, 49152), (4096, 2304, 256000))
QUICK_SHAPES = ((256, 256, 4096),)


def cases(options: Options) -> Sequence[Case]:
    """A middle-sized head and SmolLM2's; frozen and trained; all labels counted, and half."""
    if options.quick:
        shapes: Sequence[tuple[int, int, int]] = QUICK_SHAPES
    else:
        shapes = CUDA_SHAPES if options.device.type == "cuda" else CPU_SHAPES
    return [
        Case(
            f"{t}x{h}x{v} {'trained' if trained else 'frozen'} head, {ignored:.0%} ignored",
            {"t": t, "h": h, "v": v, "trained": trained, "ignored": ignored},
        )
        for t, h, v in shapes
        for trained in (False, True)
        for ignored in (0.0, 0.5)
    ]


@dataclass
class Inputs:
    """hidden: (t, h), weight: (v, h) in the run's dtype; labels: (t,) int64, -100 where ignored.

    known: what the check expects, by dtype, once an implementation has been checked.
    """

    case: Case
    options: Options
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    known: dict[torch.dtype, dict[str, torch.Tensor]] = field(default_factory=dict)


def prepare(case: Case, options: Options) -> Inputs:
    t, h, v = case["t"], case["h"], case["v"]
    device, dtype = options.device, options.dtype
    generator = torch.Generator(device).manual_seed(t + h + v)
    hidden = torch.randn(t, h, generator=generator, device=device)
    # Logits of a trained model: a few units wide, not a flat distribution.
    weight = torch.randn(v, h, generator=generator, device=device).mul_(3.0 * h**-0.5)
    labels = torch.randint(v, (t,), generator=generator, device=device)
    # A prompt before its answer: the ignored labels are contiguous, as in training on completions.
    labels[: int(t * case["ignored"])] = IGNORE_INDEX
    return Inputs(case, options, hidden.to(dtype), weight.to(dtype), labels)


def _gradients(
    inputs: Inputs,
    dtype: torch.dtype,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    hidden = inputs.hidden.detach().to(dtype, copy=True).requires_grad_()
    weight = inputs.weight.detach().to(dtype, copy=True).requires_grad_(inputs.case["trained"])
    loss = loss_of(hidden, weight)
    loss.backward()
    found = {"loss": loss.detach(), "d_hidden": hidden.grad}
    if inputs.case["trained"]:
        found["d_weight"] = weight.grad
    return found


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares the loss and its gradients with float64."""

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight)
        # bfloat16 logits are raised to float32 before the softmax, as everybody does.
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide, inputs.labels, ignore_index=IGNORE_INDEX)

    for dtype in (torch.float64, inputs.options.dtype):
        if dtype not in inputs.known:
            inputs.known[dtype] = _gradients(inputs, dtype, plain)
    known = inputs.known
    return compare(step.outputs(), known[torch.float64], known[inputs.options.dtype])


def _step(inputs: Inputs, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(inputs.case["trained"])

    def run() -> None:
        hidden.grad = weight.grad = None
        loss_of(hidden, weight).backward()

    return Step(run, lambda: _gradients(inputs, inputs.options.dtype, loss_of))


def build_torch(inputs: Inputs) -> Step:
    """Transformers' eager loss: all logits, raised to float32, then cross_entropy."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight)
        return ForCausalLMLoss(logits, None, vocab_size=weight.shape[0], shift_labels=inputs.labels)

    return _step(inputs, loss_of)


def needs_chunked_trl(case: Case, options: Options) -> str | None:
    """Its fused head came with TRL 1.16."""
    from trl.trainer import utils

    found = hasattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE")
    return None if found else "does not apply: this TRL has no chunked head (1.16 has)"


def build_trl(inputs: Inputs) -> Step:
    """TRL's fused head: its own function, called as its patched forward calls it."""
    from trl.trainer import utils

    apply: Any = utils._ChunkedLogProbFunction.apply
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    compact = utils._use_triton(inputs.options.device)

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mask = inputs.labels != IGNORE_INDEX
        # Where Triton runs, TRL scores only the labelled rows; elsewhere all of them.
        rows = hidden[mask] if compact else hidden
        labels = inputs.labels[mask] if compact else inputs.labels.clamp(min=0)
        log_probs = apply(rows, weight, None, labels, 1.0, chunk, None, 1.0, ("log_probs",))[0]
        if not compact:
            log_probs = log_probs.masked_fill(~mask, 0)
        return -log_probs.sum() / mask.sum().clamp(min=1)

    return _step(inputs, loss_of)


def build_liger(inputs: Inputs) -> Step:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return _step(inputs, lambda hidden, weight: loss(weight, hidden, inputs.labels))


def build_products(inputs: Inputs) -> Step:
    """The floor: the library's products over all tokens at once. It has no result to check."""
    hidden, weight, trained = inputs.hidden, inputs.weight, inputs.case["trained"]
    logits = torch.zeros(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)
        if trained:
            torch.mm(logits.t(), hidden)

    return Step(run, dict)


def over_products(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Median time over that of the products alone."""
    floor = by_impl.get("products")
    return None if floor is None or own is floor else own.median / floor.median


def build_fastft(inputs: Inputs) -> Step:
    """fastft.ops.linear_cross_entropy."""
    from fastft.ops import linear_cross_entropy

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, inputs.labels, ignore_index=IGNORE_INDEX)

    return _step(inputs, loss_of)


def tiny(case: Case) -> Case:
    return Case(case.name, {**case.facts, "t": 16, "h": 32, "v": 128})


def needs_cuda(case: Case, options: Options) -> str | None:
    """For peers that have kernels for GPUs only."""
    return None if options.device.type == "cuda" else "does not apply: it runs on GPUs only"


SUITE = Suite(
    name="loss",
    cases=cases,
    impls=(
        Impl("torch", build_torch, package="transformers"),
        Impl("trl", build_trl, package="trl", not_here=needs_chunked_trl),
        Impl("liger", build_liger, package="liger_kernel", not_here=needs_cuda),
        Impl("products", build_products),
        Impl("fastft", build_fastft),
    ),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("over_products", "ratio", False, over_products),
        Metric("peak_bytes", "bytes", False, peak_bytes),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    preload=("transformers.loss.loss_utils", "trl.trainer.utils", "fastft.ops"),
)
