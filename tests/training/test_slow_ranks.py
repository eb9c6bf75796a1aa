"""A rank for which the others wait is reported, once, and when it has recovered."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import on_ranks
from small_runs import tiny, use_few_images

from inbatch.data.loader import Loader
from inbatch.runtime import distributed, ring
from inbatch.training import slow_ranks
from inbatch.training.slow_ranks import SlowRanks, slowest


@pytest.mark.parametrize(
    ("times", "rank"),
    [
        ([0.2, 0.2, 0.21, 0.2], None),
        ([0.2, 0.4], 1),
        ([0.31, 0.2], 0),
        ([0.29, 0.2], None),
        ([0.2, 0.4, 0.4, 0.4], None),  # most of them are slow: no single machine
        ([0.001, 0.003], None),  # 2 ms
    ],
)
def test_the_slowest_rank_is_compared_with_the_median_of_the_others(times: list[float], rank: int | None) -> None:
    assert slowest(times) == rank


def test_a_sentence_when_a_rank_becomes_slow_and_when_it_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    monitor, others = SlowRanks(torch.device("cpu")), [0.3, 0.3, 0.1, 0.1]
    monkeypatch.setattr(distributed, "gather", lambda x: torch.cat([x, torch.tensor([0.1, others.pop(0)]).double()]))
    messages = []
    for _ in range(4):
        assert monitor.new_sentence() is None  # too few steps
        for _ in range(slow_ranks.STEPS):
            monkeypatch.setattr(distributed, "_first", 7.1)
            monitor.add(began=7.0)
        messages.append(monitor.new_sentence())
    assert messages[0] == (
        "the others wait for rank 2: it needs 300 ms for loading, views and forward pass of a step, the median of the "
        "others is 100 ms (50 steps). Check its machine for other processes, slow storage, or fewer cores."
    )
    assert messages[1:] == [None, "rank 2 is no longer slower than the others.", None]


def test_every_exchange_of_own_rows_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first one of a step is after a wait for the slow rank, and all ranks seem equally fast."""
    names = ("get_rank", "all_reduce", "all_gather", "P2POp", "batch_isend_irecv")
    calls: dict[str, Any] = {name: lambda *args, **more: 0 for name in names}
    calls |= {"get_world_size": lambda group: 2, "batch_isend_irecv": lambda moves: [], "ReduceOp": dist.ReduceOp}
    monkeypatch.setattr(ring, "dist", SimpleNamespace(**calls, isend=None, irecv=None))
    peers, x = ring.OwnRows(equal=True), torch.zeros(2, 3)
    exchanges: list[Callable[[], Any]] = [lambda: peers.add(x), lambda: peers.largest(x)]
    exchanges += [lambda: peers.gather(x, [2, 2]), lambda: peers.exchange([x], 1, 2)]
    for exchange in exchanges:
        distributed.first_exchange()
        exchange()
        assert distributed.first_exchange() is not None


def slowed(out: Path) -> dict[str, Any]:
    """Make a run whose rank 1 reads each batch 500 ms later."""
    real = Loader.epoch

    def late(self: Loader, *args: Any, **more: Any) -> Any:
        for batch in real(self, *args, **more):
            time.sleep(0.5 * distributed.rank())
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_ranks, "STEPS", 5)
        patch.setattr(Loader, "epoch", late)
        use_few_images(patch)
        tiny("simclr", out, settings={"batch_size": 16})
    report: dict[str, Any] = json.loads((out / "run.json").read_text())
    return report


@pytest.mark.slow
def test_a_rank_that_is_slowed_on_purpose_is_in_the_report(tmp_path: Path) -> None:
    for report in on_ranks(2, slowed, tmp_path / "run"):
        assert report["slow_rank"].startswith("the others wait for rank 1: it needs ")
