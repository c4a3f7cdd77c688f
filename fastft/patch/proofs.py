"""Proof at each site: the fused module computes what it replaces, on a small random input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastft.nn.attention import FusedAttention, attention_forward
from fastft.nn.calls import uncounted
from fastft.nn.deferred import DeferredLogits
from fastft.nn.experts import experts_of
from fastft.nn.head import FusedHead, FusedLoraHead, deferring
from fastft.nn.mlp import layout_of
from fastft.nn.quantized import dtype_of, is_4bit
from fastft.nn.rope import FusedRope, fused_rope, rope_facts
from fastft.nn.rules import unhooked
from fastft.nn.swap import become, original_of
from fastft.patch.products import adapts_product, dense_product, tried

__all__ = [
    "difference",
    "float_parameter",
    "run_attention",
    "run_conv",
    "run_embedding",
    "run_head",
    "run_lora",
    "run_mlp",
    "run_norm",
    "run_rope",
    "site_key",
    "tolerance",
    "verifiable",
]

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
    parameters = tried(module)
    dtypes = [p.dtype for p in parameters if _of_floats(p)]
    dtypes += [dtype_of(m) for m in _of_4_bits(module)]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    width = max(max(p.shape) for p in parameters)
    return 2 * eps + 2 * torch.finfo(torch.float32).eps * width**0.5


def difference(
    module: nn.Module,
    run: Callable[[Any, type[nn.Module]], list[Tensor]],
    fused: type[nn.Module],
    *,
    trained: bool,
) -> float:
    """Largest relative difference between the module as ``fused`` and as what it was, over the
    output and every gradient; inf when one of them gives NaN or Inf."""
    was_training = {m: m.training for m in module.modules()}
    # The first input of such a layer may choose its dtype, and this is none.
    chosen = {m: (m.compute_dtype, m.compute_type_is_set) for m in _of_4_bits(module)}
    module.train(trained)
    # Verification draws random numbers; the model's own random state must not notice.
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    try:
        with uncounted(), unhooked(module), torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            expected = run(module, original_of(module))
            torch.manual_seed(0)
            got = run(module, fused)
    finally:
        for m, training in was_training.items():
            m.training = training
        for m, (dtype, is_set) in chosen.items():
            m.compute_dtype, m.compute_type_is_set = dtype, is_set
    return max(_relative(a, b) for a, b in zip(got, expected, strict=True))


def _of_4_bits(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if is_4bit(m)]


def _relative(got: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(got).all() & torch.isfinite(expected).all()):
        return float("inf")
    scale = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / max(scale, 1e-30)


@contextmanager
def _as_class(module: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    before = type(module)
    become(module, kind)
    try:
        yield
    finally:
        become(module, before)


def float_parameter(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter of two dimensions or more: its dtype is the module's. For
    one in 4 bits stands an empty tensor, of the dtype of its products."""
    for m in module.modules():
        for p in m.parameters(recurse=False):
            if p.dim() > 1 and getattr(p, "quant_state", None) is not None:
                return torch.empty(0, dtype=dtype_of(m), device=p.device)
            if p.dim() > 1 and p.is_floating_point():
                return p
    return None


def run_lora(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of a LoRA layer with random adapters (B starts at zero, which would
    hide half of the work) as class ``kind``."""
    name = next(n for n in module.active_adapters if n in module.lora_A)
    adapters = {}
    for part in ("lora_A", "lora_B"):
        p = getattr(module, part)[name].weight
        random = torch.randn(p.shape, dtype=torch.float32, device=p.device) / p.shape[1] ** 0.5
        adapters[f"{part}.{name}.weight"] = random.to(p.dtype).requires_grad_()
    bias = module.lora_B[name].bias
    if bias is not None:
        random = torch.randn(bias.shape, device=bias.device).to(bias.dtype)
        adapters[f"lora_B.{name}.bias"] = random.requires_grad_()
    if name in module.lora_variant:  # DoRA: the magnitude starts as the norm, a scale of one
        p = module.lora_magnitude_vector[name].weight
        random = p.detach() * (1 + 0.5 * torch.rand(p.shape, device=p.device).to(p.dtype))
        adapters[f"lora_magnitude_vector.{name}.weight"] = random.requires_grad_()
    like = p if adapts_product(module) else module.base_layer.weight
    dtype = p.dtype if like is p else dtype_of(module.base_layer)
    x = torch.randn(_TOKENS, module.in_features, device=like.device).to(dtype)
    x.requires_grad_()
    with dense_product(module), _as_class(module, kind):
        y = functional_call(module, adapters, (x,))
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    leaves = [x, *adapters.values()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _run_adapted(
    module: Any, kind: type[nn.Module], names: list[str], inputs: list[Tensor]
) -> list[Tensor]:
    """Output and gradients of a layer with random values for the parameters ``names``."""
    adapters = {}
    for name in names:
        p = module.get_parameter(name)
        spread = (p.numel() / p.shape[0]) ** 0.5
        random = torch.randn(p.shape, dtype=torch.float32, device=p.device) / spread
        adapters[name] = random.to(p.dtype).requires_grad_()
    with _as_class(module, kind):
        y = functional_call(module, adapters, tuple(inputs))
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    leaves = [*(t for t in inputs if t.requires_grad), *adapters.values()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def run_conv(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of a LoRA convolution with random adapters as class ``kind``."""
    name = next(n for n in module.active_adapters if n in module.lora_A)
    conv = module.base_layer
    # A few positions to each side of what the kernel covers.
    sizes = [d * (k - 1) + s + 2 for k, d, s in zip(conv.kernel_size, conv.dilation, conv.stride)]
    weight = conv.weight
    x = torch.randn(2, conv.in_channels, *sizes, device=weight.device).to(weight.dtype)
    names = [f"lora_{part}.{name}.weight" for part in "AB"]
    results = _run_adapted(module, kind, names, [x.requires_grad_()])
    if x.dim() == 4:  # another layout, another way
        last = x.detach().contiguous(memory_format=torch.channels_last)
        results += _run_adapted(module, kind, names, [last.requires_grad_()])
    return results


def run_embedding(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of a LoRA embedding with random adapters as class ``kind``."""
    name = next(n for n in module.active_adapters if n in module.lora_embedding_A)
    weight = module.base_layer.weight
    ids = torch.randint(weight.shape[0], (2, _TOKENS), device=weight.device)
    names = [f"lora_embedding_{part}.{name}" for part in "AB"]
    return _run_adapted(module, kind, names, [ids])


def run_table(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradient of a trained embedding as class ``kind``; no token twice, for whose sum
    torch's own would be the worse one."""
    table, padding = module.weight, module.padding_idx
    # Some rows will do, unless that of padding is further down: a vocabulary's gradient is large.
    rows = table.shape[0] if padding is not None and padding >= 4 * _TOKENS else 4 * _TOKENS
    weight = torch.randn_like(table[: min(rows, table.shape[0])]).requires_grad_()
    ids = torch.randperm(weight.shape[0], device=weight.device)[: 2 * _TOKENS]
    with _as_class(module, kind):
        y = functional_call(module, {"weight": weight}, (ids,))
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, weight, dy)]


def run_experts(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of experts with random adapters, each token through two, as ``kind``."""
    experts, wrappers = experts_of(module)
    adapters, prefix = {}, ""
    for wrapper in wrappers.values():
        (name,) = (n for n in wrapper.active_adapters if n in wrapper.lora_A)
        for part in ("lora_A", "lora_B"):
            p = getattr(wrapper, part)[name].weight
            random = torch.randn(p.shape, dtype=torch.float32, device=p.device) / p.shape[1] ** 0.5
            adapters[f"{prefix}{part}.{name}.weight"] = random.to(p.dtype).requires_grad_()
        prefix += "base_layer."
    weight: Any = experts.down_proj
    width = weight.shape[2 if experts.is_transposed else 1]
    x = torch.randn(_TOKENS, width, device=weight.device).to(weight.dtype).requires_grad_()
    top_k = min(2, experts.num_experts)
    scores = torch.rand(_TOKENS, experts.num_experts, device=weight.device)
    weights, index = scores.topk(top_k)
    with _as_class(module, kind):
        y = functional_call(module, adapters, (x, index, weights.to(weight.dtype)))
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *adapters.values()], dy)]


def run_head(head: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Loss over a head, scaled and capped as some models do, and its gradients, fused or through
    the logits."""
    base = getattr(head, "base_layer", head)
    weight = base.weight
    hidden = torch.randn(1, _TOKENS, weight.shape[1], device=weight.device).to(weight.dtype)
    # exp turns an absolute error of a logit into a relative one: with logits of unit spread the
    # rounding of the product is all there is, whatever the head's scale.
    spread = nn.functional.linear(hidden, weight).float().std()
    hidden = (hidden / spread.clamp(min=1e-6)).to(weight.dtype).requires_grad_()
    labels = torch.randint(weight.shape[0], (1, _TOKENS), device=weight.device)
    labels[0, 2] = -100
    parameters, leaves = {}, [hidden]
    if base is not head:
        name = next(n for n in head.active_adapters if n in head.lora_A)
        for part in ("lora_A", "lora_B"):
            p = getattr(head, part)[name].weight
            random = torch.randn(p.shape, device=p.device) / (4 * p.shape[1] ** 0.5)
            parameters[f"{part}.{name}.weight"] = random.to(p.dtype).requires_grad_()
        leaves += parameters.values()
    fused = issubclass(kind, (FusedHead, FusedLoraHead))
    with _as_class(head, kind), deferring(head) if fused else nullcontext():
        logits = functional_call(head, parameters, (hidden,)) * 1.5
        logits = (torch.tanh(logits / 8.0) * 8.0).float()[:, :-1]
        loss = nn.functional.cross_entropy(logits.reshape(-1, weight.shape[0]), labels[0, 1:])
        if fused and not isinstance(logits, DeferredLogits):
            raise RuntimeError("the head did not defer its logits")
        gradients = torch.autograd.grad(loss, leaves)
    return [loss.detach(), *gradients]


def run_norm(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of a norm with random parameters (many start at one) as ``kind``."""
    weight = module.weight

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=weight.device).to(weight.dtype).requires_grad_()

    x = draw(_TOKENS, weight.shape[0])
    parameters = {name: draw(*p.shape) for name, p in module.named_parameters()}
    with _as_class(module, kind):
        y = functional_call(module, parameters, (x,))
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters.values()], dy)]


@contextmanager
def _dropping(module: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the module's dropout drops half: where it stands does not show at a rate of zero."""
    dropout = None if name is None else getattr(module, name)
    before = getattr(dropout, "p", None)
    if before is not None:
        dropout.p = 0.5  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before is not None:
            dropout.p = before  # type: ignore[union-attr]


def run_mlp(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and input gradient of a gated MLP as class ``kind``."""
    layout, weight = layout_of(module), float_parameter(module)
    if layout is None or weight is None:
        raise TypeError("no gated MLP with floating-point weights")
    width = getattr(module, layout.gate).in_features
    x = torch.randn(1, _TOKENS, width, device=weight.device).to(weight.dtype).requires_grad_()
    with _as_class(module, kind), _dropping(module, layout.dropout):
        y = module(x)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x], dy)]


def run_attention(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Output and gradients of the attention inside the module, ``kind``'s or sdpa's."""
    weight = float_parameter(module)
    if weight is None:
        raise TypeError("no floating-point weights")
    forward = attention_forward if issubclass(kind, FusedAttention) else sdpa_attention_forward
    group, width = getattr(module, "num_key_value_groups", 1), getattr(module, "head_dim", 64)

    def draw(heads: int) -> Tensor:
        values = torch.randn(1, heads, 2 * _TOKENS, width, device=weight.device)
        return values.to(weight.dtype).requires_grad_()

    leaves = query, key, value = draw(2 * group), draw(2), draw(2)
    scaling = getattr(module, "scaling", None)
    y, _ = forward(module, query, key, value, None, scaling=scaling)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def run_rope(module: Any, kind: type[nn.Module]) -> list[Tensor]:
    """Queries and keys turned and their gradients, by ``kind``'s rotary function."""
    weight = float_parameter(module)
    cls: Any = original_of(module)
    facts = rope_facts(cls)
    if weight is None or facts is None:
        raise TypeError("no floating-point weights, or no rotary function")
    function: Any = inspect.unwrap(cls.forward).__globals__[facts.name]
    if issubclass(kind, FusedRope):
        function = fused_rope(function, facts)
    width = getattr(module, "head_dim", 64)
    size = width // 2 if facts.tables == "half" else width

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=weight.device).to(weight.dtype)  # type: ignore[union-attr]

    # As models have them: transposed views of projections.
    leaves = [draw(2, _TOKENS, heads, width).requires_grad_() for heads in (4, 2)]
    q, k = (t.transpose(1, 2) for t in leaves)
    outs = function(q, k, draw(2, _TOKENS, size), draw(2, _TOKENS, size))
    pulls = [draw(*out.shape) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, pulls)]


def verifiable(module: nn.Module) -> bool:
    """Whether there is anything to run: not on the meta device, not sharded, floats (or 4 bits)."""
    parameters = tried(module)
    return bool(parameters) and all(
        p.device.type != "meta" and (_of_floats(p) or getattr(p, "quant_state", None) is not None)
        for p in parameters
    )


def _of_floats(p: nn.Parameter) -> bool:
    return type(p) in (Tensor, nn.Parameter) and p.is_floating_point()
