"""The cases every kernel is proved on, declared once: interpreted on the CPU and run on a GPU.

A case makes its inputs on the CPU from a fixed seed, moves them where it is told, and computes the
same thing in plain torch in any dtype: in float64 that is the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.ops import Teacher, linear_divergence
from fastft.reference import dora_scale as dora_reference
from fastft.reference import glu as glu_reference
from fastft.reference import linear_cross_entropy as loss_reference
from fastft.reference import lora_linear as lora_reference
from fastft.reference import rms_norm as norm_reference

__all__ = [
    "DIVERGENCE_CASES",
    "DORA_CASES",
    "GLU_CASES",
    "LORA_CASES",
    "LOSS_CASES",
    "NORM_CASES",
    "DivergenceCase",
    "DivergenceInputs",
    "DoraCase",
    "GluCase",
    "LoraCase",
    "LossCase",
    "NormCase",
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IGNORED = -100
CPU = torch.device("cpu")


class _Random:
    """Normal numbers from a seed, the same wherever they go."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_()


@dataclass(frozen=True)
class LoraCase:
    """Siblings that share x: shapes, dtypes, one dropout each."""

    tokens: int
    features: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype = F32
    ps: tuple[float, ...] = ()
    bias: bool = True
    owners: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def dropouts(self) -> list[float]:
        return list(self.ps or (0.0,) * len(self.ranks))

    def inputs(self, device: torch.device = CPU) -> LoraInputs:
        random = _Random(device)

        def normal(*shape: int) -> Tensor:
            return random.normal(*shape, dtype=self.dtype)

        owners = list(self.owners or range(len(self.widths)))
        spans = list(self.spans or [(0, self.tokens)] * len(owners))
        masks = []
        for i, (p, (start, stop)) in enumerate(zip(self.dropouts, spans, strict=True)):
            generator = torch.Generator().manual_seed(100 + i)
            kept = torch.rand(stop - start, self.features, generator=generator) >= p
            masks.append(lora_reference.pack_mask(kept).to(device) if p else None)
        return LoraInputs(
            x=normal(self.tokens, self.features),
            weights=[normal(w, self.features) / 8 for w in self.widths],
            biases=[normal(w) if self.bias else None for w in self.widths],
            lora_as=[random.normal(r, self.features, dtype=self.adapter_dtype) for r in self.ranks],
            lora_bs=[
                random.normal(self.widths[i], r, dtype=self.adapter_dtype)
                for i, r in zip(owners, self.ranks, strict=True)
            ],
            scalings=[0.5 + 0.25 * i for i in range(len(owners))],
            dys=[normal(self.tokens, w) for w in self.widths],
            masks=masks,
            ps=self.dropouts,
            owners=owners,
            spans=spans,
        )


@dataclass
class LoraInputs:
    """The tensors of a case."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scalings: list[float]
    dys: list[Tensor]
    masks: list[Tensor | None]
    ps: list[float]
    owners: list[int]
    spans: list[tuple[int, int]]

    def constants(self) -> tuple[Any, ...]:
        """The launcher's last arguments."""
        return self.scalings, self.masks, self.ps, self.owners, self.spans

    def tensors(self) -> list[Tensor]:
        optional = [t for t in (*self.biases, *self.masks) if t is not None]
        return [self.x, *self.weights, *self.lora_as, *self.lora_bs, *self.dys, *optional]

    def autograd(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and gradients in plain torch at ``dtype``, adapters cast as autocast does."""
        x = _leaf(self.x, dtype)
        lora_as, lora_bs = ([_leaf(t, dtype) for t in ts] for ts in (self.lora_as, self.lora_bs))
        ys, results = [], {}
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bias = None if bias is None else bias.to(dtype)
            ys.append(torch.nn.functional.linear(x, weight.to(dtype), bias))
        n = len(self.owners)
        for j, (owner, (start, stop)) in enumerate(zip(self.owners, self.spans, strict=True)):
            part, mask, p = x[start:stop], self.masks[j], self.ps[j]
            term = lora_reference.lora_term(
                part, lora_as[j], lora_bs[j], self.scalings[j], mask, p
            )  # fmt: skip
            below = x.shape[0] - stop
            ys[owner] = ys[owner] + torch.nn.functional.pad(term, (0, 0, start, below))
            results[f"s{j}"] = (lora_reference.drop(part, mask, p) @ lora_as[j].t()).detach()
        results |= {f"y{i}": y.detach() for i, y in enumerate(ys)}
        leaves, dys = [x, *lora_as, *lora_bs], [dy.to(dtype) for dy in self.dys]
        gradients = torch.autograd.grad(ys, leaves, dys)
        names = ["dx", *(f"da{i}" for i in range(n)), *(f"db{i}" for i in range(n))]
        return {**results, **dict(zip(names, gradients, strict=True))}


LORA_CASES = {
    # Two adapters on the first layer, one on the second, over all rows.
    "several-adapters": LoraCase(
        50, 40, (33, 20), (5, 8, 3), BF16, F32, (0.0, 0.3, 0.0), owners=(0, 0, 1)
    ),
    # A mixed batch: five adapters of different rank on the rows of their samples, one of them
    # twice, one on none, some rows with none, over two siblings.
    "mixed-batch": LoraCase(
        96,
        40,
        (33, 20),
        (5, 8, 3, 16, 2, 5, 4),
        F32,
        F32,
        (0.0, 0.2, 0.0, 0.2, 0.0, 0.0, 0.0),
        owners=(0, 1, 0, 1, 0, 0, 1),
        spans=((0, 32), (0, 32), (32, 48), (32, 48), (64, 96), (48, 48), (80, 81)),
    ),
    # The same with samples apart, which one launch serves: any adapter on any two samples.
    "mixed-batch-apart": LoraCase(
        96,
        72,
        (71, 20),
        (5, 8, 3, 16, 2, 5, 70),
        BF16,
        F32,
        (0.0, 0.2, 0.0, 0.2, 0.0, 0.0, 0.0),
        owners=(0, 1, 0, 1, 0, 1, 0),
        spans=((0, 32), (0, 32), (32, 49), (32, 49), (64, 96), (64, 96), (63, 63)),
    ),
    "mixed-batch-aligned": LoraCase(
        192,
        64,
        (80, 48),
        (16, 16, 8, 8),
        F16,
        F16,
        owners=(0, 1, 0, 1),
        spans=((0, 64), (0, 64), (64, 192), (64, 192)),
    ),
    # Few tokens and long rows, whose sum is split over programs, forward and backward.
    "long-rows": LoraCase(70, 1100, (40, 1090, 33), (5, 16, 3), BF16, F32),
    "long-rows-dropout": LoraCase(70, 1100, (40, 80), (5, 70), BF16, F32, (0.2, 0.3)),
    "long-rows-f32": LoraCase(33, 520, (530,), (40,), F32, F32, (0.2,)),
    # Rows of whole 16 bytes, as every model's are: what the persistent product takes.
    "aligned-siblings": LoraCase(150, 136, (264, 80, 88), (8, 16, 5), BF16, F32),
    "aligned-siblings-dropout": LoraCase(
        150, 136, (264, 80, 88), (8, 16, 5), BF16, F32, (0.3, 0.1, 0.2)
    ),
    "aligned-rank-over-a-block": LoraCase(140, 72, (80,), (70,), F16, F16, (0.1,)),
    "siblings": LoraCase(70, 100, (50, 33, 90), (5, 16, 20)),
    "siblings-dropout": LoraCase(70, 100, (50, 33, 90), (5, 16, 20), ps=(0.1, 0.5, 0.3)),
    "siblings-bf16": LoraCase(70, 100, (50, 33, 90), (5, 16, 20), BF16, F32, (0.1, 0.1, 0.1)),
    "four-siblings-some-dropped": LoraCase(
        20, 40, (24, 17, 9, 30), (4, 4, 2, 8), F32, F32, (0.0, 0.2, 0.0, 0.6)
    ),
    "one-row": LoraCase(1, 7, (3,), (1,), bias=False),
    "one-row-bf16": LoraCase(1, 9, (5,), (2,), BF16, F32, (0.25,)),
    "aligned-bf16": LoraCase(128, 64, (128,), (16,), BF16, F32),
    "bf16-adapters": LoraCase(65, 72, (40,), (17,), BF16, BF16, (0.05,)),
    "f16": LoraCase(65, 72, (40,), (33,), F16, F32, (0.05,)),
    "rank-over-a-block": LoraCase(40, 90, (80,), (70,), BF16, F32, (0.1,)),
    "rank-over-a-block-f32": LoraCase(40, 90, (80,), (70,)),
    "many-tokens-split": LoraCase(700, 24, (20,), (8,)),
    "wide": LoraCase(17, 300, (270,), (4,), BF16, BF16),
}


@dataclass(frozen=True)
class LossCase:
    """A head and labels of which every third is ignored."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    bias: bool
    chunk: int
    scale: float = 1.0
    softcap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    weighted: bool = False

    def inputs(self, device: torch.device = CPU) -> LossInputs:
        random = _Random(device)
        hidden = random.normal(self.tokens, self.hidden, dtype=self.dtype)
        weight = random.normal(self.vocabulary, self.hidden, dtype=self.dtype) / self.hidden**0.5
        bias = random.normal(self.vocabulary, dtype=self.dtype) if self.bias else None
        labels = torch.randint(0, self.vocabulary, (self.tokens,), generator=random.generator)
        labels[2::3] = IGNORED
        weights = random.normal(self.vocabulary, dtype=F32).abs() if self.weighted else None
        return LossInputs(hidden, weight, bias, labels.to(device), weights, self)


@dataclass
class LossInputs:
    """The tensors of a case."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    class_weight: Tensor | None
    case: LossCase

    def options(self) -> dict[str, Any]:
        """Arguments of ``fastft.ops.linear_cross_entropy``."""
        case = self.case
        return {
            "bias": self.bias,
            "class_weight": self.class_weight,
            "logit_scale": case.scale,
            "softcap": case.softcap or None,
            "label_smoothing": case.smoothing,
            "z_loss": case.z_loss,
        }

    def autograd(self, dtype: torch.dtype, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Summed loss, of each token times scale, and its gradients in plain torch at ``dtype``."""
        hidden, weight = _leaf(self.hidden, dtype), _leaf(self.weight, dtype)
        losses = loss_reference.linear_cross_entropy(
            hidden,
            weight,
            self.bias,
            self.labels,
            IGNORED,
            class_weight=self.class_weight,
            label_smoothing=self.case.smoothing,
            z_loss=self.case.z_loss,
            scale=self.case.scale,
            softcap=self.case.softcap,
        )
        loss = losses.sum() if scale is None else (losses * scale).sum()
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach()[None], "d_hidden": d_hidden, "d_weight": d_weight}

    def n_correct(self) -> int:
        """Tokens that count whose largest logit, rounded as the slab is, is the label's."""
        logits = torch.nn.functional.linear(self.hidden, self.weight).float()
        logits = logits if self.bias is None else logits + self.bias.float()
        hit = (logits.argmax(1) == self.labels) & (self.labels != IGNORED)
        return int(hit.sum())


# Of every three tokens two count: the slabs of the large vocabularies hold four. With fewer rows
# torch's own products on the CPU lose accuracy over so many columns.
LOSS_CASES = {
    "f32": LossCase(20, 30, 500, F32, False, 7),
    "f32-bias-two-blocks": LossCase(12, 12, 4500, F32, True, 4),
    "bf16": LossCase(20, 30, 500, BF16, False, 7),
    "bf16-bias-two-blocks": LossCase(9, 12, 5001, BF16, True, 100),
    "f16": LossCase(11, 24, 333, F16, True, 11),
    "one-row": LossCase(1, 8, 37, F32, False, 1),
    "chunk-of-one": LossCase(5, 8, 37, BF16, True, 1),
    "softcap": LossCase(12, 12, 4500, F32, True, 4, scale=2.0, softcap=3.0),
    "softcap-bf16": LossCase(12, 12, 500, BF16, False, 4, softcap=3.0),
    "smoothing": LossCase(12, 12, 4500, F32, False, 4, smoothing=0.2),
    "smoothing-class-weights": LossCase(12, 12, 500, BF16, True, 4, smoothing=0.2, weighted=True),
    "all-options": LossCase(12, 12, 4500, F32, True, 4, 0.7, 4.0, 0.1, 0.05, True),
}


@dataclass(frozen=True)
class DivergenceCase:
    """A student's head and a teacher's, of another width; every third token does not count."""

    kind: str
    dtype: torch.dtype
    tokens: int = 11
    hidden: int = 24
    vocabulary: int = 2500
    chunk: int = 4
    temperature: float = 1.0
    softcap: float = 0.0

    def inputs(self, device: torch.device = CPU) -> DivergenceInputs:
        random = _Random(device)

        def head(width: int) -> tuple[Tensor, Tensor, Tensor]:
            hidden = random.normal(self.tokens, width, dtype=self.dtype)
            weight = 3 * random.normal(self.vocabulary, width, dtype=self.dtype) / width**0.5
            return hidden, weight, random.normal(self.vocabulary, dtype=self.dtype)

        mask = torch.ones(self.tokens, dtype=torch.bool)
        mask[2::3] = False
        return DivergenceInputs(head(self.hidden), head(2 * self.hidden), mask.to(device), self)


@dataclass
class DivergenceInputs:
    """hidden states, weight and bias of the student and of the teacher."""

    student: tuple[Tensor, Tensor, Tensor]
    teacher: tuple[Tensor, Tensor, Tensor]
    mask: Tensor
    case: DivergenceCase

    def autograd(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Summed divergence and its gradients through all logits in plain torch."""
        hidden, weight = (_leaf(t, dtype) for t in self.student[:2])
        options = (1.3, self.case.softcap)

        def logits(h: Tensor, w: Tensor, bias: Tensor) -> Tensor:
            return loss_reference.transform(h @ w.t(), bias, *options) / self.case.temperature

        z = logits(hidden, weight, self.student[2])
        t = logits(*(x.to(dtype) for x in self.teacher))
        kind = ("forward_kl", "reverse_kl", "jensen_shannon").index(self.case.kind)
        found = loss_reference.divergence(kind, z, t, 0.3)[self.mask].sum()
        loss = found * self.case.temperature**2
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach()[None], "d_hidden": d_hidden, "d_weight": d_weight}

    def through_op(self, backend: str, from_logits: bool = False) -> dict[str, Tensor]:
        """The same by ``fastft.ops.linear_divergence``."""
        case = self.case
        hidden, weight = (_leaf(t, case.dtype) for t in self.student[:2])
        options = {"logit_scale": 1.3, "softcap": case.softcap or None}
        if from_logits:
            h, w, bias = self.teacher
            teacher: Any = loss_reference.transform(h @ w.t(), bias, 1.3, case.softcap)
        else:
            teacher = Teacher(*self.teacher, **options)
        loss = linear_divergence(
            hidden,
            weight,
            teacher,
            kind=case.kind,
            temperature=case.temperature,
            beta=0.3,
            bias=self.student[2],
            mask=self.mask,
            reduction="sum",
            backend=backend,
            chunk=case.chunk,
            **options,
        )
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach()[None], "d_hidden": d_hidden, "d_weight": d_weight}


DIVERGENCE_CASES = {
    f"{kind}-{name}": DivergenceCase(kind, dtype, **options)
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon")
    for name, dtype, options in (
        ("f32", F32, {}),
        ("bf16", BF16, {"vocabulary": 300}),
        ("f32-hot-capped", F32, {"temperature": 2.0, "softcap": 5.0}),
    )
}


@dataclass(frozen=True)
class GluCase:
    """A gated linear unit; ``halves``: gate and up are halves of one tensor."""

    rows: int
    columns: int
    dtype: torch.dtype
    activation: str = "silu"
    halves: bool = False

    def inputs(self, device: torch.device = CPU) -> GluInputs:
        random = _Random(device)
        if self.halves:
            both = random.normal(self.rows, 2 * self.columns, dtype=self.dtype) * 3
            gate, up = both.chunk(2, 1)
        else:
            gate = random.normal(self.rows, self.columns, dtype=self.dtype) * 3
            up = random.normal(self.rows, self.columns, dtype=self.dtype)
        dy = random.normal(self.rows, self.columns, dtype=self.dtype)
        return GluInputs(gate, up, dy, self.activation)


@dataclass
class GluInputs:
    """The tensors of a case."""

    gate: Tensor
    up: Tensor
    dy: Tensor
    activation: str

    def autograd(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients in plain torch at ``dtype``."""
        gate, up = _leaf(self.gate, dtype), _leaf(self.up, dtype)
        y = glu_reference.glu(gate, up, self.activation)
        d_gate, d_up = torch.autograd.grad(y, (gate, up), self.dy.to(dtype))
        return {"y": y.detach(), "d_gate": d_gate, "d_up": d_up}


GLU_CASES = {
    "silu-f32": GluCase(7, 33, F32),
    "gelu-f32": GluCase(7, 33, F32, "gelu"),
    "gelu-tanh-f32": GluCase(7, 33, F32, "gelu_tanh"),
    "halves-bf16": GluCase(9, 1030, BF16, halves=True),
    "gelu-tanh-bf16": GluCase(5, 64, BF16, "gelu_tanh"),
    "gelu-f16": GluCase(5, 64, F16, "gelu", halves=True),
    "one": GluCase(1, 1, F32),
}


@dataclass(frozen=True)
class NormCase:
    """An RMS norm in one of the conventions."""

    rows: int
    columns: int
    dtype: torch.dtype
    offset: float = 0.0
    round_first: bool = True

    def inputs(self, device: torch.device = CPU) -> NormInputs:
        random = _Random(device)

        def normal(*shape: int) -> Tensor:
            return random.normal(*shape, dtype=self.dtype)

        x, weight = normal(self.rows, self.columns), normal(self.columns)
        dy = normal(self.rows, self.columns)
        return NormInputs(x * 3, weight, dy, 1e-5, self.offset, self.round_first)


@dataclass
class NormInputs:
    """The tensors of a case."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    eps: float
    offset: float
    round_first: bool

    def autograd(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients in plain torch at ``dtype``."""
        x, weight = _leaf(self.x, dtype), _leaf(self.weight, dtype)
        y, rstd = norm_reference.rms_norm(x, weight, self.eps, self.offset, self.round_first)
        dx, dw = torch.autograd.grad(y, (x, weight), self.dy.to(dtype))
        return {"y": y.detach(), "rstd": rstd.detach(), "dx": dx, "dw": dw}


NORM_CASES = {
    "llama-f32": NormCase(7, 100, F32),
    "llama-bf16": NormCase(9, 576, BF16),
    "gemma-bf16": NormCase(9, 576, BF16, 1.0, False),
    "olmo2-f16": NormCase(5, 64, F16, 0.0, False),
    "head": NormCase(150, 8, BF16),
    "several-splits": NormCase(300, 40, F32),
    "longer-than-a-block": NormCase(3, 8200, F32),
    "longer-than-a-block-bf16": NormCase(3, 9001, BF16),
    "one-row": NormCase(1, 3, F32),
}


@dataclass(frozen=True)
class DoraCase:
    """A product whose columns are scaled."""

    rows: int
    columns: int
    dtype: torch.dtype
    bias: bool = False

    def inputs(self, device: torch.device = CPU) -> DoraInputs:
        random = _Random(device)
        z, dy = (random.normal(self.rows, self.columns, dtype=self.dtype) for _ in range(2))
        scale = random.normal(self.columns, dtype=F32).abs() + 0.5
        bias = random.normal(self.columns, dtype=self.dtype) if self.bias else None
        return DoraInputs(z, scale, bias, dy)


@dataclass
class DoraInputs:
    """The tensors of a case."""

    z: Tensor
    scale: Tensor
    bias: Tensor | None
    dy: Tensor

    def autograd(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients in plain torch at ``dtype``, the scale in float32 at least."""
        z = _leaf(self.z, dtype)
        scale = _leaf(self.scale, torch.promote_types(dtype, F32))
        bias = None if self.bias is None else self.bias.to(dtype)
        y = dora_reference.dora_scale(z, scale, bias)
        dz, d_scale = torch.autograd.grad(y, (z, scale), self.dy.to(dtype))
        return {"y": y.detach(), "dz": dz, "d_scale": d_scale}


DORA_CASES = {
    "f32": DoraCase(7, 33, F32),
    "bias-f32": DoraCase(7, 33, F32, True),
    "several-splits-bf16": DoraCase(300, 40, BF16, True),
    "wide-bf16": DoraCase(5, 1030, BF16),
    "f16": DoraCase(9, 64, F16, True),
    "one": DoraCase(1, 1, F32),
}
