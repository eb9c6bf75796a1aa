"""What every module is in which the samples of a context group meet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def _itself(x: Tensor) -> Tensor:
    return x


class Grouped(nn.Module):
    """A module whose samples meet in training only: in evaluation a sample never depends on its neighbours.

    gather, own: all samples of a group out of this process's part of them, with gradient, and the part back out of
        all; they do nothing unless a group reaches over several processes, which set them (`ranks.join_groups`).
    """

    gather: Callable[[Tensor], Tensor] = staticmethod(_itself)
    own: Callable[[Tensor], Tensor] = staticmethod(_itself)
    declared = False

    @property
    def meets(self) -> bool:
        """Whether the samples of a call are a group: while training, or where `as_group` says so."""
        return self.training or self.declared


@contextmanager
def as_group(module: nn.Module) -> Iterator[None]:
    """For a while the samples of every call meet in the module's parts in evaluation, too."""
    parts = [part for part in module.modules() if isinstance(part, Grouped)]
    before = [part.declared for part in parts]
    for part in parts:
        part.declared = True
    try:
        yield
    finally:
        for part, declared in zip(parts, before, strict=True):
            part.declared = declared
