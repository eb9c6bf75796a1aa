"""Evaluations that ranks share have the figures of one process, and end on all ranks when one is stopped."""

import importlib
import signal
import time
from typing import Any

import pytest
import torch
from rank_pool import on_ranks
from torch import Tensor

from inbatch.data import open_data
from inbatch.data.views import Views, make_views
from inbatch.evaluation import embed, evaluate
from inbatch.models import create_encoder
from inbatch.runtime import distributed, shared_work
from inbatch.runtime.process_group import process_group
from inbatch.runtime.signals import StopRequested, stop_on_signals
from inbatch.training.monitors import label_free


def figures(protocols: tuple[str, ...]) -> dict[str, Any]:
    """Return what an evaluation of a random encoder measures on 100 and 70 images, in parts of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("inbatch.evaluation.knn"), "_QUERIES", 16)
        patch.setattr(label_free, "_CHUNK", 16)
        patch.setattr(label_free, "LIDAR_IMAGES", 10)
        patch.setattr(label_free, "LIDAR_VIEWS", 4)
        torch.manual_seed(0)
        encoder = create_encoder("tiny", size=16, channels=1)
        source = open_data("digits-canvas", subset=170)
        bank = label_free.Subset(source, torch.arange(100), "bank")
        queries = label_free.Subset(source, torch.arange(100, 170), "queries")
        with shared_work.sharing():
            vectors = embed(encoder, queries, batch=16)
            measured = evaluate(encoder, bank, queries, protocols=protocols, k=5, shares=(0.5,), draws=2, batch=16)
            chosen = label_free.Chosen(source, None, 0, 60)
            views = Views(make_views("simclr", {"size": 16, "blur": 0.0}, 1), encoder.mean, encoder.std)
            one = label_free.embed_all({"it": encoder}, views, chosen, 0)["it"]
        rows: list[Tensor] = [vectors.vectors, vectors.index, one.clean, one.first, one.second, one.number, one.viewed]
        return measured | {"rows": [x.numpy() for x in rows], "names": vectors.identities}


FAST = ("knn", "clustering")
ALL = (*FAST, "linear", "few", "retrieval")


@pytest.mark.parametrize(
    ("world", "protocols"), [(2, FAST), *(pytest.param(world, ALL, marks=pytest.mark.slow) for world in (2, 3, 4))]
)
def test_ranks_have_the_figures_of_one_process(world: int, protocols: tuple[str, ...]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = figures(protocols)
    torch.set_num_threads(threads)
    for result in on_ranks(world, figures, protocols):
        for mine, whole in zip(result.pop("rows"), alone["rows"], strict=True):
            assert (mine == whole).all() and mine.shape == whole.shape
        assert result == {key: value for key, value in alone.items() if key != "rows"}


def test_parts_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_work, "_active", [object()])
    for world in range(1, 6):
        monkeypatch.setattr(distributed, "world", lambda: world)  # noqa: B023
        for count in (0, 1, 15, 16, 17, 100):
            spans, dealt = [], []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", lambda: rank)  # noqa: B023
                spans += list(shared_work.span(count, 16))
                assert not len(part := shared_work.span(count, 16)) or part.start % 16 == 0
                dealt += list(shared_work.own_tasks(count))
            assert spans == sorted(dealt) == list(range(count))


def stopped() -> tuple[int, float]:
    """Send rank 1 a signal in its part of the work; the other rank is in a longer part, with many batches."""
    with process_group(timeout=60), stop_on_signals() as stop:
        began = time.monotonic()
        try:
            with stop.losing(), shared_work.sharing(stop):
                shared_work.gathered("everyone is here")
                if distributed.rank() == 1:
                    signal.raise_signal(signal.SIGUSR1)
                for _ in range(600):
                    shared_work.check()
                    time.sleep(0.1)
        except StopRequested as request:
            return request.number, time.monotonic() - began
    return 0, 0.0


def test_a_signal_to_one_rank_ends_the_work_of_all() -> None:
    for number, seconds in on_ranks(2, stopped):
        assert number == signal.SIGUSR1 and seconds < 30
