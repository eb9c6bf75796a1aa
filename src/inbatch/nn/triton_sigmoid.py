"""Sums of pairwise sigmoid losses, and their gradients, by a Triton kernel: no n x m matrix in memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.nn import triton_kernels
from inbatch.nn.pair_weights import SameGroup
from inbatch.nn.triton_logsumexp import MatmulPrecision, groups_of, operands, precision, split_columns, tile_of


def row_sums(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], bias_a: Float[Tensor, "n"] | None,
    bias_b: Float[Tensor, "m"] | None, start: int, stop: int, positive: SameGroup | None, diagonal: bool,
    weights: SameGroup | None, wants: Sequence[bool], products: MatmulPrecision = "float32",
) -> list[Tensor | None]:  # fmt: skip
    """Return sums over all rows j of b for the rows i = start .. stop - 1 of a, in float32: those that `wants` names.

    With the logits x_ij = a_i . b_j + bias_i + bias_j, y = 1 for positives and -1 for others, the losses
    l_ij = log(1 + exp(-y_ij x_ij)) and slopes s_ij = dl_ij / dx_ij, the sums are sum_j w_ij l_ij (rows),
    sum_j w_ij s_ij b_j (rows, d) and sum_j w_ij s_ij (rows).

    Args:
        a: rows.
        b: the other rows of the pairs.
        bias_a: biases of all rows of a; None for 0.
        bias_b: biases of b.
        start: first row.
        stop: row after the last.
        positive: pairs of one group are the positives.
        diagonal: pairs i = j are the positives, if there are no groups of positives; else no pair is.
        weights: w_ij of all rows of a and b.
        wants: whether each of the three sums is returned, else None.
        products: how rows are multiplied.
    """
    a, b = operands(products, a, b)
    bias_a, bias_b = (None if x is None else x.detach().float().contiguous() for x in (bias_a, bias_b))
    rows, (m, d) = stop - start, b.shape
    tile = tile_of(products, d)
    parts, span = split_columns(rows, m, tile)
    shapes = (parts, rows), (parts, rows, d), (parts, rows)
    losses, out, slopes = (
        torch.empty(*shape, device=a.device) if want else None for shape, want in zip(shapes, wants, strict=True)
    )
    if rows:
        of_positives, of_weights = groups_of(positive, a.device)[:2], groups_of(weights, a.device)
        kind = "groups" if positive is not None else "diagonal" if diagonal else "none"
        kernel = triton_kernels.kernels()[2]
        with torch.accelerator.device_index(a.device.index):
            kernel[-(-rows // tile["BLOCK_M"]), parts](
                a, b, bias_a, bias_b, losses, out, slopes, *of_positives, *of_weights,
                1.0 if weights is None else float(weights.weight), start, stop, m, d, span, POSITIVE=kind,
                **precision(products), **tile,
            )  # fmt: skip
    return [None if x is None else x[0] if parts == 1 else x.sum(0) for x in (losses, out, slopes)]
