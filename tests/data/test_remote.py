"""Shards behind URLs: file:// and memory:// equal the files, the index of their members, faults, and credentials."""

import builtins
import io
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tar_shards import encoded, write_shards, write_tar

from inbatch.data import open_data, splits
from inbatch.data.sources import parquet as parquet_source
from inbatch.data.sources import tar_members
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import remote
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.remote import Url, is_url, public
from inbatch.training.requested_settings import merged_settings

fsspec = pytest.importorskip("fsspec")
SECRETS = ("hunter2", "AKIA", "deadbeef")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", (3, 5, 2))


@pytest.fixture
def memory(shards: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for file in sorted(shards.iterdir()):
        fs.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def values(source: Any) -> list[int]:
    return [int(source.image(i)[1, 0, 0]) for i in range(len(source))]


class TestUrls:
    def test_urls_are_recognised(self) -> None:
        assert all(map(is_url, ("s3://b/a.tar", "https://h/x", "file:///a", "memory://a", "gs://b/{0..1}.tar")))
        assert not any(map(is_url, ("C://a", "a/b.tar", "torchvision/CIFAR10", Path("s3://b"), None, "hf/a:b")))

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("https://me:hunter2@host/a.tar", "https://host/a.tar"),
            ("https://host/a.tar?X-Amz-Signature=deadbeef&Expires=1", "https://host/a.tar"),
            ("s3://AKIA:hunter2@bucket/t-{00..09}.tar", "s3://bucket/t-{00..09}.tar"),
            ("memory://bucket/t-?.tar", "memory://bucket/t-?.tar"),
            ("file:///data/a.tar", "file:///data/a.tar"),
            ("photos/a?b=c", "photos/a?b=c"),
        ],
    )
    def test_credentials_are_not_shown(self, url: str, shown: str) -> None:
        assert public(url) == shown == str(Url(url)) and repr(Url(url)) == repr(shown)
        away = pickle.loads(pickle.dumps(Url(url, "/a.tar")))  # as for workers that are not forked
        assert (away, away.base, away.path) == (shown, url, "/a.tar")

    def test_errors_hide_credentials(self) -> None:
        url = "https://me:hunter2@host/a.tar?sig=deadbeef"
        with pytest.raises(DataError) as caught, remote.reaching(Url(url)):
            raise OSError(f"403 for {url}; user me:hunter2, query sig=deadbeef, key hunter2")
        assert not any(secret in str(caught.value) for secret in SECRETS) and "403" in str(caught.value)
        with pytest.raises(ConfigError) as error:
            merged_settings(None, None, {"test": url}, {})
        assert "credentials in its URL" in str(error.value)
        assert not any(secret in str(error.value) for secret in SECRETS)

    def test_several_urls_are_named_by_one_pattern(self) -> None:
        with pytest.raises(ConfigError, match=r"'s3://b/1.tar' cannot be one of several paths.*range or pattern"):
            joined_paths(["s3://me:hunter2@b/1.tar", "s3://b/2.tar"])


class TestReading:
    def test_gives_the_images_of_the_files(self, shards: Path, memory: str) -> None:
        local = open_data(shards)
        for data in (memory, f"{memory}/", f"{memory}/*.tar", memory + "/t-{000..002}.tar", f"file://{shards}"):
            source = open_data(data)
            assert values(source) == values(local) == list(range(10))
            assert source.signature() == local.signature() and source.name == data
            assert [*source.read_shards(range(10))] == [*local.read_shards(range(10))]
            assert source.shard_sizes() == [3, 5, 2] and source.fingerprint() is not None

    def test_names_of_splits_in_a_folder(self, memory: str) -> None:
        fs = fsspec.filesystem("memory")
        for old, new in (("t-000", "train-0"), ("t-001", "train-1"), ("t-002", "test-0")):
            fs.mv(f"/bucket/{old}.tar", f"/bucket/{new}.tar")
        assert splits(memory) == ("train", "test")
        assert (len(open_data(memory)), len(open_data(memory, "test"))) == (8, 2)

    def test_parquet_files(self, memory: str) -> None:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        file = io.BytesIO()
        table = arrow.table({"image": [encoded(i) for i in range(20)], "label": np.arange(20) % 3})
        parquet.write_table(table, file, row_group_size=8)
        fsspec.filesystem("memory").pipe_file("/bucket/p.parquet", file.getvalue())
        source = open_data(f"{memory}/p.parquet")
        assert values(source) == list(range(20)) and source.shard_sizes() == [8, 8, 4]
        assert [*source.read_shards([7, 8, 19])] == [encoded(i) for i in (7, 8, 19)]
        with pytest.raises(DataError, match=r"'memory://bucket' names .tar and .parquet files: choose one kind"):
            open_data(memory)

    def test_parquet_files_are_described_at_once_in_their_order(
        self, memory: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first file waits until the third is read: described one after another, they would never end."""
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for number in range(4):
            file = io.BytesIO()
            rows = range(3 * number, 3 * number + 3)
            table = arrow.table({"image": [encoded(i) for i in rows], "label": list(rows)})
            parquet.write_table(table, file)
            fsspec.filesystem("memory").pipe_file(f"/bucket/p/{number}.parquet", file.getvalue())
        third, read = threading.Event(), parquet_source.read_table

        def late(file: str, *options: Any) -> Any:
            if file.endswith("0.parquet"):
                assert third.wait(10)
            table = read(file, *options)
            if file.endswith("2.parquet"):
                third.set()
            return table

        monkeypatch.setattr(parquet_source, "read_table", late)
        source = open_data(f"{memory}/p/*.parquet")
        assert values(source) == source.labels.tolist() == list(range(12)) and source.shard_sizes() == [3] * 4
        fsspec.filesystem("memory").pipe_file("/bucket/p/1.parquet", b"no parquet")
        with pytest.raises(DataError, match=r"p/1.parquet' cannot be read: ArrowInvalid"):
            open_data(f"{memory}/p/*.parquet")

    def test_members_are_read_once_and_again_after_a_change(
        self, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_tar(cache.parent / "x.tar", 0, 4)
        first, read = open_data(memory), []
        assert len(list(cache.iterdir())) == 3
        entries = tar_members._entries
        monkeypatch.setattr(tar_members, "_entries", lambda *a: read.append(str(a[0])) or entries(*a))
        assert open_data(memory).signature() == first.signature() and not read
        fsspec.filesystem("memory").pipe_file("/bucket/t-001.tar", (cache.parent / "x.tar").read_bytes())
        assert len(open_data(memory)) == 9 and read == ["memory:///bucket/t-001.tar"]
        for entry in cache.iterdir():
            (entry / "members.json").write_text("[]")
        assert len(open_data(memory)) == 9 and len(read) == 4, "damaged entries are read again"

    def test_labels_keep_their_kinds_in_the_cache(self) -> None:
        from inbatch.data.sources.labels import Unusable
        from inbatch.data.sources.shard_index import _packed, _unpacked

        for label in (b"3\xff", "cat", 4, 1.5, [1, 2], None, Unusable("such as x"), False):
            assert _unpacked(_packed(label)) == label and type(_unpacked(_packed(label))) is type(label)


class TestFaults:
    def test_a_missing_shard(self, memory: str) -> None:
        with pytest.raises(DataError, match=r"'memory://bucket/t-003.tar' does not exist: correct the URL"):
            open_data(memory + "/t-{000..003}.tar")
        with pytest.raises(DataError, match=r"'memory://nowhere/' "):
            open_data("memory://nowhere/")

    def test_a_shard_that_is_cut_off(self, memory: str) -> None:
        fs = fsspec.filesystem("memory")
        fs.pipe_file("/bucket/t-001.tar", fs.cat_file("/bucket/t-001.tar")[:2000])
        with pytest.raises(DataError, match=r"'memory:///bucket/t-001.tar' cannot be read as a tar file: unexp"):
            open_data(memory)

    def test_a_shard_that_changes_after_it_was_opened(self, memory: str) -> None:
        source, fs = open_data(memory), fsspec.filesystem("memory")
        data = fs.cat_file("/bucket/t-000.tar")
        fs.pipe_file("/bucket/t-000.tar", data)  # another time
        with pytest.raises(DataError, match=r"t-000.tar' has changed since the run began"):
            list(source.read_shards([0, 1]))
        fs.rm("/bucket/t-001.tar")
        with pytest.raises(DataError, match=r"t-001.tar' does not exist"):
            list(source.read_shards([4]))
        with pytest.raises(DataError, match=r"t-001.tar' does not exist"):
            source.image(4)

    def test_url_of_unsupported_files_is_refused(self, memory: str) -> None:
        fsspec.filesystem("memory").pipe_file("/bucket/readme.md", b"?")
        with pytest.raises(DataError, match=r"names no .tar or .parquet file, only readme.md: correct the URL"):
            open_data(f"{memory}/readme.md")
        with pytest.raises(DataError, match=r"'memory://bucket/\{5..1\}.tar' names no file"):
            open_data(memory + "/{5..1}.tar")

    def test_packages_that_are_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match=r"'nosuch://b/a.tar': fsspec knows no file system 'nosuch'"):
            open_data("nosuch://b/a.tar")
        real = builtins.__import__

        def without(name: str, *rest: Any, **more: Any) -> Any:
            if name.split(".")[0] in missing:
                raise ImportError(f"No module named {name!r}")
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", without)
        missing = {"s3fs"}
        with pytest.raises(ConfigError, match=r"'s3://bucket/a.tar' needs a package that is not installed: .*s3fs"):
            open_data("s3://AKIA:hunter2@bucket/a.tar")
        missing = {"fsspec"}
        with pytest.raises(ConfigError, match=r'URLs need fsspec: python -m pip install "inbatch\[remote\]"'):
            open_data("s3://bucket/a.tar")
