"""A run directory is claimed: of several starts at the same time one gets it, and nothing of another run is removed."""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from small_runs import tiny

import inbatch
from inbatch import api
from inbatch.errors import ConfigError, InbatchError
from inbatch.training.claim import check_free, check_place, check_unchanged, claim, numbered, run_identity


def test_every_start_at_the_same_time_gets_its_own_number(tmp_path: Path) -> None:
    stem = tmp_path / "runs" / "simclr-photos"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim(numbered(stem)), range(24)))
    assert sorted(folders) == sorted(itertools.islice(numbered(stem), 24))


@pytest.mark.slow
def test_every_process_gets_its_own_number(tmp_path: Path) -> None:
    names = [Path(f"{tmp_path / 'run'}-{n}") for n in range(40)]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        folders = list(pool.map(claim, [names] * 40))
    assert sorted(folders) == sorted(names)


def test_a_folder_that_cannot_be_created_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InbatchError, match=r"Cannot write .*simclr-photos-1"):
        claim(numbered(tmp_path / "runs" / "simclr-photos"))


def test_existing_files_of_the_user_are_not_replaced(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds result\.json, encoder, which a run would replace"):
        check_free(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        check_free(tmp_path)


def test_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    before = run_identity(tmp_path)
    check_unchanged(tmp_path, before)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match="another process has used"):
        check_unchanged(tmp_path, before)
    before = run_identity(tmp_path)
    check_unchanged(tmp_path, before)
    (tmp_path / "recipe.json").rename(tmp_path / "aside")
    (tmp_path / "recipe.json").write_text("{}")  # --overwrite in another process, with the same recipe
    with pytest.raises(ConfigError, match="another process has used"):
        check_unchanged(tmp_path, before)


@pytest.mark.usefixtures("brief")
def test_a_slow_start_does_not_remove_a_run_that_finished_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run starts after the first check and ends before the lock."""
    real, out = api.build, tmp_path / "run"

    def build(*arguments, **options):
        monkeypatch.setattr(api, "build", real)
        tiny("simclr", out, epochs=1)
        return real(*arguments, **options)

    monkeypatch.setattr(api, "build", build)
    with pytest.raises(ConfigError, match=r"another process has used .* and nothing was changed"):
        tiny("simclr", out, epochs=1)
    assert api.load_run(out).result["steps"] == 5
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "run.lock"}
    monkeypatch.setattr(api, "build", build)
    for options in ({"overwrite": True}, {"resume": out}):
        (out / "recipe.json").touch()
        with monkeypatch.context() as patch:
            patch.setattr(api, "build", lambda *a, **o: ((out / "recipe.json").touch(), real(*a, **o))[1])
            with pytest.raises(ConfigError, match="another process has used"):
                tiny("simclr", out, epochs=1, **options)
    assert files == {name: (out / name).read_bytes() for name in files}


@pytest.mark.usefixtures("brief")
def test_folders_of_the_user_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.txt").write_text("mine")
    for resume in (False, "auto"):
        with pytest.raises(ConfigError, match="encoder, which a run would replace"):
            tiny("simclr", tmp_path, epochs=1, resume=resume)
    assert (tmp_path / "encoder" / "mine.txt").read_text() == "mine"


@pytest.mark.usefixtures("brief")
def test_a_refused_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        tiny("simclr", None, settings={"fuse.views": [7], "fuse.name": "conv"})
    assert not list(tmp_path.iterdir())
    assert tiny("simclr", None, epochs=1).directory == Path("runs/simclr-digits-canvas-1")


def test_a_directory_that_cannot_be_made_ends_a_start_before_its_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for out in ("file", "file/run", tmp_path / "file" / "run"):
        with pytest.raises(InbatchError, match=r"Cannot write .*run.lock: Not a directory. Choose another folder"):
            inbatch.pretrain("no such images", out=out)
    Path("runs").touch()
    with pytest.raises(InbatchError, match=r"Cannot write .*runs/run.lock: Not a directory"):
        inbatch.pretrain("no such images")
    check_place(tmp_path / "new" / "run")
    assert sorted(os.listdir()) == ["file", "runs"]
