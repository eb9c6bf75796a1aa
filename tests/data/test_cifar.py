"""CIFAR's pickles: written by Python 2 and by other versions, and code in them that must never run."""

import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from inbatch.data import open_data, splits
from inbatch.errors import DataError

N = 4
PIXELS = np.random.default_rng(0).integers(256, size=(6 * N, 3072), dtype=np.uint8)
LABELS = [int(i) for i in np.random.default_rng(1).integers(10, size=6 * N)]
NAMES = [f"class {i}" for i in range(10)]


class Python2(pickle._Pickler):
    """Write protocol 2 as Python 2 and its NumPy did: every string is a byte string, and NumPy's module is `core`."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, obj):
        text = obj if isinstance(obj, bytes) else obj.encode()
        short = len(text) < 256
        self.write(b"U" + bytes([len(text)]) + text if short else b"T" + struct.pack("<i", len(text)) + text)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_text

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core").replace("builtins", "__builtin__")
        self.write(b"c%s\n%s\n" % (module.encode(), (name or obj.__qualname__).encode()))
        self.memoize(obj)

    dispatch[type] = dispatch[type(open_data)] = dispatch[type(len)] = save_global


def python2(value):
    file = io.BytesIO()
    Python2(file, 2).dump(value)
    return file.getvalue()


WRITERS = {
    "Python 2": python2,
    **{f"protocol {number}": lambda value, number=number: pickle.dumps(value, number) for number in (2, 3, 4, 5)},
}


def ten(root, write=python2):
    root.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        part = slice(N * i, N * (i + 1))
        batch = {"batch_label": "training batch", "labels": LABELS[part], "data": PIXELS[part], "filenames": ["a"] * N}
        (root / name).write_bytes(write(batch))
    (root / "batches.meta").write_bytes(write({"num_cases_per_batch": N, "label_names": NAMES, "num_vis": 3072}))
    return root


@pytest.mark.parametrize("how", WRITERS)
def test_ten(how, tmp_path):
    root = ten(tmp_path / "cifar-10-batches-py", WRITERS[how])
    assert splits(root) == splits(tmp_path) == ("train", "test")
    for place in (root, tmp_path):  # the folder, or its parent
        train, test = open_data(place), open_data(place, "test")
        assert train.classes == test.classes == tuple(NAMES) and train.channels == 3
        assert train.labels.tolist() == LABELS[: 5 * N] and test.labels.tolist() == LABELS[5 * N :]
        expected = torch.from_numpy(PIXELS).view(-1, 3, 32, 32)
        assert torch.equal(torch.stack([train.image(i) for i in range(len(train))]), expected[: 5 * N])
        assert torch.equal(torch.stack([test.image(i) for i in range(len(test))]), expected[5 * N :])


def test_file_begins_like_the_published_one(tmp_path):
    """The bytes before the labels, and around the pixels, of the published data_batch_1."""
    content = python2({"batch_label": "training batch 1 of 5", "labels": [6, 9], "data": PIXELS[:2]})
    assert content.startswith(b"\x80\x02}q\x00(U\x0bbatch_labelq\x01U\x15training batch 1 of 5q\x02U\x06labelsq\x03]q")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content and b"cnumpy\nndarray\n" in content
    assert b"cnumpy\ndtype\n" in content and b"U\x02u1" in content and b"T\x00\x18\x00\x00" in content


def test_a_hundred(tmp_path):
    write = WRITERS["Python 2"]
    coarse = [label // 5 for label in LABELS]
    for name, part in (("train", slice(20)), ("test", slice(20, None))):
        batch = {"fine_labels": LABELS[part], "coarse_labels": coarse[part], "data": PIXELS[part]}
        (tmp_path / name).write_bytes(write(batch))
    (tmp_path / "meta").write_bytes(write({"coarse_label_names": ["two"], "fine_label_names": NAMES}))
    assert open_data(tmp_path).labels.tolist() == LABELS[:20]
    assert open_data(tmp_path, "test").labels.tolist() == LABELS[20:]
    (tmp_path / "test").unlink()
    assert splits(tmp_path) == ("train",)


def test_missing_file_is_named(tmp_path):
    root = ten(tmp_path / "cifar")
    (root / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3' cannot be read: No such file.*unpack the archive again"):
        open_data(root)
    with pytest.raises(DataError, match="CIFAR's images have 3 channels, 1 were requested"):
        open_data(root, channels=1)
    (root / "batches.meta").unlink()
    with pytest.raises(DataError, match="No image under"):  # an ordinary folder without images
        open_data(root)
    ten(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"")
    with pytest.raises(DataError, match="holds both cifar-10-batches-py and cifar-100-python: name one"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": PIXELS[:N, :3000]}, "not an array of 3,072 bytes"),
        ({"data": PIXELS[:N].astype(np.int64)}, "not an array of 3,072 bytes"),
        ({"data": np.asfortranarray(PIXELS[:N])}, "not an array of 3,072 bytes"),
        ({"data": PIXELS[:N].astype(object)}, "not an array of 3,072 bytes"),
        ({"data": b"bytes"}, "lacks 'data' or 'labels'"),
        ({"data": PIXELS[:3]}, "a label from 0 to 9 for each of its 3 images"),
        ({"labels": [0, 1, 2, 10]}, "a label from 0 to 9 for each"),
        ({"labels": [0, 1, 2, "x"]}, "a label from 0 to 9 for each"),
        ({"labels": None}, "lacks 'data' or 'labels'"),
    ],
)
def test_damaged_batch_is_reported(change, match, tmp_path):
    root = ten(tmp_path)
    (root / "data_batch_2").write_bytes(python2({"data": PIXELS[:N], "labels": LABELS[:N]} | change))
    with pytest.raises(DataError, match=f"data_batch_2'.*{match}"):
        open_data(root)


@pytest.mark.parametrize("cut", [0, 1, 30, 3000])
def test_truncated(cut, tmp_path):
    root = ten(tmp_path)
    whole = (root / "data_batch_5").read_bytes()
    (root / "data_batch_5").write_bytes(whole[:cut])
    with pytest.raises(DataError, match="data_batch_5' is not a CIFAR file, or is damaged"):
        open_data(root)


class Call:
    """Object that unpickles as the result of a function call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def hostile(sentinel):
    order = f"echo > {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    python = f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()"
    yield pickle.dumps(Call(os.system, order), 2)
    yield pickle.dumps({"data": Call(os.system, order), "labels": [1]}, 4)
    yield pickle.dumps(Call(eval, code), 2)
    yield pickle.dumps(Call(exec, python), 5)
    yield b"cos\nsystem\n(S'" + order.encode() + b"'\ntR."
    yield b"(S'" + order.encode() + b"'\nios\nsystem\n."
    # A known name gives no access to an unknown one: neither by a dotted path, nor by the recorder's attributes.
    yield b"\x80\x04\x8c\x05numpy\x8c\x0endarray.__init__\x93" + pickle.dumps(order)[2:-1] + b"\x85R."
    yield b"\x80\x04\x8c\x07_codecs\x8c\x13encode.__globals__.x\x93."
    yield b"cnumpy.core.multiarray\nscalar\n."
    # A state set on a recorder's class would persist and affect every file read afterwards.
    yield b"cnumpy\nndarray\n}S'pixels'\nI1\nsb."
    yield b"cnumpy\nndarray\n(N}S'pixels'\nI1\nstb."
    yield b"c_codecs\nencode\n(N}S'__new__'\nI1\nstb."
    yield b"cnumpy\ndtype\n(N}S'__init__'\nI1\nstb."


@pytest.mark.parametrize("number", range(len(list(hostile("x")))))
@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta", "test_batch"])
def test_no_code_of_a_pickle_is_executed(file, number, tmp_path):
    root = ten(tmp_path / "cifar")
    sentinel = tmp_path / "sentinel"
    good = (root / file).read_bytes()
    (root / file).write_bytes(list(hostile(sentinel))[number])
    with pytest.raises(DataError, match=f"{file}' is not a CIFAR file.*; unpack the archive again"):
        open_data(root, "test" if file == "test_batch" else "train")
    assert not sentinel.exists()
    (root / file).write_bytes(good)  # and no state persists
    assert torch.equal(open_data(root).image(0).flatten(), torch.from_numpy(PIXELS[0]))


def test_memory_is_twice_the_pixels(tmp_path):
    pixels, labels = np.zeros((2000, 3072), np.uint8), [0] * 2000
    root = ten(tmp_path)
    for i in range(1, 6):
        (root / f"data_batch_{i}").write_bytes(python2({"data": pixels, "labels": labels}))
    tracemalloc.start()
    assert len(open_data(root)) == 10_000
    assert tracemalloc.get_traced_memory()[1] < 2.2 * 5 * pixels.nbytes
    tracemalloc.stop()
