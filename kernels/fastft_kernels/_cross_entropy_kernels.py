"""Row kernels of the loss: one program for each row of a slab of logits, float32 throughout."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["_cross_entropy_kernel", "_divergence_kernel", "_scaled_kernel"]


@triton.jit
def _transformed(row_ptr, bias_ptr, columns, V, scale, softcap, HAS_BIAS: tl.constexpr,
                 SOFTCAP: tl.constexpr):  # fmt: skip
    """softcap(scale (logits + bias)) of some columns; -inf past the last."""
    inside = columns < V
    z = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _cross_entropy_kernel(
    slab_ptr,  # (rows, V): logits in, their gradient out where GRADIENT
    labels_ptr,  # int64 (rows,): -1 where in no column, -2 where the token is ignored
    bias_ptr,  # float32 (V,)
    class_weight_ptr,  # float32 (V,)
    label_weight_ptr,  # float32 (rows,): class_weight of the label
    row_scale_ptr,  # float32 (rows,)
    entropy_scale_ptr,  # float32 (rows,); with it entropy is read
    top_ptr,  # float32 (rows,), as all to z_label: written by STATISTICS, else read
    log_sum_ptr,
    z_label_ptr,
    argmax_ptr,  # int64 (rows,)
    weighted_sum_ptr,  # float32 (rows,), as all below
    entropy_ptr,
    log_sum_sq_ptr,
    mean_logit_ptr,
    V,
    scale,
    softcap,
    smoothing,
    z_loss,
    weight_sum,
    classes,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_ENTROPY_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """log sum exp of a row with its parts, then g ((1 - smoothing) w_y (p - onehot)
    + smoothing / classes (p sum w - w) + 2 z_loss lse p) - e p (log p + entropy), g and e the two
    scales, through the slope of the transform."""
    row = tl.program_id(0)
    slab = slab_ptr + row.to(tl.int64) * V
    label = tl.load(labels_ptr + row)
    lanes = tl.arange(0, BLOCK_V)
    if label == -2:
        if STATISTICS:
            tl.store(top_ptr + row, 0.0)
            tl.store(log_sum_ptr + row, 0.0)
            tl.store(z_label_ptr + row, 0.0)
            tl.store(argmax_ptr + row, -1)
            if SMOOTH:
                tl.store(weighted_sum_ptr + row, 0.0)
        if MOMENTS:
            tl.store(entropy_ptr + row, 0.0)
            tl.store(log_sum_sq_ptr + row, 0.0)
            tl.store(mean_logit_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK_V,), slab_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK_V):
                tl.store(slab + start + lanes, zeros, mask=start + lanes < V)
    else:
        if STATISTICS:
            # Read before the gradient overwrites it.
            here = label >= 0
            z_label = tl.load(slab + label, mask=here, other=0.0).to(tl.float32)
            if HAS_BIAS:
                z_label += tl.load(bias_ptr + label, mask=here, other=0.0)
            z_label *= scale
            if SOFTCAP:
                z_label = softcap * (2.0 * tl.sigmoid(2.0 * z_label / softcap) - 1.0)
            tl.store(z_label_ptr + row, tl.where(here, z_label, 0.0))
            # Each lane keeps a running maximum and sum of its own: one reduction, at the end.
            lane_top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_V,), tl.float32)
            weighted = tl.zeros((BLOCK_V,), tl.float32)
            where_top = tl.zeros((BLOCK_V,), tl.int32)
            for start in range(0, V, BLOCK_V):
                columns = start + lanes
                z = _transformed(slab, bias_ptr, columns, V, scale, softcap, HAS_BIAS, SOFTCAP)
                # Strictly greater: the lowest index of equal logits stays.
                where_top = tl.where(z > lane_top, columns, where_top)
                new_top = tl.maximum(lane_top, z)
                # A lane that has only seen -inf must not compute -inf - -inf.
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp(lane_top - shift) + tl.exp(z - shift)
                lane_top = new_top
                if SMOOTH:
                    kept = tl.where(columns < V, z, 0.0)
                    if HAS_CLASS_WEIGHT:
                        kept *= tl.load(class_weight_ptr + columns, mask=columns < V, other=0.0)
                    weighted += kept
            top = tl.max(lane_top, 0)
            log_sum = tl.log(tl.sum(total * tl.exp(lane_top - top), 0))
            argmax = tl.min(tl.where(lane_top == top, where_top, V), 0)
            tl.store(top_ptr + row, top)
            tl.store(log_sum_ptr + row, log_sum)
            tl.store(argmax_ptr + row, argmax.to(tl.int64))
            if SMOOTH:
                tl.store(weighted_sum_ptr + row, tl.sum(weighted, 0))
        else:
            top = tl.load(top_ptr + row)
            log_sum = tl.load(log_sum_ptr + row)
        lse = top + log_sum
        if MOMENTS:
            surprise = tl.zeros((BLOCK_V,), tl.float32)
            squares = tl.zeros((BLOCK_V,), tl.float32)
            logits = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, V, BLOCK_V):
                columns = start + lanes
                z = _transformed(slab, bias_ptr, columns, V, scale, softcap, HAS_BIAS, SOFTCAP)
                log_p = (z - top) - log_sum  # z less their sum would round with the size of z
                p = tl.exp(log_p)
                surprise -= tl.where(p > 0.0, p * log_p, 0.0)
                squares += p * p
                logits += tl.where(columns < V, z, 0.0)
            tl.store(entropy_ptr + row, tl.sum(surprise, 0))
            tl.store(log_sum_sq_ptr + row, tl.log(tl.sum(squares, 0)))
            tl.store(mean_logit_ptr + row, tl.sum(logits, 0) / V)
        if GRADIENT:
            hard = 1.0 - smoothing
            smooth = smoothing / classes
            if HAS_LABEL_WEIGHT:
                hard *= tl.load(label_weight_ptr + row)
            of_p = hard + smooth * weight_sum + 2.0 * z_loss * lse
            if HAS_ROW_SCALE:
                row_scale = tl.load(row_scale_ptr + row)
                of_p *= row_scale
                hard *= row_scale
                smooth *= row_scale
            if HAS_ENTROPY_SCALE:
                bonus = tl.load(entropy_scale_ptr + row)
                entropy = tl.load(entropy_ptr + row)
            for start in range(0, V, BLOCK_V):
                columns = start + lanes
                z = _transformed(slab, bias_ptr, columns, V, scale, softcap, HAS_BIAS, SOFTCAP)
                log_p = (z - top) - log_sum
                p = tl.exp(log_p)
                gradient = of_p * p - tl.where(columns == label, hard, 0.0)
                if HAS_ENTROPY_SCALE:
                    gradient -= bonus * tl.where(p > 0.0, p * (log_p + entropy), 0.0)
                if SMOOTH:
                    if HAS_CLASS_WEIGHT:
                        w = tl.load(class_weight_ptr + columns, mask=columns < V, other=0.0)
                        gradient -= smooth * w
                    else:
                        gradient -= smooth
                slope = scale
                if SOFTCAP:
                    bent = z / softcap
                    slope = scale * (1.0 - bent * bent)
                gradient *= slope
                tl.store(slab + columns, gradient.to(slab_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def _log_sum_exp(row_ptr, bias_ptr, V, scale, softcap, heat, HAS_BIAS: tl.constexpr,
                 SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """The largest z = heat softcap(scale (logits + bias)) of a row, and log sum exp(z - it)."""
    lanes = tl.arange(0, BLOCK_V)
    lane_top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + lanes
        z = heat * _transformed(row_ptr, bias_ptr, columns, V, scale, softcap, HAS_BIAS, SOFTCAP)
        new_top = tl.maximum(lane_top, z)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(lane_top - shift) + tl.exp(z - shift)
        lane_top = new_top
    top = tl.max(lane_top, 0)
    return top, tl.log(tl.sum(total * tl.exp(lane_top - top), 0))


@triton.jit
def _divergence_term(lp, lq, beta, KIND: tl.constexpr):
    """A class's part of the loss, and its slope: dz = slope - p sum of slopes."""
    p, q = tl.exp(lp), tl.exp(lq)
    if KIND == 0:
        value = tl.where(q > 0.0, q * (lq - lp), 0.0)
        slope = -q
    elif KIND == 1:
        value = tl.where(p > 0.0, p * (lp - lq), 0.0)
        slope = value
    else:
        # log of m = beta q + (1 - beta) p from the larger of the two: no quotient overflows.
        larger = tl.maximum(lp, lq)
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        mixed = (1.0 - beta) * tl.exp(lp - safe) + beta * tl.exp(lq - safe)
        log_m = safe + tl.log(mixed)
        of_p = tl.where(p > 0.0, p * (lp - log_m), 0.0)
        of_q = tl.where(q > 0.0, q * (lq - log_m), 0.0)
        value = beta * of_q + (1.0 - beta) * of_p
        slope = (1.0 - beta) * of_p
    return value, slope


@triton.jit
def _divergence_kernel(
    student_ptr,  # (rows, V): logits in, their gradient out where GRADIENT
    teacher_ptr,  # (rows, V)
    bias_ptr,  # float32 (V,)
    teacher_bias_ptr,  # float32 (V,)
    row_scale_ptr,  # float32 (rows,)
    losses_ptr,  # float32 (rows,)
    V,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    beta,
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The divergence of softmax(student / temperature) from softmax(teacher / temperature)."""
    row = tl.program_id(0)
    student = student_ptr + row.to(tl.int64) * V
    teacher = teacher_ptr + row.to(tl.int64) * V
    lanes = tl.arange(0, BLOCK_V)
    heat = 1.0 / temperature
    top, log_sum = _log_sum_exp(
        student, bias_ptr, V, scale, softcap, heat, HAS_BIAS, SOFTCAP, BLOCK_V
    )
    top_t, log_sum_t = _log_sum_exp(
        teacher, teacher_bias_ptr, V, teacher_scale, teacher_softcap, heat, HAS_TEACHER_BIAS,
        TEACHER_SOFTCAP, BLOCK_V,
    )  # fmt: skip
    loss = tl.zeros((BLOCK_V,), tl.float32)
    slopes = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + lanes
        z = _transformed(student, bias_ptr, columns, V, scale, softcap, HAS_BIAS, SOFTCAP)
        t = _transformed(
            teacher, teacher_bias_ptr, columns, V, teacher_scale, teacher_softcap,
            HAS_TEACHER_BIAS, TEACHER_SOFTCAP,
        )  # fmt: skip
        lp, lq = (heat * z - top) - log_sum, (heat * t - top_t) - log_sum_t
        value, slope = _divergence_term(lp, lq, beta, KIND)
        loss += value
        slopes += slope
    tl.store(losses_ptr + row, tl.sum(loss, 0))
    if GRADIENT:
        shared = tl.sum(slopes, 0)
        factor = heat * scale
        if HAS_ROW_SCALE:
            factor *= tl.load(row_scale_ptr + row)
        for start in range(0, V, BLOCK_V):
            columns = start + lanes
            z = _transformed(student, bias_ptr, columns, V, scale, softcap, HAS_BIAS, SOFTCAP)
            t = _transformed(
                teacher, teacher_bias_ptr, columns, V, teacher_scale, teacher_softcap,
                HAS_TEACHER_BIAS, TEACHER_SOFTCAP,
            )  # fmt: skip
            lp, lq = (heat * z - top) - log_sum, (heat * t - top_t) - log_sum_t
            _, slope = _divergence_term(lp, lq, beta, KIND)
            gradient = (slope - tl.exp(lp) * shared) * factor
            if SOFTCAP:
                bent = z / softcap
                gradient *= 1.0 - bent * bent
            tl.store(student + columns, gradient.to(student_ptr.dtype.element_ty),
                     mask=columns < V)  # fmt: skip


@triton.jit
def _scaled_kernel(
    out_ptr,  # (rows, columns)
    gradient_ptr,  # (rows, columns)
    scale_ptr,  # float32 (rows,) where EACH, else (1,)
    columns,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = gradient scale: a pass of its own, for the scale is known in the backward only."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = row.to(tl.int64) * columns
    gradient = tl.load(gradient_ptr + begin + at, mask=at < columns, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + (row if EACH else 0))
    tl.store(out_ptr + begin + at, gradient * scale, mask=at < columns)
