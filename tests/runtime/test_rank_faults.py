"""A rank that exits, hangs, differs or ends by itself: the others end soon and report which rank it was and why."""

import datetime
import errno
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import _context, on_ranks
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import inbatch
from inbatch.data import open_data, write_folder
from inbatch.distributed import own_rows
from inbatch.errors import ConfigError, DataError, InbatchError, RankError
from inbatch.losses import nt_xent
from inbatch.runtime import distributed, rank_store, sharding
from inbatch.runtime.process_group import process_group, shared_errors
from inbatch.runtime.rank_store import RankStore, new_prefix
from inbatch.runtime.signals import StopRequested
from inbatch.training import checkpoint
from inbatch.training.metric_logger import Log

TIMEOUT = 4.0


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls at the same time; return what each returned or raised."""
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except InbatchError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stores(world: int, timeout: float = 5.0) -> list[RankStore]:
    store = dist.HashStore()
    return [RankStore(store, "run 0", rank, world, timeout) for rank in range(world)]


def test_ranks_that_agree_continue_and_can_compare_again() -> None:
    together = stores(3)
    for _ in range(2):
        assert at_once(*(lambda r=r: r.compare_facts({"seed": "1"}) for r in together)) == [None] * 3


def test_differing_settings_are_named_on_every_rank() -> None:
    together = stores(3)
    errors = at_once(*(lambda r=r: r.compare_facts({"batch_size": "64", "seed": "12"[r.rank == 2]}) for r in together))
    for error in errors:
        assert isinstance(error, ConfigError)
        assert "disagree about the seed: rank 2 has a different one from rank 0 (2, not 1)" in str(error)
    facts = [dict.fromkeys("fedcba", str(number)) for number in range(2)]
    for error in at_once(*(lambda r=r: r.compare_facts(facts[r.rank]) for r in stores(2))):
        names = re.findall(r"about the (\w): rank 1 has a different one from rank 0 \(1, not 0\)", str(error))
        assert names == [*"abcdef"], "every difference, in sorted order"


def test_a_rank_that_ends_by_itself_ends_the_waiting_of_the_others() -> None:
    first, second = stores(2, timeout=60)
    began = time.monotonic()
    second.report("rank 1: no such folder", DataError.exit_code)
    with pytest.raises(DataError, match="rank 1: no such folder"):
        first.compare_facts({})
    assert time.monotonic() - began < 5


def test_a_rank_that_never_comes_is_named() -> None:
    first, second, _ = stores(3, timeout=0.3)
    for i, error in enumerate(at_once(lambda: first.compare_facts({}), lambda: second.compare_facts({}))):
        assert isinstance(error, RankError) and "lost rank 2" in str(error) and error.reports_for_all == (i == 0)


def test_lost_rank_is_distinguished_from_a_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_store, "GRACE", 0.3)
    together = stores(4)
    left = [together[1], together[3]]
    for r, error in zip(left, at_once(*(r.find_failure for r in left)), strict=True):
        assert "lost ranks 0, 2" in str(error) and error.reports_for_all == (r.rank == 1)
    for error in at_once(*(r.find_failure for r in stores(3))):
        assert "all of them are running" in str(error)


def test_ranks_that_start_again_share_nothing_with_those_before() -> None:
    """torchrun's store outlives a restart; one rank of the first start never joined."""
    store = dist.HashStore()
    first = at_once(*(lambda r=r: new_prefix(store, r, 3, 0.5) for r in range(2)))
    assert "ranks 2 did not join" in str(first[0]) and isinstance(first[1], str)
    for _ in range(2):
        prefixes = at_once(*(lambda r=r: new_prefix(store, r, 3, 10) for r in range(3)))
        assert len(set(prefixes)) == 1 and prefixes[0] != first[1]
        first = prefixes


def test_rank_with_progress_is_awaited_and_one_without_is_named() -> None:
    """Embedding in parts: the time of a part has no limit in all, only that without progress."""
    first, second, third = stores(3, timeout=0.4)

    def works(store: RankStore, parts: int) -> None:
        for part in range(parts):
            time.sleep(0.1)
            store.advance("parts", finished=part == 7)

    results = at_once(lambda: first.follow("parts", [1, 2]), lambda: works(second, 8), lambda: works(third, 8))
    assert results == [None] * 3
    first, second, third = stores(3, timeout=0.4)
    began = time.monotonic()
    error = at_once(lambda: first.follow("parts", [1, 2]), lambda: works(second, 8), lambda: works(third, 2))[0]
    assert isinstance(error, RankError) and "lost rank 2: no answer for 0 s" in str(error) and error.reports_for_all
    assert time.monotonic() - began < 5


def test_a_rank_that_a_signal_ends_is_named_by_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = stores(2)
    monkeypatch.setattr(f"{process_group.__module__}._store", second)
    with pytest.raises(StopRequested), shared_errors():
        raise StopRequested(signal.SIGTERM)
    with pytest.raises(RankError, match=r"^rank 0: stopped by SIGTERM$"):  # this process counts as rank 0
        first.compare_facts({})


def test_error_states_how_to_continue_the_command() -> None:
    first = RankStore(dist.HashStore(), "run 0", 0, 2, 0.1, "with the same command")
    with pytest.raises(RankError, match="continue with the same command"):
        first.follow("parts", [1])
    second = RankStore(dist.HashStore(), "run 0", 0, 2, 0.1)
    with pytest.raises(RankError, match="continue from the last checkpoint with --resume"):
        second.compare_facts({})


def endless(fault: str, bad: int) -> str:
    """Run steps with a collective; one rank fails in the third."""
    for step in range(10_000):
        if step == 3 and distributed.rank() == bad:
            match fault:
                case "dies":
                    os._exit(1)
                case "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "cannot read":
                    raise DataError("cat.jpg cannot be read")
                case "has a bug":
                    raise RuntimeError("shapes do not fit")
        distributed.all_reduce_max(step)
    return "never"


def endless_ring(fault: str, bad: int) -> str:
    """Compute losses of own rows; one rank fails in the third, while the others wait for its block."""
    for step in range(10_000):
        z = torch.randn(2, 4, 8 + (fault == "differs" and step == 3 and distributed.rank() == bad)).requires_grad_()
        if step == 3 and distributed.rank() == bad and fault == "dies":
            os._exit(1)
        if step == 3 and distributed.rank() == bad and fault == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        with own_rows():
            loss = nt_xent(z)
        loss.backward()
    return "never"


def sharded(fault: str, bad: int) -> str:
    """Take steps with a sharded encoder and save after each; one rank fails in the third step or save."""
    what, _, where = fault.partition(" in a ")
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    sharding.shard(encoder, list(encoder), torch.device("cpu"))

    def fail(*_: Any, **__: Any) -> None:
        if what == "fills its disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        os._exit(1) if what == "dies" else os.kill(os.getpid(), signal.SIGSTOP)

    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.broadcast_object(own))
        for step in range(10_000):
            if step == 3 and distributed.rank() == bad:
                if where == "step":
                    encoder[1].register_forward_pre_hook(fail, prepend=True)
                else:
                    HuggingFaceStorageWriter.write_data = fail  # type: ignore[method-assign]
            encoder(torch.randn(3, 4)).sum().backward()
            if step >= 2 or where == "save":
                checkpoint.save(folder, {"encoder": encoder.state_dict()}, step=step)
    return "never"


def unhappy(rank: int, world: int, folder: str, fault: str, bad: int, answers: Any, ring: bool = False) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=wait)
    try:
        with process_group(timeout=TIMEOUT):
            (endless_ring if ring else sharded if " in a " in fault else endless)(fault, bad)
    except Exception as error:
        answers.put(
            (rank, type(error).__name__, str(error), getattr(error, "reports_for_all", False), time.monotonic())
        )


def ends(world: int, fault: str, bad: int, heard: int, ring: bool = False) -> dict[int, tuple[Any, ...]]:
    """Return how ranks end after one fails: {rank: (kind, sentence, reports_for_all, when)} of the first `heard`."""
    with tempfile.TemporaryDirectory() as folder:
        answers = _context.Queue()
        children = [
            _context.Process(target=unhappy, args=(r, world, folder, fault, bad, answers, ring)) for r in range(world)
        ]
        for child in children:
            child.start()
        try:
            return {rank: rest for rank, *rest in (answers.get(timeout=120) for _ in range(heard))}
        except Empty:
            raise AssertionError("some rank neither ended nor said why") from None
        finally:
            for child in children:
                child.kill()
                child.join()


@pytest.mark.grid(1)
@pytest.mark.parametrize(("fault", "bad"), [("dies", 1), ("is killed", 0), ("hangs", 2)])
def test_a_lost_rank_is_named_by_all_others(fault: str, bad: int) -> None:
    """Fault 7, four ranks: not all of them wait for the lost rank directly."""
    endings = ends(4, fault, bad, heard=3)
    assert sorted(endings) == [r for r in range(4) if r != bad]
    speakers = [rank for rank, (_, _, speaks, _) in endings.items() if speaks]
    assert speakers == [min(endings)]
    for kind, sentence, _, _ in endings.values():
        assert kind == "RankError" and f"lost rank {bad}:" in sentence, sentence


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies in a step", "hangs in a step", "dies in a save", "hangs in a save"])
def test_a_rank_lost_in_a_sharded_step_or_save_is_named(fault: str) -> None:
    endings = ends(3, fault, 1, heard=2)
    assert sorted(endings) == [0, 2]
    for kind, sentence, _, _ in endings.values():
        assert kind == "RankError" and "lost rank 1:" in sentence, sentence


@pytest.mark.slow
def test_a_rank_that_cannot_write_its_shards_is_named() -> None:
    for kind, sentence, _, _ in ends(2, "fills its disk in a save", 1, heard=2).values():
        assert kind in ("InbatchError", "RankError") and sentence.startswith("rank 1: Cannot write"), sentence


@pytest.mark.parametrize(
    ("fault", "kind", "sentence"),
    [
        ("cannot read", "DataError", "rank 1: cat.jpg cannot be read"),
        ("has a bug", "RankError", "rank 1: RuntimeError: shapes do not fit"),
    ],
)
def test_an_error_of_one_rank_is_repeated_by_the_others(fault: str, kind: str, sentence: str) -> None:
    endings = ends(3, fault, 1, heard=3)
    for rank in (0, 2):
        assert endings[rank][:2] == [kind, sentence]
    assert endings[1][1] in sentence and not endings[1][1].startswith("rank 1")


def missing(folder: str) -> tuple[str, str, float]:
    began = time.monotonic()
    try:
        inbatch.pretrain(folder if distributed.rank() == 0 else f"{folder}/missing", out=f"{folder}/run", quiet=True)
    except Exception as error:
        time.sleep(1)  # a process that continues, as in a notebook
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", 0.0


@pytest.mark.slow
def test_images_that_one_node_lacks_end_all_before_the_first_step(tmp_path: Path) -> None:
    write_folder(open_data("digits-canvas", subset=40), tmp_path / "images")
    first, second = on_ranks(2, missing, str(tmp_path / "images"))
    assert first[0] == second[0] == "DataError" and second[1] in first[1] and first[1].startswith("rank 1: ")
    assert first[2] < 30
    assert not (tmp_path / "images" / "run").exists()


def test_a_rank_without_the_checkpoint_is_named_before_a_run_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory on the disk of one machine, and --resume auto: planning a new run needs all ranks."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("recipe.json", "checkpoints/last.pt"):
        (tmp_path / "run" / name).touch()

    def arrives(store: RankStore, out: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("inbatch.api.assert_equal_across_ranks", lambda facts: seen.append((store, facts)) or stop())
            with pytest.raises(StopRequested):
                inbatch.pretrain("missing", out=out, resume="auto", quiet=True)

    def stop() -> None:
        raise StopRequested(signal.SIGTERM)

    seen: list[tuple[RankStore, Any]] = []
    for store, out in zip(stores(2), (tmp_path / "run", tmp_path / "other"), strict=True):
        arrives(store, out)
    for error in at_once(*(lambda store=store, facts=facts: store.compare_facts(facts) for store, facts in seen)):
        assert "about the checkpoint in the run directory, which all ranks must see: rank 1 has" in str(error)


def relabelled() -> str:
    images = torch.arange(48 * 64).remainder(251).byte().view(48, 1, 8, 8)
    labels = torch.arange(48) % 3
    labels[5] += distributed.rank()
    try:
        inbatch.pretrain((images, labels), batch_size=8, epochs=1, out="never", quiet=True)
    except ConfigError as error:
        return str(error)
    return "went on"


@pytest.mark.slow
def test_different_labels_on_one_rank_are_refused() -> None:
    for message in on_ranks(2, relabelled):
        assert "disagree about the names or labels of the images: rank 1 has a different one from rank 0" in message


def killed(out: str, step: int) -> Any:
    """Return a run whose rank 0 is killed during a step."""
    real = Log.step

    def log(self: Any, at: int, *rest: Any) -> None:
        if at == step and distributed.rank() == 0:
            os._exit(9)
        real(self, at, *rest)

    Log.step = log  # type: ignore[method-assign]
    inbatch.pretrain(
        "digits-canvas",
        out=out,
        subset=80,
        batch_size=40,
        context=20,
        epochs=9,
        evaluate_every=9,
        quiet=True,
        dist_timeout=20,
    )


@pytest.mark.slow
def test_another_rank_writes_the_report_if_rank_0_dies(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lost rank 0"):
        on_ranks(2, killed, str(tmp_path / "run"), 3)
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["status"] == "failed" and "lost rank 0" in report["reason"]
    assert report["last_step"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "bad"), [("dies", 1), ("hangs", 2)])
def test_a_rank_that_is_lost_while_rows_pass_is_named_by_all_others(fault: str, bad: int) -> None:
    endings = ends(4, fault, bad, heard=3, ring=True)
    assert sorted(endings) == [r for r in range(4) if r != bad]
    for kind, sentence, _, _ in endings.values():
        assert kind == "RankError" and f"lost rank {bad}:" in sentence, sentence


@pytest.mark.slow
def test_a_rank_with_other_rows_is_named_before_rows_pass() -> None:
    endings = ends(3, "differs", 2, heard=3, ring=True)
    for kind, sentence, *_ in endings.values():
        assert kind == "ConfigError" and "rank 2 torch.float32 of shape (8, 9)" in sentence, sentence
