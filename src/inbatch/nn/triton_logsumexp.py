"""Log-sum-exps over all pairs of rows, and their gradients, by Triton kernels: no n x m matrix in memory.

S_ij = scale * a_i . b_j + log w_ij, with scale = 1 / T and the weights of `SameGroup`, if any. If there are few rows,
several programs share the columns, and their results are combined in order. The kernels are in `triton_kernels`; this
module also has what `triton_sigmoid` shares: which tensors they support, tiles, and the division of columns.
"""

import functools
import math
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.nn import triton_kernels
from inbatch.nn.pair_weights import SameGroup

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


def forward(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], scale: float, exclude_self: bool, start: int, stop: int,
    mean: bool = False, products: MatmulPrecision = "float32", weights: SameGroup | None = None,
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
        weights: w_ij of all rows of q and k.
    """
    q, k = operands(products, q, k)
    rows, (m, d) = stop - start, k.shape
    tile = tile_of(products, d)
    parts, span = split_columns(rows, m, tile)
    lse = torch.empty(parts, rows, device=q.device)
    means = torch.empty(parts, rows, d, device=q.device) if mean else None
    if rows:
        kernel = triton_kernels.kernels()[0]
        with torch.accelerator.device_index(q.device.index):
            kernel[-(-rows // tile["BLOCK_M"]), parts](
                q, k, lse, means, *groups_of(weights, q.device), log2_weight(weights), start, stop, m, d, span,
                scale * math.log2(math.e), OTHERS=exclude_self, **precision(products), **tile,
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
    weights: SameGroup | None = None,
) -> Float[Tensor, "rows d"]:  # fmt: skip
    """Return scale * sum_j (grad_a_i exp(S_ij - lse_a_i) + grad_b_j exp(S_ij - lse_b_j)) b_j of some rows.

    The result is float32, for the rows start .. stop - 1 of a. A pair (lse, grad) that is None omits its term. The
    gradient of the queries is a = q, b = k with the pair of a; that of the keys is a = k, b = q with the pair of b;
    rows that are both use both pairs. exclude_self: pairs i == j are left out. An lse of -inf (nothing was summed) adds
    nothing. weights: w_ij of all rows of a and b; those of the keys are `weights.flipped`.
    """
    a, b = operands(products, a, b)
    pairs = (lse_a, grad_a, lse_b, grad_b)
    lse_a, grad_a, lse_b, grad_b = (None if x is None else x.detach().float().contiguous() for x in pairs)
    rows, (m, d) = stop - start, b.shape
    tile = tile_of(products, d)
    parts, span = split_columns(rows, m, tile)
    out = torch.empty(parts, rows, d, device=a.device)
    if rows:
        kernel = triton_kernels.kernels()[1]
        with torch.accelerator.device_index(a.device.index):
            kernel[-(-rows // tile["BLOCK_M"]), parts](
                a, b, lse_a, grad_a, lse_b, grad_b, out, *groups_of(weights, a.device), log2_weight(weights),
                start, stop, m, d, span, float(scale), scale * math.log2(math.e), OTHERS=exclude_self,
                **precision(products), **tile,
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
    return tensors[0].is_cpu and triton_kernels.interpreted()


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


def groups_of(weights: SameGroup | None, device: torch.device) -> list[Tensor | None]:
    """Return groups of queries and keys, and their classes, as the kernels read them."""
    if weights is None:
        return [None] * 4
    every = weights.q_ids, weights.k_ids, weights.q_class, weights.k_class
    return [None if x is None else x.to(device, torch.int64).contiguous() for x in every]


def log2_weight(weights: SameGroup | None) -> float:
    """Return the logarithm of the weight of a pair of one group."""
    weight = 1.0 if weights is None else weights.weight
    return math.log2(weight) if weight else -math.inf


def operands(products: MatmulPrecision, *rows: Tensor) -> list[Tensor]:
    """Return rows as the kernels read them; rounded here, a tile can be loaded directly into the tensor cores."""
    if products == "bf16":
        rows = tuple(x.to(torch.bfloat16) for x in rows)
    # The interpreter multiplies the bits of bfloat16 as integers.
    if products != "bf16" or triton_kernels.interpreted():
        rows = tuple(x.float() for x in rows)
    return [x.detach().contiguous() for x in rows]


def precision(products: MatmulPrecision) -> dict[str, Any]:
    """Return how a kernel rounds and multiplies tiles."""
    return {"ROUNDED": products == "bf16", "PRECISION": "tf32x3" if products == "tf32x3" else "ieee"}


def tile_of(products: MatmulPrecision, d: int) -> dict[str, int]:
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


def split_columns(rows: int, m: int, tile: dict[str, int]) -> tuple[int, int]:
    """Return how many programs share the columns of a block, and how many columns each takes: at least 8 tiles."""
    blocks, columns = max(1, -(-rows // tile["BLOCK_M"])), tile["BLOCK_N"]
    parts = max(1, min(PROGRAMS // blocks, m // (8 * columns)))
    span = max(1, -(-m // (parts * columns))) * columns
    return max(1, -(-m // span)), span
