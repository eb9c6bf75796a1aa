"""`inbatch search`: nearest images of a collection, marked or without the query itself; reuse and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import inbatch
from inbatch.apps.cli import app
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation.neighbours import nearest
from inbatch.models import create_encoder, load_encoder, save_encoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(10):
        folder = root / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_encoder(create_encoder("tiny", size=20), folder)
    return folder


def test_neighbours_are_those_of_the_features_and_the_query_is_marked(
    photos: Path, encoder: Path, tmp_path: Path
) -> None:
    query = photos / "cats" / "03.png"
    result = inbatch.search_images(encoder, [query, photos / "dogs"], photos, k=4, out=tmp_path / "hits.png")
    assert [q["path"] for q in result["queries"]] == [str(query), *(f"{i:02d}.png" for i in range(0, 10, 2))]
    every = load_encoder(encoder)
    files = sorted(photos.glob("*/*.png"))
    pixels = np.stack([np.array(Image.open(file)) for file in files])
    rows = torch.from_numpy(every.embed(pixels))
    similarity, place = nearest(rows[[files.index(query)]], rows, 4)
    listed = result["queries"][0]["neighbours"]
    assert [near["path"] for near in listed] == [str(files[i].relative_to(photos)) for i in place[0]]
    np.testing.assert_allclose([near["similarity"] for near in listed], similarity[0], atol=1e-5)
    assert [near["itself"] for near in listed] == [True, False, False, False]
    assert Image.open(tmp_path / "hits.png").width > 400
    others = inbatch.search_images(encoder, str(query), photos, k=3, exclude_self=True)["queries"][0]["neighbours"]
    assert [near["path"] for near in others] == [near["path"] for near in listed[1:]]
    assert [near["rank"] for near in others] == [1, 2, 3]
    assert len(inbatch.search_images(encoder, query, photos, k=99)["queries"][0]["neighbours"]) == 10


def test_command_reports_reused_features_and_reads_a_file(photos: Path, encoder: Path, tmp_path: Path) -> None:
    words = ["search", str(encoder), str(photos / "cats" / "01.png"), "-k", "2", "--json", "--data", str(photos)]
    first = CliRunner().invoke(app, words)
    again = CliRunner().invoke(app, words)
    result = json.loads(again.stdout)
    assert "features read from" in again.stderr and first.exit_code == again.exit_code == 0
    assert result["queries"] == json.loads(first.stdout)["queries"]
    file = tmp_path / "photos.npz"
    file.write_bytes(Path(result["origin"]["file"]).read_bytes())
    from_file = CliRunner().invoke(app, [*words[:6], "--features", str(file)])
    hits = json.loads(from_file.stdout)["queries"][0]["neighbours"]
    assert [near["path"] for near in hits] == [near["path"] for near in result["queries"][0]["neighbours"]]
    table = CliRunner().invoke(app, [*words[:5], "--data", str(photos)])
    assert table.exit_code == 0 and "01.png" in table.stdout and "itself" in table.stdout


def test_invalid_searches_are_refused(photos: Path, encoder: Path, tmp_path: Path) -> None:
    query = photos / "cats" / "01.png"
    search = inbatch.search_images
    file = Path(search(encoder, query, photos)["origin"]["file"])
    other = tmp_path / "other"
    torch.manual_seed(9)
    save_encoder(create_encoder("tiny", size=20), other)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    wide = tmp_path / "wide.npz"
    np.savez(wide, path=np.array(["a"]), vector=np.ones((1, 3), np.float32))
    with pytest.raises(DataError, match="features of 3 numbers"):
        search(encoder, query, features=wide)
    with pytest.raises(DataError, match="another encoder"):
        search(other, query, photos, features=file)
    with pytest.raises(ConfigError, match="--exclude-self compares files"):
        search(encoder, query, features=file, exclude_self=True)
    with pytest.raises(ConfigError, match="a picture needs the images"):
        search(encoder, query, features=file, out=tmp_path / "hits.png")
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        search(encoder, query, photos, out=tmp_path / "hits.pdf")
    with pytest.raises(ConfigError, match="without an encoder for the queries"):
        search(file, query)
    with pytest.raises(ConfigError, match="unknown index 'fast': choose exact or approximate"):
        search(encoder, query, photos, index="fast")
    with pytest.raises(ConfigError, match="there is no query"):
        search(encoder, [], photos)
    with pytest.raises(DataError, match="does not exist"):
        search(encoder, tmp_path / "none.png", photos)
    with pytest.raises(DataError, match="none of 1 query image can be read"):
        search(encoder, tmp_path / "bad.png", photos)
    with pytest.raises(DataError, match="No image under"):
        search(encoder, tmp_path / "empty", photos)
    assert len(search(encoder, [query, tmp_path / "bad.png"], photos)["unreadable_queries"]) == 1


def test_queries_are_any_paths_and_nothing_else(photos: Path, encoder: Path, tmp_path: Path) -> None:
    query = photos / "cats" / "01.png"
    found = inbatch.search_images(encoder, (path for path in [query]), photos, out=tmp_path / "hits.png")
    assert len(found["queries"]) == 1, "also of an iterator that is read once"
    with pytest.raises(ConfigError, match=r"images must be paths of query images, not PIL\.Image"):
        inbatch.search_images(encoder, Image.new("RGB", (9, 9)), photos)


def test_images_of_a_file_of_features_are_read_with_levels(tmp_path: Path) -> None:
    draw, data, folder, file = np.random.default_rng(0), tmp_path / "data", tmp_path / "enc", tmp_path / "f.npz"
    data.mkdir()
    for i in range(4):
        Image.fromarray(draw.integers(0, 1024, (20, 20)).astype(np.uint16)).save(data / f"{i}.png")
    Image.open(data / "0.png").save(data / "copy.png")
    made = create_encoder("tiny", size=20, channels=1)
    made.levels = (0.0, 1023.0)
    save_encoder(made, folder)
    inbatch.embed_run(folder, data, file)
    found = inbatch.search_images(folder, data / "0.png", data=data, features=file, k=2)
    assert {Path(near["path"]).name for near in found["queries"][0]["neighbours"]} == {"0.png", "copy.png"}
    reading = {"levels": (0, 1023), "channels": 1}
    assert inbatch.find_duplicates(data, file, settings=reading)["duplicates"] == 1
    with pytest.raises(ConfigError, match="read as the encoder reads them"):
        inbatch.find_duplicates(data, folder, settings=reading)


@pytest.mark.slow
def test_the_index_is_kept_and_belongs_to_its_features(photos: Path, encoder: Path) -> None:
    pytest.importorskip("faiss")
    query = photos / "cats" / "01.png"
    exact = inbatch.search_images(encoder, query, photos, k=3)
    first = inbatch.search_images(encoder, query, photos, k=3, index="approximate")
    again = inbatch.search_images(encoder, query, photos, k=3, index="approximate")
    assert first["queries"] == again["queries"] == exact["queries"]  # ten images are in fewer lists than are searched
    assert any("index written to" in text for text in first["notes"])
    assert any("index read from" in text for text in again["notes"])
