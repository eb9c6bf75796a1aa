"""The commands select and labels: results, lists, pictures, and sentences for what cannot be used."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import one_object, run
from feature_sets import clouds
from PIL import Image

import inbatch
from inbatch.apps.collection.features import open_collection
from inbatch.apps.collection.known_labels import known_labels
from inbatch.data import open_data
from inbatch.evaluation import Embeddings, write_embeddings

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 images in three classes, of which two lie in a wrong one."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(60):
        folder = root / NAMES[(i + (i in WRONG)) % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (9, 12, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return root


WRONG = (7, 20)


@pytest.fixture(scope="module")
def features(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return features of the images, in which the right classes are far apart."""
    return written(photos, tmp_path_factory.mktemp("features") / "features.npz")


def written(photos: Path, file: Path, labelled: float = 1.0, rows: slice = slice(None)) -> Path:
    source = open_data(photos)
    names = [source.identity(i) for i in range(len(source))]
    cloud = clouds(60, classes=3, spread=0.3)
    vectors = cloud.vectors[[int(Path(name).stem) for name in names]]
    labels = source.labels.where(torch.arange(60) % 10 < 10 * labelled, torch.tensor(-1))
    part = Embeddings(vectors[rows], labels[rows], tuple(names[rows]), "photos", "", torch.arange(60)[rows])
    write_embeddings(file, [Embeddings(**vars(part) | {"split": "train", "classes": NAMES})])
    return file


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_select_chooses_what_is_not_labelled(photos: Path, features: Path, tmp_path: Path) -> None:
    chosen, picture = tmp_path / "chosen.csv", tmp_path / "chosen.png"
    shown = run(f"select {features} {photos} -n 25 --write {chosen} --picture {picture}")
    assert shown.exit_code == 0 and "25 of 60 images" in shown.stdout and "5 images more" in shown.stdout
    first = lines(chosen)
    assert [int(row["rank"]) for row in first] == list(range(1, 26)) and all(row["reason"] for row in first)
    source = open_data(chosen)
    assert len(source) == 25 and Path(source.file_of(0)).parent.parent == photos
    with Image.open(picture) as drawn:
        assert drawn.width > 10 * 96 and drawn.height > 3 * 96
    for listed in (str(chosen), str(written(photos, tmp_path / "done.npz", rows=slice(0, 25)))):
        result = inbatch.select_images(features, photos, count=35, labelled=listed, seed=1)
        again = {one["path"] for one in result["chosen"]}
        before = {str(Path(row["path"]).relative_to(photos)) for row in first}
        if listed.endswith("csv"):
            assert len(again) == 35 and not again & before
        assert (result["images"], result["labelled"], result["candidates"]) == (60, 25, 35)
        assert one_object(run(f"select {features} -n 2 --json").stdout)["chosen"][0]["rank"] == 1
    (tmp_path / "names.csv").write_text("path,class\nant/00.png,zebra\nbee/01.png,bee\nelse.png,bee\n")
    uncertain = run(f"select {features} -n 3 --strategy uncertain --labelled {tmp_path / 'names.csv'}")
    assert uncertain.exit_code == 0 and "zebra" in uncertain.stdout and "2 of them labelled" in uncertain.stdout
    assert "1 labelled image of" in uncertain.stderr


def test_labels_of_some_images_are_used_unless_disabled(photos: Path, features: Path, tmp_path: Path) -> None:
    partly = written(photos, tmp_path / "partly.npz", 0.3)
    for file, labelled, count in (
        (partly, None, 18), (partly, "none", 0), (partly, "data", 18), (features, None, 0), (features, "none", 0),
    ):  # fmt: skip
        assert inbatch.select_images(file, count=1, labelled=labelled)["labelled"] == count
    part = Embeddings(torch.rand(3, 2), torch.tensor([0, 1, 0]), ("a", "b", "c"), "photos", "")
    for name, names in (("both", ("train", "test")), ("test", ("test",)), ("none", ("",))):
        parts = [Embeddings(**vars(part) | {"split": split, "classes": NAMES}) for split in names]
        write_embeddings(tmp_path / f"{name}.npz", parts)
    for name, listed, rows in (
        ("both", "test", [3, 4, 5]), ("both", "none", [*range(6)]), ("none", "test", [0, 1, 2]),
        ("test", "both", [0, 1, 2]),
    ):  # fmt: skip
        known = known_labels(open_collection(tmp_path / f"{name}.npz"), tmp_path / f"{listed}.npz")
        assert known.labelled.nonzero()[:, 0].tolist() == rows, "labels of another split"
    full = run(f"select {features} --labelled data -n 1")
    assert full.exit_code == 2 and "all 60 images are labelled" in full.stderr


def test_labels_finds_images_in_the_wrong_folder(photos: Path, features: Path, tmp_path: Path) -> None:
    suspects, picture = tmp_path / "suspects.csv", tmp_path / "suspects.png"
    shown = run(f"labels {features} {photos} --write {suspects} --picture {picture}")
    assert shown.exit_code == 0 and "2 of 60 labels (3.3%)" in shown.stdout and not shown.stderr
    rows = lines(suspects)
    assert {int(Path(row["path"]).stem) for row in rows} == set(WRONG)
    for row in rows:
        assert row["suggested"] == NAMES[int(Path(row["path"]).stem) % 3] != row["class"] and float(row["margin"]) < 0
    with Image.open(picture) as drawn:
        assert 4 * 96 < drawn.width < 6 * 96
    result = one_object(run(f"labels {features} -n 1 --json").stdout)
    assert (result["suspected"], len(result["suspects"]), result["checked"]) == (2, 1, 60)
    first = result["suspects"][0]
    assert first["probe"]["label"] < first["probe"]["suggested"] and first["neighbours"]["label"] < 0.5
    assert first["nearest"][0]["class"] == first["suggested"] and len(first["nearest"]) == 5
    clean = tmp_path / "random.npz"
    table = clouds(60, classes=3, spread=30, seed=4)
    write_embeddings(clean, [table])
    assert "separate the classes badly" in run(f"labels {clean}").stderr


def test_invalid_input_gives_one_sentence(photos: Path, features: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "else.csv").write_text("path\nelse.png\n")
    (tmp_path / "file").write_text("")
    odd = tmp_path / "odd.npz"
    part = Embeddings(torch.ones(1, 2), torch.zeros(1).long(), ("ant/00.png",), "photos", "")
    write_embeddings(odd, [Embeddings(**vars(part) | {"split": "train", "classes": ("NA",)})])
    one, none = tmp_path / "one.npz", tmp_path / "unlabelled.npz"
    write_embeddings(one, [clouds(1)])
    write_embeddings(none, [Embeddings(torch.ones(9, 2), torch.full((9,), -1), tuple("abcdefghi"), "x", "")])
    for line, code, words in (
        (f"select {tmp_path / 'empty'}", 2, "neither recipe"),
        (f"select {tmp_path / 'none.npz'}", 3, "does not exist"),
        (f"select {features} {tmp_path / 'empty'}", 3, ""),
        (f"select {features} -n 61", 2, "at most 60"),
        (f"select {features} -n 1 --labelled data", 2, "all 60 images are labelled: there is none to choose"),
        (f"select {features} --strategy best", 2, "choose one of diverse"),
        (f"select {features} --strategy uncertain -n 2", 3, "needs labelled images"),
        (f"select {features} -n 2 --write {tmp_path / 'a.csv'}", 2, "pass DATA"),
        (f"select {features} {photos} -n 2 --write {tmp_path / 'a.txt'}", 2, "ends in .csv"),
        (f"select {features} {photos} -n 2 --write {tmp_path / 'file' / 'a.csv'}", 1, "Cannot write"),
        (f"select {features} {photos} -n 2 --picture {tmp_path / 'a.tex'}", 2, "unknown file extension"),
        (f"select {features} -n 2 --labelled {tmp_path / 'else.csv'}", 3, "none of the 1 labelled images"),
        (f"select {features} -n 2 --labelled {tmp_path / 'no.csv'}", 3, "does not exist"),
        (f"select {features} -n 2 --labelled {tmp_path / 'file'}", 2, "not a list of labelled images"),
        (f"select {features} {photos} -n 2 --write {tmp_path / 'a.csv'} --labelled {odd}", 3, "has the class 'NA'"),
        (f"select {none} -n 2 --labelled data", 3, "no image of"),
        (f"labels {none}", 3, "no image of"),
        (f"labels {one}", 3, "least two are needed"),
        (f"labels {features} --split val", 3, "no split 'val'"),
        (f"labels {features} --picture {tmp_path / 'a.png'}", 2, "pass DATA"),
        (f"labels {features} {photos} --picture {photos / 'a.jpg'}", 2, "would become an image of the data"),
        (f"select {features} {photos} -n 2 --picture {photos / 'a.jpg'}", 2, "would become an image of the data"),
    ):
        shown = run(line)
        assert shown.exit_code == code and words in shown.stderr and "Traceback" not in shown.output, line
        assert shown.stderr.startswith("error:") and not list(tmp_path.glob("a.*")), line
    assert run(f"select {one} -n 1").exit_code == 0
    same = run(f"select {none} -n 4 --strategy diverse")
    assert same.exit_code == 0 and "equal those of another" in same.stderr
