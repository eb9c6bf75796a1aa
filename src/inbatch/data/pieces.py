"""Pieces of a batch that workers make: check them, and put them together."""

from typing import Any

import torch
from torch import Tensor

from inbatch.data.workers import Piece
from inbatch.errors import ConfigError, DataError


def checked(piece: Piece | str | ConfigError) -> Piece:
    """Return what a worker made; raise its error."""
    if isinstance(piece, str):
        raise DataError(piece)
    if isinstance(piece, ConfigError):
        raise piece
    return piece


def put(piece: dict[str, Any], first: int, into: dict[str, Any], count: int, pin: bool) -> dict[str, Any]:
    """Copy a piece of a batch of `count` samples to its position; allocate missing tensors and enlarge canvases."""

    def placed(new: Tensor, old: Tensor | None, dim: int = 0) -> Tensor:
        shape = list(new.shape) if old is None else [max(pair) for pair in zip(new.shape, old.shape, strict=True)]
        shape[dim] = count
        if old is None or list(old.shape) != shape:
            grown = torch.zeros(shape, dtype=new.dtype, pin_memory=pin)
            if old is not None:
                grown[tuple(slice(n) for n in old.shape)] = old
            old = grown
        old.narrow(dim, first, new.shape[dim])[tuple(slice(n) for n in new.shape)] = new
        return old

    merged: dict[str, Any] = {}
    for key, new in piece.items():
        if key == "crops":
            merged[key] = tuple(placed(*pair) for pair in zip(new, into.get(key, [None] * len(new)), strict=True))
        else:
            merged[key] = placed(new, into.get(key), dim=1 if key == "boxes" else 0)
    return merged
