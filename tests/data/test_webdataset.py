"""Tar shards: written by the webdataset library and by hand, and the faults of each."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch.data import Loader, open_data, splits
from inbatch.data.views import View, Views
from inbatch.errors import DataError


def encoded(value: int, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 7, 9)).save(file, kind)
    return file.getvalue()


def member(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def shard(path: Path, *members, format=tarfile.GNU_FORMAT) -> Path:
    """Write members: (name, bytes), or a TarInfo without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for one in members:
            if isinstance(one, tarfile.TarInfo):
                file.addfile(one)
            else:
                file.addfile(member(one[0], len(one[1])), io.BytesIO(one[1]))
    return path


def pictures(first: int, n: int = 3):
    return [(f"{i:03d}.png", encoded(i)) for i in range(first, first + n)]


class TestRead:
    def test_shards_of_the_webdataset_library(self, tmp_path):
        """The library itself encodes numbers, pictures and JSON."""
        webdataset = pytest.importorskip("webdataset")
        with webdataset.ShardWriter(f"{tmp_path}/train-%03d.tar", maxcount=4, verbose=0) as sink:
            for i in range(10):
                colour = Image.new("RGB", (12, 10), (i, 7, 9))
                label = {"json": {"label": i % 3, "who": "x"}} if i % 2 else {"cls": i % 3}
                sink.write({"__key__": f"sample{i:04d}", "png": colour, "txt": "words"} | label)
        source = open_data(tmp_path)
        assert len(source) == 10 and source.labels.tolist() == [i % 3 for i in range(10)]
        assert [int(source.image(i)[0, 0, 0]) for i in (9, 0, 4)] == [9, 0, 4]
        assert source.identity(9) == "train-002.tar:sample0009.png" and source.classes == ("0", "1", "2")
        assert "10 images in 3 tar files, 10 other members skipped (10 .txt); 3 classes" in source.report()

    def test_a_file_a_folder_and_a_pattern(self, tmp_path):
        for i in range(12):
            shard(tmp_path / f"s-{i:03d}.tar", *pictures(10 * i))
        assert len(open_data(tmp_path / "s-004.tar")) == 3 and len(open_data(tmp_path)) == 36
        source = open_data(f"{tmp_path}/s-{{009..011}}.tar")
        assert [source.identity(i) for i in (0, 3, 8)] == [
            "s-009.tar:090.png",
            "s-010.tar:100.png",
            "s-011.tar:112.png",
        ]
        assert len(open_data(f"{tmp_path}/s-0{{0..1}}{{0..1}}.tar")) == 12
        with pytest.raises(DataError, match=r"2 of 5 files are missing, such as .*s-012\.tar"):
            open_data(f"{tmp_path}/s-{{009..013}}.tar")
        with pytest.raises(DataError, match="names no file, or more than"):
            open_data(f"{tmp_path}/s-{{0..99999999}}.tar")

    def test_splits_by_the_names_of_the_shards(self, tmp_path):
        for name in ("train-0", "train-1", "val-0"):
            shard(tmp_path / f"{name}.tar", *pictures(0))
        assert splits(tmp_path) == ("train", "val")
        assert len(open_data(tmp_path)) == 6 and len(open_data(tmp_path, "test")) == 3
        shard(tmp_path / "extra.tar", *pictures(0))
        with pytest.raises(DataError, match=r"named as 'val' next to others, such as 'extra\.tar'.*--set 'test="):
            splits(tmp_path)

    def test_folder_of_images_with_a_tar_file_stays_a_folder_of_images(self, tmp_path):
        shard(tmp_path / "backup.tar", *pictures(0))
        (tmp_path / "a.png").write_bytes(encoded(1))
        assert len(open_data(tmp_path)) == 1 and "1 .tar" in open_data(tmp_path).report()

    def test_keys_end_at_the_first_dot_of_the_last_part(self, tmp_path):
        path = shard(
            tmp_path / "a.tar",
            ("./v1.5/01.PNG", encoded(1)),
            ("v1.5/02.cls", b"4\n"),
            ("v1.5/02.jpeg", encoded(2, "JPEG")),
            ("v1.5/03.seg.png", encoded(3)),
            ("v1.5/01.json", b'{"label": 7}'),
            ("v1.5/04.png", encoded(4)),
            ("v1.5/04.json", b'{"caption": "none"}'),
        )
        source = open_data(path)
        names = ("01.PNG", "02.jpeg", "03.seg.png", "04.png")
        assert [source.identity(i) for i in range(4)] == [f"a.tar:v1.5/{n}" for n in names]
        assert source.labels.tolist() == [1, 0, -1, -1] and source.ids == (4, 7)

    def test_a_key_is_one_sample(self, tmp_path):
        """A photo and its mask are one image; which one is used is stated, and can be chosen."""
        path = shard(tmp_path / "a.tar", *(one for i in range(3) for one in (
            (f"{i}.png", encoded(100 + i)), (f"{i}.jpg", encoded(i, "JPEG")), (f"{i}.cls", b"cat" if i else b"dog"),
        )))  # fmt: skip
        source = open_data(path)
        assert [source.identity(i) for i in range(3)] == [f"a.tar:{i}.jpg" for i in range(3)]
        assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0, 0]
        note = "skipped (3 .png); one image for each key, jpg before png (image_column chooses); 2 classes"
        assert note in source.report() and source.skipped() == {".png": 3}
        masks = open_data(path, image_column="png")
        assert [int(masks.image(i)[0, 0, 0]) for i in range(3)] == [100, 101, 102] and len(masks) == 3
        assert masks.fingerprint() != source.fingerprint() and "each key, png" in masks.report()
        with pytest.raises(DataError, match=r"has no image KEY.seg.png \(image_column\), only png, jpg"):
            open_data(path, image_column="seg.png")

    def test_splits_inside_a_shard_are_refused(self, tmp_path):
        for name, prefix in (("a", "train"), ("b", "photos/Training"), ("c", "./train/cat")):
            other = prefix.replace("train", "test").replace("Training", "val")
            members = [(f"{place}/{i}.png", encoded(i)) for i, place in enumerate((prefix, other))]
            with pytest.raises(DataError, match="holds folders of several splits"):
                open_data(shard(tmp_path / f"{name}.tar", *members))
        assert len(open_data(shard(tmp_path / "d.tar", *members[:1], ("train/dog/1.png", encoded(1))))) == 2

    def test_names_with_several_dots(self, tmp_path):
        pair = [(f"{i}.{kind}.jpg", encoded(i, "JPEG")) for i in range(3) for kind in ("input", "target")]
        with pytest.raises(DataError, match=r"several images for a key, input.jpg, target.jpg: .*--image-column input"):
            open_data(shard(tmp_path / "a.tar", *pair))
        assert len(open_data(tmp_path / "a.tar", image_column="target.jpg")) == 3
        assert len(open_data(shard(tmp_path / "b.tar", *pair[::2], ("0.cls", b"1")))) == 3
        assert open_data(tmp_path / "b.tar").labels.tolist() == [0, -1, -1]
        dotted = [
            (f"{name}.jpg", encoded(9, "JPEG")) for name in ("a.0001", "a.0002", "b.0001", "me.at.home", "me.at.sea")
        ]
        source = open_data(shard(tmp_path / "c.tar", *dotted, ("a.0002.cls", b"5")))
        assert [source.identity(i) for i in range(5)] == [f"c.tar:{name}" for name, _ in dotted]
        assert source.labels.tolist() == [-1, 0, -1, -1, -1] and source.ids == (5,)

    def test_columns_of_labels(self, tmp_path):
        members = [("0.json", b'{"kind": "cat", "label": 3}'), ("1.json", b'{"kind": "eel"}'), ("1.seg", b"x ")]
        path = shard(tmp_path / "a.tar", *pictures(0, 2), *[(f"00{name}", text) for name, text in members])
        for column, classes, labels in (
            (None, ("3",), [0, -1]), ("kind", ("cat", "eel"), [0, 1]), ("seg", ("x",), [-1, 0]), ("none", (), [-1, -1]),
        ):  # fmt: skip
            source = open_data(path, label_column=column)
            assert source.classes == classes and source.labels.tolist() == labels
        deep = shard(tmp_path / "b.tar", *pictures(0, 2), ("000.Kind.txt", b"cat"), ("001.Kind.txt", b"eel"))
        for column in ("kind.txt", "Kind.txt", ".kind.txt"):
            assert open_data(deep, label_column=column).labels.tolist() == [0, 1], column
            assert open_data(deep, group_column=column).groups.tolist() == [0, 1], column
        with pytest.raises(DataError, match=r"no member KEY\.kind.txt and .* of an image"):
            open_data(shard(tmp_path / "c.tar", *pictures(0, 2), ("900.kind.txt", b"cat")), label_column="kind.txt")
        with pytest.raises(DataError, match=r"no member KEY\.what and no 'what' in a KEY.json"):
            open_data(path, label_column="what")

    def test_a_test_split_is_numbered_like_the_train_split(self, tmp_path):
        for name, labels in (("train", (b"100", b"7", b"5000")), ("test", (b"5000", b"7", b"60"))):
            shard(tmp_path / f"{name}.tar", *pictures(0), *((f"{i:03d}.cls", text) for i, text in enumerate(labels)))
        train, test = open_data(tmp_path), open_data(tmp_path, "test")
        assert (train.ids, train.labels.tolist()) == ((7, 100, 5000), [1, 0, 2])
        assert (test.ids, test.labels.tolist()) == ((7, 100, 5000, 60), [2, 0, 3])

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_and_strange_names(self, tmp_path, format):
        name = f"{'long ' * 15}/{'näme' * 8}\n.png"
        source = open_data(shard(tmp_path / "a.tar", (name, encoded(5)), *pictures(0), format=format))
        assert source.identity(0) == f"a.tar:{name}" and source.image(0)[0, 0, 0] == 5

    def test_names_that_cannot_be_decoded(self, tmp_path):
        source = open_data(shard(tmp_path / "a.tar", ("\udcff.png", encoded(5))))
        assert source.identity(0) == r"a.tar:\xff.png"

    def test_workers_get_no_python_object_per_image_and_read_the_same(self, tmp_path):
        small = encoded(1)
        source = open_data(shard(tmp_path / "a.tar", *((f"{i:06d}.png", small) for i in range(2000))))
        assert len(pickle.dumps(source)) < 2000 * (4 * 8 + 10) + 5_000
        views = Views([View(size=8)], (0.5,) * 3, (0.2,) * 3)
        dataset = open_data(shard(tmp_path / "b.tar", *pictures(0, 8)))
        seen = {}
        for workers in (0, 2):
            loader = Loader(dataset, batch=4, views=views, seed=1, resident=False, workers=workers)
            seen[workers] = torch.cat([batch.crops[0] for batch in loader.epoch(0)])
        assert torch.equal(seen[0], seen[2])

    def test_fingerprints(self, tmp_path):
        path = shard(tmp_path / "a.tar", *pictures(0))
        before = open_data(path).fingerprint()
        assert before == open_data(path).fingerprint()
        assert shard(tmp_path / "a.tar", *pictures(1, 9)) == path and open_data(path).fingerprint() != before


class TestFaults:
    @pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "./../x.png", ".."])
    def test_names_that_lead_out(self, tmp_path, name):
        with pytest.raises(
            DataError, match=r"a\.tar' cannot be read.*points out of the folder.*: pack it with relative names"
        ):
            open_data(shard(tmp_path / "a.tar", *pictures(0), (name, encoded(1))))

    @pytest.mark.parametrize(
        "fields",
        [
            {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            {"type": tarfile.LNKTYPE, "linkname": "000.png"},
            {"type": tarfile.CHRTYPE},
            {"type": tarfile.BLKTYPE},
            {"type": tarfile.FIFOTYPE},
        ],
    )
    def test_links_and_devices(self, tmp_path, fields):
        with pytest.raises(DataError, match=r"'x.png' is a link, a device or a sparse file"):
            open_data(shard(tmp_path / "a.tar", *pictures(0), member("x.png", **fields)))

    def test_sparse_files(self, tmp_path):
        sparse = member("x.png", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.size": "9"})
        sparse.size = 512
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
            file.addfile(sparse, io.BytesIO(b"1\n0\n9\n".ljust(512, b"\0")))
        with pytest.raises(DataError, match="sparse"):
            open_data(tmp_path / "a.tar")

    def test_hidden_members_are_left_out_and_counted(self, tmp_path):
        source = open_data(shard(tmp_path / "a.tar", ("./._000.png", b"?"), (".git/1.png", b"?"), *pictures(0)))
        assert len(source) == 3 and "2 other members skipped (2 hidden)" in source.report()

    def test_compressed(self, tmp_path):
        plain = shard(tmp_path / "a.tar", *pictures(0))
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.write_bytes(gzip.compress(plain.read_bytes()))
        for path in (plain, tmp_path / "a.tar.gz"):
            with pytest.raises(DataError, match=r"is compressed.*unpack it to a plain"):
                open_data(path)

    def test_truncated_anywhere(self, tmp_path):
        whole = shard(tmp_path / "a.tar", *pictures(0), ("000.cls", b"1")).read_bytes()
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
        for length in [0, 1, 511, 512, 700, *range(1024, end + 1, 256)]:
            (tmp_path / "a.tar").write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"a\.tar' cannot be read as a tar file"):
                open_data(tmp_path / "a.tar")
        (tmp_path / "a.tar").write_bytes(whole[: end + 512])  # one block of zeros ends the archive
        assert len(open_data(tmp_path / "a.tar")) == 3

    def test_a_flipped_byte_in_any_header_loses_nothing(self, tmp_path):
        whole = shard(tmp_path / "a.tar", *pictures(0)).read_bytes()
        for at in [i for i in range(0, len(whole), 512) if whole[i : i + 3].isdigit()]:
            (tmp_path / "a.tar").write_bytes(whole[:at] + b"\x07" + whole[at + 1 :])
            with pytest.raises(DataError, match="cannot be read as a tar file"):
                open_data(tmp_path / "a.tar")

    def test_cut_off_while_it_is_used(self, tmp_path):
        path = shard(tmp_path / "a.tar", *pictures(0))
        source = open_data(path)
        path.write_bytes(path.read_bytes()[:2200])
        with pytest.raises(DataError, match=r"shorter than at the start of the run: 'a\.tar:002\.png' is missing"):
            source.open(2)
        path.unlink()
        with pytest.raises(DataError, match=r"a\.tar' cannot be read: No such file"):
            source.open(0)

    @pytest.mark.parametrize(
        ("name", "data", "reason"),
        [("000.json", b"{", "'000.json', which cannot be read as JSON"), ("000.json", b'{"label": [1, 2]}', "list"),
         ("000.json", b"[" * 5000, "'000.json'"), ("000.json", b'{"label": 1.5}', "numbers such as 1.5"),
         ("000.cls", b"9" * (2**20 + 1), "of 1 MB")],
    )  # fmt: skip
    def test_labels_that_are_none(self, tmp_path, name, data, reason):
        """They are left out with a sentence, for methods that need no labels."""
        source = open_data(shard(tmp_path / "a.tar", *pictures(0), (name, data), ("001.cls", b"3")))
        assert source.labels.tolist() == [-1] * 3 and source.classes == ()
        assert reason in source.label_note and source.label_note in source.report()

    def test_labels_of_any_size_and_unknown_ones(self, tmp_path):
        known = [(b"1000000", ("1000000",)), (b"9" * 30, ("9" * 30,))]
        for text, classes in [*known, (b"", ()), (b"-1.0", ()), (b"NA", ())]:
            assert open_data(shard(tmp_path / "a.tar", *pictures(0), ("000.cls", text))).classes == classes
        with pytest.raises(DataError, match="go down to -2"):
            open_data(shard(tmp_path / "a.tar", *pictures(0), ("000.cls", b"-2")))

    def test_no_image(self, tmp_path):
        with pytest.raises(DataError, match=r"No image in .*1 other member skipped \(1 \.txt\)"):
            open_data(shard(tmp_path / "a.tar", ("a.txt", b"?")))
        with pytest.raises(DataError, match="No image in"):
            open_data(shard(tmp_path / "b.tar"))

    def test_a_damaged_image_is_named(self, tmp_path):
        source = open_data(shard(tmp_path / "a.tar", ("x.png", b"no image"), *pictures(0)))
        with pytest.raises(DataError, match=r"a\.tar:x\.png' cannot be read: not one of"):
            source.open(0)

    def test_random_bytes(self, tmp_path):
        noise = np.random.default_rng(0).bytes(5000)
        (tmp_path / "a.tar").write_bytes(noise)
        with pytest.raises(DataError, match="cannot be read as a tar file"):
            open_data(tmp_path / "a.tar")
        assert json.dumps(str(tmp_path))  # the path is printable, so the message was too
