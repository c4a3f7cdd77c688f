"""Proof at each site: the fused module computes what it replaces, on a small random input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastft.nn.calls import uncounted
from fastft.nn.head import FusedHead, causal_lm_loss
from fastft.nn.lora import FusedLoraLinear

__all__ = ["difference", "site_key", "tolerance"]

# The head keeps eight of them, one shifted out and one ignored: float32 products over a vocabulary
# lose accuracy in torch at 1, 2, 3 and 5 rows (measured with K = 49152: 1e-5 to 7e-5 against 4e-7).
_TOKENS = 10


def site_key(module: nn.Module) -> tuple[Any, ...]:
    """Sites with equal keys run the same code on the same shapes: one proof serves all."""
    parameters = [
        (name, tuple(p.shape), p.dtype, p.device) for name, p in module.named_parameters()
    ]
    return tuple(parameters)


def tolerance(module: nn.Module) -> float:
    """Largest relative difference (in the Euclidean norm) that rounding explains.

    Each side rounds operands and results to the dtype a handful of times, each time with a mean
    relative error of eps / (2 sqrt(3)): 2 eps covers their sum. Sums of K products in float32 in
    another order differ by eps32 sqrt(K): twice that.
    """
    eps = max(torch.finfo(p.dtype).eps for p in module.parameters())
    width = max(max(p.shape) for p in module.parameters())
    return 2 * eps + 2 * torch.finfo(torch.float32).eps * width**0.5


def difference(module: nn.Module, fused: type[nn.Module], original: type[nn.Module]) -> float:
    """Largest relative difference between the module as ``fused`` and as ``original``, over the
    output and every gradient; inf when the fused one gives NaN or Inf."""
    was_training = {m: m.training for m in module.modules()}
    module.eval()  # no dropout: two draws of a mask differ
    # Verification draws random numbers; the model's own random state must not notice.
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    try:
        with uncounted(), torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            run = _run_head if fused is FusedHead else _run_layer
            expected = run(module, original)
            torch.manual_seed(0)
            got = run(module, fused)
    finally:
        for m, training in was_training.items():
            m.training = training
    return max(_relative(a, b) for a, b in zip(got, expected, strict=True))


def _relative(got: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / max(scale, 1e-30)


def _run_layer(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of a LoRA layer with random adapters (B starts at zero, which would
    hide half of the work) as class ``kind``."""
    name = next(n for n in module.active_adapters if n in module.lora_A)
    weight = module.base_layer.weight
    adapters = {}
    for part in ("lora_A", "lora_B"):
        p = getattr(module, part)[name].weight
        random = torch.randn(p.shape, dtype=torch.float32, device=p.device) / p.shape[1] ** 0.5
        adapters[f"{part}.{name}.weight"] = random.to(p.dtype).requires_grad_()
    x = torch.randn(_TOKENS, weight.shape[1], device=weight.device).to(weight.dtype)
    x.requires_grad_()
    before = type(module)
    module.__class__ = kind
    try:
        y = functional_call(module, adapters, (x,))
    finally:
        module.__class__ = before
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    leaves = [x, *adapters.values()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _run_head(head: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Loss and gradient of the hidden states, fused or through the logits."""
    weight = head.weight
    hidden = torch.randn(1, _TOKENS, weight.shape[1], device=weight.device).to(weight.dtype)
    # exp turns an absolute error of a logit into a relative one: with logits of unit spread the
    # rounding of the product is all there is, whatever the head's scale.
    spread = nn.functional.linear(hidden, weight).float().std()
    hidden = (hidden / spread.clamp(min=1e-6)).to(weight.dtype).requires_grad_()
    labels = torch.randint(weight.shape[0], (1, _TOKENS), device=weight.device)
    labels[0, 2] = -100
    if kind is FusedHead:
        loss = causal_lm_loss(hidden, head, labels)
    else:
        logits = nn.functional.linear(hidden, weight, head.bias).float()
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, [hidden])]


def verifiable(module: nn.Module) -> bool:
    """Whether there is anything to run: not on the meta device, not sharded, dense floats."""
    plain = all(
        p.device.type != "meta" and type(p) in (Tensor, nn.Parameter) for p in module.parameters()
    )
    return plain and isinstance(module, (nn.Linear, FusedLoraLinear.__mro__[1]))
