"""Known groups of images: read from columns of every kind of data, kept by selections, and part of batches."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch.data import Loader, Subset, open_data
from inbatch.data.sources.groups import groups_of_array, groups_of_values
from inbatch.data.views import Views, make_views
from inbatch.errors import DataError

VIDEOS = ["a", "b", "a", "", "b", "c"]
GROUPS = [0, 1, 0, -1, 1, 2]
IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


def encoded(i: int) -> bytes:
    Image.fromarray(IMAGES[i]).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    rows = [f"{i}.png,{'train' if i < 5 else 'test'},{video}" for i, video in enumerate(VIDEOS)]
    (tmp_path / "l.csv").write_text("\n".join(["path,split,Video", *rows]))
    return tmp_path / "l.csv"


def test_lists(listed: Path) -> None:
    source = open_data(listed, group_column="video")
    assert source.groups is not None and source.groups.dtype == torch.int64 and source.groups.tolist() == GROUPS[:5]
    assert open_data(listed).groups is None and open_data(listed, "test").groups is None
    with pytest.raises(DataError, match="no columns for group_column = 'clip'; its first line has 'path', 'split"):
        open_data(listed, group_column="clip")
    (listed.parent / "l.txt").write_text("0.png cat\n1.png dog\n")
    with pytest.raises(DataError, match="has no columns with names"):
        open_data(listed.parent / "l.txt", group_column="video")


def test_tables_arrays_and_items(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [encoded(i) for i in range(6)], "label": [0, 1] * 3, "video": VIDEOS}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=4)
    numbers = columns | {"video": [7, 3, 7, None, 3, 9]}
    parquet.write_table(arrow.table(numbers), tmp_path / "b.parquet")
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=np.arange(6), video=np.array([7, 3, 7, -1, 3, 9]))
    items = [{"image": Image.fromarray(x), "video": v} for x, v in zip(IMAGES, VIDEOS, strict=True)]
    every = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "a.npz", items]
    try:
        import datasets
    except ImportError:
        pass
    else:
        every.append(datasets.Dataset.from_dict(columns))
    for data in every:
        source = open_data(data, group_column="video")
        same = source.groups[:, None] == source.groups
        assert torch.equal(same, torch.tensor(GROUPS)[:, None] == torch.tensor(GROUPS)), data
        assert source.groups.tolist()[3] == -1 and open_data(data).groups is None
        assert open_data(data).signature() != source.signature()
        with pytest.raises(DataError, match=r"has no (column|array) 'clip'"):
            open_data(data, group_column="clip")
    both = open_data([str(tmp_path / "a.parquet"), str(tmp_path / "a.npz")], group_column="video")
    assert both.groups[:6].max() < both.groups[[6, 7, 11]].min() and (both.groups == -1).sum() == 2


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return file


def test_folders_and_tar_shards(tmp_path: Path) -> None:
    """By the folder, by a pattern of the path, and by the members beside the image."""
    names = ["a/clip1_0", "a/clip2_0", "a/b/clip1_1", "b/x", "b/clip1_2", "top"]
    members: dict[str, bytes] = {}
    for i, (name, video) in enumerate(zip(names, VIDEOS, strict=True)):
        file = tmp_path / "photos" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
        members |= {f"{name}.png": encoded(i), f"{name}.video.txt": video.encode()}
        members[f"{name}.json"] = json.dumps({"clip": video or None}).encode()
    shard = write_tar(tmp_path / "s.tar", members)
    rules = {
        "folder": {"a/clip1_0": "a", "a/clip2_0": "a", "a/b/clip1_1": "ab", "b/x": "b", "b/clip1_2": "b", "top": ""},
        r"(clip\d)_": {"a/clip1_0": "1", "a/clip2_0": "2", "a/b/clip1_1": "1", "b/x": "", "b/clip1_2": "1", "top": ""},
        "video.txt": dict(zip(names, VIDEOS, strict=True)),
        "clip": dict(zip(names, VIDEOS, strict=True)),
    }
    for column, group in rules.items():
        for data in (tmp_path / "photos", shard):
            if column in ("video.txt", "clip") and data != shard:
                with pytest.raises(DataError, match=r"the files of .* have no columns. Use folder"):
                    open_data(data, group_column=column)
                continue
            source = open_data(data, group_column=column)
            expected = [group[source.identity(i).removeprefix("s.tar:").removesuffix(".png")] for i in range(6)]
            for i in range(6):
                same = [j for j in range(6) if source.groups[j] == source.groups[i] != -1]
                assert same == ([j for j in range(6) if expected[j] == expected[i]] if expected[i] else []), column
            assert open_data(data).groups is None and open_data(data).signature() != source.signature()
    for column, message in {
        "(clip": "is not a regular expression", "(c)(l)": "has 2 pairs of capturing brackets", "(?:c)": "has 0 pairs",
        "(dog)": "it finds no text in its brackets in any path", "slide": r"no member KEY.slide .*group_column",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message):
            open_data(shard, group_column=column)


def test_data_without_columns_have_no_groups(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(encoded(0))
    for data in (tmp_path, (IMAGES, [0, 1] * 3), "digits-canvas"):
        with pytest.raises(DataError, match="group_column = 'video'"):
            open_data(data, group_column="video")


def test_values_that_cannot_be_groups_are_refused() -> None:
    with pytest.raises(DataError, match=r"The groups are numbers such as 0\.5: a group is a whole number or a name"):
        groups_of_values([0.5, 1.5], "The groups")
    with pytest.raises(DataError, match="The groups are list: a group is"):
        groups_of_values([[1], [2]], "The groups")
    with pytest.raises(DataError, match=r"have shape \(2, 2\), but there are 2 images"):
        groups_of_array(np.zeros((2, 2)), 2, "The groups")
    assert groups_of_values([5, "5 ", None, float("nan"), "x"], "").tolist() == [0, 1, -1, -1, 2]


def test_batches_and_selections_keep_groups(listed: Path) -> None:
    source = open_data(listed, group_column="video")
    assert Subset(source, torch.tensor([4, 0]), "chosen").groups.tolist() == [1, 0]
    views = Views(make_views("plain", {"size": 4}, 3), (0.5,) * 3, (0.5,) * 3)
    for resident in (True, False):
        for data, expected in ((source, source.groups), (open_data(listed), None)):
            loader = Loader(data, batch=2, views=views, seed=0, resident=resident, workers=0)
            for batch in loader.epoch(0):
                if expected is None:
                    assert batch.group is None
                else:
                    assert torch.equal(batch.group, expected[batch.index])
                    assert torch.equal(batch.take(slice(1, 2)).group, batch.group[1:])
            loader.close()
