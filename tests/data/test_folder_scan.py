"""Scans of folders: the order of sorted paths, few bytes per name, and only changed folders are read again."""

import os
import pickle
import random
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_pool import on_ranks
from test_loader import VIEWS

from inbatch.data import Loader, cache, open_data
from inbatch.data.sources import folder_scan
from inbatch.data.sources.folder_scan import EXTENSIONS
from inbatch.data.sources.packed_names import Names
from inbatch.rng import permutation


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return an empty cache in which every scan is worth keeping, and trust folders that changed some time ago."""
    monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_scan, "WORTH", 0)
    monkeypatch.setattr(folder_scan, "_STABLE_AGE", -(10**10))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    fill(folder, *(f"{c}/{i}.jpg" for c in "abc" for i in range(3)), "a/deep/er/1.png", "b/notes.txt")
    return folder


def fill(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def read(monkeypatch):
    """Return the list of the names of the folders that are read from now on."""
    names, real = [], os.scandir

    def count(path):
        if isinstance(path, bytes):
            names.append(os.path.basename(os.fsdecode(path)))
        return real(path)

    monkeypatch.setattr(os, "scandir", count)
    return names


def scanned_there(root, tree):
    """Scan in another process."""
    os.environ["INBATCH_CACHE"] = root
    folder_scan.WORTH, folder_scan._STABLE_AGE = 0, -(10**10)  # this process ends with the test
    return len(folder_scan.scan(tree).paths)


def again(folder):
    """Scan in a process that has no scan in memory."""
    folder_scan._recent.clear()
    return folder_scan.scan(folder)


def literal(folder):
    """Compute the specified result literally: every path under the folder, sorted as bytes."""
    paths = []
    for where, folders, files in os.walk(os.fsencode(folder)):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        paths += [
            os.path.relpath(os.path.join(where, name), os.fsencode(folder))
            for name in files
            if not name.startswith(b".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return np.sort(np.array(paths, dtype=np.bytes_)).tolist() if paths else []


class TestNames:
    def test_packed_names_behave_as_a_list(self):
        paths = [b"", b"a", b"\xff/x y\n", b"z" * 300, b"b"]
        names = Names(paths)
        assert len(names) == 5 and list(names) == names.tolist() == paths
        assert names[-1] == b"b" and names[3] == paths[3] and isinstance(names[0], bytes)
        for wrong in (5, -6):
            with pytest.raises(IndexError):
                names[wrong]
        assert Names().tolist() == []

    def test_packed_names_are_small_in_memory_and_pickled(self):
        names = Names(b"%06d" % i for i in range(10_000))
        assert len(pickle.dumps(names)) < 10_000 * (6 + 8) * 1.01
        assert pickle.loads(pickle.dumps(names)).tolist() == names.tolist()


class TestOrder:
    def test_names_that_sort_about_a_slash(self, tmp_path):
        fill(tmp_path, *(f"{name}/1.png" for name in ("a", "a b", "a-b", "a.d", "a0", "A", "é", "a/a", "a/a.b")))
        fill(tmp_path, "a.png", "a!.png", "a/.png/2.png", "a/b.png", "a0.png", "a/a/0.png", "zz.JPG", ".x/1.png")
        paths = folder_scan.scan(tmp_path).paths.tolist()
        assert paths == literal(tmp_path) and len(paths) == 15

    def test_any_tree(self, tmp_path):
        draw = random.Random(3)
        for _ in range(300):
            depth = draw.choice((1, 1, 2, 3, 4))
            parts = [
                "".join(draw.choice("ab-.0 ~") for _ in range(draw.randint(1, 3))).strip(".") + "x"
                for _ in range(depth)
            ]
            path = tmp_path.joinpath(*parts)
            path.mkdir(parents=True, exist_ok=True)
            (path / (draw.choice("ab-.0") + draw.choice((".png", ".jpeg", ".txt")))).touch()
        paths = folder_scan.scan(tmp_path).paths.tolist()
        assert paths == literal(tmp_path) and len(paths) > 100

    def test_first_of_two_links_by_name_is_followed(self, tmp_path):
        """By the folder's name alone: `photos` before `photos-old`, whose images would sort first."""
        fill(tmp_path, "photos/1.png")
        (tmp_path / "photos-old").symlink_to("photos")
        assert folder_scan.scan(tmp_path).paths.tolist() == [b"photos/1.png"]

    def test_deeper_than_python_recurses(self, tmp_path):
        at = os.open(tmp_path, os.O_RDONLY)
        for _ in range(1200):  # longer than the path limit, as seen from the root
            os.mkdir("d", dir_fd=at)
            at, last = os.open("d", os.O_RDONLY, dir_fd=at), at
            os.close(last)
        os.close(at)
        fill(tmp_path, "d/d/1.png")
        assert folder_scan.scan(tmp_path).paths.tolist() == [b"d/d/1.png"]
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)

    def test_links_that_lead_nowhere(self, tmp_path):
        fill(tmp_path, "1.png")
        (tmp_path / "round.png").symlink_to("round.png")
        (tmp_path / "gone.png").symlink_to("nowhere")
        os.mkfifo(tmp_path / "pipe.png")
        result = folder_scan.scan(tmp_path)
        assert (
            result.paths.tolist() == [b"1.png"]
            and result.skipped == {".png that are not files": 3}
            and not result.stamps
        )


class TestLabels:
    def test_classes_in_their_own_order(self, tmp_path):
        """`a` is the first class although the images of `a-b` sort first; a test split has the classes of train."""
        for path in ("train/a/1.png", "train/a-b/2.png", "train/c/3.png", "val/a-b/1.png", "val/a/2.png"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / path)
        train, test = open_data(tmp_path), open_data(tmp_path, "test")
        assert train.classes == test.classes == ("a", "a-b", "c")
        assert train.labels.tolist() == [1, 0, 2] and test.labels.tolist() == [1, 0]
        assert train.labels.dtype == torch.long

    def test_a_test_split_does_not_read_train_again(self, root, tmp_path, monkeypatch):
        fill(tmp_path, *(f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(2)))
        monkeypatch.setenv("INBATCH_CACHE", "off")
        train, names = open_data(tmp_path), read(monkeypatch)
        test = open_data(tmp_path, "test")
        assert sorted(names) == ["a", "b", "val"] and test.classes == train.classes
        assert open_data(tmp_path).scan is train.scan
        fill(tmp_path, "train/c/1.png")
        assert open_data(tmp_path).classes == ("a", "b", "c")


class TestKept:
    def test_only_what_changed_is_read(self, root, tree, monkeypatch):
        first = again(tree)
        assert (first.read, first.kept) == (6, 0)
        names = read(monkeypatch)
        second = again(tree)
        assert not names and (second.read, second.kept) == (0, 6)
        assert second.paths.tolist() == first.paths.tolist() == literal(tree) and second.skipped == {".txt": 1}
        (tree / "b" / "1.jpg").unlink()
        fill(tree, "c/new/9.png", "b/other.md")
        names.clear()
        third = again(tree)
        assert sorted(names) == ["b", "c", "new"] and third.skipped == {".md": 1, ".txt": 1}
        assert third.paths.tolist() == literal(tree)
        os.rename(tree / "a", tree / "z")
        assert again(tree).paths.tolist() == literal(tree)
        (tree / "z" / "deep").rename(tree / "z" / "deeper")
        assert again(tree).paths.tolist() == literal(tree)

    def test_a_folder_that_a_moment_ago_was_another(self, root, tree, monkeypatch):
        """A time of change that is set back, as by rsync and tar, does not hide a change."""
        again(tree)
        was = os.stat(tree / "a")
        fill(tree, "a/0.jpg")
        os.utime(tree / "a", ns=(was.st_atime_ns, was.st_mtime_ns))
        assert b"a/0.jpg" in again(tree).paths.tolist()

    def test_recently_changed_folders_are_read_again(self, root, tree, monkeypatch):
        monkeypatch.setattr(folder_scan, "_STABLE_AGE", 10**12)
        assert again(tree).stamps == {}
        names = read(monkeypatch)
        assert again(tree).kept == 0 and len(names) == 6 and folder_scan.scan(tree).read == 6

    def test_repaired_link_is_followed(self, root, tree):
        (tree / "a" / "x.png").symlink_to(tree.parent / "later.png")
        assert b"a/x.png" not in again(tree).paths.tolist()
        fill(tree.parent, "later.png")
        scan = again(tree)
        assert b"a/x.png" in scan.paths.tolist() and (scan.read, scan.kept) == (1, 5)

    def test_interrupted_scan_is_continued(self, root, tree, monkeypatch):
        real, names = os.scandir, []

        def stop(path):
            if isinstance(path, bytes) and path.endswith(b"/c"):
                raise KeyboardInterrupt
            return real(path)

        monkeypatch.setattr(os, "scandir", stop)
        with pytest.raises(KeyboardInterrupt):
            again(tree)
        monkeypatch.setattr(os, "scandir", real)
        names = read(monkeypatch)
        scan = again(tree)
        assert names == ["c"] and scan.kept == 5 and scan.paths.tolist() == literal(tree)

    def test_killed_scan_is_continued_from_its_last_state(self, root, tree, monkeypatch):
        monkeypatch.setattr(folder_scan, "_EVERY", 0.0)
        stored, real = [], folder_scan._store

        def die(place, listings, name):
            real(place, listings, name)
            stored.append(len(listings))
            if len(stored) == 4:
                raise MemoryError  # no further action is possible

        monkeypatch.setattr(folder_scan, "_store", die)
        with pytest.raises(MemoryError):
            again(tree)
        monkeypatch.setattr(folder_scan, "_store", real)
        scan = again(tree)
        assert stored == [1, 2, 3, 4] and (scan.read, scan.kept) == (2, 4) and scan.paths.tolist() == literal(tree)

    def test_short_scans_leave_nothing(self, root, tree, monkeypatch):
        monkeypatch.setattr(folder_scan, "WORTH", 60.0)
        again(tree)
        assert not root.exists()

    @pytest.mark.parametrize("setting", [("INBATCH_CACHE", "off"), ("INBATCH_CACHE_GB", "0")])
    def test_disabled_cache_is_not_written(self, root, tree, setting, monkeypatch):
        monkeypatch.setenv(*setting)
        assert again(tree).read == again(tree).read == 6 and not root.exists()

    def test_listing_is_an_entry_of_the_cache(self, root, tree):
        again(tree)
        (one,) = cache.entries()
        assert one.name == str(tree) and one.bytes == cache.used() > 100
        assert cache.clear() == one.bytes and again(tree).read == 6

    @pytest.mark.parametrize("name", ["names.bin", "folders.i64", "entry.json"])
    @pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
    def test_damaged_listing_is_read_again(self, root, tree, name, how):
        again(tree)
        (one,) = cache.entries()
        file = one.path / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 2
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(data if how == "flipped" else data[:-1])
        scan = again(tree)
        assert scan.paths.tolist() == literal(tree) and scan.skipped == {".txt": 1}
        assert again(tree).kept == 6  # a complete file has replaced it

    @pytest.mark.parametrize("text", ["[]", "null", "{}", '{"names": 0, "folders": 0, "skipped": []}'])
    def test_listing_with_another_note_is_not_used(self, root, tree, text):
        again(tree)
        (one,) = cache.entries()
        (one.path / "entry.json").write_text(text)
        assert again(tree).read == 6

    def test_names_of_any_bytes(self, root, tmp_path):
        folder = tmp_path / "any"
        folder.mkdir()
        for name in (b"\xff\n.png", b"a\tb.jpg", b"\xe2\x80\xae.png", b"x.\xfe"):
            Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).touch()
        first, second = again(folder), again(folder)
        assert second.kept == 1 and second.paths.tolist() == first.paths.tolist() == literal(folder)
        assert second.skipped == first.skipped == {".\udcfe": 1}
        assert b"\\udcfe" in (cache.entries()[0].path / "entry.json").read_bytes()

    def test_two_processes_at_once(self, root, tree):
        assert on_ranks(2, scanned_there, str(root), str(tree)) == [10, 10]
        assert again(tree).kept == 6 and not [p for p in root.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_long_path_costs_itself_alone(tmp_path):
    """One path of 250 bytes among 20,000 short ones: a numpy array of bytes took 5 MB for them."""
    fill(tmp_path, "x" * 120 + "/" + "y" * 120 + ".jpg")
    for i in range(0, 20_000):
        if i % 1000 == 0:
            (tmp_path / f"{i:05d}").mkdir()
            (tmp_path / f"{i:05d}" / "0.jpg").touch()
        else:
            os.link(tmp_path / f"{i // 1000 * 1000:05d}" / "0.jpg", tmp_path / f"{i // 1000 * 1000:05d}" / f"{i}.jpg")
    scan = folder_scan.scan(tmp_path)
    assert len(scan.paths) == 20_001 and len(pickle.dumps(scan.paths)) < 20_001 * 25


def test_order_of_an_epoch_is_sent_to_workers_in_pieces(monkeypatch):
    monkeypatch.setattr("inbatch.data.loader.PIECE", 3)
    source = open_data(np.zeros((40, 8, 8), np.uint8))
    loader = Loader(source, batch=7, views=VIEWS, seed=0, resident=False, workers=0)
    order = loader._order
    for start in (0, 2):
        batches = list(loader.epoch(1, start))
        keys = list(order)
        assert len(order) == len(keys) == 3 * (5 - start) and [len(key[1]) for key in keys[:3]] == [3, 3, 1]
        assert {epoch for epoch, _ in keys} == {1}
        places = list(chain.from_iterable(key[1] for key in keys))
        assert permutation(0, 1, 40)[places].tolist() == torch.cat([batch.index for batch in batches]).tolist()
        assert all(isinstance(key[1], range) for key in keys), "a list would be copied into every worker"
