"""Shards read from beginning to end: every sample once, the same batches on any ranks and workers, and the faults."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tar_shards import SIZES, encoded, literal_batches, write_shards, write_tar

from inbatch import rng
from inbatch.data import Loader, Subset, open_data
from inbatch.data.sequential import StreamReader
from inbatch.data.streams import Sequential, StreamPlan, Tally, after, check_epoch, plan_streams
from inbatch.errors import ConfigError, DataError
from inbatch.training.build import build
from inbatch.training.plan import plan_without_budget
from inbatch.training.requested_settings import chosen_reading


@dataclass
class Corner:
    """Stand-in for `views.Views`: the top left corner."""

    views: tuple[SimpleNamespace, ...] = (SimpleNamespace(size=8, interpolation="bilinear"),)

    def boxes(self, index: torch.Tensor, size: torch.Tensor, seed: int, epoch: int, attempt: int = 0) -> torch.Tensor:
        return torch.tensor([[[0, 0, 8, 8]]]).expand(1, len(index), 4)


READ = Sequential(buffer=5, streams=12)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def loader(data: Any, **options: Any) -> Loader:
    source = open_data(data) if isinstance(data, Path) else data
    return Loader(source, **{"batch": 12, "views": Corner(), "seed": 3, "read": READ, "workers": 0} | options)


def indices(one: Loader, epoch: int = 0, start: int = 0) -> np.ndarray:
    return np.stack([batch.index.numpy() for batch in one.epoch(epoch, start)])


PLANS = [
    StreamPlan(SIZES, batch=12, seed=3, streams=12, buffer=5),
    StreamPlan(SIZES, batch=12, seed=3, streams=5, buffer=200),
    StreamPlan((50,), batch=8, seed=0, streams=3, buffer=1),
    StreamPlan((0, 9, 0, 3), batch=12, seed=1, streams=4, buffer=2),
    StreamPlan((3,) * 40, batch=7, seed=2, streams=2, buffer=16),
]


class TestPlan:
    @pytest.mark.parametrize("plan", PLANS)
    def test_an_epoch_has_every_sample_once_but_those_left_over(self, plan: StreamPlan) -> None:
        for epoch in (0, 1):
            every = np.concatenate([plan.numbers(epoch, stream) for stream in range(plan.streams)])
            assert len(every) == plan.steps * plan.batch == len(set(every.tolist()))
            assert 0 <= sum(plan.sizes) - len(every) < plan.batch

    def test_shards_are_read_from_beginning_to_end_in_random_order(self) -> None:
        plan = PLANS[0]
        every = np.concatenate([plan.numbers(0, stream) for stream in range(plan.streams)])
        shard = np.repeat(np.arange(len(SIZES)), SIZES)[every]
        changes = np.flatnonzero(np.diff(shard)) + 1
        assert len(changes) <= len(SIZES) - 1, "a shard is left only at its end"
        assert all((np.diff(part) == 1).all() for part in np.split(every, changes))
        order = rng.permutation(rng.fold(3, 31), 0, len(SIZES)).tolist()
        assert shard[np.concatenate([[0], changes])].tolist() == order[: len(changes) + 1]
        assert not np.array_equal(every, np.concatenate([plan.numbers(1, s) for s in range(plan.streams)]))

    @pytest.mark.parametrize("plan", PLANS)
    def test_a_sample_leaves_the_buffer_after_it_was_read(self, plan: StreamPlan) -> None:
        for stream in range(plan.streams):
            order = plan.shuffled(2, stream)
            assert sorted(order.tolist()) == list(range(len(order)))
            assert (order < np.arange(len(order)) + plan.buffer).all()
        literal_batches(plan, 2)  # its buffer is a list

    def test_places_of_a_batch_belong_to_the_streams(self) -> None:
        for plan in PLANS:
            owner = [plan.stream_at(position) for position in range(plan.batch)]
            assert owner == [s for s in range(plan.streams) for _ in range(plan.width(s))]

    def test_remaining_files_are_read_in_order(self) -> None:
        assert after(np.array([2, 0, 1, 4, 3]), 2).tolist() == [1, 3, 4]

    def test_pieces_give_every_worker_its_own_streams(self) -> None:
        plan = StreamPlan((4096,), batch=1024, seed=0, streams=32, buffer=4)
        cuts = plan.cuts(1, 2, 2, 100)
        assert sorted(i for cut in cuts for i in range(cut.start, cut.stop)) == list(range(512))
        assert all(cut.stop - cut.start <= 100 for cut in cuts)
        streams = [{plan.stream_at(512 + i) for i in range(cut.start, cut.stop)} for cut in cuts]
        assert not set.union(*streams[::2]) & set.union(*streams[1::2])

    @pytest.mark.parametrize(("world", "streams"), [(300, 301), (255, 256), (7, 48), (1, 16)])
    def test_no_piece_is_empty_if_ranks_do_not_divide_the_streams(self, world: int, streams: int) -> None:
        """A rank can have few samples of a stream; a worker with these alone would have no sample in most pieces."""
        plan = StreamPlan((world * 1000,), batch=world * 1000, seed=0, streams=streams, buffer=4)
        for rank in {0, 1, world // 2, world - 1} & {*range(world)}:
            for requested in (1, 2, 3, 16):
                workers = plan.workers(rank, world, 64, requested)
                cuts = plan.cuts(rank, world, workers, 64)
                assert 1 <= workers <= requested and len(cuts) % workers == 0
                assert all(0 < cut.stop - cut.start <= 64 for cut in cuts)
                assert sorted(i for cut in cuts for i in range(cut.start, cut.stop)) == list(range(1000))
                places = [(k % workers, i) for k, cut in enumerate(cuts) for i in range(cut.start, cut.stop)]
                owners = {(worker, plan.stream_at(rank * 1000 + i)) for worker, i in places}
                assert len(owners) == len({stream for _, stream in owners}), "a stream has one worker"
        assert plan.workers(0, world, 64, 0) == 0

    def test_tally_distinguishes_sets_of_samples(self) -> None:
        assert Tally.of([3, 1]) + Tally.of([2]) == Tally.of([1, 2, 3]) != Tally.of([2, 2, 2])
        assert Tally.of([1, 2, 3]) - Tally.of([2]) == Tally.of([3, 1])


class TestBatches:
    def test_are_those_of_a_literal_buffer(self, shards: Path) -> None:
        one = loader(shards)
        for epoch in (0, 1):
            assert np.array_equal(indices(one, epoch), literal_batches(one.plan, epoch))

    def test_hold_the_images_of_their_numbers(self, shards: Path) -> None:
        for batch in loader(shards).epoch(0, stop=2):
            assert batch.crops[0][:, 1, 0, 0].tolist() == batch.index.tolist()
        whole = next(loader(shards, whole=True).epoch(0))
        assert whole.images[:, 1, 0, 0].tolist() == whole.index.tolist()

    @pytest.mark.parametrize(("world", "streams"), [(2, 12), (3, 4), (6, 12)])  # 3 ranks share a stream of 4
    def test_do_not_depend_on_the_ranks(self, shards: Path, world: int, streams: int) -> None:
        source, read = open_data(shards), Sequential(5, streams)
        whole = indices(loader(source, read=read))
        parts = [indices(loader(source, read=read, rank=rank, world=world)) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts, 1), whole)

    def test_do_not_depend_on_the_workers(self, shards: Path) -> None:
        one, two = loader(shards), loader(shards, workers=2)
        for epoch, start in ((0, 0), (1, 7)):
            assert np.array_equal(indices(one, epoch, start), indices(two, epoch, start))
        two.close()

    def test_do_not_depend_on_the_size_of_a_piece(self, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = indices(loader(shards))
        monkeypatch.setattr("inbatch.data.loader.PIECE", 5)
        assert np.array_equal(indices(loader(shards)), whole)

    def test_after_a_resume_are_the_rest_and_decode_nothing_used_before(
        self, shards: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, opened = open_data(shards), []
        whole = indices(loader(source))
        unpack = type(source).unpack
        monkeypatch.setattr(type(source), "unpack", lambda self, i, data: opened.append(i) or unpack(self, i, data))
        for start in (1, 4, 8):
            one = loader(source)
            opened.clear()  # sizes of some images are read when the loader is made
            assert np.array_equal(indices(one, 0, start), whole[start:])
            assert sorted(opened) == sorted(whole[start:].flatten().tolist())

    def test_unreadable_image_is_replaced_by_one_of_the_next_batch(self, tmp_path: Path) -> None:
        source = open_data(write_shards(tmp_path, damaged=[5, 60]))
        one = loader(source, max_bad=0.1)
        expected = literal_batches(one.plan, 0)
        for number in (5, 60):
            for step, place in np.argwhere(expected == number):
                expected[step, place] = literal_batches(one.plan, 0)[(step + 1) % len(expected), place]
        assert np.array_equal(indices(one), expected)
        assert len(one.bad) == len({5, 60} & set(literal_batches(one.plan, 0).flatten().tolist()))

    def test_stream_of_a_subset_and_of_parquet_files(self, shards: Path, tmp_path: Path) -> None:
        subset = open_data(shards, subset=50)
        assert sum(subset.shard_sizes()) == 50 and len(subset.shard_sizes()) == len(SIZES)
        one = loader(subset)
        assert np.array_equal(indices(one), literal_batches(one.plan, 0))
        unordered = Subset(open_data(shards), torch.tensor([3, 1, 2] * 4), "by hand")
        assert unordered.shard_sizes() is None
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.table({"image": [encoded(i) for i in range(60)]})
        parquet.write_table(table, tmp_path / "p.parquet", row_group_size=13)
        two = loader(tmp_path / "p.parquet")
        assert two.plan.sizes == (13, 13, 13, 13, 8)
        batches = list(two.epoch(0))
        assert np.array_equal(np.stack([b.index for b in batches]), literal_batches(two.plan, 0))
        assert all(torch.equal(b.crops[0][:, 1, 0, 0].long(), b.index) for b in batches)

    def test_stream_of_several_paths(self, shards: Path, tmp_path: Path) -> None:
        write_tar(tmp_path / "more.tar", 113, 31)
        one = loader(open_data([str(shards), str(tmp_path / "more.tar")]))
        assert one.plan.sizes == (31, *SIZES), "files come before folders"
        assert np.array_equal(indices(one), literal_batches(one.plan, 0))


class TestFaults:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        return write_shards(tmp_path / "own")

    def test_a_shard_that_changes_between_epochs(self, own: Path) -> None:
        one = loader(own)
        indices(one)
        write_tar(own / "t-003.tar", 500, 40)
        with pytest.raises(DataError, match=r"t-003\.tar' has changed since the run began: restore it, or start a"):
            indices(one, 1)

    def test_a_shard_that_is_cut_off(self, own: Path) -> None:
        one = loader(own, workers=2)
        os.truncate(own / "t-001.tar", 3000)
        with pytest.raises(DataError, match=r"t-001\.tar' has changed since the run began"):
            indices(one)
        one.close()

    def test_missing_shard_is_an_error(self, own: Path) -> None:
        one = loader(own)
        (own / "t-004.tar").unlink()
        with pytest.raises(DataError, match=r"t-004\.tar' cannot be read: No such file or directory"):
            indices(one)

    def test_samples_that_are_lost_or_read_twice(self, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check_epoch(Tally.of([1, 2]), Tally.of([2, 1]), 0, 0)
        with pytest.raises(DataError, match=r"rank 3 read 2 samples in epoch 5, which are not its 2 samples, each"):
            check_epoch(Tally.of([2, 2]), Tally.of([2, 1]), 3, 4)
        one, piece = loader(own), StreamReader.piece
        doubled = Tally.of([0])
        monkeypatch.setattr(
            StreamReader, "piece", lambda self, parts: (p := piece(self, parts))._replace(read=p.read + doubled)
        )
        with pytest.raises(DataError, match="rank 0 read 117 samples in epoch 1, which are not its 108"):
            indices(one)

    def test_unsupported_data_and_invalid_numbers_are_refused(self, own: Path) -> None:
        arrays = open_data(np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8))
        with pytest.raises(DataError, match=r"read = sequential: .* is not tar or Parquet files"):
            loader(arrays)
        with pytest.raises(ConfigError, match="read_streams = 13: a stream fills at least one position of a"):
            plan_streams(open_data(own), 12, 0, 1, Sequential(5, 13))
        assert plan_streams(open_data(own), 64, 0, 2, Sequential(5)).streams == 32


class TestRecipe:
    SMALL = {"encoder.name": "tiny", "batch_size": 12, "image_size": 16, "epochs": 1, "method.name": "simclr"}

    def planned(self, data: Any, **more: Any) -> Any:
        return plan_without_budget(str(data), self.SMALL | more)

    def test_a_run_states_its_streams(self, shards: Path) -> None:
        plan = self.planned(shards, read="sequential", read_buffer=7)
        built = build(plan.recipe, plan.source, device=torch.device("cpu"), workers=0)
        assert (built.recipe.read_streams, built.recipe.read_buffer, built.recipe.cache_on_device) == (12, 7, False)
        assert "one after the other (read = sequential): 6 shards in 12 streams" in built.loader.report()
        again = build(built.recipe, plan.source, device=torch.device("cpu"), workers=0)
        assert again.loader.plan == built.loader.plan

    def test_settings_that_exclude_sequential_reading_are_refused(self, shards: Path) -> None:
        plan = self.planned(shards, read="sequential")
        with pytest.raises(ConfigError, match="cache_on_device = true exclude each other"):
            build(replace(plan.recipe, cache_on_device=True), plan.source, device=torch.device("cpu"), workers=0)
        plan = self.planned(shards, **{"read": "sequential", "sampler.name": "neighbours"})
        with pytest.raises(ConfigError, match="read = sequential and sampler = neighbours exclude each other"):
            build(plan.recipe, plan.source, device=torch.device("cpu"), workers=0)

    def test_auto_reads_remote_images_one_after_the_other(self) -> None:
        url = "s3://bucket/a.tar"
        assert chosen_reading({}, url) == chosen_reading({"read": "auto"}, url) == {"read": "sequential"}
        assert chosen_reading({"sampler.name": "apart"}, url) == {"read": "random"}
        assert chosen_reading({"cache_on_device": True}, url) == {"read": "random"}
        assert chosen_reading({"read": "random"}, url) == chosen_reading({}, "a.tar") == {"read": "random"}
        with pytest.raises(ConfigError, match=r"read_streams = 4 has no effect: .*--read sequential"):
            chosen_reading({"read_streams": 4}, "a.tar")

    def test_unknown_order_of_reading_is_refused(self, shards: Path) -> None:
        with pytest.raises(ConfigError, match="read = 'sideways'"):
            self.planned(shards, read="sideways")
