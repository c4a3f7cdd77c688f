"""Rotary embeddings of any attention module: the function its code calls, replaced for its class.

Models call a function of their own module, ``apply_rotary_pos_emb(q, k, cos, sin)``. A fused module
runs the very code of its class over a copy of that module's names in which this one function is
fastft's; nothing that others see is touched. What the function computes is found by trying it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.swap import Swapped, call_refusal
from fastft.ops._checks import autocast_dtype

__all__ = [
    "FusedRope",
    "RopeFacts",
    "current_facts",
    "facts_of",
    "fused_rope",
    "names_of",
    "rope_facts",
    "rotary_function",
]

_PARAMETERS = ["q", "k", "cos", "sin"]
_TRIAL = (2, 3, 5, 8)  # batch, heads, tokens, width


class RopeFacts(NamedTuple):
    """What a rotary function does.

    name: of the function among its module's. interleaved: pairs are neighbours. tables: "whole"
    (an entry a feature), "half" (one a pair), or "first half" (of an entry a feature, the first
    half is read). partial: features past the tables' stay. narrow: the results are in the dtype of
    the heads, whatever that of the tables.
    """

    name: str
    interleaved: bool
    tables: str
    partial: bool
    narrow: bool

    def turned(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        """The operation on tables as the function takes them."""
        if self.tables == "first half":
            cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
        half = self.tables != "whole"
        return ops.rope(q, k, cos, sin, interleaved=self.interleaved, half_tables=half, **options)


class FusedRope(Swapped):
    """An attention module whose rotary function is :func:`fastft.ops.rope`."""

    fastft_rope: RopeFacts

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The code of the module's class; compiled, with its own function, which torch fuses."""
        cls = type(self)
        code = None
        if not torch.compiler.is_compiling():
            code = _current(cls.fastft_original.forward, cls.fastft_rope)
        if code is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        modules = _thread.__dict__.setdefault("modules", [])
        modules.append(self)
        try:
            return code(self, *args, **kwargs)
        finally:
            modules.pop()


_thread = threading.local()  # .modules: whose forward this thread is in, innermost last


class _Fused(NamedTuple):
    """A forward over the names of its module, with fastft's rotary function in place of its own."""

    code: FunctionType
    names: dict[str, Any]
    own: FunctionType  # the function under the forward's decorators
    original: Callable[..., Any]  # its rotary function


def _current(forward: Any, facts: RopeFacts) -> Callable[..., Any] | None:
    """The fused code with what its module's names mean now: others may have patched one since.
    None when the rotary function itself is another than the one that was tried, or cannot be
    reached any more."""
    found = _unpatched(forward, facts)
    if found is None:
        return None
    code, names, own, _ = found
    live = own.__globals__
    for name in own.__code__.co_names:
        if name != facts.name and name in live:
            names[name] = live[name]
    return code


def current_facts(cls: Any) -> RopeFacts | None:
    """What the rotary function of a fused class does, while it is the one that was tried."""
    found = _unpatched(cls.fastft_original.forward, cls.fastft_rope)
    return None if found is None else cls.fastft_rope  # type: ignore[no-any-return]


def names_of(cls: Any) -> dict[str, Any]:
    """What the names in the code of a fused class's forward mean now."""
    found = _rebound(cls.fastft_original.forward, cls.fastft_rope)
    if found is None:
        return {}
    _, _, own, _ = found
    return own.__globals__


def _unpatched(forward: Any, facts: RopeFacts) -> _Fused | None:
    found = _rebound(forward, facts)
    if found is None:
        return None
    _, _, own, original = found
    return found if own.__globals__.get(facts.name) is original else None


@functools.cache
def _rebound(forward: Any, facts: RopeFacts) -> _Fused | None:
    own = _code_of(forward)
    if own is None or facts.name not in own.__globals__:
        return None
    names = dict(own.__globals__)
    original = names[facts.name]
    names[facts.name] = fused_rope(original, facts)
    code = _around(forward, own, _copied(own, names, own.__closure__))
    return _Fused(code, names, own, original)


def _around(forward: Any, own: FunctionType, code: FunctionType) -> FunctionType:
    """The decorators of a forward around ``code`` in place of what they are around."""
    if forward is own:
        return code
    inner = forward.__wrapped__
    fused = _around(inner, own, code)
    cells = [CellType(fused) if _holds(c, inner) else c for c in forward.__closure__]
    return _copied(forward, forward.__globals__, tuple(cells))


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _copied(
    function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None
) -> FunctionType:
    """The function over other names and another closure."""
    defaults = function.__defaults__
    copy = FunctionType(function.__code__, names, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _code_of(forward: Any) -> FunctionType | None:
    """The function under the decorators of a forward; None where one of them does not hold what it
    decorates as a plain closure does."""
    while isinstance(forward, FunctionType):
        inner = getattr(forward, "__wrapped__", None)
        if inner is None:
            return forward
        if not any(_holds(cell, inner) for cell in forward.__closure__ or ()):
            return None
        forward = inner
    return None


def fused_rope(original: Callable[..., Any], facts: RopeFacts) -> Callable[..., Any]:
    """The rotary function ``original``, fused where a call allows it and counted."""

    def apply(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        heads_at = kwargs.get("unsqueeze_dim", 1)
        reason = None
        if args or set(kwargs) - {"unsqueeze_dim"} or heads_at not in (1, 2):
            reason = "arguments passed to the rotary function"
        reason = reason or _refusal(q, k, cos, sin, facts, heads_at)
        modules = _thread.__dict__.get("modules")
        if modules:
            count(modules[-1], reason, "rope")
        if reason is not None:
            return original(q, k, cos, sin, *args, **kwargs)
        # Attention runs in autocast's dtype: wider heads would only be cast there.
        narrow = facts.narrow or autocast_dtype(q.device.type) == q.dtype
        dtype = q.dtype if narrow else None
        if heads_at == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = facts.turned(q, k, cos, sin, out_dtype=dtype)
        return (q.transpose(1, 2), k.transpose(1, 2)) if heads_at == 2 else (q, k)

    return apply


def _refusal(q: Any, k: Any, cos: Any, sin: Any, facts: RopeFacts, heads_at: int) -> str | None:
    if not all(isinstance(t, Tensor) for t in (q, k, cos, sin)):
        return "no tensors"
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or sin.shape != cos.shape:
        return "heads or tables of other dimensions"
    if cos.requires_grad or sin.requires_grad:
        return "a table with a gradient"
    rotary = cos.shape[-1] * (2 if facts.tables == "half" else 1)
    if rotary > q.shape[-1] or (rotary < q.shape[-1] and not facts.partial):
        return "tables of another width"
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        return "queries and keys of different sizes"
    if cos.shape[0] not in (1, q.shape[0]):
        return "tables of another batch"
    tokens = 3 - heads_at
    if q.shape[tokens] != cos.shape[1] or k.shape[tokens] != cos.shape[1]:
        return "tables of another length"
    if cos.device != q.device or type(cos) is not Tensor or type(sin) is not Tensor:
        return "tables elsewhere"
    return call_refusal("rope", q, k)


def rotary_function(cls: type[nn.Module]) -> str | None:
    """The name of the rotary function that the class's forward calls, by what it takes; None where
    there is none, or where the forward's code cannot be reached through its decorators."""
    forward = _code_of(cls.forward)
    if forward is None:
        return None
    for name in forward.__code__.co_names:
        found = forward.__globals__.get(name)
        if callable(found) and not isinstance(found, type):
            # Older Transformers beside the package kernels make a module of it.
            made = found.forward if isinstance(found, nn.Module) else found
            try:
                parameters = list(inspect.signature(made).parameters)
            except (TypeError, ValueError):
                continue
            if parameters[:4] == _PARAMETERS:
                return name
    return None


@functools.cache
def rope_facts(cls: Any) -> RopeFacts | None:
    """What the rotary function of this class computes; None when it is nothing we know."""
    name = rotary_function(cls)
    if name is None:
        return None
    return facts_of(name, inspect.unwrap(cls.forward).__globals__[name])


def facts_of(name: str, function: Callable[..., Any]) -> RopeFacts | None:
    """What a rotary function computes, found by trying it; None when it is nothing we know."""
    for tables in ("whole", "half", "first half"):
        for interleaved in (False, True):
            facts = RopeFacts(name, interleaved, tables, False, False)
            if _agrees(function, facts, partial=False):
                partial = _agrees(function, facts, partial=True)
                return facts._replace(partial=partial, narrow=_narrow(function, facts))
    return None


def _draw(facts: RopeFacts, partial: bool) -> list[Tensor]:
    """Random heads and tables, of which every entry differs."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, width = _TRIAL
    rotary = width // 2 if partial else width
    size = rotary // 2 if facts.tables == "half" else rotary
    table = (batch, tokens, size)
    shapes = [(batch, heads, tokens, width), (batch, 1, tokens, width), table, table]
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]


def _agrees(function: Callable[..., Any], facts: RopeFacts, *, partial: bool) -> bool:
    given = _draw(facts, partial)
    try:
        with torch.no_grad():
            expected, got = function(*given), facts.turned(*given)
    except Exception:  # tables of another shape: a function of another kind
        return False
    pairs = list(zip(got, expected, strict=False))
    return all(
        isinstance(e, Tensor) and g.shape == e.shape and torch.allclose(g, e, atol=1e-5)
        for g, e in pairs
    ) and len(expected) == len(got)


def _narrow(function: Callable[..., Any], facts: RopeFacts) -> bool:
    """Whether 16-bit heads stay so under float32 tables."""
    q, k, cos, sin = _draw(facts, False)
    with torch.no_grad():
        found = function(q.bfloat16(), k.bfloat16(), cos, sin)[0]
    return found.dtype == torch.bfloat16
