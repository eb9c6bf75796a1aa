"""What a method is: one equation, and a few hooks that most methods leave alone."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from inbatch.batch import Batch, Losses, Rows
from inbatch.heads import Head


class Method(nn.Module):
    """A learning objective over the rows of the whole batch.

    A subclass gives `heads` and `loss`. It holds hyper-parameters and memory (buffers), never a trainable
    parameter: those are heads, and stand before the loss. Rows come gathered from every group and every rank;
    a loss names none of them.

    online: the heads whose rows the loss reads from the tower that learns.
    target: the same of the momentum tower; empty means that there is none.
    views: fewest and most views that the equation allows (None: any number).
    labels: whether it learns from labels, and so needs a data set that has some.
    presets: named settings from the paper, by dotted key of the recipe ("optimizer.lr"), and "source": where from.
    """

    online: ClassVar[tuple[str, ...]] = ("projection",)
    target: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[tuple[int, int | None]] = (2, 2)
    labels: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def heads(self, width: int) -> dict[str, Head]:
        """The heads, in order, for features of this width."""
        raise TypeError(f"{type(self).__name__} must say which heads it has")

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        """Rows (V, N, D) by head name, and the index and label of the N samples -> "loss" and its parts.

        Pure: called twice it gives the same value and changes nothing.
        """
        raise TypeError(f"{type(self).__name__} must say what its loss is")

    def online_views(self, views: int) -> Sequence[int]:
        """Which of the views run through the tower that learns."""
        return range(views)

    def target_views(self, views: int) -> Sequence[int]:
        """Which of the views run through the momentum tower."""
        return range(views)

    def momentum(self, progress: float) -> float:
        """How much of itself the momentum tower keeps in one step; progress runs from 0 to 1."""
        raise TypeError(f"{type(self).__name__} has a momentum tower and must say its momentum")

    def on_gradients(self, heads: nn.ModuleDict, progress: float) -> None:
        """Look at or change the gradients of the heads, once they are averaged, before the optimiser."""

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        """Remember. The only place where a method may change its memory; rows carry no gradient."""
