"""What a method is: one equation, and a few hooks that most methods leave alone."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Rows
from inbatch.nn.heads import Head


class Method(nn.Module):
    """A learning objective over the rows of the whole batch.

    A subclass gives `heads` and `loss`. It holds hyper-parameters and memory (buffers), never a trainable
    parameter: those are heads, and stand before the loss. Rows come gathered from every group and every rank;
    a loss names none of them.

    online: the heads whose rows the loss reads from the network that learns.
    target: the same of the target network; empty means that there is none.
    views: fewest and most views that the equation allows (None: any number).
    labels: whether it learns from labels, and so needs a data set that has some.
    m: momentum of the target network, where there is one that keeps its momentum.
    assigns: the head whose largest output is a sample's cluster or class, where there is one.
    presets: named settings from the paper, by dotted key of the recipe ("optimizer.lr"), and "source": where from.
    """

    online: ClassVar[tuple[str, ...]] = ("projection",)
    target: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[tuple[int, int | None]] = (2, 2)
    labels: ClassVar[bool] = False
    assigns: ClassVar[str | None] = None
    m: float
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        """Told once, before `heads`: images and classes (0: no labels) of the data, samples and views of a batch.

        What hangs on them is made here; what they do not allow is a ValueError here, not at some later step.
        """

    def heads(self, width: int) -> dict[str, Head]:
        """The heads, in order, for features of this width."""
        raise TypeError(f"{type(self).__name__} must say which heads it has")

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        """Rows (V, N, D) by head name, and the index and label of the N samples -> "loss" and its parts.

        Pure: called twice it gives the same value and changes nothing.
        """
        raise TypeError(f"{type(self).__name__} must say what its loss is")

    def online_views(self, views: int) -> Sequence[int]:
        """Which of the views run through the network that learns."""
        return range(views)

    def target_views(self, views: int) -> Sequence[int]:
        """Which of the views run through the target network."""
        return range(views)

    def momentum(self, progress: float) -> float:
        """How much of itself the target network keeps in one step; progress runs from 0 to 1. Constant by default."""
        return self.m

    def constant_lr(self) -> Sequence[str]:
        """The heads whose learning rate no schedule moves."""
        return ()

    def on_gradients(self, heads: nn.ModuleDict, batch: Batch, progress: float) -> None:
        """Look at or change the gradients of the heads, once they are averaged, before the optimiser."""

    def on_weights(self, heads: nn.ModuleDict) -> None:
        """Look at or change the weights of the heads, after the optimiser, before the target follows."""

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        """Remember. The only place where a method may change its memory; rows carry no gradient."""

    def surveys(self, epoch: int) -> bool:
        """Whether it wants to see the rows of the whole data set before this epoch."""
        return False

    def survey(
        self, rows: Rows, label: Tensor, epoch: int, spread: Callable[[Callable[[int], Any], int], list[Any]]
    ) -> dict[str, float]:
        """Learn from the rows (M, D) that the target network (else the only one) gives to the clean images of the data.

        spread: spread(task, n) -> [task(0), ..., task(n - 1)], shared out over the ranks. Returns numbers for the log.
        """
        return {}
