"""Memory bank: rows stored between steps."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from inbatch.nn.batch_sums import batch_count, batch_sum
from inbatch.nn.functional import normalize


class MemoryBank(nn.Module):
    """Memory bank of the newest `size` rows of width `dim`, first in, first out, saved in the checkpoint.

    It starts with random unit rows, as in MoCo; `filled` is the number of rows that have been replaced.
    Any number of rows may be pushed: the bank wraps around, and of more than `size` rows only the newest are kept.
    """

    rows: Tensor
    tags: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a memory bank keeps at least one row, not {size}")
        self.size = size
        self.register_buffer("rows", normalize(torch.randn(size, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def keep_tags(self, width: int | None) -> None:
        """Keep for each row what finds its near duplicates: features of this width; None: a number, -1 at first."""
        tags = torch.full((self.size,), -1) if width is None else torch.zeros(self.size, width)
        self.register_buffer("tags", tags.to(self.rows.device))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        errors = rest[-1]
        pointer, filled = (int(state.get(f"{prefix}{name}", torch.tensor(0))) for name in ("pointer", "filled"))
        if not (0 <= pointer < self.size and 0 <= filled <= self.size):
            errors.append(f"{prefix}pointer is {pointer} and {prefix}filled is {filled}: the bank has {self.size} rows")
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def mean_with(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
        """Return the mean of rows of the whole batch and of the stored rows, without the random ones of the start."""
        stored = torch.arange(self.size, device=rows.device) < self.filled
        total = batch_sum(rows.sum(0)) + stored.to(rows.dtype) @ self.rows.to(rows.dtype)
        return total / (batch_count(len(rows), rows) + self.filled)

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "n d"], tags: Shaped[Tensor, "n ..."] | None = None) -> None:
        """Store the rows, and their tags if these are kept, in place of the oldest. Only after the optimiser step."""
        n = len(rows)
        place = (self.pointer + torch.arange(max(0, n - self.size), n, device=rows.device)) % self.size
        self.rows[place] = rows[-self.size :].to(self.rows.dtype)
        if tags is not None:
            self.tags[place] = tags[-self.size :].to(self.tags.dtype)
        self.pointer.copy_((self.pointer + n) % self.size)
        self.filled.copy_((self.filled + n).clamp(max=self.size))
