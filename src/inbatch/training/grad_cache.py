"""Gradient caching: rows out of a network first, gradients back into it later, one context group at a time.

With one group the graph is kept. With more groups, the first pass keeps no graph. In the backward pass every group runs
again with the same random numbers and receives its own gradient. The memory is that of one group, and the gradient is
that of the whole batch (Gao et al. 2021, arXiv 2101.06983; here with norm statistics and dropout).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch.batch import Rows
from inbatch.models.network import Network, frozen_statistics, norms, restored_statistics, running_statistics

Group = Callable[[], Sequence[Tensor]]
"""Return the views (G, C, H, W) of one context group; each call draws them, so that they need not be held."""


@dataclass
class GroupForward:
    """The rows of one network for all groups of this rank, and the inputs of the backward pass.

    Attributes:
        groups: Functions that return the views of each group.
        numbers: Indices of the V views among a sample's views.
        keys: One random seed per group.
        rows: (V, B, D) by head, without graph.
        live: The same with graph if there is only one group.
    """

    groups: Sequence[Group]
    numbers: Sequence[int]
    keys: Sequence[int]
    rows: Rows
    live: Rows | None


def cut(images: Sequence[Tensor], groups: int) -> list[Sequence[Tensor]]:
    """Split V views (B, C, H, W) into the views of each group, in the order of the batch."""
    return list(zip(*(view.tensor_split(groups) for view in images), strict=True))


@contextlib.contextmanager
def seeded_rng(key: int, device: torch.device) -> Iterator[None]:
    """Seed random numbers (dropout) from a key, so that a group can run twice and on any rank."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if device.type == "cpu":  # torch.manual_seed formats a stack trace for each accelerator that is not in use
            torch.default_generator.manual_seed(key)
        else:
            torch.manual_seed(key)
        yield


def forward_groups(
    network: Network, call: Callable[..., Rows], groups: Sequence[Group], numbers: Sequence[int], keys: Sequence[int],
    grad: bool,
) -> GroupForward:  # fmt: skip
    """Run every group through the network.

    Running statistics end as the mean of those that each group alone would have left, so that they do not depend on the
    rank or the order of the groups either.

    Args:
        network: The network.
        call: The network itself or its wrapper (DistributedDataParallel), used if the graph is kept.
        groups: Functions that return the views of each group.
        numbers: Indices of the groups' views among a sample's views.
        keys: One random seed per group.
        grad: Whether gradients will be propagated back.
    """
    if len(groups) == 1:
        images = groups[0]()
        with seeded_rng(keys[0], images[0].device), torch.set_grad_enabled(grad):
            live = (call if grad else network)(images, numbers)
        rows = {name: x.detach() for name, x in live.items()}
        return GroupForward(groups, numbers, keys, rows, live if grad else None)

    statistics, counts = running_statistics(network), [norm.num_batches_tracked for norm in norms(network)]
    before, total = [s.clone() for s in statistics + counts], [torch.zeros_like(s) for s in statistics]
    parts = []
    with torch.no_grad():
        for group, key in zip(groups, keys, strict=True):
            for statistic, old in zip(statistics + counts, before, strict=True):
                statistic.copy_(old)
            images = group()
            with seeded_rng(key, images[0].device):
                parts.append(network(images, numbers))
            for summed, statistic in zip(total, statistics, strict=True):
                summed += statistic
        for statistic, summed in zip(statistics, total, strict=True):
            statistic.copy_(summed / len(groups))
    rows = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return GroupForward(groups, numbers, keys, rows, None)


def backward_groups(forward: GroupForward, network: Network, call: Callable[..., Rows], gradients: Rows) -> None:
    """Propagate the gradients of the rows, (V, B, D) by head, into the network's parameters.

    Args:
        forward: The result of `forward_groups`.
        network: The network.
        call: As in `forward_groups`; if it has `no_sync`, ranks synchronise only in the last group's backward pass.
        gradients: Gradients of the rows, by head.
    """
    if forward.live is not None:
        with restored_statistics(network) if network.recomputes else contextlib.nullcontext():
            _backward(forward.live, gradients)
        return
    last = len(forward.groups) - 1
    slices = [dict(zip(gradients, part, strict=True))
              for part in zip(*(g.tensor_split(last + 1, dim=1) for g in gradients.values()), strict=True)]  # fmt: skip
    with frozen_statistics(network):
        for i, (group, key, gradient) in enumerate(zip(forward.groups, forward.keys, slices, strict=True)):
            alone = contextlib.nullcontext() if i == last or not hasattr(call, "no_sync") else call.no_sync()
            images = group()
            with alone, seeded_rng(key, images[0].device):
                _backward(call(images, forward.numbers), gradient)


def _backward(rows: Rows, gradients: Rows) -> None:
    """Propagate the gradients of rows; rows that no trainable parameter has produced are left out."""
    names = [name for name, x in rows.items() if x.requires_grad]
    torch.autograd.backward([rows[name] for name in names], [gradients[name] for name in names])
