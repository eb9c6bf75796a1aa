"""`embed_run` writes every image of every split, with its split."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run
from PIL import Image

import inbatch
from inbatch.errors import DataError
from inbatch.models import create_encoder, save_encoder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    save_encoder(create_encoder("tiny", size=16), tmp_path / "encoder")
    return tmp_path / "encoder"


def write(root: Path, *paths: str) -> Path:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, sum(path.encode()) % 256, 9)).save(root / path)
    return root


def test_every_image_with_its_split(encoder: Path, tmp_path: Path) -> None:
    train = [f"Training/{c}/{i}.png" for c in "ab" for i in range(3)]
    photos = write(tmp_path / "photos", *train, "valid/b/1.png", "Testing/a/1.png", "Testing/b/2.png")
    (photos / "valid" / "b" / "0.png").write_bytes(b"damaged")
    missing: dict[int, str] = {}
    stage: dict[str, object] = {}
    for name in ("f.npz", "f.parquet"):
        assert inbatch.embed_run(encoder, photos, tmp_path / name, missing=missing, stage=stage) == 9
    assert list(missing) == [6] and "0.png" in missing[6]  # numbered over all splits
    assert stage["splits"] == {"train": 6, "val": 1, "test": 2}  # embedded ones, which add up to their number
    written = np.load(tmp_path / "f.npz")
    assert written["split"].tolist() == ["train"] * 6 + ["val"] + ["test"] * 2
    assert written["index"].tolist() == [*range(6), 1, 0, 1] and written["label"].tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        1,
        0,
        1,
    ]
    table = pq.read_table(tmp_path / "f.parquet").to_pydict()
    assert all(table[key] == written[key].tolist() for key in ("split", "path", "index", "label"))
    for split, count in (("Testing", 2), ("train", 6)):
        assert inbatch.embed_run(encoder, photos, tmp_path / "one.npz", split=split) == count
        assert set(np.load(tmp_path / "one.npz")["split"]) == {"test" if split == "Testing" else "train"}
    with pytest.raises(DataError, match="no split 'extra', only train, val, test"):
        inbatch.embed_run(encoder, photos, tmp_path / "one.npz", split="extra")


def test_embed_prints_the_splits_and_accepts_several_paths(encoder: Path, tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", "train/1.png", "test/2.png"), write(tmp_path / "two", "3.png")
    result = run(f"embed {encoder} {one} {two} -o {tmp_path / 'f.npz'}")
    assert result.exit_code == 0 and "3 images embedded into" in result.stdout
    assert "(2 of train, 1 of test)" in result.stdout
    assert np.load(tmp_path / "f.npz")["path"].tolist() == ["one/1.png", "two/3.png", "one/2.png"]
    result = run(f"data {one} {two}")
    assert result.exit_code == 0 and "2 in train, 1 in test" in result.stdout and "splits: train, test" in result.stdout
    result = run(f"pretrain --data {one} {two}")
    assert result.exit_code == 2 and "is a path, not a method: write a pattern in quotes" in result.stderr
