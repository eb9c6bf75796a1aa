"""Some rows of a tensor, without a copy of all of them."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class SelectedRows:
    """Rows of a tensor, which are copied only as they are read.

    Attributes:
        rows: All rows, for example memory-mapped.
        places: Positions of the selected ones.
    """

    rows: Tensor
    places: Int[Tensor, "m"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: slice | Tensor) -> Tensor:
        return self.rows[self.places[at]]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.places), *self.rows.shape[1:]


AnyRows = Tensor | SelectedRows
"""Rows that are read in parts: their number, width, and rows at a slice or at positions."""
