"""Losses in a loop of several processes: with gathered rows they are those of one process; local rows are reported."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_pool import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import inbatch
from inbatch import losses
from inbatch.batch import Batch
from inbatch.distributed import LocalRowsWarning, gather_rows, own_rows
from inbatch.errors import ConfigError
from inbatch.nn.batch_sums import batch_count
from inbatch.nn.functional import normalize
from inbatch.nn.slicing import random_directions

N = 12
Loss = Callable[[Tensor, Tensor], Any]

LOSSES: dict[str, Loss] = {
    "nt_xent": lambda z, y: losses.nt_xent(z, 0.2),
    "dcl": lambda z, y: losses.dcl(z, 0.2),
    "hcl": lambda z, y: losses.hcl(z, 0.2),
    "sogclr": lambda z, y: losses.sogclr(z, torch.zeros(len(y)), 0.2)[0],
    "isogclr": lambda z, y: losses.isogclr(z, torch.zeros(len(y)), torch.full((len(y),), 0.2))[0],
    "align_uniform": lambda z, y: losses.align_uniform(z)["loss"],
    "tico": lambda z, y: losses.tico(z[0], z[1], torch.zeros(6, 6), 0.0)[0]["loss"],
    "mmcr": lambda z, y: losses.mmcr(z)["loss"],
    "ctr": lambda z, y: losses.ctr(z[0], z[1].detach(), 0.2),
    "nnclr": lambda z, y: losses.nnclr(z[0], z[1], 0.2),
    "supcon": lambda z, y: losses.supcon(z, y, 0.2),
    "barlow_twins": lambda z, y: losses.barlow_twins(z)["loss"],
    "vicreg": lambda z, y: losses.vicreg(z)["loss"],
    "sigreg": lambda z, y: losses.sigreg(z, random_directions(6, 5)),
    "lejepa": lambda z, y: losses.lejepa(z, random_directions(6, 5), 0.2)["loss"],
    "visreg": lambda z, y: losses.visreg(z, random_directions(6, 5))["loss"],
    "koleo": lambda z, y: losses.koleo(z),
    "wmse": lambda z, y: losses.wmse(z[..., :4], torch.arange(n := batch_count(len(y), z))[None], n)["loss"],
    "cluster_contrast": lambda z, y: sum(losses.cluster_contrast(z.softmax(-1), 1.0)),
    "proto_nce": lambda z, y: losses.proto_nce(z[0], z[1], torch.full((len(y),), 0.2)),
    "swapped_prediction": lambda z, y: losses.swapped_prediction(normalize(z), losses.sinkhorn(normalize(z))),
    "byol": lambda z, y: losses.byol(z, z),
    "simsiam": lambda z, y: losses.simsiam(z, z),
    "dino": lambda z, y: losses.dino(z, z, torch.zeros(6), 0.1, 0.07),
    "cross_entropy": lambda z, y: losses.cross_entropy(z, y, 0.1),
    "pairwise_sigmoid": lambda z, y: losses.pairwise_sigmoid(z),
    "relation": lambda z, y: losses.relation(z[0], z[1], normalize(torch.ones(3, 6)), 0.2, 0.2),
    "info_nce": lambda z, y: losses.info_nce(z[0], z[1], normalize(torch.ones(3, 6)), 0.2),
}
assert LOSSES.keys() | {"sinkhorn"} == set(losses.__all__)


def steps(shares: list[int], rank: int = 0, local: bool = False, own_only: bool = False) -> dict[str, list[float]]:
    """Return value and gradient of every loss, as process `rank` computes them from its share of the samples."""
    torch.manual_seed(0)
    images = torch.randn(2, N, 5, dtype=torch.float64)
    label = torch.arange(N) % 3
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    model = network if len(shares) == 1 else DistributedDataParallel(network)
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    results = {}
    for name, loss in LOSSES.items():
        network.zero_grad()
        rows, y = model(images[:, own].flatten(0, 1)).unflatten(0, (2, -1)), label[own]
        if own_only:
            with own_rows():
                value = loss(rows, y)
        else:
            value = loss(rows, y) if local else loss(gather_rows(rows), gather_rows(y))
        value.backward()
        results[name] = [value.item(), *torch.cat([p.grad.flatten() for p in network.parameters()]).tolist()]
    return results


def ranks_steps(shares: list[int]) -> list[dict[str, list[float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LocalRowsWarning)
        return [steps(shares, torch.distributed.get_rank(), own_only=own_only) for own_only in (False, True)]


@pytest.mark.parametrize("shares", [[7, 5], pytest.param([4, 4, 4], marks=pytest.mark.slow),
                                    pytest.param([3, 8, 1], marks=pytest.mark.slow)])  # fmt: skip
def test_every_loss_of_gathered_or_own_rows_is_that_of_one_process(shares: list[int]) -> None:
    """Value and gradient under DistributedDataParallel, also with shares of different size, without a warning."""
    expected = steps([N])
    for results in on_ranks(len(shares), ranks_steps, shares):
        for name in LOSSES:
            for way in results:
                assert way[name] == pytest.approx(expected[name], rel=0, abs=1e-12), name


def local_steps() -> tuple[list[str], dict[str, list[float]]]:
    """Return the warnings and results of local rows, computed twice, then what must stay silent."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            results = steps([6, 6], torch.distributed.get_rank(), local=True)
        leaf = torch.randn(2, 4, 6, requires_grad=True)
        with torch.no_grad():
            inbatch.losses.nt_xent(leaf * 2)
    return [str(w.message) for w in caught if w.category is LocalRowsWarning], results


COUPLED = set(losses.__all__) - {"swapped_prediction", "byol", "simsiam", "dino", "cross_entropy", "info_nce"}


def test_local_rows_are_reported_once_per_loss_that_compares_samples() -> None:
    """Other losses are exact with local rows. With local rows these are wrong by 2 % and more."""
    whole = {name: torch.tensor(values[1:]) for name, values in steps([N]).items()}
    for messages, local in on_ranks(2, local_steps):
        assert {message.split()[0] for message in messages} == COUPLED and len(messages) == len(COUPLED)
        assert all(re.search(r"2 processes.*gather_rows", message) for message in messages)
        errors = {name: float((torch.tensor(local[name][1:]) - x).norm() / x.norm()) for name, x in whole.items()}
        assert all((error > 0.02) == (name in COUPLED | {"swapped_prediction"}) for name, error in errors.items())


def other_gathers() -> int:
    """Return the number of warnings for rows that other code has gathered, or that a step of inbatch passes."""
    from inbatch.nn import logsumexp

    rows = nn.Linear(5, 6)(torch.randn(2, 4, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = torch.distributed.nn.functional.all_gather(rows)
        losses.nt_xent(torch.cat(parts, 1)).backward()
        with logsumexp.using(world=2):
            losses.dcl(normalize(rows))
    return sum(w.category is LocalRowsWarning for w in caught)


def mistakes() -> list[str]:
    """Return the errors for rows that cannot be joined."""
    rank, messages = torch.distributed.get_rank(), []
    for rows in (
        torch.zeros(2, 3, 4 + rank),
        torch.zeros(3, 4, dtype=(torch.float32, torch.float64)[rank]),
        torch.zeros(3, 4, requires_grad=rank == 0),
        torch.zeros((3, 4) if rank else (3,)),
    ):
        try:
            gather_rows(rows)
        except ConfigError as error:
            messages.append(str(error))
    return messages


def joined() -> list[Any]:
    """Return gathered labels, flags and half-precision rows, and rows along another dimension."""
    rank = torch.distributed.get_rank()
    return [
        gather_rows(torch.arange(2 + rank) + 10 * rank).tolist(),
        gather_rows(torch.tensor([rank == 0])).tolist(),
        gather_rows(torch.full((1, 2), rank + 0.5).bfloat16()).tolist(),
        gather_rows(torch.full((1, 2), float(rank)), dim=-1).tolist(),
        gather_rows(torch.zeros(0, 2) if rank else torch.ones(1, 2)).tolist(),
    ]


def on_two() -> tuple[int, list[str], list[Any]]:
    return other_gathers(), mistakes(), joined()


def test_rows_of_any_type_are_joined_and_others_refused() -> None:
    for alarms, messages, rows in on_ranks(2, on_two):
        assert alarms == 0
        assert rows == [
            [0, 1, 10, 11, 12], [True, False], [[0.5, 0.5], [1.5, 1.5]], [[0, 0, 1, 1]], [[1, 1]],
        ]  # fmt: skip
        assert len(messages) == 4 and "rank 1 torch.float32 of shape (2, 3, 5) without gradient" in messages[0]
        assert "rank 0 has torch.float32 of shape (3, 4) with gradient" in messages[2]


def test_one_process_gathers_nothing() -> None:
    rows = torch.randn(2, 3, 4)
    assert gather_rows(rows) is rows and inbatch.distributed.gather_rows is gather_rows
    assert Batch(gather_rows(torch.arange(3)), torch.arange(3)).index.tolist() == [0, 1, 2]
