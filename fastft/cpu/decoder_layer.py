"""CPU launcher of the decoder layer: csrc/cpu/decoder_layer.cpp.

It serves bfloat16 where vectors multiply it (AVX512-BF16 without AMX), for its parts are the
kernels that do there: attention with its products inside, and LoRA's terms in the frozen products'
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import native
from fastft.cpu import thin
from fastft.cpu._lora_buffers import keep
from fastft.cpu.attention_fused import visible
from fastft.cpu.glu import CODES
from fastft.cpu.product import MIN_ROWS, vectors_multiply

__all__ = ["backward", "forward", "room", "supports", "takes"]

_DTYPE = torch.bfloat16
_ADAPTERS = (torch.bfloat16, torch.float32)


def supports(*, device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
    """bfloat16, adapters in it or float32, where vectors multiply bfloat16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype != _DTYPE or adapter_dtype not in _ADAPTERS:
        return f"{dtype} and {adapter_dtype} adapters: it takes bfloat16, and either for adapters"
    return None if vectors_multiply() else "this processor's vectors do not multiply bfloat16"


def takes(
    sizes: Sequence[int],
    groups: Sequence[Sequence[int]],
    dropped: Sequence[Sequence[bool]],
) -> bool:
    """Whether these sizes (batch, tokens, features, heads, kv_heads, width, inner) and ranks, those
    of each product beside whether their inputs drop, are such as the parts take."""
    batch, tokens, features, _, _, width, inner = sizes
    if batch * tokens < MIN_ROWS or features % 2 or width % 2 or inner % 2:
        return False
    pairs = zip(groups, dropped, strict=True)
    return all(thin.serves_all(_DTYPE, ranks, drops) for ranks, drops in pairs)


def room(sizes: Sequence[int], ranks: Sequence[int], head_norms: bool) -> tuple[int, int, int]:
    """Bytes that a forward leaves for its backward, and of the scratch of the two."""
    found: tuple[int, int, int] = native.module().decoder_room(sizes, ranks, head_norms)
    return found


def forward(y: Tensor, scratch: Tensor, *call: Any) -> None:
    """Writes y, and ``kept``, of the arguments that both ways share."""
    arguments = _arguments([0] * 14, *call)
    native.module().decoder_layer_forward(*arguments, y.data_ptr(), scratch.data_ptr())


def backward(
    dx: Tensor | None, gradients: Sequence[Tensor | None], dy: Tensor, scratch: Tensor, *call: Any
) -> None:
    """Writes dx and the gradients, of the As and then the Bs, where wanted."""
    arguments = _arguments(list(map(native.address, gradients)), *call)
    at_dx = native.address(dx)
    native.module().decoder_layer_backward(*arguments, dy.data_ptr(), at_dx, scratch.data_ptr())


def _arguments(
    gradients: Sequence[int],
    kept: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    norms: Sequence[Tensor],
    tensors: Sequence[Sequence[Any]],
    facts: Any,
) -> tuple[Any, ...]:
    """tensors: weights, biases, lora_as, lora_bs and masks; facts: of ``ops._decoder_layer``."""
    weights, biases, lora_as, lora_bs, masks = tensors
    at, seen, strides, causal = visible(mask, facts.causal)
    attention = (facts.scale, causal, at, seen, tuple(strides))
    tables = (
        cos.data_ptr(),
        sin.data_ptr(),
        native.DTYPE_CODES[cos.dtype],
        cos.shape[-1] * (2 if facts.half_tables else 1),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        facts.interleaved,
        facts.half_tables,
    )
    address = native.address
    projections = [
        (
            a.shape[0],
            weight.data_ptr(),
            address(bias),
            a.data_ptr(),
            b.data_ptr(),
            da,
            db,
            address(bits),
            keep(bits, p),
            scaling,
        )
        for weight, bias, a, b, da, db, bits, p, scaling in zip(
            weights, biases, lora_as, lora_bs, gradients[:7], gradients[7:], masks,
            facts.dropout_ps, facts.scalings, strict=True,
        )
    ]  # fmt: skip
    return (
        [*facts.sizes, torch.get_num_threads()],
        CODES[facts.activation],
        lora_as[0].dtype == torch.float32,
        [(w.data_ptr(), *norm) for w, norm in zip(norms, facts.norms, strict=True)],
        tables,
        attention,
        projections,
        x.data_ptr(),
        kept.data_ptr(),
    )
