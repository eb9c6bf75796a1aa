"""Triton kernels of the log-sum-exps over all pairs of rows and of their gradients, without an n x m matrix in memory.

S_ij = scale * a_i . b_j, with scale = 1 / T. Every program handles a block of rows and iterates over the columns with
a running maximum (Milakov and Gimelshein 2018; Dao et al. 2022, Algorithm 1, iterates in the same way), so rows of any
length and temperatures of any size are valid. If there are few rows, several programs share the columns, and their
results are combined in order: there are no atomics, and equal inputs give equal bits. The arithmetic of the softmax is
float32, in powers of two.

Triton is imported on first use: until then the kernels below are plain functions.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

MatmulPrecision = Literal["float32", "tf32x3", "bf16"]
"""How rows are multiplied: "float32" in true float32; "tf32x3" by three tensor-core products of operands split in two;
"bf16" with operands rounded to bfloat16, including the softmax before it multiplies rows. Sums are always float32.
"""

WIDEST = 256
"""Maximum width of a row: a program holds its rows and their sums in full."""
PROGRAMS = 512
"""The columns are split until there are this many programs, about four per multiprocessor of the largest cards. It is a
constant, not a property of the card, so that the order of summation is the same on all of them. It bounds the memory of
the partial results: 32 MB at width 128 and at width 256.
"""

tl: Any
"""triton.language, set for the kernels when they are compiled."""


def forward(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], scale: float, exclude_self: bool, start: int, stop: int,
    mean: bool = False, products: MatmulPrecision = "float32",
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d"] | None]:  # fmt: skip
    """Return lse_i = log sum_j exp(S_ij) of the rows i = start .. stop - 1 of q over all rows j of k, in float32.

    A row with nothing to sum over has lse -inf and a mean of 0.

    Args:
        q: queries.
        k: keys.
        scale: 1 / T.
        exclude_self: leave out j == i, with i counted from the first row of q.
        start: first row.
        stop: row after the last.
        mean: also return sum_j softmax_j(S_ij) k_j, else None.
        products: how rows are multiplied.
    """
    q, k = _operands(products, q, k)
    rows, (m, d) = stop - start, k.shape
    tile = _tile(products, d)
    parts, span = _deal(rows, m, tile)
    lse = torch.empty(parts, rows, device=q.device)
    means = torch.empty(parts, rows, d, device=q.device) if mean else None
    if rows:
        kernel = _kernels()[0]
        with torch.accelerator.device_index(q.device.index):
            kernel[-(-rows // tile["BLOCK_M"]), parts](
                q, k, lse, means, start, stop, m, d, span, scale * math.log2(math.e), OTHERS=exclude_self,
                **_precision(products), **tile,
            )  # fmt: skip
    if parts == 1:
        return lse[0], None if means is None else means[0]
    whole = lse.logsumexp(0)
    if means is None:
        return whole, None
    share = (lse - whole.masked_fill(whole == -torch.inf, 0)).exp()
    return whole, (share[..., None] * means).sum(0)


def backward(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], scale: float, exclude_self: bool, start: int, stop: int,
    lse_a: Float[Tensor, " n"] | None, grad_a: Float[Tensor, " n"] | None,
    lse_b: Float[Tensor, " m"] | None, grad_b: Float[Tensor, " m"] | None, products: MatmulPrecision = "float32",
) -> Float[Tensor, "rows d"]:  # fmt: skip
    """Return scale * sum_j (grad_a_i exp(S_ij - lse_a_i) + grad_b_j exp(S_ij - lse_b_j)) b_j of some rows.

    The result is float32, for the rows start .. stop - 1 of a. A pair (lse, grad) that is None omits its term. The
    gradient of the queries is a = q, b = k with the pair of a; that of the keys is a = k, b = q with the pair of b;
    rows that are both use both pairs. exclude_self: pairs i == j are left out. An lse of -inf (nothing was summed) adds
    nothing.
    """
    a, b = _operands(products, a, b)
    pairs = (lse_a, grad_a, lse_b, grad_b)
    lse_a, grad_a, lse_b, grad_b = (None if x is None else x.detach().float().contiguous() for x in pairs)
    rows, (m, d) = stop - start, b.shape
    tile = _tile(products, d)
    parts, span = _deal(rows, m, tile)
    out = torch.empty(parts, rows, d, device=a.device)
    if rows:
        kernel = _kernels()[1]
        with torch.accelerator.device_index(a.device.index):
            kernel[-(-rows // tile["BLOCK_M"]), parts](
                a, b, lse_a, grad_a, lse_b, grad_b, out, start, stop, m, d, span, float(scale),
                scale * math.log2(math.e), OTHERS=exclude_self, **_precision(products), **tile,
            )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def usable(*tensors: Tensor) -> bool:
    """Return whether the kernels support these tensors. Never raises.

    Rows must be at most 256 wide and float32 or narrower, on an NVIDIA card of compute capability 8.0 or more with a
    working Triton; on the CPU only under Triton's interpreter. If Triton fails on a supported card, a warning gives the
    reason once.
    """
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    if not tensors or any(x.dtype not in narrow or x.shape[-1:] > (WIDEST,) for x in tensors):
        return False
    device = tensors[0].device
    if any(x.device != device for x in tensors):
        return False
    if tensors[0].is_cuda:
        return _works(device)
    return tensors[0].is_cpu and _interpreted()


@functools.cache
def _works(device: torch.device) -> bool:
    """Return whether a kernel can be compiled and run on the card, by running one once."""
    try:
        if torch.version.hip is not None or torch.get_device_module(device).get_device_capability(device) < (8, 0):
            return False
        x = torch.ones(1, 1, device=device)
        return bool(forward(x, x, 1.0, False, 0, 1)[0].isfinite())
    except Exception as error:  # no Triton, no C compiler or no headers: each raises its own type
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton does not work on {device} ({type(error).__name__}: {reason}); losses take torch's own products, "
            "which is slower", stacklevel=3,
        )  # fmt: skip
        return False


def _interpreted() -> bool:
    """Return whether TRITON_INTERPRET was set when the kernels were created: they are Python and take plain tensors."""
    if "TRITON_INTERPRET" not in os.environ:
        return False  # avoids importing Triton, which takes a second
    try:
        import triton

        return not isinstance(_kernels()[0], triton.JITFunction)
    except Exception:
        return False


@functools.cache
def _kernels() -> tuple[Any, Any]:
    global tl
    import triton
    import triton.language

    tl = triton.language
    # Counts change from call to call, and compiling for a multiple of 16 gains nothing.
    counts = ("start", "stop", "m", "span")
    return triton.jit(_forward, do_not_specialize=counts), triton.jit(_backward, do_not_specialize=counts)


def _operands(products: MatmulPrecision, *rows: Tensor) -> list[Tensor]:
    """Return rows as the kernels read them; rounded here, a tile can be loaded directly into the tensor cores."""
    if products == "bf16":
        rows = tuple(x.to(torch.bfloat16) for x in rows)
    if products != "bf16" or _interpreted():  # the interpreter multiplies the bits of bfloat16 as integers
        rows = tuple(x.float() for x in rows)
    return [x.detach().contiguous() for x in rows]


def _precision(products: MatmulPrecision) -> dict[str, Any]:
    return {"ROUNDED": products == "bf16", "PRECISION": "tf32x3" if products == "tf32x3" else "ieee"}


def _tile(products: MatmulPrecision, d: int) -> dict[str, int]:
    """Return the rows and columns of a tile, the width of a partial product, and the compiler options.

    One table for all cards, never tuned at run time, so that all ranks add in the same order. A tile is about as large
    as fits into the 99 KB of shared memory of consumer cards without register spills (as compiled for capabilities
    8.0, 8.6, 9.0, 10.0 and 12.0: tf32x3 spills a little at width 256, and float32 on 8.0 at 64 and 128).
    float32 and tf32x3 unroll a product, and split its operands, in registers: they process the width in pieces, while
    bfloat16 rows are passed to the tensor cores at full width.
    """
    width = max(16, 1 << (d - 1).bit_length())
    wide = width > 128
    rows, columns, stages = {
        "float32": (64, 32 if wide else 64, 2),
        "tf32x3": (64, 32, 2),
        "bf16": (64, 64, 2) if wide else (128, 64, 3),
    }[products]
    return {
        "BLOCK_M": rows, "BLOCK_N": columns, "WIDTH": width, "DEPTH": width if products == "bf16" else min(width, 32),
        "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _deal(rows: int, m: int, tile: dict[str, int]) -> tuple[int, int]:
    """Return how many programs share the columns of a block, and how many columns each takes: at least 8 tiles."""
    blocks, columns = max(1, -(-rows // tile["BLOCK_M"])), tile["BLOCK_N"]
    parts = max(1, min(PROGRAMS // blocks, m // (8 * columns)))
    span = max(1, -(-m // (parts * columns))) * columns
    return max(1, -(-m // span)), span


def _forward(
    q, k, lse, mean, start, stop, m, d, span, scale2,
    OTHERS: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    here, there, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    first = start + tl.program_id(0).to(tl.int64) * BLOCK_M
    row, within = start + tl.program_id(0) * BLOCK_M + here, (dim < d)[None, :]
    inside = row < stop
    mine = q + first * d + here[:, None] * d
    if DEPTH == WIDTH:
        x = tl.load(mine + dim[None, :], mask=inside[:, None] & within, other=0.0)

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
                some = c + tl.arange(0, DEPTH)[None, :]
                x = tl.load(mine + some, mask=inside[:, None] & (some < d), other=0.0)
                y = tl.load(theirs + some, mask=real[:, None] & (some < d), other=0.0)
                s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
        s = s * scale2 + tl.where(real, 0.0, float("-inf"))[None, :]
        if OTHERS:
            s = tl.where(row[:, None] != column[None, :], s, float("-inf"))
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


def _backward(
    a, b, lse_a, grad_a, lse_b, grad_b, out, start, stop, m, d, span, scale, scale2,
    OTHERS: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    here, there, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    first = start + tl.program_id(0).to(tl.int64) * BLOCK_M
    row, within = start + tl.program_id(0) * BLOCK_M + here, (dim < d)[None, :]
    inside = row < stop
    mine = a + first * d + here[:, None] * d
    if DEPTH == WIDTH:
        x = tl.load(mine + dim[None, :], mask=inside[:, None] & within, other=0.0)
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
                some = c + tl.arange(0, DEPTH)[None, :]
                x = tl.load(mine + some, mask=inside[:, None] & (some < d), other=0.0)
                y = tl.load(theirs + some, mask=real[:, None] & (some < d), other=0.0)
                s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
        s = s * scale2 + tl.where(real, 0.0, float("-inf"))[None, :]
        if OTHERS:
            s = tl.where(row[:, None] != column[None, :], s, float("-inf"))
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
