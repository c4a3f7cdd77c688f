"""LoRA over one linear layer in bitsandbytes' 4 bits (QLoRA): what it costs on top of that layer,
forward + backward. The truth is that of the 4 bits' values."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import lora
from .declare import Case, Impl, Options

# (in_features, out_features, tokens)
CPU_SHAPES = ((576, 1536, 2048), (2048, 2048, 1024))
CUDA_SHAPES = tuple(
    (k, n, m) for m in (8192, 2048) for k, n in ((4096, 4096), (4096, 14336), (14336, 4096))
)


def cases(options: Options) -> Sequence[Case]:
    """r = 16, dropout off and at 0.05: shapes of SmolLM2 and of a 1B model on a CPU, of an 8B model
    on a GPU. None where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        print("qlora: missing: bitsandbytes (pip install bitsandbytes)", file=sys.stderr)
        return []
    shapes = CUDA_SHAPES if options.device.type == "cuda" else CPU_SHAPES
    shapes = lora.QUICK_SHAPES if options.quick else shapes
    return [
        Case(f"{k}x{n}x{m} r=16 dropout={p:g}", {"k": k, "n": n, "m": m, "r": 16, "dropout": p})
        for p in (0.0, 0.05)
        for k, n, m in shapes
    ]


@dataclass
class Inputs(lora.Inputs):
    """``weight`` is what ``packed`` and ``state`` stand for."""

    packed: Any = None
    state: Any = None

    def linear(self) -> nn.Module:
        """bitsandbytes' layer over the 4 bits."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        n, k = self.weight.shape
        made = Linear4bit(k, n, bias=False, compute_dtype=self.options.dtype, device="meta")
        made.weight = Params4bit(
            self.packed, quant_state=self.state, bnb_quantized=True, quant_type="nf4", module=made
        )
        made.quant_state = self.state
        return made  # type: ignore[no-any-return]


def prepare(case: Case, options: Options) -> Inputs:
    """NF4 in blocks of 64, with quantized scales: what QLoRA's paper uses."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dense = lora.prepare(case, options)
    packed, state = quantize_4bit(dense.weight, quant_type="nf4", compress_statistics=True)
    given = {f.name: getattr(dense, f.name) for f in dataclasses.fields(dense)}
    given["weight"] = dequantize_4bit(packed, state).to(options.dtype)
    return Inputs(**given, packed=packed, state=state)


SUITE = dataclasses.replace(
    lora.SUITE,
    name="qlora",
    cases=cases,
    impls=tuple(
        Impl(name, build, package="bitsandbytes")
        for name, build in (
            ("frozen", lora.build_frozen),
            ("peft", lora.build_peft),
            ("peft-bf16", lora.build_peft_bf16),
            ("fastft", lora.build_fastft),
        )
    ),
    prepare=prepare,
)
