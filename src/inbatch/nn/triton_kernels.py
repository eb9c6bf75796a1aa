"""Triton kernels of sums over all pairs of rows, and of their gradients: log-sum-exps and pairwise sigmoids.

S_ij = a_i . b_j. Every program handles a block of rows and iterates over its share of the columns, by tiles; the
log-sum-exps with a running maximum (Milakov and Gimelshein 2018; Dao et al. 2022, Algorithm 1, iterates in the same
way), so rows of any length and temperatures of any size are valid. Arithmetic is float32, exponentials are powers of
two. There are no atomics, and equal inputs give equal bits.

Arguments that several kernels share: `*_ids` are the groups of rows, `*_class` their classes, None if there are none. A
pair of one group, unless also of one class, has the weight of `SameGroup`; `weight2` is its logarithm of base 2, -inf
for 0. Rows start .. stop - 1 are computed; m: columns; d: width; span: columns of a program; scale2: scale log2(e).

Triton is imported on first use: until then the kernels below are plain functions.
"""

from __future__ import annotations

import functools
import os
from typing import Any

tl: Any
"""triton.language, set for the kernels when they are compiled."""


@functools.cache
def kernels() -> tuple[Any, Any, Any]:
    """Return the compiled `log_sums`, `gradients` and `logistic`; raises any error if Triton is missing."""
    global tl
    import triton
    import triton.language

    tl = triton.language
    # Counts change from call to call, and compiling for a multiple of 16 gains nothing.
    counts = ("start", "stop", "m", "span")
    log, slope, sigmoid = (triton.jit(x, do_not_specialize=counts) for x in (log_sums, gradients, logistic))
    return log, slope, sigmoid


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET was set when the kernels were created: they are Python and take plain tensors."""
    if "TRITON_INTERPRET" not in os.environ:
        return False  # avoids importing Triton, which takes a second
    try:
        import triton

        return not isinstance(kernels()[0], triton.JITFunction)
    except Exception:
        return False


def log_sums(
    q, k, lse, mean, q_ids, k_ids, q_class, k_class, weight2, start, stop, m, d, span, scale2,
    OTHERS: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store log sum_j w_ij exp(S_ij) of a block of rows, and the means of k by its softmax if `mean` is given."""
    here, there, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    first = start + tl.program_id(0).to(tl.int64) * BLOCK_M
    row, within = start + tl.program_id(0) * BLOCK_M + here, (dim < d)[None, :]
    inside = row < stop
    mine = q + first * d + here[:, None] * d
    if DEPTH == WIDTH:
        x = tl.load(mine + dim[None, :], mask=inside[:, None] & within, other=0.0)
    if q_ids is not None:
        group = tl.load(q_ids + row, mask=inside, other=0)
        if q_class is not None:
            kind = tl.load(q_class + row, mask=inside, other=0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if mean is not None:
        summed = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    begin = tl.program_id(1) * span
    for j in range(begin, tl.minimum(begin + span, m), BLOCK_N):
        column = j + there
        theirs, real = k + tl.cast(j, tl.int64) * d + there[:, None] * d, column < m
        if DEPTH == WIDTH:
            y = tl.load(theirs + dim[None, :], mask=real[:, None] & within, other=0.0)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for c in range(0, WIDTH, DEPTH):
                dims = c + tl.arange(0, DEPTH)[None, :]
                x = tl.load(mine + dims, mask=inside[:, None] & (dims < d), other=0.0)
                y = tl.load(theirs + dims, mask=real[:, None] & (dims < d), other=0.0)
                s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
        s = s * scale2 + tl.where(real, 0.0, float("-inf"))[None, :]
        if OTHERS:
            s = tl.where(row[:, None] != column[None, :], s, float("-inf"))
        if k_ids is not None:
            same = group[:, None] == tl.load(k_ids + column, mask=real, other=0)[None, :]
            if k_class is not None:
                same = same & (kind[:, None] != tl.load(k_class + column, mask=real, other=0)[None, :])
            s += tl.where(same, weight2, 0.0)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # an empty row would give -inf - -inf, NaN
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if mean is not None:
            if ROUNDED:
                p = p.to(tl.bfloat16)
            if DEPTH != WIDTH:
                y = tl.load(theirs + dim[None, :], mask=real[:, None] & within, other=0.0)
            summed = tl.dot(p.to(y.dtype), y, summed * shrink[:, None], input_precision=PRECISION)
        top = higher

    at = tl.program_id(1).to(tl.int64) * (stop - start) + (first - start)
    tl.store(lse + at + here, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)
    if mean is not None:
        summed = summed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(mean + at * d + (here[:, None] * d + dim[None, :]), summed, mask=inside[:, None] & within)


def gradients(
    a, b, lse_a, grad_a, lse_b, grad_b, out, a_ids, b_ids, a_class, b_class, weight2, start, stop, m, d, span, scale,
    scale2,
    OTHERS: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store scale sum_j w_ij (grad_a_i exp(S_ij - lse_a_i) + grad_b_j exp(S_ij - lse_b_j)) b_j of a block of rows."""
    here, there, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    first = start + tl.program_id(0).to(tl.int64) * BLOCK_M
    row, within = start + tl.program_id(0) * BLOCK_M + here, (dim < d)[None, :]
    inside = row < stop
    mine = a + first * d + here[:, None] * d
    if DEPTH == WIDTH:
        x = tl.load(mine + dim[None, :], mask=inside[:, None] & within, other=0.0)
    if a_ids is not None:
        group = tl.load(a_ids + row, mask=inside, other=0)
        if a_class is not None:
            kind = tl.load(a_class + row, mask=inside, other=0)
    # An lse of +inf makes a softmax of 0: for rows beyond the end, and for those with nothing to sum.
    if lse_a is not None:
        own = tl.load(lse_a + row, mask=inside, other=float("inf")) * 1.4426950408889634
        own = tl.where(own == float("-inf"), float("inf"), own)
        weight = tl.load(grad_a + row, mask=inside, other=0.0)

    summed = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    begin = tl.program_id(1) * span
    for j in range(begin, tl.minimum(begin + span, m), BLOCK_N):
        column = j + there
        theirs, real = b + tl.cast(j, tl.int64) * d + there[:, None] * d, column < m
        if DEPTH == WIDTH:
            y = tl.load(theirs + dim[None, :], mask=real[:, None] & within, other=0.0)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for c in range(0, WIDTH, DEPTH):
                dims = c + tl.arange(0, DEPTH)[None, :]
                x = tl.load(mine + dims, mask=inside[:, None] & (dims < d), other=0.0)
                y = tl.load(theirs + dims, mask=real[:, None] & (dims < d), other=0.0)
                s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
        s = s * scale2 + tl.where(real, 0.0, float("-inf"))[None, :]
        if OTHERS:
            s = tl.where(row[:, None] != column[None, :], s, float("-inf"))
        if b_ids is not None:
            same = group[:, None] == tl.load(b_ids + column, mask=real, other=0)[None, :]
            if b_class is not None:
                same = same & (kind[:, None] != tl.load(b_class + column, mask=real, other=0)[None, :])
            s += tl.where(same, weight2, 0.0)
        w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if lse_a is not None:
            w += tl.exp2(s - own[:, None]) * weight[:, None]
        if lse_b is not None:
            its = tl.load(lse_b + column, mask=real, other=float("inf")) * 1.4426950408889634
            its = tl.where(its == float("-inf"), float("inf"), its)
            w += tl.exp2(s - its[None, :]) * tl.load(grad_b + column, mask=real, other=0.0)[None, :]
        if ROUNDED:
            w = w.to(tl.bfloat16)
        if DEPTH != WIDTH:
            y = tl.load(theirs + dim[None, :], mask=real[:, None] & within, other=0.0)
        summed = tl.dot(w.to(y.dtype), y, summed, input_precision=PRECISION)

    at = tl.program_id(1).to(tl.int64) * (stop - start) + (first - start)
    tl.store(out + at * d + (here[:, None] * d + dim[None, :]), summed * scale, mask=inside[:, None] & within)


def logistic(
    a, b, bias_a, bias_b, losses, out, out_bias, a_ids, b_ids, w_a_ids, w_b_ids, w_a_class, w_b_class, weight, start,
    stop, m, d, span,
    POSITIVE: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store sums over j of the sigmoid losses of pairs, of their slopes times b_j, and of their slopes."""
    here, there, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    first = start + tl.program_id(0).to(tl.int64) * BLOCK_M
    row, within = start + tl.program_id(0) * BLOCK_M + here, (dim < d)[None, :]
    inside = row < stop
    mine = a + first * d + here[:, None] * d
    if DEPTH == WIDTH:
        x = tl.load(mine + dim[None, :], mask=inside[:, None] & within, other=0.0)
    if bias_a is not None:
        own = tl.load(bias_a + row, mask=inside, other=0.0)
    if a_ids is not None:
        group = tl.load(a_ids + row, mask=inside, other=0)
    if w_a_ids is not None:
        alike = tl.load(w_a_ids + row, mask=inside, other=0)
        if w_a_class is not None:
            kind = tl.load(w_a_class + row, mask=inside, other=0)

    total = tl.zeros([BLOCK_M], tl.float32)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if out is not None:
        summed = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    begin = tl.program_id(1) * span
    for j in range(begin, tl.minimum(begin + span, m), BLOCK_N):
        column = j + there
        theirs, real = b + tl.cast(j, tl.int64) * d + there[:, None] * d, column < m
        if DEPTH == WIDTH:
            y = tl.load(theirs + dim[None, :], mask=real[:, None] & within, other=0.0)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for c in range(0, WIDTH, DEPTH):
                dims = c + tl.arange(0, DEPTH)[None, :]
                x = tl.load(mine + dims, mask=inside[:, None] & (dims < d), other=0.0)
                y = tl.load(theirs + dims, mask=real[:, None] & (dims < d), other=0.0)
                s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
        if bias_a is not None:
            s += own[:, None]
        if bias_b is not None:
            s += tl.load(bias_b + column, mask=real, other=0.0)[None, :]
        sign = tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32)  # 1 for a negative: its loss grows with the logit
        if POSITIVE == "diagonal":
            sign = tl.where(row[:, None] == column[None, :], -1.0, sign)
        if POSITIVE == "groups":
            same = group[:, None] == tl.load(b_ids + column, mask=real, other=0)[None, :]
            sign = tl.where(same, -1.0, sign)
        z = sign * s
        # log(1 + e^z) = max(z, 0) + log1p(e), e = e^-|z|, with log1p(e) = e log(u) / (u - 1), u = 1 + e rounded:
        # a small loss keeps its relative precision.
        e = tl.exp2(-tl.abs(z) * 1.4426950408889634)
        u = 1.0 + e
        grown = u - 1.0
        loss = tl.maximum(z, 0.0) + tl.where(grown == 0.0, e, tl.log(u) * (e / tl.where(grown == 0.0, 1.0, grown)))
        slope = sign * tl.where(z > 0, 1.0, e) / u
        w = tl.where(inside[:, None] & real[None, :], 1.0, 0.0)
        if w_a_ids is not None:
            same = alike[:, None] == tl.load(w_b_ids + column, mask=real, other=0)[None, :]
            if w_a_class is not None:
                same = same & (kind[:, None] != tl.load(w_b_class + column, mask=real, other=0)[None, :])
            w = tl.where(same, w * weight, w)
        slope = w * slope
        total += tl.sum(w * loss, 1)
        slopes += tl.sum(slope, 1)
        if out is not None:
            if ROUNDED:
                slope = slope.to(tl.bfloat16)
            if DEPTH != WIDTH:
                y = tl.load(theirs + dim[None, :], mask=real[:, None] & within, other=0.0)
            summed = tl.dot(slope.to(y.dtype), y, summed, input_precision=PRECISION)

    at = tl.program_id(1).to(tl.int64) * (stop - start) + (first - start)
    if losses is not None:
        tl.store(losses + at + here, total, mask=inside)
    if out_bias is not None:
        tl.store(out_bias + at + here, slopes, mask=inside)
    if out is not None:
        tl.store(out + at * d + (here[:, None] * d + dim[None, :]), summed, mask=inside[:, None] & within)
