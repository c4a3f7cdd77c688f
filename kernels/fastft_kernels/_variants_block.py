"""Variants of the loss, the optimizer and the rest of a block."""

from __future__ import annotations

import itertools

from fastft_kernels import config
from fastft_kernels._variant import BOOLEANS, DTYPES, Variant
from fastft_kernels.optimizer_step import N_SCALARS

__all__ = ["ALL_VARIANTS", "VARIANTS"]

_LOSS = "fastft_kernels._cross_entropy_kernels"
_ADAMW = "fastft_kernels.optimizer_step"


def _loss(slab: str, *, statistics: bool = True, gradient: bool = True, **flags: bool) -> Variant:
    vectors = (
        "bias_ptr", "class_weight_ptr", "label_weight_ptr", "row_scale_ptr", "entropy_scale_ptr",
        "top_ptr",
        "log_sum_ptr", "z_label_ptr", "weighted_sum_ptr", "entropy_ptr", "log_sum_sq_ptr",
        "mean_logit_ptr",
    )  # fmt: skip
    numbers = ("scale", "softcap", "smoothing", "z_loss", "weight_sum", "classes")
    types = {
        "slab_ptr": f"*{slab}", "labels_ptr": "*i64", "argmax_ptr": "*i64", "V": "i32",
        **dict.fromkeys(vectors, "*fp32"), **dict.fromkeys(numbers, "fp32"),
    }  # fmt: skip
    constants = {"STATISTICS": statistics, "GRADIENT": gradient} | dict.fromkeys(_LOSS_FLAGS, False)
    constants |= flags
    text = "".join(f" {name.lower()}" for name, value in constants.items() if value)
    return Variant(
        _LOSS, "_cross_entropy_kernel", f"logits={slab}{text}", types, constants, "cross_entropy"
    )


_LOSS_FLAGS = (
    "MOMENTS", "SMOOTH", "SOFTCAP", "HAS_BIAS", "HAS_CLASS_WEIGHT", "HAS_LABEL_WEIGHT",
    "HAS_ROW_SCALE", "HAS_ENTROPY_SCALE",
)  # fmt: skip
_ALL_LOSS_FLAGS = dict.fromkeys(_LOSS_FLAGS, True)


def _divergence(slab: str, teacher: str, kind: int, gradient: bool, full: bool) -> Variant:
    numbers = ("scale", "softcap", "teacher_scale", "teacher_softcap", "temperature", "beta")
    vectors = ("bias_ptr", "teacher_bias_ptr", "row_scale_ptr", "losses_ptr")
    types = {
        "student_ptr": f"*{slab}", "teacher_ptr": f"*{teacher}", "V": "i32",
        **dict.fromkeys(vectors, "*fp32"), **dict.fromkeys(numbers, "fp32"),
    }  # fmt: skip
    flags = ("SOFTCAP", "TEACHER_SOFTCAP", "HAS_BIAS", "HAS_TEACHER_BIAS", "HAS_ROW_SCALE")
    return Variant(
        _LOSS, "_divergence_kernel",
        f"logits={slab} teacher={teacher} kind={kind} gradient={gradient} full={full}", types,
        {"KIND": kind, "GRADIENT": gradient, **dict.fromkeys(flags, full)}, "divergence",
    )  # fmt: skip


def _scaled(gradient: str, out: str, each: bool) -> Variant:
    types = {
        "out_ptr": f"*{out}", "gradient_ptr": f"*{gradient}", "scale_ptr": "*fp32",
        "columns": "i32",
    }  # fmt: skip
    label = f"gradient={gradient} out={out} each={each}"
    return Variant(_LOSS, "_scaled_kernel", label, types, {"EACH": each}, "scaled")


def _adamw_norm(grad: str, aligned: bool = True) -> Variant:
    types = {
        "table_ptr": "*i64", "chunk_tensor_ptr": "*i32", "chunk_part_ptr": "*i32",
        "partials_ptr": "*fp32", "first_chunk": "i32",
    }  # fmt: skip
    constants = {"GRAD": grad, "ALIGNED": aligned}
    return Variant(_ADAMW, "_adamw_norm_kernel", f"g={grad}", types, constants, "adamw")


def _adamw_update(param: str, grad: str, aligned: bool = True) -> Variant:
    types = {
        "table_ptr": "*i64", "chunk_tensor_ptr": "*i32", "chunk_part_ptr": "*i32",
        "scalars_ptr": "*fp32", "stats_ptr": "*fp32", "first_chunk": "i32",
    }  # fmt: skip
    constants = {"PARAM": param, "GRAD": grad, "ALIGNED": aligned, "N_IN": N_SCALARS}
    return Variant(
        _ADAMW, "_adamw_update_kernel", f"p={param} g={grad} aligned={aligned}", types, constants,
        "adamw",
    )  # fmt: skip


def _adamw_prepare() -> Variant:
    types = {
        "partials_ptr": "*fp32", "stats_ptr": "*fp32", "table_ptr": "*i64", "hyper_ptr": "*fp32",
        "scalars_ptr": "*fp32", "n_chunks": "i32", "n_tensors": "i32", "max_norm": "fp32",
    }  # fmt: skip
    constants = {"NEEDS_NORM": True, "N_HYPER": 7, "N_OUT": N_SCALARS}
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
# A longer row is walked.
_LARGEST = config.NormConfig().rows[-1].block


def _norm(dtype: str, backward: bool, columns: int, residual: bool = False, **flags: bool):
    names = ["y_ptr", "residual_ptr", "summed_ptr"]
    if backward:
        names = ["dx_ptr", "dy_ptr", "more_ptr"]
    types = {
        **dict.fromkeys((*names, "x_ptr", "weight_ptr"), f"*{dtype}"), "rstd_ptr": "*fp32",
        "rows": "i32", "columns": "i32", "offset": "fp32",
        **({} if backward else {"eps": "fp32"}),
    }  # fmt: skip
    round_first = flags.get("round_first", True)
    constants = {"RESIDUAL": residual, "ROUND_FIRST": round_first}
    if backward:
        constants = {"MORE": residual}
    constants["WHOLE"] = columns <= _LARGEST
    return Variant(
        _NORM, f"_rms_norm_{'backward' if backward else 'forward'}_kernel",
        f"x={dtype} columns={columns} residual={residual} round_first={round_first}", types,
        constants, "norm_rows", (columns, 0, False),
    )  # fmt: skip


def _norm_weight(dtype: str) -> Variant:
    types = {
        "partial_ptr": "*fp32", "dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "rstd_ptr": "*fp32",
        "rows": "i32", "columns": "i32", "rows_per_split": "i32",
    }  # fmt: skip
    return Variant(_NORM, "_rms_norm_weight_kernel", f"x={dtype}", types, {}, "norm_weight")


_LAYER_NORM = "fastft_kernels.layer_norm"


def _layer_norm(dtype: str, backward: bool, columns: int, affine: bool = True) -> Variant:
    names = ["dx_ptr", "dy_ptr"] if backward else ["y_ptr", "bias_ptr"]
    types = {
        **dict.fromkeys((*names, "x_ptr", "weight_ptr"), f"*{dtype}"), "mean_ptr": "*fp32",
        "rstd_ptr": "*fp32", "columns": "i32", "offset": "fp32",
        **({} if backward else {"eps": "fp32"}),
    }  # fmt: skip
    constants = {"HAS_WEIGHT": affine, "WHOLE": columns <= _LARGEST}
    if not backward:
        constants |= {"HAS_BIAS": affine, "ROUND_FIRST": affine}
    return Variant(
        _LAYER_NORM, f"_layer_norm_{'backward' if backward else 'forward'}_kernel",
        f"x={dtype} columns={columns} affine={affine}", types, constants, "norm",
        (columns, 0, False),
    )  # fmt: skip


def _layer_norm_weight(dtype: str, weight: bool, bias: bool) -> Variant:
    types = {
        **dict.fromkeys(("dw_ptr", "db_ptr", "mean_ptr", "rstd_ptr"), "*fp32"),
        **dict.fromkeys(("dy_ptr", "x_ptr"), f"*{dtype}"),
        **dict.fromkeys(("rows", "columns", "rows_per_split"), "i32"),
    }  # fmt: skip
    return Variant(
        _LAYER_NORM, "_layer_norm_weight_kernel", f"x={dtype} weight={weight} bias={bias}", types,
        {"WEIGHT": weight, "BIAS": bias}, "norm_weight",
    )  # fmt: skip


def _rope(x: str, table: str, out: str, half: int, **flags: bool) -> Variant:
    """``half`` pairs of features a head, up to the next power of two."""
    strides = [f"{t}_{n}" for t in ("q", "k", "q_out", "k_out") for n in ("batch", "head", "token")]
    sizes = ("q_heads", "k_heads", "tokens", "width", "half", "table_batch", "table_token")
    types = {
        **dict.fromkeys(("q_out_ptr", "k_out_ptr"), f"*{out}"),
        **dict.fromkeys(("q_ptr", "k_ptr"), f"*{x}"),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{table}"),
        **dict.fromkeys((*sizes, *strides), "i32"),
    }  # fmt: skip
    names = ("INTERLEAVED", "HALF_TABLES", "BACKWARD", "REST")
    constants = {name: flags.get(name.lower(), False) for name in names}
    text = "".join(f" {name}" for name, value in flags.items() if value)
    return Variant(
        "fastft_kernels.rope", "_rope_kernel", f"x={x} cos={table} out={out} half={half}{text}",
        types, constants, "rope", (half, 0, False),
    )  # fmt: skip


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


def _embedding(dtype: str) -> Variant:
    types = {
        **dict.fromkeys(("d_weight_ptr", "dy_ptr"), f"*{dtype}"),
        **dict.fromkeys(("order_ptr", "ids_ptr"), "*i64"),
        **dict.fromkeys(("count", "columns", "padding"), "i32"),
    }
    return Variant(
        "fastft_kernels.embedding", "_embedding_backward_kernel", f"dy={dtype}", types,
        {"TOKENS": 4}, "elementwise",
    )  # fmt: skip


VARIANTS: list[Variant] = [
    _loss("bf16"),
    _loss("bf16", **_ALL_LOSS_FLAGS),
    _loss("fp32", **_ALL_LOSS_FLAGS),
    _loss("fp16", statistics=False, HAS_ROW_SCALE=True),
    _divergence("bf16", "bf16", 2, True, True),
    _divergence("fp32", "fp32", 1, True, False),
    _divergence("fp16", "fp32", 0, True, False),
    _scaled("fp32", "bf16", False),
    _scaled("fp16", "fp16", True),
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
    _norm("bf16", True, 128),
    _norm("fp32", True, 16384),
    _norm("bf16", False, 8192, residual=True),
    _norm("fp32", True, 4096, residual=True),
    _norm_weight("bf16"),
    _layer_norm("bf16", False, 4096),
    _layer_norm("fp32", True, 16384),
    _layer_norm_weight("bf16", True, True),
    _rope("bf16", "bf16", "bf16", 64),
    _rope("fp32", "fp32", "fp32", 128, interleaved=True, backward=True, rest=True),
    _rope("bf16", "fp32", "fp32", 32, half_tables=True),
    _dora("bf16", False),
    _dora("fp32", True),
    _embedding("bf16"),
]


_SOME = ((True, False), (False, True), (True, True))


def _all_variants() -> list[Variant]:
    variants: list[Variant] = []
    for slab, full in itertools.product(DTYPES, (False, True)):
        flags = _ALL_LOSS_FLAGS if full else {}
        variants.append(_loss(slab, **flags))
        variants.append(_loss(slab, gradient=False, **{**flags, "HAS_ROW_SCALE": False}))
        variants.append(_loss(slab, statistics=False, **{**flags, "MOMENTS": False}))
        variants += [_loss(slab, **{name: True}) for name in _LOSS_FLAGS]
        cases = itertools.product(dict.fromkeys((slab, "fp32")), (0, 1, 2), (False, True))
        variants += [_divergence(slab, *case, full) for case in cases]
    variants += [_scaled("fp32", dtype, False) for dtype in DTYPES]
    variants += [_scaled(dtype, dtype, True) for dtype in DTYPES]
    variants += [_adamw_norm(*c) for c in itertools.product(DTYPES, BOOLEANS)]
    variants += [_adamw_update(*c) for c in itertools.product(DTYPES, DTYPES, BOOLEANS)]
    flags = itertools.product(DTYPES, (0, 1, 2), BOOLEANS, BOOLEANS)
    variants += [_glu(*case) for case in flags]
    for dtype, columns in itertools.product(DTYPES, (64, 576, 4096, 8192, 16384)):
        for residual, first in itertools.product(BOOLEANS, BOOLEANS):
            variants.append(_norm(dtype, False, columns, residual, round_first=first))
        variants += [_norm(dtype, True, columns, residual) for residual in BOOLEANS]
        cases = itertools.product(BOOLEANS, (columns,), BOOLEANS)
        variants += [_layer_norm(dtype, *case) for case in cases]
    variants += [_norm_weight(dtype) for dtype in DTYPES]
    variants += [_layer_norm_weight(dtype, *c) for dtype in DTYPES for c in _SOME]
    for x, half in itertools.product(DTYPES, (32, 64, 128)):
        for flags in itertools.product(BOOLEANS, repeat=4):
            names = ("interleaved", "half_tables", "backward", "rest")
            variants.append(_rope(x, x, x, half, **dict(zip(names, flags, strict=True))))
    variants += [_dora(dtype, False, bias) for dtype in DTYPES for bias in BOOLEANS]
    variants += [_dora(dtype, True) for dtype in DTYPES]
    variants += [_embedding(dtype) for dtype in DTYPES]
    return variants


ALL_VARIANTS: list[Variant] = _all_variants()
