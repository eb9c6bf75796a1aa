"""Base class of the modules in which the samples of a context group interact."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def _itself(x: Tensor) -> Tensor:
    return x


class Grouped(nn.Module):
    """Module with interacting samples in training only: in evaluation, a sample never depends on the others.

    Attributes:
        gather: returns all samples of a group from this process's part of them, with gradient.
        own: returns this process's part of all samples. Both do nothing unless a group spans several processes, which
            then set them (`distributed.make_context_global`).
        declared: whether samples interact in evaluation, too (`as_group`).
    """

    gather: Callable[[Tensor], Tensor] = staticmethod(_itself)
    own: Callable[[Tensor], Tensor] = staticmethod(_itself)
    declared = False

    @property
    def mixes_samples(self) -> bool:
        """Whether the samples of a call are a group: in training, or within `as_group`."""
        return self.training or self.declared


@contextmanager
def as_group(module: nn.Module) -> Iterator[None]:
    """Let the samples of every call interact in the module's parts in evaluation, too."""
    parts = [part for part in module.modules() if isinstance(part, Grouped)]
    before = [part.declared for part in parts]
    for part in parts:
        part.declared = True
    try:
        yield
    finally:
        for part, declared in zip(parts, before, strict=True):
            part.declared = declared
