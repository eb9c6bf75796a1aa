"""`inbatch data`: the report for every kind of data, hostile names, and findings that stop a run."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import one_object, run
from PIL import Image

import inbatch
from inbatch.apps.reports import image_statistics
from inbatch.apps.reports.dataset import survey_data
from inbatch.data import open_data
from inbatch.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


def put(path: Path, shape: tuple[int, ...] = (20, 30, 3), **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(256, size=shape, dtype=np.uint8)).save(path, **options)
    return path.read_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write two classes in two splits: grey and coloured files, a copy within train and a copy in both splits."""
    root = tmp_path / "my photos"
    for i in range(6):
        put(root / f"train/cat/{i}.jpg", (20 + i, 64, 3))
    for i in range(2):
        put(root / f"train/dog/{i}.png", (40, 30))
    (root / "train/dog/again.jpeg").write_bytes((root / "train/cat/3.jpg").read_bytes())
    put(root / "val/cat/1.jpg")
    (root / "val/dog").mkdir()
    (root / "val/dog/same.jpg").write_bytes((root / "train/cat/5.jpg").read_bytes())
    (root / "train/notes.txt").write_text("no image")
    return root


def test_report_lists_splits_classes_and_damage(photos: Path) -> None:
    report = survey_data(photos)
    assert report["splits"] == {"train": 9, "val": 2} and report["images"] == report["looked_at"] == 9
    assert report["classes"] == [{"name": "cat", "images": 6}, {"name": "dog", "images": 3}]
    assert report["imbalance"] == 2 and report["unlabelled"] == 0
    assert report["formats"] == {"JPEG": 7, "PNG": 2} and report["skipped"] == {".txt": 1}
    sizes = report["sizes"]
    assert sizes["height"] == {"min": 20, "median": 23, "max": 40} and sizes["width"]["min"] == 30
    assert sizes["distinct"] == 7 and sizes["most"][0]["images"] == 2
    assert sizes["shorter_side"] == [{"up_to": 32, "images": 9}]
    assert report["duplicates"] == {"groups": 1, "images": 2, "first": [["cat/3.jpg", "dog/again.jpeg"]]}
    assert report["leaks"] == {"val": {"images": 1, "first": [["cat/5.jpg", "dog/same.jpg"]]}}
    assert not report["problems"] and not report["unreadable"] and report["memory"]["resident"]
    assert (report["batch"], report["steps"]) == (8, 1)
    assert report["next"][1] == f"inbatch pretrain --data {shlex.quote(str(photos))}"
    assert json.loads(json.dumps(report)) == report


def test_the_other_split(photos: Path) -> None:
    report = survey_data(str(photos), split="test")
    assert report["images"] == 2 and report["leaks"]["train"]["first"] == [["dog/same.jpg", "cat/5.jpg"]]
    assert report["next"][1].endswith(" --set split=val") and list(report["leaks"]) == ["train"]
    with pytest.raises(DataError, match="no split 'extra', only train, val"):
        survey_data(photos, split="extra")


def test_mean_and_deviation_are_those_of_all_pixels(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_statistics, "_BLOCK", 1000)
    monkeypatch.setattr(image_statistics, "_CHUNK", 2)
    for channels in (1, 3):
        source = open_data(photos, channels=channels)
        every = torch.cat([source.image(i).flatten(1) for i in range(9)], 1).double() / 255
        pixels = survey_data(photos, settings={"channels": channels})["pixels"]
        assert pixels["mean"] == pytest.approx(every.mean(1).tolist(), abs=1e-14)
        assert pixels["std"] == pytest.approx(every.std(1, correction=0).tolist(), abs=1e-12)
        assert pixels["lowest"] == every.amin(1).tolist() and pixels["highest"] == every.amax(1).tolist()


def test_sums_are_exact_however_large() -> None:
    one = image_statistics.ImageStatistics(
        pixels=2**40, sums=np.array([255 * 2**40], object), squares=np.array([255**2 * 2**40], object)
    )
    assert one.mean_and_deviation() == ([1.0], [0.0])


@pytest.mark.parametrize("sample", [1, 4, 9, 50])
def test_report_of_a_sample_states_its_size(photos: Path, sample: int) -> None:
    report = survey_data(photos, sample=sample)
    assert report["looked_at"] == min(sample, 9) and sum(report["formats"].values()) == min(sample, 9)
    assert sum(one["images"] for one in report["classes"]) == 9  # of all
    shown = run(f"data {shlex.quote(str(photos))} --sample {sample}").stdout
    assert (f"a sample of {sample}, evenly spaced" in shown) == (sample < 9)
    with pytest.raises(ConfigError, match="a sample of 0 images"):
        survey_data(photos, sample=0)


@pytest.mark.slow
def test_report_as_text(photos: Path, tmp_path: Path) -> None:
    result = run(f"data {shlex.quote(str(photos))} -o {tmp_path}/samples.png")
    assert result.exit_code == 0 and not result.stderr
    for words in (
        "9 in train, 2 in val",
        "2: cat 6, dog 3; the largest is 2.0 times the smallest",
        "7 JPEG, 2 PNG",
        "height 20 / 23 / 40",
        "2 images in 1 groups: cat/3.jpg = dog/again.jpeg",
        "LEAK into val",
        "1 step of 8 images",
        "a row for each of cat, dog",
    ):
        assert words in result.stdout, words
    picture = Image.open(tmp_path / "samples.png")
    assert picture.size == (6 * 100 + 4, 2 * 100 + 4)
    for line in (line.strip() for line in result.stdout.splitlines() if line.startswith("  inbatch ")):
        extra = " --dry-run" if "pretrain" in line else ""
        os.chdir(tmp_path)
        assert run(line.removeprefix("inbatch ") + extra).exit_code == 0, line


def test_damage_is_named_and_too_much_of_it_stops(photos: Path) -> None:
    (photos / "train/cat/2.jpg").write_bytes((photos / "train/cat/2.jpg").read_bytes()[:300])
    for i in range(11):
        (photos / f"train/dog/x{i:02d}.png").write_text("no image")
    result = run(f"data {shlex.quote(str(photos))}")
    assert result.exit_code == 3 and "12 of 20 images cannot be read" in result.stderr
    assert "--set max_unreadable=0.6" in result.stderr
    assert result.stdout.count("cannot be read") == 10 and "and 2 more: --json names all" in result.stdout
    assert "Next" not in result.stdout
    json_result = run(f"data {shlex.quote(str(photos))} --json")
    assert json_result.exit_code == 3 and len(one_object(json_result.stdout)["unreadable"]) == 12
    first = one_object(json_result.stdout)["unreadable"][0]
    assert first["image"] == "cat/2.jpg" and "runcated" in first["why"]


def test_one_unreadable_in_a_hundred_is_left_out(tmp_path: Path) -> None:
    for i in range(99):
        put(tmp_path / f"{i}.png", (4, 4))
    (tmp_path / "x.png").touch()
    report = survey_data(tmp_path)
    assert (
        len(report["unreadable"]) == 1
        and not report["problems"]
        and report["classes"] == []
        and report["imbalance"] is None
    )
    assert report["unlabelled"] == 100 and "unlabelled" in run(f"data {tmp_path}").stdout


@pytest.mark.skipif(os.name != "posix", reason="such names are POSIX's")
def test_hostile_names(tmp_path: Path) -> None:
    root, hostile = tmp_path / "data", "\x1b[31m[bold]\n$\\frac{<script>\u202e"
    for name in (hostile, "b"):
        for i in range(2):
            put(root / name / f"{hostile}{i}.png")
    (root / "b" / f"bad{hostile}.png").touch()
    Path(os.fsdecode(os.path.join(os.fsencode(root), b"x.\xff\x1b"))).touch()
    (root / hostile / "copy.png").write_bytes((root / "b" / f"{hostile}0.png").read_bytes())
    for line in ("", "--json"):
        result = run(f"data {root} {line} -o {tmp_path / 'sheet.png'}")
        assert result.exit_code == 3
        for control in ("\x1b", "\u202e"):
            assert control not in result.stdout + result.stderr
        assert "\\nfrac" not in result.stdout and not any(line.startswith("$") for line in result.stdout.splitlines())
    report = one_object(result.stdout)
    assert report["classes"][0]["name"] == "\\x1b[31m[bold]\\n$\\frac{<script>\\u202e"
    assert report["skipped"] == {".\\xff\\x1b": 1} and report["duplicates"]["images"] == 2


def test_empty_or_missing_folder_exits_with_3(tmp_path: Path) -> None:
    for line in (f"data {tmp_path}", f"data {tmp_path} --json", f"data {tmp_path}/nowhere"):
        assert run(line).exit_code == 3
    assert "No image under" in run(f"data {tmp_path}").stderr


def test_identical_images_exit_with_3(tmp_path: Path) -> None:
    data = put(tmp_path / "0.png")
    for i in range(1, 5):
        (tmp_path / f"{i}.png").write_bytes(data)
    result = run(f"data {tmp_path}")
    assert result.exit_code == 3 and "all 5 images are identical" in result.stderr
    assert "5 images in 1 groups: 0.png = 1.png = 2.png" in result.stdout


def test_one_image_and_none_that_can_be_read(tmp_path: Path) -> None:
    put(tmp_path / "0.png")
    assert "there is one image" in run(f"data {tmp_path}").stderr
    (tmp_path / "0.png").write_text("no image")
    result = run(f"data {tmp_path} -o {tmp_path}/sheet.png")
    assert result.exit_code == 3 and "1 of 1 images cannot be read" in result.stderr
    assert not (tmp_path / "sheet.png").exists()


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [put(tmp_path / f"{i}.png") for i in range(4)]
    rows = [{"bytes": data, "path": f"p/{i}.png"} for i, data in enumerate([*files, files[1]])]
    parquet.write_table(arrow.table({"image": rows, "label": [0, 1, 1, None, 0]}), tmp_path / "train.parquet")
    report = survey_data(tmp_path / "train.parquet")
    assert report["formats"] == {"PNG": 5} and report["duplicates"]["first"] == [["p/1.png", "p/4.png"]]
    assert report["unlabelled"] == 1 and [one["images"] for one in report["classes"]] == [2, 2]


def test_many_classes_and_long_names_stay_short(tmp_path: Path) -> None:
    data = put(tmp_path / "a" / "0.png")
    for i in range(14):
        put(tmp_path / f"{i:02d}" / "1.png")
    (tmp_path / ("x" * 200)).mkdir()
    for name in ("y" * 200, "z"):
        (tmp_path / ("x" * 200) / f"{name}.png").write_bytes(data)
    shown = run(f"data {tmp_path}").stdout
    assert "16, of 1 (a) to 2 images (xxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxx)" in shown
    assert "3 images in 1 groups: a/0.png = xxxxxxxxxxxxxxxxxxxxxx...yyyyyyyyyyyyyyyyyy.png = xxx" in shown


def test_arrays_and_the_embedded_set() -> None:
    images = torch.randint(256, (40, 5, 9, 9), dtype=torch.uint8)
    images[30] = images[2]
    report = survey_data((images, torch.arange(40) % 4), out=None)
    assert report["duplicates"]["first"] == [["2", "30"]] and report["channels"] == 5 == len(report["pixels"]["mean"])
    assert report["formats"] == {"pixels in memory": 40} and report["data"] == "array"
    digits = one_object(run("data digits-canvas --sample 100 --json").stdout)
    assert digits["splits"] == {"train": 1297, "test": 500} and digits["leaks"]["test"]["images"] == 0
    assert inbatch.survey_data is survey_data


def test_a_class_without_images_has_no_ratio(photos: Path) -> None:
    for file in (photos / "val/dog").iterdir():
        file.unlink()
    put(photos / "val/dog2/1.jpg")
    with pytest.raises(DataError, match="classes that the train split lacks: dog2"):
        survey_data(photos)


def test_settings_and_pictures_that_cannot_be(photos: Path, tmp_path: Path) -> None:
    where = shlex.quote(str(photos))
    assert run(f"data {where} --set channel=1").exit_code == 2
    assert run(f"data {where} --set channels=2").exit_code in (2, 3)
    assert run(f"data {where} -o {tmp_path}/sheet.what").exit_code == 2
    assert run(f"data {where} -o {tmp_path}/no/such/folder/sheet.png").exit_code == 0


def test_long_survey_prints_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inbatch.runtime.terminal.counted.__defaults__", (0.0, False))
    result = run("data digits-canvas --json")
    assert "of 1,297 images looked at" in result.stderr and one_object(result.stdout)["images"] == 1297


def test_images_of_more_than_8_bits_are_reported_with_levels(tmp_path: Path) -> None:
    for i, top in enumerate((300, 4095, 1000)):
        scan = RANDOM.integers(0, top + 1, (9, 12)).astype(np.uint16)
        scan[0, 0] = top
        Image.fromarray(scan).save(tmp_path / f"{i}.png")
        Image.fromarray(scan.astype(np.uint16)).save(tmp_path / f"{i}.tif")
    Image.fromarray(np.full((9, 12), 255, np.uint8)).save(tmp_path / "plain.png")
    report = survey_data(tmp_path, settings={"channels": 1})
    assert report["bits"] == {"8": 1, "16": 6} and report["levels"] == [0, 65535]  # the 8-bit file contains white
    (tmp_path / "plain.png").unlink()
    assert survey_data(tmp_path, settings={"channels": 1})["levels"] == [0, 4095]
    assert "--set levels=[0,4095]" in run(f"data {shlex.quote(str(tmp_path))} --set channels=1").stdout
    scaled = survey_data(tmp_path, settings={"channels": 1, "levels": (0, 4095)})
    assert scaled["levels"] is None and scaled["pixels"]["highest"] == [1.0]
