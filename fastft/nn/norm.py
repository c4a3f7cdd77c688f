"""RMS and layer norms of any model, fused; their convention is found by trying, not by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.few import few_rows
from fastft.nn.rules import parameter
from fastft.nn.swap import Swapped, call_refusal
from fastft.ops._checks import autocast_dtype

__all__ = [
    "Convention",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "epsilon",
    "layer_norm_offset",
    "norm_facts",
    "normed",
]

_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
# (centred, offset, round_first): Llama, OLMo 2, Gemma, and the fourth for completeness; then those
# of layer norms with a weight alone (Cohere).
_CONVENTIONS = tuple(
    (centred, offset, round_first)
    for centred in (False, True)
    for offset, round_first in ((0.0, True), (0.0, False), (1.0, False), (1.0, True))
)


class FusedRMSNorm(Swapped):
    """The forward of a norm with one weight; centred (a layer norm), offset, round_first and narrow
    are facts of the class.

    narrow: a 16-bit input under a float32 weight (a query's norm under autocast) is computed in
    float32, and the result is "wide" (float32) or as the "input"; None: not known, left alone.
    """

    fastft_centred: bool
    fastft_offset: float
    fastft_round_first: bool
    fastft_narrow: str | None
    weight: nn.Parameter

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The operation, or the original's forward, counted with its reason."""
        x, reason = _only_tensor(args, kwargs)
        dtype = None
        # On a GPU its own code is a launch an operation.
        if reason is None and x.device.type == "cpu" and few_rows(self, x):
            count(self, None)
            return super().forward(x)  # type: ignore[misc]
        weight = parameter(self, "weight")
        if reason is None and self.fastft_narrow is not None and _is_narrow(x, weight):
            dtype = x.dtype if self.fastft_narrow == "input" else weight.dtype
            x = x.to(weight.dtype)
        op = "layer_norm" if self.fastft_centred else "rms_norm"
        reason = reason or call_refusal(op, x, weight)
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        convention = (self.fastft_centred, self.fastft_offset, self.fastft_round_first)
        y = normed(x, weight, epsilon(self) or 0.0, convention)
        return y if dtype is None else y.to(dtype)


# Whether a norm centres, its offset, and whether it rounds before the weight.
Convention = tuple[bool, float, bool]


def normed(x: Tensor, weight: Tensor, eps: float, convention: Convention) -> Tensor:
    """The norm of this convention."""
    centred, offset, round_first = convention
    if centred:
        return ops.layer_norm(x, weight, None, eps, offset=offset, round_first=round_first)
    y: Tensor = ops.rms_norm(x, weight, eps, offset=offset, round_first=round_first)
    return y


class FusedLayerNorm(Swapped):
    """The forward of ``nn.LayerNorm`` and of classes that add a constant to its weight."""

    fastft_offset: float

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """:func:`fastft.ops.layer_norm`, or the original's forward, counted with its reason."""
        x, reason = _only_tensor(args, kwargs)
        if reason is None and few_rows(self, x):
            count(self, None)
            return super().forward(x)  # type: ignore[misc]
        affine = [t for t in (self.weight, self.bias) if t is not None]
        dtype = None
        if reason is None and autocast_dtype(x.device.type) is not None:
            # Autocast runs layer norms in float32; on a CPU it leaves their dtype.
            dtype = x.dtype if x.device.type == "cpu" else None
            x, *affine = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, *affine))
        reason = reason or call_refusal("layer_norm", x, *affine)
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            y: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return y
        weight, bias = (*affine, None, None)[:2]
        y = ops.layer_norm(x, weight, bias, self.eps, offset=self.fastft_offset)
        return y if dtype is None else y.to(dtype)


def _only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    """What a norm is called with, or why that is not one tensor."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args[0], None
    return None, "arguments passed to the layer"


def layer_norm_offset(module: Any) -> float | None:
    """The constant this ``nn.LayerNorm`` (or subclass of it) adds to its weight, found by running
    it; None when it computes something else."""
    if module.weight is None or module.weight.dim() != 1:
        return None
    x, weight = _draw(module, module.weight.dtype)
    parameters = {"weight": weight}
    if module.bias is not None:
        parameters["bias"] = weight.flip(0)
    bound = 2 * torch.finfo(weight.dtype).eps
    with torch.no_grad():
        try:
            expected = functional_call(module, parameters, (x,)).double()
        except Exception:  # it takes something else: images, channels first
            return None
        for offset in (0.0, 1.0):
            y = ops.layer_norm(x, weight, parameters.get("bias"), module.eps, offset=offset)
            same = expected.shape == y.shape
            if same and float((y.double() - expected).norm() / expected.norm()) <= bound:
                return offset
    return None


def _is_narrow(x: Any, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def epsilon(module: nn.Module) -> float | None:
    """The module's epsilon, by whichever of its usual names; None when it has none."""
    own = module.__dict__  # what is not there nn.Module looks for in vain, and for long
    value = next((own[name] for name in _EPSILONS if isinstance(own.get(name), float)), None)
    if value is None:
        found = (getattr(module, name, None) for name in _EPSILONS)
        value = next((value for value in found if isinstance(value, float)), None)
    if value is None and isinstance(module, nn.RMSNorm) and module.elementwise_affine:
        # torch's own default is that of the dtype it computes in, not (as it says) of its input's.
        return torch.finfo(torch.promote_types(module.weight.dtype, torch.float32)).eps
    return value


def norm_facts(module: Any) -> tuple[tuple[str, Any], ...] | None:
    """What makes this module a norm of ours: whether it centres, its offset, its rounding and what
    it does with a narrower input, found by running it on a random input with a random weight; None
    when it computes something else."""
    dtype = module.weight.dtype
    # In float32 the place of the rounding does not show; it will once the model is cast.
    convention = min(
        _CONVENTIONS, key=lambda convention: _error(module, torch.bfloat16, convention)
    )
    if not _error(module, dtype, convention) <= 2 * torch.finfo(dtype).eps:
        return None
    narrow = None
    if dtype == torch.float32:
        x, weight = _draw(module, dtype)
        with torch.no_grad():
            wide = functional_call(module, {"weight": weight}, (x,)).double()
            got = functional_call(module, {"weight": weight}, (x.bfloat16(),))
        narrow = _narrow_fact(got, wide)
    centred, offset, round_first = convention
    return (
        ("fastft_centred", centred),
        ("fastft_offset", offset),
        ("fastft_round_first", round_first),
        ("fastft_narrow", narrow),
    )


def _draw(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random input (8, features), every second row small enough for an epsilon to count, and a
    random weight."""
    generator = torch.Generator().manual_seed(0)
    weight: Tensor = module.weight
    # A weight on meta is replaced by the one drawn: what the module computes can be seen anywhere.
    device = "cpu" if weight.is_meta else weight.device
    draw = torch.randn(9, weight.shape[0], generator=generator, device="cpu").to(device, dtype)
    draw[1::2] *= 1e-3
    return draw[1:], draw[0]


def _error(module: Any, dtype: torch.dtype, convention: Convention) -> float:
    """How far the operation is from the module in ``dtype``, relative."""
    x, weight = _draw(module, dtype)
    with torch.no_grad():
        expected = functional_call(module, {"weight": weight}, (x,)).double()
        y = normed(x, weight, epsilon(module) or 0.0, convention)
    return float((y.double() - expected).norm() / expected.norm())


def _narrow_fact(got: Tensor, expected: Tensor) -> str | None:
    """What the module gave for a bfloat16 input: "wide", "input", or None for something else."""
    # The input was rounded, xhat may have been, and the result: three relative errors of eps / 2.
    eps = torch.finfo(torch.bfloat16).eps
    if not float((got.double() - expected).norm()) <= 1.5 * eps * float(expected.norm()):
        return None
    return {torch.float32: "wide", torch.bfloat16: "input"}.get(got.dtype)
