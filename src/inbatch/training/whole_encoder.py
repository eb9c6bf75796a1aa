"""The encoder of a sharded run with whole tensors, for evaluation, callbacks and export."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from inbatch.models import Encoder
from inbatch.runtime.sharding import whole


class WholeEncoder:
    """A copy of an encoder that holds its weights only within a context; otherwise they are NaN and take no memory.

    Buffers are shared: running statistics are the current ones, and whitening that is fitted is that of the run.

    Args:
        encoder: The encoder, before it is sharded.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.source = encoder
        self.copy = copy.deepcopy(encoder).requires_grad_(False)
        self._release(torch.device("cpu"))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Fill the copy with the current weights; every rank must enter the context."""
        for own, module in zip(self.copy.modules(), self.source.modules(), strict=True):
            own._buffers = module._buffers
            for name, p in module._parameters.items():
                if (mine := own._parameters[name]) is not None and p is not None:
                    mine.data = whole(p.detach())
        try:
            yield
        finally:
            self._release(self.copy.device)

    def _release(self, device: torch.device) -> None:
        for p in self.copy.parameters():
            p.data = torch.full((), torch.nan, dtype=p.dtype, device=device).expand(p.shape)
