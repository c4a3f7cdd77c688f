"""A decoder layer whose seven projections have LoRA as one node of autograd, and one native call:

    h = x + o(attention(rope(q(n)), rope(k(n)), v(n))),   n = norm(x)
    y = h + down(act(gate(m)) * up(m)),                   m = norm(h)

and where q and k have norms of their own, rope(norm(q(n))) and rope(norm(k(n))), head by head.

The kernels are those of the operations one by one, in the same order on the same values: the bits
are the same, dropout's masks among them. What is spared is the way through Python and autograd
between them, which on two cores takes a twelfth of SmolLM2's step, and four passes of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._lora_linear_call import AUTO, Constants, draw_masks
from fastft.ops._lora_linear_gradients import plain_products
from fastft.ops._room import empty_like, new_empty
from fastft.reference.attention import attention
from fastft.reference.glu import glu
from fastft.reference.rms_norm import rms_norm
from fastft.reference.rope import rope

__all__ = ["GROUPS", "PROJECTIONS", "Facts", "Norm", "decoder_layer"]

PROJECTIONS = 7
_NORMS = 2
# The projections by what they read: q k v, o, gate up, down.
GROUPS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))


class Norm(NamedTuple):
    """An RMS norm's constants, as ``fastft.ops.rms_norm`` takes them."""

    eps: float
    offset: float
    round_first: bool


class Facts(NamedTuple):
    """What a call holds beside tensors.

    sizes: batch, tokens, features, heads, kv_heads, width of a head, inner features of the MLP.
    norms: of the layer, and those of q's and k's heads where there are any.
    scale, causal: attention's. interleaved, half_tables: rope's. scalings, dropout_ps: one a
    projection. launcher: of the whole.
    """

    sizes: tuple[int, ...]
    norms: tuple[Norm, ...]
    scale: float
    causal: bool
    interleaved: bool
    half_tables: bool
    activation: str
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    launcher: Any

    def room(self, lora_as: Sequence[Tensor]) -> tuple[int, int, int]:
        """Elements of what is kept, and of the scratch of forward and backward."""
        ranks, of_heads = [a.shape[0] for a in lora_as], len(self.norms) > _NORMS
        kept, forward, backward = self.launcher.room(self.sizes, ranks, of_heads)
        return kept // 2, forward // 2, backward // 2


def decoder_layer(
    facts: Facts,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    norms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
) -> Tensor:
    """The layer's result (batch, tokens, features), in x's dtype.

    Args:
        x: (batch, tokens, features), contiguous, in the dtype of the frozen tensors.
        cos, sin: (batch or 1, tokens, entries), as ``fastft.ops.rope`` takes them, of the same
            strides, neighbouring entries.
        mask: as ``fastft.ops.scaled_dot_product_attention`` takes it, neighbouring keys.
        norms: their weights.
        weights, biases, lora_as, lora_bs: of q, k, v, o, gate, up and down, contiguous.

    Gradients flow to x, lora_as and lora_bs. The caller has held all else against the rules of the
    operations one by one, and asked the launcher.
    """
    masks: list[Tensor | None] = [None] * PROJECTIONS
    if any(facts.dropout_ps):
        masks, rows = [], x.shape[0] * x.shape[1]
        for of in GROUPS:
            ps, a = facts.dropout_ps[of], lora_as[of][0]
            like = x.new_empty(1).expand(rows, a.shape[1])  # only its shape is looked at
            masks += draw_masks(like, ps, [0, rows] * len(ps), a, AUTO, False)
    tensors = (*weights, *biases, *lora_as, *lora_bs, *masks)
    y: Tensor = DecoderLayer.apply(facts, x, cos, sin, mask, *norms, *tensors)
    return y


def _kinds(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """weights, biases, lora_as, lora_bs and masks."""
    n = PROJECTIONS
    return [tensors[start : start + n] for start in range(0, 5 * n, n)]


def _forms(tensors: Sequence[Tensor | None]) -> list[Any]:
    """How tensors are read by address."""
    return [None if t is None else (t.dtype, t.shape, t.is_contiguous()) for t in tensors]


class DecoderLayer(torch.autograd.Function):
    """Eager autograd; a second derivative, and that of parameters whose data has taken another form
    since, goes through the references."""

    @staticmethod
    def forward(
        ctx: Any,
        facts: Facts,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        norms, kinds = tensors[: len(facts.norms)], _kinds(tensors[len(facts.norms) :])
        of_kept, of_scratch, _ = facts.room(kinds[2])
        kept, scratch = new_empty(x, (of_kept,)), new_empty(x, (of_scratch,))
        y = empty_like(x)
        call = (kept, x, cos, sin, mask, norms, kinds, facts)
        facts.launcher.forward(y, scratch, *call)
        ctx.facts, ctx.forms = facts, _forms(tensors)
        ctx.save_for_backward(kept, x, cos, sin, mask, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        facts: Facts = ctx.facts
        kept, x, cos, sin, mask, *tensors = ctx.saved_tensors
        # Data put in another's place has no version: what is read by address has to be as it was.
        changed = _forms(tensors) != ctx.forms
        n = len(facts.norms)
        norms, tensors, before = tensors[:n], tensors[n:], [None] * (3 + n)
        need_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[5 + n :]
        if changed or wanted(dy):

            def again(x: Tensor, *tensors: Any) -> Tensor:
                return _plain(facts, x, cos, sin, mask, norms, tensors)

            dx, *others = plain_gradients(again, (x, *tensors), (need_x, *needs), [dy])
            return (None, dx, *before, *others)
        kinds = _kinds(tensors)
        adapters = range(2 * PROJECTIONS, 4 * PROJECTIONS)
        gradients = [torch.empty_like(tensors[i]) if needs[i] else None for i in adapters]
        scratch = new_empty(x, (facts.room(kinds[2])[2],))
        dx = empty_like(x) if need_x else None
        call = (kept, x, cos, sin, mask, norms, kinds, facts)
        facts.launcher.backward(dx, gradients, dy.contiguous(), scratch, *call)
        none = [None] * PROJECTIONS
        return (None, dx, *before, *none, *none, *gradients, *none)


def _plain(
    facts: Facts,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    norms: Sequence[Tensor],
    tensors: Sequence[Any],
) -> Tensor:
    """The layer as torch operations."""
    kinds = _kinds(tensors)
    rows, width = x.reshape(-1, x.shape[-1]), facts.sizes[5]

    def project(of: slice, x: Tensor) -> list[Tensor]:
        n = of.stop - of.start
        constants = Constants(
            n, list(facts.scalings[of]), list(facts.dropout_ps[of]), list(range(n)),
            [0, x.shape[0]] * n, AUTO,
        )  # fmt: skip
        return plain_products(constants, x, *[kind[of] for kind in kinds])

    def heads(rows: Tensor) -> Tensor:
        return rows.view(*x.shape[:2], -1, width).transpose(1, 2)

    def normed(x: Tensor, index: int) -> Tensor:
        return rms_norm(x, norms[index], *facts.norms[index])[0]

    def turned(tensor: Tensor, index: int) -> Tensor:
        if len(norms) > _NORMS:
            tensor = normed(tensor.view(-1, width), _NORMS + index).view(tensor.shape)
        facts_of = {"interleaved": facts.interleaved, "half_tables": facts.half_tables}
        return rope(heads(tensor), cos, sin, **facts_of).to(tensor.dtype)

    q, k, v = project(GROUPS[0], normed(rows, 0))
    out, _ = attention(turned(q, 0), turned(k, 1), heads(v), mask, facts.scale, facts.causal)
    h = rows + project(GROUPS[1], out.transpose(1, 2).reshape(q.shape))[0]
    gate, up = project(GROUPS[2], normed(h, 1))
    y = h + project(GROUPS[3], glu(gate, up, facts.activation))[0]
    return y.view(x.shape)
