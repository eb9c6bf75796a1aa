"""`inbatch duplicates` and `inbatch outliers`: groups, leaks, lists to keep, pictures, and wrong input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import one_object, run
from PIL import Image
from scenes import scene

import inbatch
from inbatch.data import open_data, splits
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, write_embeddings
from inbatch.evaluation.neighbours import nearest_others
from inbatch.evaluation.selected_rows import SelectedRows


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two splits: images, in the other split a smaller mirrored copy and an identical file."""
    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "test"):
        (root / split).mkdir()
    grain = np.random.default_rng(0).normal(0, 8, (96, 96))  # without it they are blurred
    values = [(scene(seed)[0].numpy() + grain).clip(0, 255).astype(np.uint8) for seed in range(6)]
    pictures = [Image.fromarray(image) for image in values]
    for i, picture in enumerate(pictures):
        picture.save(root / "train" / f"{i}.png")
    pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((64, 64)).save(root / "test" / "copy.jpg", quality=90)
    (root / "test" / "same.png").write_bytes((root / "train" / "1.png").read_bytes())
    Image.new("RGB", (96, 96), (9, 9, 9)).save(root / "test" / "black.png")
    (root / "test" / "damaged.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def features(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return features of the readable images of `photos`; test/black.png is far from the others."""
    file, parts = tmp_path_factory.mktemp("features") / "features.npz", []
    draw = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        source = open_data(str(photos), split)
        rows = [i for i in range(len(source)) if source.identity(i) != "damaged.png"]
        vectors = torch.randn(len(rows), 4, generator=draw) * 0.1 + torch.tensor([1.0, 0, 0, 0])
        names = tuple(source.identity(i) for i in rows)
        vectors[[name == "black.png" for name in names]] = torch.tensor([-1.0, 0, 0, 0])
        parts.append(
            Embeddings(vectors, torch.full((len(rows),), -1), names, "photos", "test", torch.tensor(rows), split=split)
        )
    write_embeddings(file, iter(parts))
    return file


def test_duplicates_are_grouped_across_splits(photos: Path, tmp_path: Path) -> None:
    keep, picture = tmp_path / "keep.csv", tmp_path / "pairs.png"
    report = inbatch.find_duplicates(photos, write=keep, picture=picture)
    groups = {Path(g["keep"]["path"]).name: g for g in report["groups"]}
    assert set(groups) == {"0.png", "1.png"} and report["leaks"] == 2
    (copy,), (same,) = groups["0.png"]["duplicates"], groups["1.png"]["duplicates"]
    assert (Path(copy["path"]).name, copy["split"], copy["identical"]) == ("copy.jpg", "test", False)
    assert (Path(same["path"]).name, same["split"], same["identical"], same["check"]) == ("same.png", "test", True, 1)
    assert [pair["mirrored"] for pair in report["pairs"]] == [True] and len(report["unreadable"]) == 1
    assert report["kept"] == 7 and sum(len(open_data(keep, split)) for split in ("train", "test")) == 7
    with Image.open(picture) as shown:
        assert shown.width > 100
    one = inbatch.find_duplicates(photos, split="train")
    assert not one["groups"] and one["splits"] == {"train": 6} and one["candidates"]["by"] == ["thumbnails"]


def test_candidates_by_features(photos: Path, features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def search(vectors: SelectedRows, *options: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(vectors)
        return nearest_others(vectors, *options, **named)

    monkeypatch.setattr("inbatch.apps.collection.duplicates.nearest_others", search)
    by_features = inbatch.find_duplicates(photos, features, candidates="features", neighbours=8)
    assert by_features["candidates"]["by"] == ["features"] and by_features["duplicates"] == 2
    assert len(rows[0]) == 8 and len(rows[0].rows) == 9, "a copy of all features without one of the identical images"
    assert inbatch.find_duplicates(photos, features)["candidates"]["by"] == ["thumbnails", "features"]


def test_outliers_and_broken_images(photos: Path, features: Path, tmp_path: Path) -> None:
    keep, picture = tmp_path / "keep.csv", tmp_path / "sheet.png"
    report = inbatch.find_outliers(features, photos, count=2, write=keep, picture=picture)
    assert Path(report["outliers"][0]["path"]).name == "black.png" and len(report["outliers"]) == 2
    assert {Path(one["path"]).name: one["reason"] for one in report["broken"]}["black.png"] == "one colour"
    assert report["kept"] == 9 - len({one["path"] for one in (*report["broken"], *report["outliers"])})
    assert picture.exists() and sum(len(open_data(keep, split)) for split in splits(keep)) == report["kept"]
    for order in ("distance", "density"):
        listed = inbatch.find_outliers(features, count=9, order=order)
        assert listed["broken"] is None and [o[order] for o in listed["outliers"]] == sorted(
            (o[order] for o in listed["outliers"]), reverse=True
        )


def test_commands(photos: Path, features: Path, tmp_path: Path) -> None:
    text = run(f"duplicates {photos} --write {tmp_path}/keep.csv")
    assert text.exit_code == 0 and "identical" in text.stdout and "Leaks: 2 groups" in text.stdout
    assert "nothing was deleted" in text.stdout and len(list(photos.rglob("*.*"))) == 10
    assert one_object(run(f"duplicates {photos} --features {features} --json").stdout)["duplicates"] == 2
    text = run(f"outliers {features} {photos} -n 1")
    assert text.exit_code == 0 and "black.png" in text.stdout and "1 one colour" in text.stdout
    assert one_object(run(f"outliers {features} --json -n 1").stdout)["broken"] is None


def test_wrong_input(photos: Path, features: Path, tmp_path: Path) -> None:
    empty, same = tmp_path / "empty", tmp_path / "same"
    for folder in (empty, same):
        folder.mkdir()
    picture = Image.new("RGB", (20, 20), (200, 10, 10))
    picture.save(same / "0.png")
    alone = inbatch.find_duplicates(same, picture=tmp_path / "pairs.png")
    assert alone["duplicates"] == 0 and alone["picture"] is None and "no picture" in alone["notes"][0], "one image"
    picture.save(same / "1.png")
    picture.save(same / "2.bmp")
    report = inbatch.find_duplicates(same)
    assert (report["identical"], report["duplicates"]) == (1, 1), "images without detail have no near duplicates"
    one = tmp_path / "one.npz"
    write_embeddings(one, iter([Embeddings(torch.ones(1, 4), torch.tensor([-1]), ("a",), "one", "test")]))
    plain, names = tmp_path / "plain.npz", ("0.png", "1.png", "2.bmp")  # all of one colour
    write_embeddings(plain, iter([Embeddings(torch.eye(3), torch.full((3,), -1), names, "same", "test")]))
    blocked = tmp_path / "file"
    blocked.write_text("")
    for words, code, message in (
        (f"duplicates {empty}", 3, "image"),
        *((f"duplicates {photos} --threshold={t}", 2, "above -1, at most 1") for t in ("-1", "2", "nan")),
        (f"duplicates {photos} --run a --features b", 2, "give one of them"),
        (f"duplicates {photos} --candidates features", 2, "pass a run or a file"),
        (f"duplicates {photos} --candidates odd", 2, "thumbnails, features or both"),
        (f"duplicates {photos} --index fast", 2, "exact or approximate"),
        (f"duplicates {photos} --device gpu", 2, "unknown device"),
        (f"duplicates {photos} --write list.txt", 2, ".csv"),
        (f"duplicates {photos} --write {blocked}/keep.csv", 1, "Cannot write"),
        (f"duplicates {photos} --picture pairs.abc", 2, "pairs.abc"),
        (f"duplicates {photos} --features {one}", 3, "other images"),
        (f"outliers {tmp_path}/none.npz", 3, "does not exist"),
        (f"outliers {one}", 3, "one image"),
        (f"outliers {features} --order size", 2, "distribution, distance, density"),
        (f"outliers {features} --write keep.csv", 2, "pass DATA"),
        (f"outliers {features} {photos} -n 9 --write {tmp_path}/keep.csv", 2, "choose a smaller number"),
        (f"outliers {plain} {same} -n 1 --write {tmp_path}/keep.csv", 2, "all 3 images of"),
        (f"outliers {features} {photos} --picture {blocked}/sheet.png", 1, "Cannot write"),
    ):
        result = run(words)
        assert result.exit_code == code and message in result.stderr, (words, result.stderr)
    assert not (tmp_path / "keep.csv").exists()
    with pytest.raises(ConfigError, match=r"the threshold is '0\.9': choose"):
        inbatch.find_duplicates(photos, threshold="0.9")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no readable image: .*0\.png' cannot be read"):
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        (damaged / "0.png").write_bytes(b"no image")
        inbatch.find_duplicates(damaged)
    assert json.dumps(report)
