"""Base class of the methods: one loss, and a few hooks that most methods do not override."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.errors import many, reason
from inbatch.nn.heads import Head
from inbatch.nn.memory_bank import MemoryBank
from inbatch.nn.negatives import Negatives

MixedKeys = Literal["other", "same", "none"]

_EQUATIONS = {"loss", "mixed_loss", "negatives_of", "on_gradients", "after_step"}
"""Hooks that get rows, or the samples of a batch."""


class Method(nn.Module):
    """A learning objective over the rows of the whole batch.

    A subclass defines `heads` and `loss`. It holds hyper-parameters and memory (buffers), never a trainable parameter:
    these belong to heads. Rows are gathered from all context groups and ranks; a loss depends on neither.

    online: heads of the online network that the loss reads.
    target: heads of the target network that the loss reads; empty if there is no target network.
    views: minimum and maximum number of views that the equation allows (None: no maximum).
    labels: whether the method learns from labels and needs a labelled data set.
    momentum: momentum of the target network, if its momentum is constant.
    teacher: whether the rows of `target`, "features", are those of a frozen encoder (the recipe's `teacher`).
    teacher_width: width of these rows, set before `prepare`.
    assigns: the head of which the largest output is the cluster or class of a sample, if any.
    negatives: values of the recipe's `negatives` that fit the equation, which then reads `negatives_of(batch)`.
    weighting: what the recipe's `negatives` sets for the equation, once for the run.
    mixed_keys: views with which `mixed_loss` compares a mixed view: the "other" views of its samples, the "same" view,
        or "none" (labels are the target). None: the equation has no soft targets, so that images cannot be mixed.
    mixed_if: the settings with which images can be mixed, if `mixed_keys` depends on them, for the error message.
    keys_learn: whether `mixed_loss` has a gradient with respect to the keys; those of a target network have none.
    own_rows: whether `loss`, `mixed_loss` and `after_step` reach the other samples of the batch through
        `nn.batch_sums` and `nn.logsumexp` alone, so that on several ranks each may get its own rows (V, B, D), with the
        index and label of its B samples. A subclass that overrides one of them states it again.
    later: what begins after a number of epochs, by the option that sets the number: {"start": "the queue is filled"}.
    presets: named settings from the paper, by dotted key of the recipe ("optimizer.lr"), and "source": their origin.
    """

    online: tuple[str, ...] = ("projection",)
    target: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[tuple[int, int | None]] = (2, 2)
    labels: ClassVar[bool] = False
    assigns: ClassVar[str | None] = None
    teacher: ClassVar[bool] = False
    teacher_width: int = 0
    negatives: ClassVar[tuple[str, ...]] = ()
    weighting: Negatives | None = None
    mixed_keys: MixedKeys | None = None
    mixed_if: ClassVar[str] = ""
    keys_learn: bool = True
    own_rows: ClassVar[bool] = False
    momentum: float
    later: Mapping[str, str] = {}
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Keep the arguments of the constructor, by which a run makes methods of its own that are equal to this one."""
        method = super().__new__(cls)
        method.__dict__["_arguments"] = (args, options)
        return method

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a method called `momentum`: the hook is `target_momentum`, and `self.momentum` is a number.

        A subclass with equations of its own does not inherit `own_rows`.
        """
        super().__init_subclass__(**options)
        if "own_rows" not in cls.__dict__ and _EQUATIONS & cls.__dict__.keys():
            cls.own_rows = False
        if callable(cls.__dict__.get("momentum")):
            raise TypeError(f"{cls.__name__}.momentum is a number: define target_momentum(self, progress) instead")

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        """Set the images and classes (0: no labels) of the data, the samples and views of a batch; before `heads`.

        Create here the parts that depend on them; raise ValueError here, not in a later step, if they are not allowed.
        """

    def negatives_of(self, batch: Batch) -> Negatives | None:
        """Return which samples of a batch are negatives, and how they count; None: all other samples alike."""
        bank = None if batch.bank is None else batch.bank.same
        return None if self.weighting is None else replace(self.weighting, same=batch.same, bank=bank)

    def negative_bank(self) -> MemoryBank | None:
        """Return the memory bank of which all rows are negatives, if any: `negatives` may leave out some of them."""
        return None

    def notes(self, images: int) -> list[str]:
        """Return sentences for the user about settings that do not suit this number of images."""
        sizes = {bank.size for bank in self.modules() if isinstance(bank, MemoryBank) and bank.size > images}
        return [
            f"The memory bank keeps {size:,} rows, more than the {many(images, 'image')}: it holds several rows of the "
            f"same image, so an image is compared with earlier rows of its own. Set method.queue_size to {images} or "
            "less to avoid most of these."
            for size in sizes
        ]

    def heads(self, width: int) -> dict[str, Head]:
        """Return the heads, in order, for features of this width."""
        raise TypeError(f"{type(self).__name__} must define `heads`")

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        """Return "loss" and its terms for rows (V, N, D) by head name, and the index and label of the N samples.

        Pure: a second call returns the same value and changes nothing. If the equation uses the updated value of a
        buffer, compute it here and return it, without graph, as "state.NAME" (`batch.Losses`): the step stores it.
        """
        raise TypeError(f"{type(self).__name__} must define `loss`")

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        """Return the loss of M images that are mixed of two samples each, on the scale of `loss`.

        query: rows (M, D) of the mixed images of one view, by head of the online network.
        keys: rows (V, N, D) of plain images of the whole batch, of the views that `mixed_keys` names: by head of the
            target network, or of the online network if there is none.
        """
        raise TypeError(f"{type(self).__name__} must define `mixed_loss`")

    def online_views(self, views: int) -> Sequence[int]:
        """Return which views pass through the online network."""
        return range(views)

    def target_views(self, views: int) -> Sequence[int]:
        """Return which views pass through the target network."""
        return range(views)

    def target_momentum(self, progress: float) -> float:
        """Return the momentum of the target network at `progress`, from 0 to 1. Constant by default."""
        return self.momentum

    def constant_lr(self) -> Sequence[str]:
        """Return the heads with a constant learning rate, exempt from the schedule."""
        return ()

    def on_gradients(self, heads: nn.ModuleDict, batch: Batch, progress: float) -> None:
        """Inspect or change the gradients of the heads, after they are averaged and before the optimiser step."""

    def on_weights(self, heads: nn.ModuleDict) -> None:
        """Inspect or change the weights of the heads, between the optimiser step and the target network's update."""

    def store(self, state: dict[str, Tensor]) -> None:
        """Copy the next values that the loss returned into the buffers of these names; runs before `after_step`."""
        for name, value in state.items():
            self.get_buffer(name).copy_(value)

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        """Update the memory of the method. No other hook may change it; rows carry no gradient."""

    def surveys(self, epoch: int) -> bool:
        """Return whether `survey` needs the rows of the whole data set before this epoch."""
        return False

    def survey_clusterings(self) -> Sequence[tuple[int, int, int]]:
        """Return the clusters, restarts and iterations of each k-means in `survey`, to estimate its duration."""
        return ()

    def survey(
        self, rows: Rows, label: Tensor, epoch: int, spread: Callable[[Callable[[int], Any], int], list[Any]]
    ) -> dict[str, float]:
        """Process the rows (M, D) of all clean images from the target network, or from the online network without one.

        spread: spread(task, n) -> [task(0), ..., task(n - 1)], distributed over the ranks. Returns numbers for the log.
        """
        return {}


def call_hook(method: Method, hook: str, *args: Any, **named: Any) -> Any:
    """Return what a hook returns; ValueError that names it if it raises an error, except ValueErrors of our methods."""
    try:
        return getattr(method, hook)(*args, **named)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        if isinstance(error, ValueError) and type(method).__module__.startswith("inbatch."):
            raise
        called = ", ".join([*map(str, args), *(f"{name}={value}" for name, value in named.items())])
        raise ValueError(f"{hook}({called}) raises {reason(error)}") from error


def check_widths(heads: dict[str, Head], width: int) -> None:
    """Raise ValueError if a head that passed `check_heads` cannot read rows of the width that it gets.

    Copies of the heads compute rows of zeros; other errors of a head are left to its first use.
    """
    rows = {"features": torch.zeros(2, width)}
    for name, head in heads.items():
        read = rows[head.source]
        try:
            network = copy.deepcopy(head.network).eval()
            kind = next((p.dtype for p in network.parameters() if p.is_floating_point()), read.dtype)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                rows[name] = network(read.to(kind))
        except Exception as error:  # code of the user
            if not any(text in str(error) for text in _WRONG_WIDTH):
                return
            raise ValueError(
                f"heads({width}): the head {name!r} cannot read {head.source!r}, rows of {read.shape[1]} numbers: "
                f"{reason(error)}"
            ) from error


_WRONG_WIDTH = ("shapes cannot be multiplied", "normalized_shape=", "running_mean should contain")
"""Parts of torch's errors of a first layer for rows of another width."""


def check_heads(method: Method, heads: Any, views: int) -> None:
    """Raise ValueError if the heads of a method, the rows that it reads and its views do not fit each other."""
    if not isinstance(heads, dict):
        raise ValueError(f"heads() returns {type(heads).__name__}: return a dict {{name: Head(module, source)}}")
    known = {"features"}
    for name, head in heads.items():
        if not isinstance(head, Head):
            raise ValueError(
                f"heads() returns {type(head).__name__} for {name!r}: wrap networks in inbatch.nn.heads.Head"
            )
        if not isinstance(head.network, nn.Module):
            raise ValueError(
                f"the head {name!r} holds {type(head.network).__name__}: Head(module, source) takes an nn.Module"
            )
        if head.source not in known:
            raise ValueError(
                f"the head {name!r} reads {head.source!r}, which is neither 'features' nor an earlier head"
            )
        known.add(name)
    shared = {name for name, head in heads.items() if not head.online_only} | {"features"}
    if not method.online or not set(method.online) <= known:
        raise ValueError(
            f"online = {method.online} must name heads that the loss reads; heads() returns {sorted(heads)}"
        )
    if not set(method.target) <= shared:
        raise ValueError(
            f"target = {method.target} must name heads that are not online_only; these are {sorted(shared)}"
        )
    for hook in ("online_views", "target_views") if method.target else ("online_views",):
        numbers = call_hook(method, hook, views)
        if not isinstance(numbers, Iterable):
            raise ValueError(f"{hook}({views}) returns {numbers!r}: return numbers of views, such as (0, 1)")
        numbers = list(numbers)
        if not numbers or not set(numbers) <= set(range(views)):
            raise ValueError(f"{hook}({views}) returns {numbers}: the views are numbered 0 to {views - 1}")
    constant = call_hook(method, "constant_lr")
    if not isinstance(constant, Iterable) or not set(constant) <= set(heads):
        raise ValueError(f"constant_lr() returns {constant!r}: return names of heads, of {sorted(heads)}")
