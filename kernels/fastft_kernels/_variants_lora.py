"""Variants of the LoRA kernels."""

from __future__ import annotations

import itertools
from typing import Any

from fastft_kernels import lora_config
from fastft_kernels._tiles import GEMM_RANKS
from fastft_kernels._variant import BOOLEANS, DTYPES, Variant

__all__ = ["ALL_VARIANTS", "VARIANTS"]

_LORA = "fastft_kernels._lora_linear_kernels"
_DROPOUT = "fastft_kernels._lora_dropout_kernels"
_REDUCE = "fastft_kernels._lora_reduce_kernels"

# Sizes that are no multiples of 16, which no model's are, load element by element: three masked
# siblings may then spill this much. Measured: at most 72 bytes (Triton 3.6, sm_90, rank 16).
_UNALIGNED_STACK = 80
# In 128 registers: an H200 is faster so than with fewer programs at a time. At most 40 bytes, the
# exact GELU and its slope 96 (Triton 3.9, sm_90 and sm_100).
_PAIR_STACK = 48
_ERF_STACK = 96
# A persistent product spills outside its loops over K alone: under Triton 3.8 64 bytes for sm_100,
# and of three masked terms asked for early at most 112 for sm_90 (Triton 3.9), once a tile.
_GEMM_STACK = 64
_GEMM_MASKED_STACK = 128


def _numbered(prefix: str, kind: str, suffix: str = "") -> dict[str, str]:
    return {f"{prefix}{i}{suffix}": kind for i in range(lora_config.MAX_SIBLINGS)}


def _lora(kernel: str, x: str, adapter: str, r: int, siblings: int, masked: bool, **flags: Any):
    """A variant of one of the three wide LoRA kernels."""
    aligned = flags.pop("aligned", True)
    shape = {"M": "i32", "K": "i32", **_numbered("r", "i32")}
    masks = _numbered("mask", "*u8", "_ptr")
    scales = _numbered("scale", "fp32")
    if kernel == "shrink":
        made = "fp32" if flags.setdefault("SPLIT", False) else x
        types = {
            "x_ptr": f"*{x}", **_numbered("a", f"*{adapter}", "_ptr"),
            **_numbered("s", f"*{made}", "_ptr"), **masks, "copy_ptr": f"*{x}", **shape, **scales,
            "copy_stride": "i32", **_numbered("first", "i32"), "k_per_split": "i32",
        }  # fmt: skip
        flags.setdefault("COPY", False)
    elif kernel == "expand":
        flags.setdefault("FRESH", False)
        shape = {"M": "i32", "N": "i32", **_numbered("r", "i32")}
        types = {
            "y_ptr": f"*{x}", "bias_ptr": f"*{x}", **_numbered("s", f"*{x}", "_ptr"),
            **_numbered("w", f"*{adapter}", "_ptr"), **masks, **shape, **scales,
        }  # fmt: skip
    else:
        types = {
            "x_ptr": f"*{x}", **_numbered("d", f"*{x}", "_ptr"), **_numbered("p", "*fp32", "_ptr"),
            **masks, **shape, "rows_per_split": "i32",
        }  # fmt: skip
    names = {"shrink": "_shrink", "expand": "_expand_add", "outer": "_outer_partial"}
    block_r = lora_config.block_r_for(r, DTYPES[x])
    text = "".join(f" {name.lower()}={value}" for name, value in flags.items())
    return Variant(
        _LORA, f"{names[kernel]}_kernel",
        f"x={x} ab={adapter} r={r} siblings={siblings} masked={masked}{text}"
        + ("" if aligned else " unaligned"),
        types, {"SIBLINGS": siblings, "MASKED": masked, "BLOCK_R": block_r, **flags},
        kernel, (DTYPES[x], block_r, lora_config.form_of(siblings, masked)), aligned,
        Variant.stack_limit if aligned else _UNALIGNED_STACK,
    )  # fmt: skip


def _lora_variants() -> list[Variant]:
    variants = []
    for r in (16, 64):
        # Float32 walks ranks in blocks of 32 at most: rank 64 is its heaviest form.
        for x, adapter in (("bf16", "fp32"), ("fp32", "fp32"))[: 1 if r == 16 else 2]:
            variants += [
                _lora("shrink", x, x, r, 3, True, TRANSPOSED=False, COPY=True),
                _lora("expand", x, adapter, r, 3, True, HAS_BIAS=False, TRANSPOSED=False),
                _lora("outer", x, adapter, r, 3, True),
            ]
        variants += [
            _lora("shrink", "bf16", "fp32" if r == 16 else "bf16", r, 1, False, TRANSPOSED=True),
            _lora("shrink", "bf16", "bf16", r, 3, False, TRANSPOSED=False, COPY=True, SPLIT=True),
            _lora("expand", "bf16", "fp32", r, 1, False, HAS_BIAS=True, TRANSPOSED=True),
        ]
    variants += [
        _lora("outer", "fp16", "fp16", 16, 1, False),
        _reduce("fp32", False),
        _reduce("bf16", True),
    ]
    variants += [_pair("bf16", "fp32", 16, True), _pair("fp16", "fp16", 32, False)]
    variants += [_glu_pair("bf16", "fp32", 16), _glu_pair("fp16", "fp16", 16, 1)]
    for kernel in ("shrink", "expand", "outer"):
        variants += [_routed(kernel, "bf16", "fp32", 64, True), _routed(kernel, "fp32", "fp32", 16)]
    variants += [
        _gemm("bf16", "fp32", 1, False, TRANSPOSED=True, HAS_BIAS=True, MASKED=False),
        _gemm("bf16", "fp32", 3, True, TRANSPOSED=False, HAS_BIAS=False, MASKED=False),
        _gemm("bf16", "fp32", 3, True, TRANSPOSED=False, HAS_BIAS=False, MASKED=True),
        _gemm("bf16", "fp32", 3, False, TRANSPOSED=False, HAS_BIAS=False, MASKED=True),
        _pair_reduce("bf16", True),
        _cast("bf16", "fp32"),
    ]
    mask_types = {"out_ptr": "*u8", "seed_ptr": "*i64", "n_bytes": "i32", "threshold": "i32"}
    variants.append(Variant(_DROPOUT, "_dropout_mask_kernel", "", mask_types, {}, "mask"))
    return variants


def _reduce(out: str, transposed: bool) -> Variant:
    types = {
        **_numbered("out", f"*{out}", "_ptr"), **_numbered("p", "*fp32", "_ptr"),
        **_numbered("splits", "i32"),
        **_numbered("K", "i32"), **_numbered("r", "i32"), **_numbered("scale", "fp32"),
    }  # fmt: skip
    constants = {"TRANSPOSED": transposed}
    return Variant(
        _REDUCE, "_outer_reduce_kernel", f"out={out} transposed={transposed}", types, constants,
        "reduce",
    )  # fmt: skip


def _pair(x: str, adapter: str, r: int, copy: bool) -> Variant:
    pointers = {"dy_ptr": x, "b_ptr": adapter, "s_ptr": x, "ds_ptr": "fp32", "db_ptr": "fp32"}
    types = {
        **{name: f"*{kind}" for name, kind in pointers.items()}, "copy_ptr": f"*{x}",
        **dict.fromkeys(("M", "N", "r", "rows_per_split", "copy_stride"), "i32"),
    }  # fmt: skip
    return Variant(
        "fastft_kernels._lora_pair_kernels", "_pair_partial_kernel",
        f"dy={x} b={adapter} r={r} copy={copy}", types, {"COPY": copy, "BLOCK_R": r},
        "pair_copy" if copy else "pair", (DTYPES[x], r, False),
    )  # fmt: skip


def _glu_pair(x: str, adapter: str, r: int, activation: int = 0) -> Variant:
    pointers = {
        **dict.fromkeys(("d_gate_ptr", "d_up_ptr", "d_out_ptr", "gate_ptr", "up_ptr"), x),
        **dict.fromkeys(("b0_ptr", "b1_ptr"), adapter), **dict.fromkeys(("s0_ptr", "s1_ptr"), x),
        **dict.fromkeys(("ds0_ptr", "ds1_ptr", "db0_ptr", "db1_ptr"), "fp32"),
    }  # fmt: skip
    sizes = ("M", "N", "r", "rows_per_split", "gate_stride", "up_stride", "d_stride")
    types = {**{name: f"*{kind}" for name, kind in pointers.items()}, **dict.fromkeys(sizes, "i32")}
    return Variant(
        "fastft_kernels._lora_glu_kernels", "_glu_pair_kernel",
        f"dy={x} b={adapter} r={r} activation={activation}", types,
        {"ACTIVATION": activation, "SETTLE": True, "BLOCK_R": r}, "glu_pair", (DTYPES[x], r, False),
        stack_limit=_ERF_STACK if activation == 1 else _PAIR_STACK,
    )  # fmt: skip


def _pair_reduce(out: str, copy: bool) -> Variant:
    types = {
        **_numbered("ds", f"*{out}", "_ptr"), **_numbered("copy", f"*{out}", "_ptr"),
        **_numbered("p", "*fp32", "_ptr"),
        **_numbered("strips", "i32"), **_numbered("r", "i32"),
        **_numbered("scale", "fp32"), "M": "i32", "copy_stride": "i32",
    }  # fmt: skip
    return Variant(
        _REDUCE, "_pair_reduce_kernel", f"ds={out} copy={copy}", types, {"COPY": copy}, "reduce"
    )


def _cast(out: str, adapter: str) -> Variant:
    types = {
        **_numbered("out", f"*{out}", "_ptr"), **_numbered("in", f"*{adapter}", "_ptr"),
        **_numbered("size", "i32"),
    }  # fmt: skip
    return Variant(_REDUCE, "_cast_kernel", f"out={out} in={adapter}", types, {}, "cast")


def _routed(
    kernel: str, x: str, adapter: str, r: int, masked: bool = False, transposed: bool = False,
    aligned: bool = True,
) -> Variant:  # fmt: skip
    types = {"fields_ptr": "*i64", "scales_ptr": "*fp32", "programs_ptr": "*i32"}
    types |= {"expand": {"members_ptr": "*i32"}, "outer": {"outs_ptr": "*i64"}}.get(kernel, {})
    block_r = lora_config.block_r_for(r, DTYPES[x])
    constants = {
        "WIDE": x, "ADAPTER": adapter, "MASKED": masked, "TRANSPOSED": transposed,
        "ALIGNED": aligned, "BLOCK_R": block_r,
    }  # fmt: skip
    return Variant(
        "fastft_kernels._lora_routed_kernels", f"_routed_{kernel}_kernel",
        f"x={x} ab={adapter} r={r} masked={masked} transposed={transposed} aligned={aligned}",
        types, constants, kernel, (DTYPES[x], block_r, "masked"), True,
        Variant.stack_limit if aligned else _UNALIGNED_STACK,
    )  # fmt: skip


def _gemm(x: str, adapter: str, siblings: int, few: bool, **flags: bool) -> Variant:
    """A variant of the persistent product, on the architectures that have one."""
    wide = "{BLOCK_N}, {BLOCK_K}" if flags["TRANSPOSED"] else "{BLOCK_K}, {BLOCK_N}"
    absent = [f"{name}{i}_desc" for name in "xw" for i in range(siblings, lora_config.MAX_SIBLINGS)]
    types = {
        **_numbered("x", f"tensordesc<{x}[{{BLOCK_M}}, {{BLOCK_K}}]>", "_desc"),
        **_numbered("w", f"tensordesc<{x}[{wide}]>", "_desc"),
        "y_desc": f"tensordesc<{x}[{{BLOCK_M}}, {{PART}}]>",
        **_numbered("s", f"*{x}", "_ptr"), **_numbered("l", f"*{adapter}", "_ptr"),
        **_numbered("mask", "*u8", "_ptr"), "bias_ptr": f"*{x}", "M": "i32", "N": "i32",
        **_numbered("k", "i32"), **_numbered("r", "i32"), **_numbered("scale", "fp32"),
        "programs": "i32",
    }  # fmt: skip
    types = {name: kind for name, kind in types.items() if name not in absent}
    text = "".join(f" {name.lower()}={value}" for name, value in flags.items())
    return Variant(
        "fastft_kernels._lora_gemm_kernel", "_lora_gemm_kernel",
        f"x={x} ab={adapter} siblings={siblings} few={few}{text}", types,
        {
            "SIBLINGS": siblings, "BLOCK_R": GEMM_RANKS[few], **flags,
            **dict.fromkeys(absent),
        },
        "gemm", (DTYPES[x], 0, flags["MASKED"]),
        stack_limit=_GEMM_MASKED_STACK if few and flags["MASKED"] else _GEMM_STACK,
    )  # fmt: skip


def _all_variants() -> list[Variant]:
    pairs = [(x, a) for x in DTYPES for a in dict.fromkeys(("fp32", x))]
    variants = []
    for (x, a), r, aligned in itertools.product(pairs, (16, 32, 64), BOOLEANS):
        for siblings, masked in itertools.product((1, 2, 3), BOOLEANS):
            case = (x, a, r, siblings, masked)
            flags = {"TRANSPOSED": False, "aligned": aligned}
            variants.append(_lora("outer", *case, aligned=aligned))
            variants += [_lora("shrink", *case, SPLIT=split, **flags) for split in BOOLEANS]
            variants += [
                _lora("expand", *case, HAS_BIAS=False, FRESH=fresh, **flags) for fresh in BOOLEANS
            ]
        # s B^T of one sibling at a time, where a bias may be; dY B likewise.
        alone, flags = (x, a, r, 1, False), {"TRANSPOSED": True, "aligned": aligned}
        variants += [_lora("shrink", *alone, SPLIT=split, **flags) for split in BOOLEANS]
        variants += [_lora("expand", *alone, HAS_BIAS=bias, **flags) for bias in BOOLEANS]
    for (x, a), copy in itertools.product(pairs, BOOLEANS):
        if DTYPES[x] == 2:
            variants += [_pair(x, a, r, copy) for r in (16, 32)]
    for (x, a), activation in itertools.product(pairs, range(3)):
        if DTYPES[x] == 2:
            variants.append(_glu_pair(x, a, 16, activation))
    for (x, a), r in itertools.product(pairs, (16, 32, 64)):
        for masked, transposed, aligned in itertools.product(BOOLEANS, BOOLEANS, BOOLEANS):
            rest = (x, a, r, masked, transposed, aligned)
            variants += [_routed(kernel, *rest) for kernel in ("shrink", "expand", "outer")]
        for siblings, masked in itertools.product((1, 2, 3), BOOLEANS):
            flags = {"TRANSPOSED": False, "COPY": True}
            for split in BOOLEANS:
                variants.append(_lora("shrink", x, a, r, siblings, masked, SPLIT=split, **flags))
        flags = {"TRANSPOSED": True, "COPY": True}
        variants += [_lora("shrink", x, a, r, 1, False, SPLIT=s, **flags) for s in BOOLEANS]
    narrow = [both for both in pairs if DTYPES[both[0]] == 2]
    for (x, a), few in itertools.product(narrow, BOOLEANS):
        flags = {"TRANSPOSED": True, "MASKED": False}
        variants += [_gemm(x, a, 1, few, HAS_BIAS=bias, **flags) for bias in BOOLEANS]
        flags = {"TRANSPOSED": False, "HAS_BIAS": False}
        for siblings, masked in itertools.product((1, 2, 3), BOOLEANS):
            variants.append(_gemm(x, a, siblings, few, MASKED=masked, **flags))
    variants += [_pair_reduce(out, copy) for out in DTYPES for copy in BOOLEANS]
    variants += [_reduce(out, t) for out, t in itertools.product(DTYPES, BOOLEANS)]
    variants += [_cast("fp16", "fp32")]
    return variants


VARIANTS: list[Variant] = _lora_variants()
ALL_VARIANTS: list[Variant] = _all_variants()
