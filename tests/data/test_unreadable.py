"""Faults 11 and 13: unreadable images are counted and listed, and no other image silently replaces them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import on_ranks
from small_runs import assert_same_state, leave_out_evaluation, saved, stop_after
from test_loader import VIEWS, same
from typer.testing import CliRunner

import inbatch
from inbatch import rng
from inbatch.apps.cli import app
from inbatch.data import Loader, open_data, write_folder
from inbatch.data.resident import allowing
from inbatch.errors import DataError, Preempted
from inbatch.evaluation import embed
from inbatch.models import create_encoder, save_encoder

BATCH, N = 20, 130  # six batches, and a remainder of ten


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write 130 digits in folders by class, all undamaged."""
    return write_folder(open_data("digits-canvas-colour", subset=N), tmp_path / "images")


def files(folder: Path) -> list[Path]:
    return [folder / open_data(folder).identity(i) for i in range(N)]


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.write_bytes({"header": b"no image", "pixels": data[: len(data) // 2], "empty": b""}[how])


def loader(folder: Path, **fields: Any) -> Loader:
    settings = {"batch": BATCH, "views": VIEWS, "seed": 3, "resident": False, "workers": 0, "max_bad": 0.1}
    return Loader(open_data(folder), **(settings | fields))


def expected(bad: set[int], epoch: int) -> list[int]:
    """Apply the rule literally: the sample at the same place of the next batch replaces an unreadable one."""
    order = rng.permutation(3, epoch, N).tolist()[: N // BATCH * BATCH]
    used = []
    for place in range(len(order)):
        at = place
        while order[at] in bad:
            at = (at + BATCH) % len(order)
        used.append(order[at])
    return used


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["crops", "canvases"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_place_goes_to_the_image_of_the_next_batch(images: Path, workers: int, whole: bool) -> None:
    order = rng.permutation(3, 0, N).tolist()
    # Two in the last batch, whose next is the first; and two successive batches at the same place.
    bad = {order[i] for i in (7, 100, 101, 30, 50)}
    plain = list(loader(images, whole=whole).epoch(1))
    for i, how in zip(sorted(bad), ("header", "pixels", "empty", "pixels", "header"), strict=True):
        damage(files(images)[i], how)
    here = loader(images, workers=workers, whole=whole)
    for epoch in (0, 1):
        batches = list(here.epoch(epoch))
        index = torch.cat([batch.index for batch in batches]).tolist()
        assert index == expected(bad, epoch) and not bad & set(index)
        for batch in batches:
            assert len(set(batch.index.tolist())) == BATCH, "an image stands twice in a batch"
            assert torch.equal(batch.label, here.source.labels[batch.index])
    assert set(here.bad) == bad
    assert all(repr(str(files(images)[i]))[1:-1] in why for i, why in here.bad.items())
    untouched = [
        b for b, (new, old) in enumerate(zip(batches, plain, strict=True)) if torch.equal(new.index, old.index)
    ]
    assert untouched, "every batch has a damaged image: the test has lost its point"
    for b in untouched:
        same(batches[b], plain[b])
    for batch in batches:  # a replacement is drawn as the sample itself
        for slot, i in enumerate(batch.index.tolist()):
            other = next(b for b in loader(images, whole=whole).epoch(1) if i in b.index.tolist())
            at = other.index.tolist().index(i)
            if whole:
                h, w = batch.size[slot].tolist()
                assert torch.equal(batch.images[slot, :, :h, :w], other.images[at, :, :h, :w])
            else:
                assert torch.equal(batch.boxes[:, slot], other.boxes[:, at])
                assert all(torch.equal(x[slot], y[at]) for x, y in zip(batch.crops, other.crops, strict=True))


def test_ranks_and_resumed_runs_use_the_same_images(images: Path) -> None:
    order = rng.permutation(3, 0, N).tolist()
    for i in (order[25], order[33], order[47]):
        damage(files(images)[i], "pixels")
    whole = list(loader(images).epoch(0))
    for a, b in zip(loader(images).epoch(0, 2), whole[2:], strict=True):
        same(a, b)
    shares = [loader(images, rank=r, world=2).epoch(0) for r in (0, 1)]
    for batch, left, right in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([left.index, right.index]), batch.index)


@pytest.mark.slow
def test_more_than_max_bad_is_an_error_that_names_some(images: Path) -> None:
    for i in rng.permutation(3, 0, N).tolist()[5:8]:
        damage(files(images)[i], "pixels")
    with pytest.raises(DataError, match=r"3 of 130 images .* cannot be read \(max_unreadable allows 2%\)") as error:
        list(loader(images, max_bad=0.02).epoch(0))
    assert error.value.exit_code == 3


def test_the_advised_share_allows_the_unreadable_images() -> None:
    for count in (*range(2, 130), 1_000, 10_000):
        for bad in {1, count // 3, count // 2, count * 29 // 50, count - 1} - {0}:
            share = allowing(bad, count)
            assert bad <= share * count and bad / count <= share < 1, (bad, count, share)
    assert allowing(3, 202) == 0.015 and allowing(1, 30) == 0.034


def test_no_readable_image_is_left_for_the_batch(tmp_path: Path) -> None:
    folder = write_folder(open_data("digits-canvas", subset=20), tmp_path)
    damage(folder / open_data(folder).identity(4), "pixels")
    with pytest.raises(DataError, match=r"No readable image is left .*: pass a smaller --batch-size"):
        list(loader(folder, batch=20).epoch(0))


# Whole runs.

SHORT: dict[str, Any] = {
    "encoder": "tiny", "image_size": 32, "batch_size": BATCH, "epochs": 2, "quiet": True, "evaluate_every": 1,
}  # fmt: skip


def run(images: Path, out: Path, **fields: Any) -> inbatch.Run:
    settings = {"max_unreadable": 0.05, "method.out_dim": 8, "schedule.warmup_epochs": 0} | fields.pop("settings", {})
    return inbatch.pretrain(images, "simclr", out=out, settings=settings, **(SHORT | fields))


@pytest.mark.slow
@pytest.mark.parametrize("resident", [True, False])
def test_run_lists_unreadable_images_and_continues(images: Path, tmp_path: Path, resident: bool) -> None:
    bad = [files(images)[i] for i in (0, 64, 129)]  # including one of the images used to detect collapse
    for file, how in zip(bad, ("header", "pixels", "empty"), strict=True):
        damage(file, how)
    finished = run(images, tmp_path / "run", cache_on_device=resident, workers=1)
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert sorted(line.split("' cannot be read: ")[0].lstrip("'") for line in listed) == sorted(map(str, bad))
    assert finished.result["unreadable"] == 3 and finished.result["evaluation"]["knn"]["top1"] > 0
    evaluated = finished.result["evaluation"]
    assert sum(evaluated[split].get("unreadable", 0) for split in ("train", "test")) >= (0 if resident else 3)


@pytest.mark.usefixtures("brief")
def test_a_resumed_run_reports_what_could_not_be_read_before(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = rng.permutation(0, 0, 130).tolist()
    bad = [files(images)[order[at]] for at in (0, BATCH + 1)]  # of the first and of the second step
    for file in bad:
        damage(file, "header")
    fields = {"epochs": 1, "cache_on_device": False, "workers": 0}
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 1)
        run(images, tmp_path / "cut", **fields)
    assert run(images, tmp_path / "cut", resume=True, **fields).result["unreadable"] == 2
    listed = (tmp_path / "cut" / "bad_images.txt").read_text().splitlines()
    assert [line.split("' cannot be read: ")[0].lstrip("'") for line in listed] == list(map(str, bad))


@pytest.mark.slow
def test_resumed_run_uses_the_same_images(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (5, 60, 100):
        damage(files(images)[i], "pixels")
    run(images, tmp_path / "whole", cache_on_device=False, workers=2)
    for step in (4, 9):
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            stop_after(patch, step)
            run(images, tmp_path / "cut", cache_on_device=False, workers=0, resume=step > 4)
    run(images, tmp_path / "cut", cache_on_device=False, workers=1, resume=True)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_files_that_vanish_in_the_middle_of_a_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inbatch.training.metric_logger import Log

    gone, real = files(images)[10:14], Log.step

    def step(self: Log, at: int, *rest: Any) -> None:
        if at == 3:
            for file in gone:
                file.unlink()
        real(self, at, *rest)

    monkeypatch.setattr(Log, "step", step)
    finished = run(images, tmp_path / "run", cache_on_device=False, workers=2)
    listed = (tmp_path / "run" / "bad_images.txt").read_text()
    assert finished.result["unreadable"] == 4 and all(file.name in listed for file in gone)
    assert "No such file" in listed


@pytest.mark.slow
@pytest.mark.parametrize("resident", ["true", "false"])
def test_too_many_end_with_3(images: Path, tmp_path: Path, resident: str) -> None:
    for file in files(images)[::10]:
        damage(file, "header")
    words = ["pretrain", "--data", str(images), "--out", str(tmp_path / "run"), "--encoder", "tiny", "--batch", "20"]
    words += ["--epochs", "2", "--workers", "0", "--set", f"cache_on_device={resident}", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3, done.output
    error = json.loads(done.stdout)["error"]
    assert (
        "of 130 images" in error
        and "max_unreadable allows 1%" in error
        and re.search(r"--set max_unreadable=0\.\d+ or more allows them", error)
    )
    if resident == "false":  # training had begun
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    else:
        assert not (tmp_path / "run").exists()


def _two_ranks(folder: str, out: str) -> list[str]:
    run(Path(folder), Path(out), cache_on_device=False, workers=0)
    return (Path(out) / "bad_images.txt").read_text().splitlines()


@pytest.mark.slow
def test_ranks_list_the_unreadable_images_of_all(images: Path, tmp_path: Path) -> None:
    order = rng.permutation(0, 0, N).tolist()
    for place in (1, 11, 25, 39):  # of the first and the second half of a batch
        damage(files(images)[order[place]], "pixels")
    lists = on_ranks(2, _two_ranks, str(images), str(tmp_path / "two"))
    run(images, tmp_path / "one", cache_on_device=False, workers=0, context=10)
    assert len(lists[0]) == 4 and sorted(lists[0]) == sorted(
        (tmp_path / "one" / "bad_images.txt").read_text().splitlines()
    )


@pytest.mark.slow
def test_pcl_surveys_what_can_be_read(images: Path, tmp_path: Path) -> None:
    for i in (0, 70, 129):
        damage(files(images)[i], "pixels")
    inbatch.pretrain(
        images, "pcl", out=tmp_path / "run", cache_on_device=False, workers=0, **SHORT,
        settings={"method.num_clusters": [4], "method.negatives": 2, "method.warmup_epochs": 0, "method.queue_size": 40,
                  "max_unreadable": 0.05, "schedule.warmup_epochs": 0},
    )  # fmt: skip


# Embedding.


def test_embed_warns_of_an_unreadable_image_and_succeeds(tmp_path: Path) -> None:
    folder = write_folder(open_data("digits-canvas-colour", subset=4), tmp_path / "images")
    save_encoder(create_encoder("tiny", size=8), tmp_path / "encoder")
    damage(folder / open_data(folder).identity(2), "header")
    words = ["embed", str(tmp_path / "encoder"), str(folder), "-o", str(tmp_path / "f.npz")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "error" not in done.stderr
    assert done.stderr.startswith("warning: 1 image cannot be read and is not in it: ")
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["unreadable"]
    for path in folder.rglob("*.*"):
        damage(path, "header")
    assert CliRunner().invoke(app, words).exit_code == 3


@pytest.mark.slow
def test_embeddings_keep_the_numbers_of_the_others(images: Path, tmp_path: Path) -> None:
    encoder = run(images, tmp_path / "run", epochs=1).encoder
    whole = embed(encoder, open_data(images))
    for i in (2, 3, 129):
        damage(files(images)[i], "pixels")
    rest = embed(encoder, open_data(images), batch=2)  # no image of one batch is left
    keep = [i for i in range(N) if i not in (2, 3, 129)]
    assert rest.index.tolist() == keep and len(rest.missing) == 3
    assert torch.allclose(rest.vectors, whole.vectors[keep], atol=1e-5) and torch.equal(rest.labels, whole.labels[keep])

    done = CliRunner().invoke(app, ["embed", str(tmp_path / "run"), str(images), "-o", str(tmp_path / "f.npz"), "-q"])
    assert done.exit_code == 0 and "3 images cannot be read and are not in it" in done.output
    with np.load(tmp_path / "f.npz") as archive:
        assert archive["index"].tolist() == keep and archive["path"].tolist() == [
            open_data(images).identity(i) for i in keep
        ]
    for file in files(images):
        damage(file, "empty")
    with pytest.raises(DataError, match="none of 130 images can be read"):
        embed(encoder, open_data(images))
    done = CliRunner().invoke(app, ["embed", str(tmp_path / "run"), str(images), "-o", str(tmp_path / "g.npz"), "-q"])
    assert done.exit_code == 3 and not os.path.exists(tmp_path / "g.npz")


def _stopped_on_two_ranks(images: str, out: str) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted) as stopped:
        leave_out_evaluation(patch)
        stop_after(patch, 1)
        run(Path(images), Path(out), epochs=1, cache_on_device=False, workers=0)
    return str(stopped.value)


def test_a_checkpoint_of_two_ranks_has_what_both_could_not_read(images: Path, tmp_path: Path) -> None:
    order = rng.permutation(0, 0, N).tolist()
    bad = [order[at] for at in (3, BATCH // 2 + 3)]  # one of each rank, in the first step
    for at in bad:
        damage(files(images)[at], "header")
    on_ranks(2, _stopped_on_two_ranks, str(images), str(tmp_path / "run"))
    assert sorted(saved(tmp_path / "run")["progress"]["unreadable"]) == sorted(bad)
    assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == 2
