"""What ``fastft_kernels.aot`` compiles: every kernel with the argument types and compile-time
constants that its launcher gives it.

``VARIANTS`` is the heaviest and the lightest form of every kernel for each kind of dtype and rank;
``ALL_VARIANTS`` adds every combination in between.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from fastft_kernels import config
from fastft_kernels.multi_tensor import N_SCALARS

__all__ = ["ALL_VARIANTS", "VARIANTS", "Variant"]

_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of argument types and compile-time constants.

    Args:
        module, kernel: where the ``@triton.jit`` function is.
        label: what distinguishes it, for people.
        types: argument name -> Triton type, for the arguments that are not compile-time constants;
            ``{BLOCK_M}`` and the like stand for block sizes.
        constants: compile-time constants other than block sizes.
        table: the tile table of ``config.Arch`` that gives block sizes, or the field's name.
        key: the key into that tile table: bytes of an element of x, rank block, stacked; for a norm
            its columns first.
        aligned: pointers and sizes are multiples of 16, as they usually are.
        stack_limit: bytes of stack (spilled registers) that are accepted: four registers, by which
            versions of Triton differ, cost nothing that can be measured.
    """

    module: str
    kernel: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    key: tuple[int, int, bool] = (4, 16, False)
    aligned: bool = True
    stack_limit: int = 16


_LORA = "fastft_kernels._lora_linear_kernels"
_LOSS = "fastft_kernels.linear_cross_entropy"
_ADAMW = "fastft_kernels.adamw"


# Sizes that are no multiples of 16, which no model's are, load element by element: three masked
# siblings may then spill this much. Measured: at most 72 bytes (Triton 3.6, sm_90, rank 16).
_UNALIGNED_STACK = 80


def _numbered(prefix: str, kind: str, suffix: str = "") -> dict[str, str]:
    return {f"{prefix}{i}{suffix}": kind for i in range(config.MAX_SIBLINGS)}


def _lora(kernel: str, x: str, adapter: str, r: int, siblings: int, masked: bool, **flags: Any):
    """A variant of one of the three wide LoRA kernels."""
    aligned = flags.pop("aligned", True)
    shape = {"M": "i32", "K": "i32", **_numbered("r", "i32")}
    masks = _numbered("mask", "*u8", "_ptr")
    scales = _numbered("scale", "fp32")
    if kernel == "shrink":
        types = {
            "x_ptr": f"*{x}", **_numbered("a", f"*{adapter}", "_ptr"),
            **_numbered("s", f"*{x}", "_ptr"), **masks, "copy_ptr": f"*{x}", **shape, **scales,
            "copy_stride": "i32", **_numbered("first", "i32"),
        }  # fmt: skip
        flags.setdefault("COPY", False)
    elif kernel == "expand":
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
    block_r = config.block_r_for(r, _DTYPES[x])
    text = "".join(f" {name.lower()}={value}" for name, value in flags.items())
    return Variant(
        _LORA, f"{names[kernel]}_kernel",
        f"x={x} ab={adapter} r={r} siblings={siblings} masked={masked}{text}"
        + ("" if aligned else " unaligned"),
        types, {"SIBLINGS": siblings, "MASKED": masked, "BLOCK_R": block_r, **flags},
        kernel, (_DTYPES[x], block_r, masked or siblings > 1), aligned,
        Variant.stack_limit if aligned else _UNALIGNED_STACK,
    )  # fmt: skip


def _lora_variants() -> list[Variant]:
    variants = []
    for r in (16, 64):
        # Float32 walks ranks in blocks of 32 at most: rank 64 is its heaviest form.
        for x, adapter in (("bf16", "fp32"), ("fp32", "fp32"))[: 1 if r == 16 else 2]:
            variants += [
                _lora("shrink", x, adapter, r, 3, True, TRANSPOSED=False, COPY=True),
                _lora("expand", x, adapter, r, 3, True, HAS_BIAS=False, TRANSPOSED=False),
                _lora("outer", x, adapter, r, 3, True),
            ]
        variants += [
            _lora("shrink", "bf16", "fp32", r, 1, False, TRANSPOSED=True),
            _lora("expand", "bf16", "fp32", r, 1, False, HAS_BIAS=True, TRANSPOSED=True),
        ]
    variants += [
        _lora("outer", "fp16", "fp16", 16, 1, False),
        _reduce("fp32", False),
        _reduce("bf16", True),
    ]
    variants += [_pair("bf16", "fp32", 16, True), _pair("fp16", "fp16", 32, False)]
    for kernel in ("shrink", "expand", "outer"):
        variants += [_routed(kernel, "bf16", "fp32", 64, True), _routed(kernel, "fp32", "fp32", 16)]
    variants += [
        _gemm("bf16", "fp32", 1, TRANSPOSED=True, HAS_BIAS=True, MASKED=False),
        _gemm("bf16", "fp32", 3, TRANSPOSED=False, HAS_BIAS=False, MASKED=False),
        _gemm("bf16", "fp32", 3, TRANSPOSED=False, HAS_BIAS=False, MASKED=True),
        _pair_reduce("bf16", True),
    ]
    mask_types = {"out_ptr": "*u8", "seed_ptr": "*i64", "n_bytes": "i32", "threshold": "i32"}
    variants.append(Variant(_LORA, "_dropout_mask_kernel", "", mask_types, {}, "mask"))
    return variants


def _reduce(out: str, transposed: bool) -> Variant:
    types = {
        "out_ptr": f"*{out}", "p_ptr": "*fp32", "splits": "i32", "K": "i32", "r": "i32",
        "scale": "fp32",
    }  # fmt: skip
    constants = {"TRANSPOSED": transposed}
    return Variant(
        _LORA, "_outer_reduce_kernel", f"out={out} transposed={transposed}", types, constants,
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
        f"dy={x} b={adapter} r={r} copy={copy}", types, {"COPY": copy, "BLOCK_R": r}, "pair",
        (_DTYPES[x], r, False),
    )  # fmt: skip


def _pair_reduce(out: str, copy: bool) -> Variant:
    types = {
        "ds_ptr": f"*{out}", "copy_ptr": f"*{out}", "p_ptr": "*fp32", "size": "i32",
        "strips": "i32", "r": "i32", "copy_stride": "i32", "scale": "fp32",
    }  # fmt: skip
    return Variant(
        "fastft_kernels._lora_pair_kernels", "_pair_reduce_kernel", f"ds={out} copy={copy}", types,
        {"COPY": copy}, "reduce",
    )  # fmt: skip


def _routed(
    kernel: str, x: str, adapter: str, r: int, masked: bool = False, transposed: bool = False,
    aligned: bool = True,
) -> Variant:  # fmt: skip
    types = {"fields_ptr": "*i64", "scales_ptr": "*fp32", "programs_ptr": "*i32"}
    types |= {"expand": {"members_ptr": "*i32"}, "outer": {"outs_ptr": "*i64"}}.get(kernel, {})
    block_r = config.block_r_for(r, _DTYPES[x])
    constants = {
        "WIDE": x, "ADAPTER": adapter, "MASKED": masked, "TRANSPOSED": transposed,
        "ALIGNED": aligned, "BLOCK_R": block_r,
    }  # fmt: skip
    return Variant(
        "fastft_kernels._lora_routed_kernels", f"_routed_{kernel}_kernel",
        f"x={x} ab={adapter} r={r} masked={masked} transposed={transposed} aligned={aligned}",
        types, constants, kernel, (_DTYPES[x], block_r, True), True,
        Variant.stack_limit if aligned else _UNALIGNED_STACK,
    )  # fmt: skip


def _gemm(x: str, adapter: str, siblings: int, **flags: bool) -> Variant:
    """A variant of the persistent product, on the architectures that have one."""
    wide = "{BLOCK_N}, {BLOCK_K}" if flags["TRANSPOSED"] else "{BLOCK_K}, {BLOCK_N}"
    types = {
        **_numbered("x", f"tensordesc<{x}[{{BLOCK_M}}, {{BLOCK_K}}]>", "_desc"),
        **_numbered("w", f"tensordesc<{x}[{wide}]>", "_desc"),
        "y_desc": f"tensordesc<{x}[{{BLOCK_M}}, {{BLOCK_N}}]>",
        **_numbered("s", f"*{x}", "_ptr"), **_numbered("l", f"*{adapter}", "_ptr"),
        **_numbered("mask", "*u8", "_ptr"), "bias_ptr": f"*{x}", "M": "i32", "N": "i32",
        **_numbered("k", "i32"), **_numbered("r", "i32"), **_numbered("scale", "fp32"),
        "programs": "i32",
    }  # fmt: skip
    text = "".join(f" {name.lower()}={value}" for name, value in flags.items())
    return Variant(
        "fastft_kernels._lora_gemm_kernel", "_lora_gemm_kernel",
        f"x={x} ab={adapter} siblings={siblings}{text}", types, {"SIBLINGS": siblings, **flags},
        "gemm", (_DTYPES[x], 0, flags["MASKED"]),
    )  # fmt: skip


def _loss(slab: str, bias: bool, gradient: bool) -> Variant:
    types = {
        "slab_ptr": f"*{slab}", "labels_ptr": "*i64", "bias_ptr": f"*{slab}",
        "losses_ptr": "*fp32", "correct_ptr": "*i32", "V": "i32", "ignore_index": "i32",
    }  # fmt: skip
    return Variant(
        _LOSS, "_cross_entropy_kernel", f"logits={slab} bias={bias} gradient={gradient}", types,
        {"HAS_BIAS": bias, "GRADIENT": gradient}, "cross_entropy",
    )  # fmt: skip


def _adamw_norm(grad: str, aligned: bool = True) -> Variant:
    types = {
        "addresses_ptr": "*i64", "sizes_ptr": "*i64", "chunk_tensor_ptr": "*i32",
        "chunk_part_ptr": "*i32", "partials_ptr": "*fp32", "n_tensors": "i32",
        "first_chunk": "i32",
    }  # fmt: skip
    constants = {"GRAD": grad, "ALIGNED": aligned}
    return Variant(_ADAMW, "_adamw_norm_kernel", f"g={grad}", types, constants, "adamw")


def _adamw_update(param: str, grad: str, aligned: bool = True) -> Variant:
    types = {
        "addresses_ptr": "*i64", "sizes_ptr": "*i64", "chunk_tensor_ptr": "*i32",
        "chunk_part_ptr": "*i32", "scalars_ptr": "*fp32", "stats_ptr": "*fp32",
        "n_tensors": "i32", "first_chunk": "i32", "sign": "fp32",
    }  # fmt: skip
    constants = {"PARAM": param, "GRAD": grad, "ALIGNED": aligned, "N_IN": N_SCALARS}
    return Variant(
        _ADAMW, "_adamw_update_kernel", f"p={param} g={grad} aligned={aligned}", types, constants,
        "adamw",
    )  # fmt: skip


def _adamw_prepare() -> Variant:
    types = {
        "partials_ptr": "*fp32", "stats_ptr": "*fp32", "steps_ptr": "*fp32", "hyper_ptr": "*fp32",
        "scalars_ptr": "*fp32", "n_chunks": "i32", "n_tensors": "i32", "max_norm": "fp32",
    }  # fmt: skip
    constants = {"N_HYPER": 5, "N_OUT": N_SCALARS}
    return Variant(_ADAMW, "_adamw_prepare_kernel", "", types, constants, "prepare")


def _glu(dtype: str, activation: int, backward: bool, aligned: bool = True) -> Variant:
    names = ["d_gate_ptr", "d_up_ptr", "d_out_ptr"] if backward else ["out_ptr"]
    pointers = dict.fromkeys((*names, "gate_ptr", "up_ptr"), f"*{dtype}")
    types = {**pointers, "columns": "i32", "gate_stride": "i32", "up_stride": "i32"}
    return Variant(
        "fastft_kernels.glu", f"_glu_{'backward' if backward else 'forward'}_kernel",
        f"x={dtype} activation={activation}" + ("" if aligned else " unaligned"), types,
        {"ACTIVATION": activation}, "elementwise", aligned=aligned,
    )  # fmt: skip


_NORM = "fastft_kernels.rms_norm"


def _norm(dtype: str, backward: bool, columns: int, round_first: bool = True) -> Variant:
    names = ["dx_ptr", "dy_ptr"] if backward else ["y_ptr"]
    types = {
        **dict.fromkeys((*names, "x_ptr", "weight_ptr"), f"*{dtype}"), "rstd_ptr": "*fp32",
        "columns": "i32", "offset": "fp32", **({} if backward else {"eps": "fp32"}),
    }  # fmt: skip
    return Variant(
        _NORM, f"_rms_norm_{'backward' if backward else 'forward'}_kernel",
        f"x={dtype} columns={columns} round_first={round_first}", types,
        {} if backward else {"ROUND_FIRST": round_first}, "norm", (columns, 0, False),
    )  # fmt: skip


def _norm_weight(dtype: str) -> Variant:
    types = {
        "partial_ptr": "*fp32", "dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "rstd_ptr": "*fp32",
        "rows": "i32", "columns": "i32", "rows_per_split": "i32",
    }  # fmt: skip
    return Variant(_NORM, "_rms_norm_weight_kernel", f"x={dtype}", types, {}, "norm_weight")


_DORA = "fastft_kernels.dora_scale"


def _dora(dtype: str, backward: bool, bias: bool = True) -> Variant:
    names = ("dz_ptr", "dy_ptr", "z_ptr") if backward else ("y_ptr", "z_ptr", "bias_ptr")
    types = {**dict.fromkeys(names, f"*{dtype}"), "scale_ptr": "*fp32", "columns": "i32"}
    if backward:
        types |= {"partial_ptr": "*fp32", "rows": "i32", "rows_per_split": "i32"}
    return Variant(
        _DORA, f"_dora_scale_{'backward' if backward else 'forward'}_kernel",
        f"z={dtype}" + ("" if backward else f" bias={bias}"), types,
        {} if backward else {"HAS_BIAS": bias}, "norm_weight" if backward else "elementwise",
    )  # fmt: skip


VARIANTS: tuple[Variant, ...] = (
    *_lora_variants(),
    _loss("bf16", True, True),
    _loss("fp32", False, True),
    _loss("fp16", False, False),
    _adamw_norm("fp32"),
    _adamw_norm("bf16"),
    _adamw_prepare(),
    _adamw_update("fp32", "fp32"),
    _adamw_update("bf16", "bf16"),
    _adamw_update("fp16", "fp32", aligned=False),
    _glu("bf16", 0, False),
    _glu("fp32", 1, True),
    _glu("bf16", 2, True),
    _norm("bf16", False, 4096),
    _norm("bf16", True, 576),
    _norm("fp32", True, 16384),
    _norm_weight("bf16"),
    _dora("bf16", False),
    _dora("fp32", True),
)


def _all_variants() -> tuple[Variant, ...]:
    """Every combination that a launcher makes."""
    pairs = [(x, a) for x in _DTYPES for a in dict.fromkeys(("fp32", x))]
    booleans = (False, True)
    variants = list(VARIANTS)
    for (x, a), r, aligned in itertools.product(pairs, (16, 32, 64), booleans):
        for siblings, masked in itertools.product((1, 2, 3), booleans):
            case = (x, a, r, siblings, masked)
            flags = {"TRANSPOSED": False, "aligned": aligned}
            variants.append(_lora("outer", *case, aligned=aligned))
            variants.append(_lora("shrink", *case, **flags))
            variants.append(_lora("expand", *case, HAS_BIAS=False, **flags))
        # s B^T of one sibling at a time, where a bias may be; dY B likewise.
        alone, flags = (x, a, r, 1, False), {"TRANSPOSED": True, "aligned": aligned}
        variants.append(_lora("shrink", *alone, **flags))
        variants += [_lora("expand", *alone, HAS_BIAS=bias, **flags) for bias in booleans]
    for (x, a), copy in itertools.product(pairs, booleans):
        if _DTYPES[x] == 2:
            variants += [_pair(x, a, r, copy) for r in (16, 32)]
    for (x, a), r in itertools.product(pairs, (16, 32, 64)):
        for masked, transposed, aligned in itertools.product(booleans, booleans, booleans):
            rest = (x, a, r, masked, transposed, aligned)
            variants += [_routed(kernel, *rest) for kernel in ("shrink", "expand", "outer")]
        for siblings, masked in itertools.product((1, 2, 3), booleans):
            flags = {"TRANSPOSED": False, "COPY": True}
            variants.append(_lora("shrink", x, a, r, siblings, masked, **flags))
        variants.append(_lora("shrink", x, a, r, 1, False, TRANSPOSED=True, COPY=True))
    for x, a in (both for both in pairs if _DTYPES[both[0]] == 2):
        flags = {"TRANSPOSED": True, "MASKED": False}
        variants += [_gemm(x, a, 1, HAS_BIAS=bias, **flags) for bias in booleans]
        flags = {"TRANSPOSED": False, "HAS_BIAS": False}
        for siblings, masked in itertools.product((1, 2, 3), booleans):
            variants.append(_gemm(x, a, siblings, MASKED=masked, **flags))
    variants += [_pair_reduce(out, copy) for out in _DTYPES for copy in booleans]
    variants += [_reduce(out, t) for out, t in itertools.product(_DTYPES, booleans)]
    variants += [_loss(*c) for c in itertools.product(_DTYPES, booleans, booleans)]
    variants += [_adamw_norm(*c) for c in itertools.product(_DTYPES, booleans)]
    variants += [_adamw_update(*c) for c in itertools.product(_DTYPES, _DTYPES, booleans)]
    flags = itertools.product(_DTYPES, (0, 1, 2), booleans, booleans)
    variants += [_glu(*case) for case in flags]
    for dtype, columns in itertools.product(_DTYPES, (64, 576, 4096, 8192, 16384)):
        variants += [_norm(dtype, False, columns, first) for first in booleans]
        variants.append(_norm(dtype, True, columns))
    variants += [_norm_weight(dtype) for dtype in _DTYPES]
    variants += [_dora(dtype, False, bias) for dtype in _DTYPES for bias in booleans]
    variants += [_dora(dtype, True) for dtype in _DTYPES]
    unique = {(v.kernel, v.label, json.dumps(v.constants, default=str)): v for v in variants}
    return tuple(unique.values())


ALL_VARIANTS: tuple[Variant, ...] = _all_variants()
