"""Runs that read shards from beginning to end: exact after a stop, equal on two ranks, and the faults of one rank."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_pool import on_ranks
from small_runs import assert_same_state, saved, stop_after
from tar_shards import write_shards

import inbatch
from inbatch.errors import InbatchError, Preempted
from inbatch.runtime import distributed
from inbatch.training.metric_logger import Log

pytestmark = pytest.mark.slow
SIZES = (30, 50, 20, 40)
RUN: dict[str, Any] = {
    "encoder": "tiny", "batch_size": 20, "context": 10, "image_size": 8, "epochs": 2, "evaluate_every": 2,
    "read": "sequential", "read_buffer": 8, "quiet": True,
}  # fmt: skip


def learned(data: object, out: Path, **fields: Any) -> inbatch.Run:
    return inbatch.pretrain(str(data), "moco", out=out, settings={"method.queue_size": 40}, **(RUN | fields))


@pytest.mark.usefixtures("brief")
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_shards(tmp_path / "shards", SIZES)
    learned(data, tmp_path / "whole", workers=0)
    for step, resume, workers in ((3, False, 2), (9, True, 0)):
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            stop_after(patch, step)
            learned(data, tmp_path / "cut", resume=resume, workers=workers)
    run = learned(f"file://{data}/t-*.tar", tmp_path / "cut", resume=True, workers=3)  # moved behind a URL
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    assert (run.recipe.read, run.recipe.read_streams) == ("sequential", 16)


def batches(data: str) -> list[list[int]]:
    """Return this rank's samples of each step of the second epoch."""
    settings = {"method.queue_size": 40}
    fields = {key: RUN[key] for key in RUN.keys() - {"quiet"}} | {"read_streams": 10}
    built = inbatch.prepare(data, "moco", settings=settings, workers=0, **fields)
    steps = [batch.index.tolist() for batch in built.loader.epoch(1)]
    built.loader.close()
    return steps


def test_two_ranks_share_the_batches_of_one(tmp_path: Path) -> None:
    data = str(write_shards(tmp_path, SIZES))
    whole, (first, second) = batches(data), on_ranks(2, batches, data)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    every = [i for step in whole for i in step]
    assert len(set(every)) == len(every) == 140


def of_two(first: str, second: str, gone: bool) -> tuple[str, int]:
    """Return how a run ends whose ranks find other shards at one path; `gone`: those of rank 1 vanish after a step."""
    real, rank = Log.step, distributed.rank()

    def log(self: Log, at: int, *rest: Any) -> None:
        if gone and rank and at == 1:
            shutil.rmtree("shards")
        real(self, at, *rest)

    Log.step = log  # type: ignore[method-assign]
    os.chdir(second if rank else first)
    try:
        learned("shards", Path(first).parent / "run", epochs=4, workers=0)
    except InbatchError as error:
        return str(error), error.exit_code
    return "went on", 0


@pytest.mark.parametrize(
    ("sizes", "damaged", "what"),
    [
        ((30, 50, 21, 39), (), "(names or labels of the images|places of the images in their files)"),
        (SIZES, (7,), "places of the images in their files"),  # of the same names
    ],
)
def test_a_rank_with_other_shards_is_named(sizes: tuple[int, ...], damaged: Any, what: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "a" / "shards", SIZES)
    write_shards(tmp_path / "b" / "shards", sizes, damaged)
    for message, code in on_ranks(2, of_two, str(tmp_path / "a"), str(tmp_path / "b"), False):
        assert re.match(f"ranks disagree about the {what}: rank 1 has a different one from rank 0", message)
        assert code == 2


def test_a_rank_that_loses_its_shards_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name / "shards", SIZES)
    (first, code), (second, other) = on_ranks(2, of_two, str(tmp_path / "a"), str(tmp_path / "b"), True)
    assert first == f"rank 1: {second}" and code == other == 3
    assert "cannot be read: No such file or directory" in second
