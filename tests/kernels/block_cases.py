"""Cases of the block's operations, declared once: as ``fastft.ops`` runs them and in plain torch.

Each is proved on the CPU, interpreted, and on a GPU by the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.reference import layer_norm as layer_norm_reference
from fastft.reference import rms_norm as rms_norm_reference
from fastft.reference import rope as rope_reference

__all__ = ["BLOCK_CASES", "LARGE_BLOCK_CASES", "BlockCase"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class BlockCase:
    """An operation on given tensors: ``names`` of its results, then of the gradients it has."""

    op: str
    dtype: torch.dtype
    names: Sequence[str]

    def draw(self) -> list[Tensor]:
        """The tensors with gradients, on the CPU."""
        raise NotImplementedError

    def run(self, tensors: list[Tensor], backend: str | None) -> list[Tensor]:
        """The results, by a backend or (None) in plain torch, in the dtype of the tensors."""
        raise NotImplementedError

    def results(
        self, backend: str | None, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Results and gradients."""
        torch.manual_seed(0)
        dtype = dtype or self.dtype
        drawn = self.draw()
        leaves = [t.to(self.dtype).to(device, dtype).requires_grad_() for t in drawn]
        outs = self.run(leaves, backend)
        pulls = [torch.randn(o.shape).to(self.dtype).to(device, o.dtype) for o in outs]
        gradients = torch.autograd.grad(outs, leaves, pulls)
        found = [*(o.detach() for o in outs), *gradients]
        return dict(zip(self.names, found, strict=True))


@dataclass(frozen=True)
class RopeCase(BlockCase):
    """Queries and keys as a model has them: transposed views of projections."""

    dtype: torch.dtype
    heads: int = 3
    key_heads: int = 2
    tokens: int = 7
    width: int = 16
    rotary: int = 16
    batch: int = 2
    table_batch: int = 1
    table: torch.dtype | None = None
    interleaved: bool = False
    half_tables: bool = False
    transposed: bool = True

    op = "rope"
    names = ("q", "k", "dq", "dk")

    def draw(self) -> list[Tensor]:
        shapes = [(self.batch, self.tokens, h, self.width) for h in (self.heads, self.key_heads)]
        return [torch.randn(shape) for shape in shapes]

    def run(self, tensors: list[Tensor], backend: str | None) -> list[Tensor]:
        size = self.rotary // 2 if self.half_tables else self.rotary
        # Every entry its own: a table need not repeat itself.
        angles = torch.arange(self.table_batch * self.tokens * size) * 0.37
        angles = angles.view(self.table_batch, self.tokens, size)
        device, dtype = tensors[0].device, self.table or self.dtype
        cos, sin = (t.to(dtype).to(device) for t in (angles.cos(), angles.sin()))
        q, k = (t.transpose(1, 2) for t in tensors)
        if not self.transposed:
            q, k = q.contiguous(), k.contiguous()
        facts = {"interleaved": self.interleaved, "half_tables": self.half_tables}
        if backend is not None:
            return list(ops.rope(q, k, cos, sin, backend=backend, **facts))
        wide = torch.promote_types(q.dtype, dtype)
        return [rope_reference.rope(x, cos, sin, **facts).to(wide) for x in (q, k)]


@dataclass(frozen=True)
class LayerNormCase(BlockCase):
    """A layer norm in one of the conventions."""

    dtype: torch.dtype
    rows: int
    columns: int
    affine: str = "both"
    offset: float = 0.0
    round_first: bool = False

    op = "layer_norm"

    @property
    def names(self) -> Sequence[str]:  # type: ignore[override]
        return ("y", "dx", *(("dw",) if self.affine != "none" else ()),
                *(("db",) if self.affine == "both" else ()))  # fmt: skip

    def draw(self) -> list[Tensor]:
        x = torch.randn(self.rows, self.columns) * 3 + 2
        more = {"both": 2, "weight": 1, "none": 0}[self.affine]
        return [x, *(torch.randn(self.columns) for _ in range(more))]

    def run(self, tensors: list[Tensor], backend: str | None) -> list[Tensor]:
        x, weight, bias = (*tensors, None, None)[:3]
        facts = {"offset": self.offset, "round_first": self.round_first}
        if backend is not None:
            return [ops.layer_norm(x, weight, bias, 1e-5, backend=backend, **facts)]
        return [layer_norm_reference.layer_norm(x, weight, bias, 1e-5, **facts)[0]]


@dataclass(frozen=True)
class AddNormCase(BlockCase):
    """An RMS norm of a residual stream that x is added to; both results are used."""

    dtype: torch.dtype
    rows: int
    columns: int
    offset: float = 0.0
    round_first: bool = True

    op = "rms_norm"
    names = ("y", "sum", "dx", "dresidual", "dw")

    def draw(self) -> list[Tensor]:
        shapes = [(self.rows, self.columns)] * 2 + [(self.columns,)]
        return [torch.randn(shape) for shape in shapes]

    def run(self, tensors: list[Tensor], backend: str | None) -> list[Tensor]:
        x, residual, weight = tensors
        facts: dict[str, Any] = {"offset": self.offset, "round_first": self.round_first}
        if backend is not None:
            return list(ops.rms_norm(x, weight, 1e-5, residual=residual, backend=backend, **facts))
        summed = x + residual
        return [rms_norm_reference.rms_norm(summed, weight, 1e-5, **facts)[0], summed]


@dataclass(frozen=True)
class EmbeddingCase(BlockCase):
    """A table and ids of which some come often: token i has the id i^2 / tokens of as many."""

    dtype: torch.dtype
    rows: int
    columns: int
    tokens: int
    padding: int | None = None

    op = "embedding"
    names = ("y", "dw")

    def draw(self) -> list[Tensor]:
        return [torch.randn(self.rows, self.columns)]

    def run(self, tensors: list[Tensor], backend: str | None) -> list[Tensor]:
        (weight,) = tensors
        ids = torch.arange(self.tokens)
        # A product with an odd number mixes the order.
        ids = (ids * ids // self.tokens) * 7919 % self.rows
        ids = ids.view(-1, 2 if self.tokens % 2 == 0 else 1).to(weight.device)
        if backend is not None:
            return [ops.embedding(ids, weight, padding_idx=self.padding, backend=backend)]
        return [torch.nn.functional.embedding(ids, weight, self.padding)]


BLOCK_CASES: dict[str, BlockCase] = {
    "rope-f32": RopeCase(F32),
    "rope-bf16": RopeCase(BF16, table_batch=2),
    "rope-f16-dense": RopeCase(F16, transposed=False),
    "rope-partial": RopeCase(F32, width=20, rotary=8),
    "rope-partial-interleaved-bf16": RopeCase(BF16, width=40, rotary=24, interleaved=True),
    "rope-interleaved": RopeCase(F32, interleaved=True, heads=9, key_heads=1),
    "rope-half-tables": RopeCase(F32, half_tables=True, width=24, rotary=24),
    "rope-half-tables-interleaved": RopeCase(F32, half_tables=True, interleaved=True),
    "rope-float32-tables": RopeCase(BF16, table=F32),
    "rope-one-token": RopeCase(F32, tokens=1, batch=1, heads=17, width=6, rotary=6),
    "layer-norm-f32": LayerNormCase(F32, 7, 100),
    "layer-norm-bf16": LayerNormCase(BF16, 9, 576),
    "layer-norm-f16": LayerNormCase(F16, 5, 64),
    "layer-norm-weight-only": LayerNormCase(BF16, 9, 96, "weight"),
    "layer-norm-plain": LayerNormCase(F32, 9, 33, "none"),
    "layer-norm-one-plus": LayerNormCase(F32, 9, 64, offset=1.0),
    "layer-norm-round-first": LayerNormCase(BF16, 9, 64, "weight", round_first=True),
    "layer-norm-several-splits": LayerNormCase(F32, 300, 40),
    "layer-norm-longer-than-a-block": LayerNormCase(F32, 3, 8200),
    "layer-norm-one-row": LayerNormCase(F32, 1, 3),
    "add-norm-f32": AddNormCase(F32, 7, 100),
    "add-norm-bf16": AddNormCase(BF16, 9, 576),
    "add-norm-gemma-f16": AddNormCase(F16, 5, 64, 1.0, False),
    "add-norm-longer-than-a-block": AddNormCase(BF16, 3, 9001),
    "embedding-f32": EmbeddingCase(F32, 30, 33, 40),
    "embedding-bf16": EmbeddingCase(BF16, 200, 64, 120, padding=0),
    "embedding-f16-padding-at-the-end": EmbeddingCase(F16, 9, 40, 50, padding=-1),
    "embedding-few-rows-for-many-tokens": EmbeddingCase(BF16, 3, 20, 301),
    "embedding-longer-than-a-block": EmbeddingCase(F32, 5, 1100, 12),
    "embedding-one": EmbeddingCase(F32, 1, 1, 1),
}

LARGE_BLOCK_CASES: dict[str, BlockCase] = {
    "rope-llama-3-8b": RopeCase(BF16, 32, 8, 1024, 128, 128, batch=2),
    "rope-partial-f16": RopeCase(F16, 32, 32, 777, 80, 32, batch=1),
    "layer-norm-4096": LayerNormCase(BF16, 4096, 4096),
    "add-norm-4096": AddNormCase(BF16, 4096, 4096),
    "embedding-llama-3-8b": EmbeddingCase(BF16, 128256, 4096, 8192),
}
