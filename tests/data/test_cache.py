"""Decoded data sets on disk: what the cache key depends on, and every fault of the disk or of concurrent runs."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_pool import on_ranks

from inbatch.data import Subset, cache, decoded_cache, open_data
from inbatch.data.resident import decode_all, hold
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import unfinished as unfinished_module
from inbatch.runtime.unfinished import unfinished_folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return the root of an empty cache in which every set is worth keeping."""
    monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INBATCH_CACHE_GB", raising=False)
    monkeypatch.setattr(decoded_cache, "WORTH", 0)
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(256, size=(10 + i % 2, 12, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def entry(root):
    (path,) = [path for path in root.iterdir() if not path.name.startswith(".")]
    return path


def held_there(root, photos):
    """Hold images in another process, which knows the cache only."""
    os.environ["INBATCH_CACHE"] = root
    held = hold(open_data(photos), canvas=8)
    return held.notes[0][:14], int(held.images.sum())


def half_written(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def same(held, source):
    expected = decode_all(source, canvas=held.images.shape[-1], max_bad=0.5)
    assert torch.equal(held.images, expected.images) and torch.equal(held.size, expected.size)
    assert held.size.dtype == torch.long and held.dropped == expected.dropped and held.scaled == expected.scaled
    assert len(held.source) == len(expected.source)


class TestHold:
    def test_decoded_once(self, root, photos, monkeypatch):
        source = open_data(photos)
        first = hold(source, canvas=12)
        assert first.notes == (f"cached in {entry(root)}",)
        with monkeypatch.context() as undecoded:
            undecoded.setattr("inbatch.data.resident._decode_all", None)
            again = hold(open_data(photos), canvas=12)
        assert again.notes == (f"from the cache, {entry(root)}",)
        for held in (first, again):
            same(held, source)

    def test_cache_keeps_the_list_of_unreadable_and_scaled_images(self, root, photos):
        data = (photos / "03.png").read_bytes()
        (photos / "03.png").write_bytes(data[:40])
        source = open_data(photos)
        for expected in ("cached in", "from the cache"):
            held = hold(source, canvas=11, max_bad=0.1)
            assert held.notes[0].startswith(expected) and held.scaled == 11 and len(held.source) == 11
            assert "03.png' cannot be read" in held.dropped[0] and held.source.identity(3) == "04.png"
            same(held, source)
        with pytest.raises(DataError, match="1 of 12 images"):  # as strict as during decoding
            hold(source, canvas=11, max_bad=0.01)
        times = os.stat(photos / "03.png")
        with open(photos / "03.png", "wb") as file:  # as if the disk had failed to read it earlier
            file.write(data)
        os.utime(photos / "03.png", ns=(times.st_atime_ns, times.st_mtime_ns))
        (was,) = cache.entries()
        whole = hold(_like(source, was.path), canvas=11, max_bad=0.1)
        assert "can be read now" in whole.notes[0] and len(whole.source) == 12

    @pytest.mark.parametrize("setting", [("INBATCH_CACHE", "off"), ("INBATCH_CACHE_GB", "0")])
    def test_disabled_cache_is_not_written(self, root, photos, setting, monkeypatch):
        monkeypatch.setenv(*setting)
        assert hold(open_data(photos)).notes == () and not root.exists()

    def test_fast_sources_are_not_cached(self, root, photos, monkeypatch):
        monkeypatch.setattr(decoded_cache, "WORTH", 1000.0)
        assert hold(open_data(photos)).notes == () and not root.exists()
        assert hold(open_data(np.zeros((3, 8, 8), np.uint8))).notes == ()  # in memory already

    def test_invalid_size_limit_is_refused(self, root, photos, monkeypatch):
        for wrong in ("ten", "-1", "nan", "inf"):
            monkeypatch.setenv("INBATCH_CACHE_GB", wrong)
            with pytest.raises(ConfigError, match=f"INBATCH_CACHE_GB is '{wrong}': give the size"):
                hold(open_data(photos))


def _like(source, path):
    """Return the source with the file states that the cache entry contains."""
    source.fingerprint = lambda: "fixed"
    moved = decoded_cache.place(source, 11)
    os.rename(path, moved)
    return source


class TestKey:
    def test_key_of_a_folder(self, root, photos):
        def key(data=photos, canvas=12, **settings):
            return decoded_cache.place(open_data(data, **settings), canvas)

        was = key()
        assert was.parent == root and key() == was and key(canvas=11) != was and key(channels=1) != was
        assert key(subset=5) not in (was, key(subset=6))
        os.utime(photos / "03.png", ns=(1, 1))
        touched = key()
        assert touched != was
        os.rename(photos / "03.png", photos / "3.png")
        renamed = key()
        assert renamed not in (was, touched)
        with open(photos / "05.png", "ab") as file:
            file.write(b"!")
        os.utime(photos / "05.png", ns=(1, 1))
        assert key() not in (was, touched, renamed)

    def test_key_of_a_parquet_file(self, root, tmp_path):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

        def key(images, group=2):
            rows = [{"bytes": image, "path": "x"} for image in images]
            parquet.write_table(arrow.table({"image": rows}), tmp_path / "train.parquet", row_group_size=group)
            os.utime(tmp_path / "train.parquet", ns=(1, 1))
            return decoded_cache.place(open_data(tmp_path), 12)

        keys = [key([b"aa", b"bb", b"cc"]), key([b"aa", b"bb", b"dd"]), key([b"aa", b"bb", b"cc"], 3)]
        assert len(set(keys)) == 3 and key([b"aa", b"bb", b"cc"]) == keys[0]

    def test_key_depends_on_the_decoder_and_the_order(self, root, photos, monkeypatch):
        source = open_data(photos)
        turned = Subset(source, torch.arange(11, -1, -1), "turned round")
        keys = {decoded_cache.place(source, 12), decoded_cache.place(turned, 12)}
        monkeypatch.setattr(decoded_cache, "decoders", lambda: "another version")
        assert len(keys | {decoded_cache.place(source, 12)}) == 3
        (photos / "03.png").unlink()
        assert decoded_cache.place(source, 12) is None  # opening it reports the error


class TestFaults:
    @pytest.mark.parametrize("name", ["images.u8", "sizes.i32", "entry.json"])
    @pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "gone"])
    def test_damaged_entry_is_replaced(self, root, photos, name, how):
        source = open_data(photos)
        hold(source)
        file = entry(root) / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 2
        changed = {"flipped": data, "truncated": data[:-1], "longer": data + b"1", "gone": b""}[how]
        file.write_bytes(changed)
        if how == "gone":
            file.unlink()
        if name == "entry.json" and how == "flipped":
            file.write_bytes(bytes(data).replace(b'"shape": [12', b'"shape": [13'))
        held = hold(source)
        assert "is damaged" in held.notes[0] and held.notes[1].startswith("cached in")
        same(held, source)
        assert hold(source).notes[0].startswith("from the cache") and not half_written(root)

    @pytest.mark.parametrize("text", ["[]", "null", '{"shape": [1e99, 3, 1, 1]}', '{"shape": [-1, -1, 3, 4]}', "\x00"])
    def test_entry_with_another_note_is_damaged(self, root, photos, text):
        hold(open_data(photos))
        (entry(root) / "entry.json").write_text(text)
        assert "is damaged" in hold(open_data(photos)).notes[0]

    def test_a_folder_that_cannot_be_written(self, root, photos, monkeypatch):
        root.write_text("a file, where a folder is wanted")
        held = hold(open_data(photos))
        assert "cannot be written" in held.notes[0]
        same(held, open_data(photos))
        root.unlink()

        def refuse(*_, **__):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(cache.Path, "mkdir", refuse)  # permissions do not stop root
        assert hold(open_data(photos)).notes == (f"not cached: {root} cannot be written (Read-only file system)",)

    def test_folder_of_another_user_is_reported(self, root, photos, monkeypatch):
        """The cache can be neither read nor written: the run reports it and continues without a cache."""
        hold(open_data(photos))

        def refused(name):
            allowed = getattr(cache.Path, name)

            def ask(path, *args, **options):
                if (path == root and name != "is_dir") or root in path.parents:
                    raise PermissionError(13, "Permission denied")
                return allowed(path, *args, **options)

            monkeypatch.setattr(cache.Path, name, ask)

        for name in ("is_dir", "iterdir", "mkdir"):
            refused(name)
        held = hold(open_data(photos))
        assert "another user's (Permission denied)" in held.notes[0] and "cannot be written" in held.notes[1]
        same(held, open_data(photos))
        assert cache.entries() == [] and cache.used() == 0 and cache.clear() == 0

    def test_a_full_disk(self, root, photos, monkeypatch):
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(9, 9, 1000))
        assert "free in" in hold(open_data(photos)).notes[0] and not list(root.iterdir())
        monkeypatch.undo()
        monkeypatch.setenv("INBATCH_CACHE", str(root))
        monkeypatch.setattr(decoded_cache, "WORTH", 0)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(decoded_cache, "to_json", full)  # after the pixels
        assert "No space left on device" in hold(open_data(photos)).notes[0] and not list(root.iterdir())

    def test_a_damaged_entry_that_cannot_be_removed(self, root, photos, monkeypatch):
        hold(open_data(photos))
        (entry(root) / "images.u8").write_bytes(b"?")
        monkeypatch.setattr(cache.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only")))
        held = hold(open_data(photos))
        assert "is damaged" in held.notes[0] and "not cached" in held.notes[1]
        same(held, open_data(photos))

    def test_entry_of_a_dead_writer_is_removed_and_that_of_a_living_one_kept(self, root, photos):
        source = open_data(photos)
        path = decoded_cache.place(source, None)
        left = root / f".{path.name}.tmp"
        root.mkdir()
        with unfinished_folder(left) as mine:
            assert mine
            (left / "images.u8").write_bytes(b"half")
            for file in (left / "images.u8", left):
                os.utime(file, (time.time() - 4000,) * 2)  # a writer that takes long
            assert hold(source).notes == (f"being cached in {root} by another process",)
            assert cache.clear() == 0 and (left / "images.u8").exists()
        other = root / f".{'0' * 64}.tmp"
        other.mkdir()
        assert hold(source).notes == (f"cached in {path}",) and not half_written(root)

    def test_a_dead_writer_on_a_disk_without_locks(self, root, photos, monkeypatch):
        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("inbatch.runtime.unfinished.fcntl.flock", refuse)
        source = open_data(photos)
        path = decoded_cache.place(source, None)
        left = root / f".{path.name}.tmp"
        left.mkdir(parents=True)
        (left / "images.u8").write_bytes(b"half")
        assert hold(source).notes == (f"being cached in {root} by another process",)
        for file in (left / "images.u8", left):
            os.utime(file, (time.time() - 4000,) * 2)
        assert hold(source).notes == (f"cached in {path}",) and not half_written(root)


class TestSize:
    def test_least_recently_used_go_first(self, root, photos, monkeypatch):
        sets = [open_data(photos, subset=n) for n in (3, 4, 5)]
        for age, source in zip((300, 200), sets, strict=False):
            hold(source)
            os.utime(decoded_cache.place(source, None) / "entry.json", (time.time() - age,) * 2)
        assert hold(sets[0]).notes[0].startswith("from the cache")  # used now
        (root / "notes.txt").write_text("not ours")
        monkeypatch.setenv("INBATCH_CACHE_GB", str((cache.used() + 600) / 1e9))
        hold(sets[2])
        assert {e.path for e in cache.entries()} == {
            decoded_cache.place(sets[0], None),
            decoded_cache.place(sets[2], None),
        }
        monkeypatch.setenv("INBATCH_CACHE_GB", "1e-6")
        assert "over the limit of 1e-06 GB" in hold(sets[1]).notes[0]
        assert len(cache.entries()) == 2  # no entry is removed for a set that does not fit

    def test_clear_removes_only_entries_of_the_cache(self, root, photos):
        hold(open_data(photos))
        (root / "notes.txt").write_text("not ours")
        (root / "folder").mkdir()
        (one,) = cache.entries()
        assert one.name == str(photos) and one.bytes == cache.used() > 12 * 3 * 10 * 12 and one.used > 1e9
        assert cache.clear() == one.bytes and cache.entries() == []
        assert sorted(path.name for path in root.iterdir()) == ["folder", "notes.txt"]
        assert cache.clear() == 0

    @pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
    def test_only_the_user_can_read_the_cache(self, root, photos):
        hold(open_data(photos))
        assert root.stat().st_mode & 0o777 == entry(root).stat().st_mode & 0o777 == 0o700


class TestWhere:
    def test_the_users_folder(self, monkeypatch, tmp_path):
        for name in ("INBATCH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(cache.Path, "home", lambda: tmp_path)
        for platform, folder in (("linux", ".cache/inbatch"), ("darwin", "Library/Caches/inbatch")):
            monkeypatch.setattr(sys, "platform", platform)
            assert cache.where() == tmp_path / folder
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as the specification requires
        assert cache.where() == tmp_path / "Library/Caches/inbatch"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.where() == tmp_path / "xdg" / "inbatch"
        monkeypatch.setenv("INBATCH_CACHE", "here")
        assert cache.where() == Path.cwd() / "here"
        monkeypatch.setenv("INBATCH_CACHE", "OFF")
        assert cache.where() is None and cache.entries() == [] and cache.used() == 0

    def test_no_home(self, monkeypatch):
        monkeypatch.delenv("INBATCH_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def none():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(cache.Path, "home", none)
        assert cache.where() is None

    def test_the_limit(self, monkeypatch):
        monkeypatch.delenv("INBATCH_CACHE_GB", raising=False)
        assert cache.limit() == 10 * 10**9
        monkeypatch.setenv("INBATCH_CACHE_GB", "0.5")
        assert cache.limit() == 5 * 10**8


class TestTogether:
    def test_writers_at_once(self, root, photos):
        source = open_data(photos)
        with ThreadPoolExecutor(6) as pool:
            copies = list(pool.map(lambda _: hold(source), range(12)))
        for held in copies:
            same(held, source)
            assert any(word in held.notes[0] for word in ("cached in", "from the cache"))
        assert len(cache.entries()) == 1 and not half_written(root)
        assert hold(source).notes[0].startswith("from the cache")

    def test_entry_written_before_the_lock_is_kept(self, root, monkeypatch):
        """It removes abandoned folders, and a new one looks like these until it is locked."""
        paths, locked = [root / (digit * 64) for digit in "ab"], unfinished_module._locked

        def write(folder):
            (folder / "entry.json").write_text('{"name": "one"}')

        def late(path, wait):
            monkeypatch.setattr(unfinished_module, "_locked", locked)
            assert cache.write_entry(paths[1], 10, write) == f"cached in {paths[1]}"
            return locked(path, wait)

        monkeypatch.setattr(unfinished_module, "_locked", late)
        assert cache.write_entry(paths[0], 10, write) == f"cached in {paths[0]}"
        assert {entry.path for entry in cache.entries()} == {*paths} and not half_written(root)

    def test_threads_that_write_other_entries(self, root):
        def write(folder):
            (folder / "entry.json").write_text('{"name": "one"}')

        paths = [root / f"{i:064x}" for i in range(48)]
        with ThreadPoolExecutor(6) as pool:
            notes = list(pool.map(lambda path: cache.write_entry(path, 10, write), paths))
        assert notes == [f"cached in {path}" for path in paths] and len(cache.entries()) == 48

    def test_entry_of_a_faster_process_is_kept(self, root, photos, monkeypatch):
        source = open_data(photos)
        path, rename = decoded_cache.place(source, None), os.rename

        def late(half, whole):
            (whole / "first").mkdir(parents=True)
            rename(half, whole)

        monkeypatch.setattr(cache.os, "rename", late)
        assert hold(source).notes == (f"cached in {root} by another process",)
        assert (path / "first").is_dir() and not half_written(root)

    def test_folder_removed_before_the_lock_is_no_error(self, root, photos, monkeypatch):
        def taken(path, wait, locked=unfinished_module._locked):
            if wait:
                path.rmdir()
            return locked(path, wait)

        monkeypatch.setattr(unfinished_module, "_locked", taken)
        assert hold(open_data(photos)).notes == (f"being cached in {root} by another process",)
        assert not half_written(root)

    @pytest.mark.skipif(os.name != "posix", reason="Windows keeps mapped files")
    def test_mapped_images_remain_valid_after_clear(self, root, photos):
        source = open_data(photos)
        hold(source)
        mapped = hold(source)
        before = mapped.images.clone()
        cache.clear()
        mapped.images[0, 0, 0, 0] += 1  # a private copy: the file does not change
        assert not torch.equal(mapped.images, before) and torch.equal(mapped.images[1:], before[1:])

    def test_writing_into_the_map_leaves_the_file(self, root, photos):
        source = open_data(photos)
        hold(source)
        hold(source).images.zero_()
        same(hold(source), source)

    def test_second_process_reads_the_entry(self, root, photos):
        hold(open_data(photos), canvas=8)
        expected = decode_all(open_data(photos), canvas=8).images.sum()
        assert on_ranks(1, held_there, str(root), str(photos)) == [("from the cache", int(expected))]
