"""A decoder layer whose seven projections have LoRA as one node of autograd:

    h = x + o(attention(rope(q(n)), rope(k(n)), v(n))),   n = norm(x)
    y = h + down(act(gate(m)) * up(m)),                   m = norm(h)

The launchers are those of the operations one by one, called in the same order on the same values:
the bits are the same, dropout's masks among them. What is spared is the way through Python and
autograd between them, which on two cores takes a twelfth of SmolLM2's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._lora_linear_call import Constants, draw_masks
from fastft.ops._lora_linear_gradients import plain_products
from fastft.ops._room import empty_like, new_empty
from fastft.reference.attention import attention
from fastft.reference.glu import glu
from fastft.reference.rms_norm import rms_norm
from fastft.reference.rope import rope

__all__ = ["GROUPS", "Facts", "Launchers", "Norm", "decoder_layer"]

# The projections by what they read: q k v, o, gate up, down.
GROUPS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))
_Q, _O, _GATE, _DOWN = range(4)
_LAYERS = 7


class Norm(NamedTuple):
    """An RMS norm's constants, as ``fastft.ops.rms_norm`` takes them."""

    eps: float
    offset: float
    round_first: bool


class Launchers(NamedTuple):
    """Who runs the operations between the projections."""

    norm: Any
    rope: Any
    attention: Any
    glu: Any


class Facts(NamedTuple):
    """What a call holds beside tensors.

    products: the call of each of ``GROUPS``. width: of a head. scale, causal: attention's.
    interleaved, half_tables: rope's.
    """

    norms: tuple[Norm, Norm]
    products: tuple[Constants, ...]
    width: int
    scale: float
    causal: bool
    interleaved: bool
    half_tables: bool
    activation: str
    launchers: Launchers

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
        """Heads of q and k, turned in place."""
        facts = {"interleaved": self.interleaved, "half_tables": self.half_tables}
        self.launchers.rope.fwd([q, k], [q, k], cos, sin, **facts, backward=backward)


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
        mask: as ``fastft.ops.scaled_dot_product_attention`` takes it.
        norms: the weights of the two.
        weights, biases, lora_as, lora_bs: of q, k, v, o, gate, up and down.

    Gradients flow to x, lora_as and lora_bs. The caller has held all else against the rules of the
    operations one by one.
    """
    masks: list[Tensor | None] = []
    rows = x.shape[0] * x.shape[1]
    for product, of in zip(facts.products, GROUPS, strict=True):
        ps, first = product.dropout_ps, lora_as[of][0]
        like = x.new_empty(1).expand(rows, first.shape[1]) if any(ps) else x  # of x only the shape
        masks += draw_masks(like, ps, product.spans, first, product.backend, False)
    tensors = (*weights, *biases, *lora_as, *lora_bs, *masks)
    y: Tensor = DecoderLayer.apply(facts, x, cos, sin, mask, *norms, *tensors)
    return y


def _products_of(tensors: Sequence[Any]) -> list[list[Sequence[Any]]]:
    """For each of ``GROUPS`` its weights, biases, lora_as, lora_bs and masks."""
    kinds = [tensors[start : start + _LAYERS] for start in range(0, 5 * _LAYERS, _LAYERS)]
    return [[kind[of] for kind in kinds] for of in GROUPS]


def _heads(rows: Tensor, like: Tensor, width: int) -> Tensor:
    """(batch, heads, tokens, width) of rows of features; like: (batch, tokens, features)."""
    return rows.view(*like.shape[:2], -1, width).transpose(1, 2)


def _project(
    call: Constants, x: Tensor, operands: Sequence[Sequence[Any]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The ys of a product and its ss."""
    weights, biases, lora_as, lora_bs, masks = map(list, operands)
    rows = x.shape[0]
    ys = [new_empty(x, (rows, w.shape[0])) for w in weights]
    ss = [x.new_empty((rows, a.shape[0])) for a in lora_as]
    call.launcher.fwd(
        ys, ss, x, weights, biases, lora_as, lora_bs, call.scalings, masks, call.dropout_ps,
        call.owners, call.pairs(),
    )  # fmt: skip
    return ys, ss


def _project_back(
    call: Constants,
    dys: list[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    operands: Sequence[Sequence[Any]],
    needs: Sequence[Sequence[bool]],
    need_dx: bool = True,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx, dAs and dBs."""
    weights, _, lora_as, lora_bs, masks = map(list, operands)
    dx = empty_like(x) if need_dx else None
    das, dbs = (
        [torch.empty_like(t) if need else None for t, need in zip(some, asked, strict=True)]
        for some, asked in ((lora_as, needs[2]), (lora_bs, needs[3]))
    )
    call.launcher.bwd(
        dx, das, dbs, dys, x, list(ss), weights, lora_as, lora_bs, call.scalings, masks,
        call.dropout_ps, call.owners, call.pairs(),
    )  # fmt: skip
    return dx, das, dbs


class DecoderLayer(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the references."""

    @staticmethod
    def forward(
        ctx: Any,
        facts: Facts,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        norm: Tensor,
        norm_2: Tensor,
        *tensors: Any,
    ) -> Tensor:
        to, products, operands = facts.launchers, facts.products, _products_of(tensors)
        rows = x.view(-1, x.shape[-1])
        n, rstd = empty_like(rows), x.new_empty(rows.shape[0], dtype=torch.float32)
        to.norm.fwd(n, rstd, rows, norm, **facts.norms[0]._asdict())
        (q, k, v), ss = _project(products[_Q], n, operands[_Q])
        query, key, value = (_heads(t, x, facts.width) for t in (q, k, v))
        facts.turn(query, key, cos, sin, False)
        attended = empty_like(q)
        lse = x.new_empty(query.shape[:3], dtype=torch.float32)
        out = _heads(attended, x, facts.width)
        to.attention.fwd(
            out, lse, query, key, value, mask, scale=facts.scale, is_causal=facts.causal
        )
        (h,), s = _project(products[_O], attended, operands[_O])
        ss += s
        m, rstd_2 = empty_like(h), torch.empty_like(rstd)
        to.norm.fwd(m, rstd_2, h, norm_2, rows, h, **facts.norms[1]._asdict())
        (gate, up), s = _project(products[_GATE], m, operands[_GATE])
        ss += s
        product = empty_like(gate)
        to.glu.fwd(product, gate, up, activation=facts.activation)
        (y,), s = _project(products[_DOWN], product, operands[_DOWN])
        ss += s
        y.add_(h)
        ctx.facts = facts
        made = (n, rstd, q, k, v, attended, lse, h, m, rstd_2, gate, up, *ss)
        ctx.save_for_backward(x, cos, sin, mask, norm, norm_2, *made, *tensors)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        facts: Facts = ctx.facts
        x, cos, sin, mask, norm, norm_2, *saved = ctx.saved_tensors
        n, rstd, q, k, v, attended, lse, h, m, rstd_2, gate, up, *saved = saved
        ss, tensors = saved[:_LAYERS], saved[_LAYERS:]
        need_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[7:]
        if wanted(d_out):
            inputs = (x, *tensors)

            def again(x: Tensor, *tensors: Any) -> Tensor:
                return _plain(facts, x, cos, sin, mask, (norm, norm_2), tensors)

            dx, *others = plain_gradients(again, inputs, (need_x, *needs), [d_out])
            return (None, dx, *[None] * 5, *others)
        to, products, operands = facts.launchers, facts.products, _products_of(tensors)
        asked = _products_of(needs)
        dy = d_out.reshape(h.shape).contiguous()
        # The unit, whose product is made again.
        product = empty_like(gate)
        to.glu.fwd(product, gate, up, activation=facts.activation)
        d, da_down, db_down = _project_back(
            products[_DOWN], [dy], product, ss[6:], operands[_DOWN], asked[_DOWN]
        )
        d_gate, d_up = product, empty_like(up)
        to.glu.bwd(d_gate, d_up, d, gate, up, activation=facts.activation)
        dm, da_gate, db_gate = _project_back(
            products[_GATE], [d_gate, d_up], m, ss[4:6], operands[_GATE], asked[_GATE]
        )
        del product, d, d_gate, d_up
        dh = empty_like(h)
        to.norm.bwd(dh, None, dm, h, norm_2, rstd_2, offset=facts.norms[1].offset)
        dh.add_(dy)
        # Attention.
        d, da_o, db_o = _project_back(
            products[_O], [dh], attended, ss[3:4], operands[_O], asked[_O]
        )
        heads = [_heads(t, x, facts.width) for t in (q, k, v, attended, d)]
        dq, dk, dv = (empty_like(t) for t in (q, k, v))
        d_heads = [_heads(t, x, facts.width) for t in (dq, dk, dv)]
        query, key, value, out, d_attended = heads
        to.attention.bwd(
            *d_heads, d_attended, query, key, value, mask, out, lse,
            scale=facts.scale, is_causal=facts.causal,
        )  # fmt: skip
        facts.turn(d_heads[0], d_heads[1], cos, sin, True)
        dn, da_q, db_q = _project_back(
            products[_Q], [dq, dk, dv], n, ss[:3], operands[_Q], asked[_Q], need_x
        )
        dx = None
        if dn is not None:
            dx = empty_like(h)
            to.norm.bwd(dx, None, dn, x.view(h.shape), norm, rstd, offset=facts.norms[0].offset)
            dx = dx.add_(dh).view(x.shape)
        das, dbs = (*da_q, *da_o, *da_gate, *da_down), (*db_q, *db_o, *db_gate, *db_down)
        none = [None] * _LAYERS
        return (None, dx, *[None] * 5, *none, *none, *das, *dbs, *none)


def _plain(
    facts: Facts,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    norms: tuple[Tensor, Tensor],
    tensors: Sequence[Any],
) -> Tensor:
    """The layer as torch operations."""
    products = _products_of(tensors)
    rows = x.reshape(-1, x.shape[-1])

    def project(index: int, x: Tensor) -> list[Tensor]:
        return plain_products(facts.products[index], x, *products[index])

    q, k, v = project(_Q, rms_norm(rows, norms[0], *facts.norms[0])[0])
    query, key, value = (_heads(t, x, facts.width) for t in (q, k, v))
    turned = {"interleaved": facts.interleaved, "half_tables": facts.half_tables}
    query, key = (rope(t, cos, sin, **turned, backward=False).to(t.dtype) for t in (query, key))
    out, _ = attention(query, key, value, mask, facts.scale, facts.causal)
    h = rows + project(_O, out.transpose(1, 2).reshape(q.shape))[0]
    gate, up = project(_GATE, rms_norm(h, norms[1], *facts.norms[1])[0])
    y = h + project(_DOWN, glu(gate, up, facts.activation))[0]
    return y.view(x.shape)
