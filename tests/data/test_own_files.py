"""What inbatch writes into a folder of images is never read as data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_sources import fill, picture

import inbatch
from inbatch.apps.reports.view_grid import save_sheet
from inbatch.data import open_data, splits
from inbatch.data.sources import folder_contents, folder_splits
from inbatch.errors import ConfigError, DataError
from inbatch.runtime.picture_mark import MARK, is_marked, png_mark


def run_folder(root: Path, *pictures: str) -> None:
    """Write the files of a run by which its folder is recognised, and pictures without a mark."""
    fill(root, *pictures)
    for name in ("run", "recipe"):
        (root / f"{name}.json").write_text("{}")


def test_marks_of_both_libraries(tmp_path):
    Figure(figsize=(1, 1)).savefig(tmp_path / "a.png", metadata=MARK)
    picture().save(tmp_path / "b.png", pnginfo=png_mark())
    save_sheet(tmp_path / "c.png", [[torch.zeros(3, 8, 8, dtype=torch.uint8)]])
    assert all(is_marked(tmp_path / f"{name}.png") for name in "abc")
    Figure(figsize=(1, 1)).savefig(tmp_path / "d.png")
    picture().save(tmp_path / "e.png")
    assert not any(is_marked(tmp_path / name) for name in ("d.png", "e.png", "missing.png", "."))


def test_every_picture_in_the_source_is_marked():
    calls = [
        line
        for file in Path(inbatch.__file__).parent.rglob("*.py")
        for line in file.read_text().splitlines()
        if "savefig(" in line or "picture.save(" in line
    ]
    assert len(calls) >= 7 and all("MARK" in call or "png_mark()" in call for call in calls)


def test_runs_and_pictures_are_left_out_and_counted(tmp_path):
    fill(tmp_path, "a/1.png", "a/2.png")
    before = open_data(tmp_path)
    run_folder(tmp_path / "runs" / "simclr-1", "curves.png", "inspect/views.png")
    run_folder(tmp_path / "a" / "run", "curves.png")
    picture().save(tmp_path / "views.png", pnginfo=png_mark())
    after = open_data(tmp_path)
    assert after.signature() == before.signature() and after.classes == before.classes == ()
    assert "not data: 2 run directories and 1 inbatch picture;" in after.report()
    assert after.skipped() == {"run directory": 2, "inbatch picture": 1}
    pattern = open_data(f"{tmp_path}/**")
    assert [pattern.identity(i) for i in range(len(pattern))] == ["a/1.png", "a/2.png"]
    assert "not data: 4 inbatch pictures" in pattern.report()


def test_a_folder_keeps_its_meaning(tmp_path):
    """The splits and the kind of a folder do not change when runs and pictures are written into it."""
    layouts = {"train": ["train/a/1.png", "train/b/1.png"], "pair": ["train/1.png", "test/1.png"]}
    layouts |= {"coco": ["train2017/1.png", "val2017/1.png"], "wrapped": ["x/train/1.png", "x/test/1.png"]}
    for name, paths in layouts.items():
        root = fill(tmp_path / name, *paths)
        before = {split: open_data(root, split).signature() for split in splits(root)}
        run_folder(root / "runs" / "1", "curves.png")
        run_folder(root / "run", "curves.png")
        picture().save(root / "views.png", pnginfo=png_mark())
        assert {split: open_data(root, split).signature() for split in splits(root)} == before


def test_a_folder_of_shards_keeps_its_meaning(tmp_path):
    from test_webdataset import pictures, shard

    shard(tmp_path / "0.tar", *pictures(0))
    run_folder(tmp_path / "runs" / "1", "curves.png")
    picture().save(tmp_path / "views.png", pnginfo=png_mark())
    assert len(open_data(tmp_path)) == 3


def test_the_data_are_the_run_directory(tmp_path):
    """Images in the folder that a run was written to (`-o .`) stay data; those of a run alone are none."""
    fill(tmp_path, "1.png", "2.png")
    run_folder(tmp_path)
    picture().save(tmp_path / "curves.png", pnginfo=png_mark())
    assert len(open_data(tmp_path)) == 2
    run_folder(tmp_path / "alone" / "run", "curves.png")
    with pytest.raises(DataError, match=r"No image under .*, not data: 1 run directory"):
        open_data(tmp_path / "alone")
    (tmp_path / "bare").mkdir()
    run_folder(tmp_path / "bare")
    with pytest.raises(DataError, match="bare' is the folder of a run and contains no images"):
        open_data(tmp_path / "bare")


def test_formats_without_a_mark_are_refused_inside_the_data_folder(tmp_path):
    photos = fill(tmp_path / "photos", "1.png", "2.png")
    fill(tmp_path / "other", "1.png")
    refusal = r"would become an image of the data: choose a name that ends in \.png"
    for write in (
        lambda out: inbatch.survey_data(photos, out=out),
        lambda out: inbatch.draw_views(photos, out),
        lambda out: inbatch.draw_views([tmp_path / "other", photos], out),
    ):
        with pytest.raises(ConfigError, match=refusal):
            write(photos / "sub" / "x.jpg")
    for out in (photos / "x.png", tmp_path / "x.jpg"):
        inbatch.survey_data(photos, out=out)
    assert len(open_data(photos)) == 2


def test_written_folders_are_data(tmp_path):
    from inbatch.data import write_folder

    write_folder(open_data(np.zeros((2, 8, 8, 3), np.uint8)), tmp_path / "out")
    assert len(open_data(tmp_path / "out")) == 2 and Image.open(tmp_path / "out" / "000000.png").size == (8, 8)


def test_the_layout_of_a_flat_folder_is_found_by_its_first_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan opens every PNG once, to see its mark; finding the splits must not open them before."""
    for i in range(5):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    opened: list[str] = []
    monkeypatch.setattr(folder_contents, "is_marked", lambda path: bool(opened.append(path)))
    assert folder_splits.find_layout(tmp_path).names == {} and len(opened) == 1
