"""The parts of the page of `inbatch explore`, without a browser."""

import base64
import hashlib
import itertools
import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

import inbatch
from inbatch.apps.collection.features import open_collection
from inbatch.apps.reports.explorer import explore, sprite
from inbatch.apps.reports.explorer.explore import is_features
from inbatch.apps.reports.explorer.facts import common_neighbours, gather_facts, near_duplicates
from inbatch.apps.reports.explorer.page import data_text, packed, render_page, resource, smallest, split_root
from inbatch.apps.reports.explorer.projection import choose_projection, project
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation.outliers import distribution_distance

ODD = "a\"b<c>&'`é </script> .png".replace("/", "")
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
WEB = Path(__file__).parents[2] / "web" / "explorer"


def unpack(value: dict[str, str]) -> np.ndarray:
    kind = {"f32": np.float32, "u8": np.uint8, "u16": np.uint16, "u32": np.uint32}[value["type"]]
    return np.frombuffer(base64.b64decode(value["values"]), kind)


def data_of(page: Path) -> dict:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert block is not None
    return json.loads(block[1])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return 30 images of three colours in class folders, and features of them in which classes are apart."""
    folder = tmp_path_factory.mktemp("explore") / "photos"
    names, labels, vectors = [], [], []
    generator = torch.Generator().manual_seed(0)
    for label, (name, colour) in enumerate(sorted(COLOURS.items())):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            file = ODD if i == 0 else f"{name}-{i}.png"
            Image.new("RGB", (20, 30), colour).save(folder / name / file)
            names.append(f"{name}/{file}")
            labels.append(label)
            vectors.append(4 * torch.eye(3, 8)[label] + torch.randn(8, generator=generator))
    order = sorted(range(30), key=lambda i: names[i])
    features = folder.parent / "features.npz"
    rows = torch.stack(vectors)
    rows[order[1]] = rows[order[0]]  # a near duplicate
    np.savez(
        features, path=np.array(names)[order], vector=rows.numpy()[order].astype(np.float32),
        label=np.array(labels)[order], index=np.arange(30), split=np.array(["train"] * 30),
        **{"class": np.array(sorted(COLOURS))[labels][order]},
    )  # fmt: skip
    return features, folder


def test_data_cannot_end_its_element() -> None:
    data = {"paths": ["</script><b>", "<!--", "\udcff\u2028&amp;", "é"]}
    text = data_text(data)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_numbers_are_packed_in_the_smallest_type() -> None:
    for values, kind in (([0, 255], "u8"), ([256], "u16"), ([70_000, 1], "u32"), ([], "u8")):
        value = packed(smallest(np.array(values, np.int64)))
        assert value["type"] == kind
        assert unpack(value).tolist() == values
    assert unpack(packed(np.float32([0.5, -1]))).tolist() == [0.5, -1]


def test_paths_share_their_folder() -> None:
    assert split_root(["/a/b/c.png", "/a/bd/e.png"]) == ("/a/", ["b/c.png", "bd/e.png"])
    assert split_root(["/a/b/c.png"]) == ("/a/b/", ["c.png"])
    assert split_root(["0", "1"]) == ("", ["0", "1"])


def test_bundle_is_the_one_that_was_built() -> None:
    digest, name = resource("explorer.js.sha256").split()
    assert name == "explorer.js"
    assert hashlib.sha256(resource("explorer.js").encode()).hexdigest() == digest, "build web/explorer again"
    licences = resource("LICENCES.txt")
    if WEB.is_dir():  # an installed package has no web/
        versions = json.loads((WEB / "package.json").read_text())["dependencies"]
        for package, version in versions.items():
            assert f"{package} {version} (" in licences
    assert "kdbush" in licences and "simplify-js" in licences


@pytest.mark.slow
def test_wheel_holds_the_page(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    from zipfile import ZipFile

    [file] = wheel.WheelBuilder(str(WEB.parents[1])).build(directory=str(tmp_path))
    inside = set(ZipFile(file).namelist())
    for name in ("explorer.js", "explorer.js.sha256", "LICENCES.txt", "page.html", "page.css"):
        assert f"inbatch/apps/reports/explorer/{name}" in inside


def test_page_allows_no_request() -> None:
    maps = [{"name": "<b>run</b>"}]
    page = render_page("<title>", 'a"b', {"maps": maps})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;;")
    script = base64.b64encode(hashlib.sha256(resource("explorer.js").encode()).digest()).decode()
    assert f"sha256-{script}" in policy[1]
    assert "http:" not in policy[1] and "https:" not in policy[1] and "file:" not in policy[1]
    assert "<b>run</b>" not in page and 'aria-label="a"b' not in page


def test_colours_are_distinguishable_without_a_kind_of_cone() -> None:
    """The distances are CIE76; below 10, colours of small points are hard to tell apart."""
    if not WEB.is_dir():
        pytest.skip("needs web/explorer")
    text = (WEB / "src" / "colours.js").read_text()
    block = re.search(r"CATEGORIES = \[(.*?)\]", text, re.DOTALL)
    assert block is not None
    colours = [_linear(colour) for colour in re.findall(r"#(\w{6})", block[1])]
    assert len(colours) == 10
    for matrix in _SIMULATIONS:
        seen = [_lab(np.clip(np.array(matrix) @ colour, 0, 1)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


# Machado, Oliveira and Fernandes (2009), severity 1.0: protanopia, deuteranopia, tritanopia.
_SIMULATIONS = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


def _linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _lab(rgb: np.ndarray) -> np.ndarray:
    matrix = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
    relative = np.array(matrix) @ rgb / (0.95047, 1, 1.08883)
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_projections_of_few_or_equal_images() -> None:
    for rows in (torch.ones(1, 4), torch.ones(30, 4), torch.zeros(12, 4), torch.eye(3, 1)):
        for name in ("pca", "tsne"):
            places = project(rows, name, 0)
            assert places.shape == (len(rows), 2)
            assert places.isfinite().all() and places.abs().max() <= 1
    with pytest.raises(DataError, match="NaN"):
        project(torch.full((3, 2), torch.nan), "pca", 0)


def test_pca_finds_the_plane_of_the_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(200, generator=generator) * 6.28
    rows = torch.cat([torch.stack([angle.cos(), angle.sin()], 1), 0.01 * torch.randn(200, 5, generator=generator)], 1)
    places = project(rows @ torch.linalg.qr(torch.randn(7, 7, generator=generator))[0], "pca", 0)
    assert torch.allclose(torch.linalg.vector_norm(places, dim=1), torch.tensor(1.0), atol=0.1)


def test_projection_is_chosen_by_installed_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(
        "inbatch.apps.reports.explorer.projection.find_spec", lambda name: name if name in installed else None
    )
    assert [choose_projection("auto", count)[0] for count in (5, 10_000, 10_001)] == ["pca", "tsne", "pca"]
    assert "pip install" in choose_projection("auto", 10_001)[1]
    with pytest.raises(ConfigError, match=r'pip install "inbatch\[explore\]"'):
        choose_projection("umap", 10)
    installed.add("umap")
    assert choose_projection("auto", 10_001)[0] == "umap"
    installed.add("pacmap")
    assert [choose_projection("auto", count)[0] for count in (5, 10_000, 10_001)] == ["pca", "pacmap", "pacmap"]
    with pytest.raises(ConfigError, match="choose one of auto, pca"):
        choose_projection("tnse", 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsne", "umap", "pacmap"])
def test_projection_keeps_neighbourhoods(name: str) -> None:
    if name != "tsne":
        pytest.importorskip(name)
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(200) % 4
    rows = 6 * torch.eye(4, 16)[group] + torch.randn(200, 16, generator=generator)
    places = project(rows, name, 0)
    near = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert (group[near] == group).float().mean() > 0.95
    assert torch.equal(places, project(rows, name, 0))


def test_facts_about_images(photos: tuple[Path, Path]) -> None:
    collection = open_collection(photos[0])
    places = torch.zeros(30, 2)
    facts = gather_facts(collection, places, k=5, clusters=3, index="exact", seed=0)
    assert facts.neighbours.shape == (30, 5)
    assert facts.neighbours[0, 0] == 1 and facts.similarities[0, 0] > 0.999
    assert {re.sub(r"cluster \d \(\d+% (\w+)\)", r"\1", name) for name in facts.cluster_names} == set(COLOURS)
    assert torch.equal(facts.outliers, distribution_distance(collection.vectors))


def test_groups_of_near_duplicates(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    scenes = [Image.fromarray(generator.integers(0, 255, (6, 6, 3), np.uint8)).resize((90, 60)) for _ in range(4)]
    pictures = [scenes[0], scenes[1], scenes[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), scenes[2]]
    pictures += [scenes[1].resize((45, 30)), scenes[3], scenes[3], Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9))]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    names = np.array([f"{i}.png" for i in range(10)])
    np.savez(tmp_path / "f.npz", path=names, vector=generator.normal(size=(10, 4)).astype(np.float32))
    collection = open_collection(tmp_path / "f.npz", tmp_path)
    drawn = sprite.draw_sprite(collection, 16)
    assert drawn.missing == 1
    others = torch.tensor([[2, 9], [4, 3], [9, 3], [0, 1], [2, 3], [0, 1], [0, 1], [0, 1], [1, 2], [0, 1]])
    assert near_duplicates(drawn, [others]).tolist() == [1, 2, 1, 0, 2, 3, 3, 4, 4, 0]


def test_common_neighbours_in_any_order() -> None:
    first, second = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 1, 9], [7, 8, 9]])
    assert common_neighbours(first, second).tolist() == [2, 0]


def test_sprite_has_each_image_at_its_place(photos: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sprite, "_SIDE", 64)  # 16 tiles per sheet
    collection = open_collection(*photos)
    drawn = sprite.draw_sprite(collection, 16)
    assert (drawn.columns, drawn.per_sheet, len(drawn.sheets), drawn.missing) == (4, 16, 2, 0)
    sheets = [np.asarray(Image.open(BytesIO(sheet)).convert("RGB")) for sheet in drawn.sheets]
    assert sheets[1].shape == (64, 64, 3)  # 14 images in 4 rows
    for i in range(30):
        at = i % 16
        tile = sheets[i // 16][16 * (at // 4) :, 16 * (at % 4) :][4:12, 4:12].reshape(-1, 3).mean(0)
        expected = COLOURS[Path(collection.paths[i]).parent.name]
        assert np.abs(tile - expected).max() < 40, collection.paths[i]


def test_map_of_a_folder(photos: tuple[Path, Path], tmp_path: Path) -> None:
    features, folder = photos
    out = tmp_path / "map.html"
    result = inbatch.explore_features(features, folder, out=out, projection="pca", thumbnails=16)
    assert result["images"] == 30 and result["projection"] == "pca"
    assert result["bytes"] == out.stat().st_size
    assert result["thumbnails"]["folder"] is None and list(tmp_path.iterdir()) == [out]
    data = data_of(out)
    collection = open_collection(features, folder)
    assert [data["root"] + path for path in data["paths"]] == [collection.file_of(i) for i in range(30)]
    assert any(path.endswith(ODD) for path in data["paths"])
    assert (unpack(data["labels"]).astype(int) - 1).tolist() == collection.labels.tolist()
    neighbours = unpack(data["maps"][0]["neighbours"]).reshape(30, 12)
    assert neighbours[0, 0] == 1
    assert data["sprite"]["sheets"][0].startswith("data:image/webp;base64,")
    assert out.read_text().count("</script>") == 2


def test_thumbnails_in_a_folder_next_to_the_file(photos: tuple[Path, Path], tmp_path: Path) -> None:
    features, folder = photos
    out = tmp_path / "a map#1.html"
    result = inbatch.explore_features(features, folder, out=out, projection="pca", thumbnails=16, inside=0)
    assert result["thumbnails"]["folder"] == str(tmp_path / "a map#1_files")
    assert data_of(out)["sprite"]["sheets"] == ["a%20map%231_files/sheet-0.webp"]
    assert (tmp_path / "a map#1_files" / "sheet-0.webp").stat().st_size == result["thumbnails"]["bytes"]
    with pytest.raises(ConfigError, match="would become an image of the data"):
        inbatch.explore_features(features, folder, out=folder / "map.html", projection="pca", inside=0)
    assert not (folder / "map.html").exists()


def test_two_maps_of_the_same_images(photos: tuple[Path, Path], tmp_path: Path) -> None:
    features, folder = photos
    with np.load(features) as archive:
        columns = dict(archive)
    generator = np.random.default_rng(0)
    order = generator.permutation(30)
    other = {name: column[order] for name, column in columns.items()}
    np.savez(tmp_path / "same.npz", **other)
    other["vector"] = generator.normal(size=(30, 5)).astype(np.float32)
    np.savez(tmp_path / "random.npz", **other)
    out = tmp_path / "map.html"
    options = {"out": out, "projection": "pca", "thumbnails": 0}
    same = inbatch.explore_features(features, folder, other=tmp_path / "same.npz", **options)
    assert same["common_neighbours"] == 1
    different = inbatch.explore_features(features, folder, other=tmp_path / "random.npz", **options)
    assert different["common_neighbours"] < 0.8
    data = data_of(out)
    shared = unpack(data["shared"])
    assert [entry["name"] for entry in data["maps"]] == ["features.npz", "random.npz"]
    assert shared[data["changed"]].tolist() == sorted(shared.tolist())
    np.savez(tmp_path / "fewer.npz", **{name: column[:20] for name, column in columns.items()})
    with pytest.raises(DataError, match=r"20 images and .* 30, of which 10 are not"):
        inbatch.explore_features(features, folder, other=tmp_path / "fewer.npz", **options)


def test_one_image_and_equal_images(photos: tuple[Path, Path], tmp_path: Path) -> None:
    for count in (1, 2, 12):
        rows = np.ones((count, 4), np.float32)
        np.savez(tmp_path / "f.npz", path=np.array([f"{i}.png" for i in range(count)]), vector=rows)
        result = inbatch.explore_features(tmp_path / "f.npz", out=tmp_path / "map.html")
        assert result["neighbours"] == min(12, count - 1)
        assert result["near_duplicates"] is None  # there are no pixels
        assert data_of(tmp_path / "map.html")["sprite"] is None


def test_command(photos: tuple[Path, Path], tmp_path: Path) -> None:
    features, folder = photos
    out = tmp_path / "map.html"
    done = run(f"explore {features} {folder} -o {out} --projection pca --json")
    assert done.exit_code == 0 and json.loads(done.stdout)["out"] == str(out)
    done = run(f"explore {features} {features} {folder} -o {out} --projection pca")
    assert done.exit_code == 0 and "100% of the 12 nearest are common" in done.stdout
    assert "projection: pca" in done.stderr
    for words, code, message in (
        (f"{tmp_path}/no.npz -o {out}", 3, "does not exist"),
        (f"{tmp_path} -o {out}", 2, ""),
        (f"{features} -o {tmp_path}/map.txt", 2, "ends in .html"),
        (f"{features} -o {tmp_path}/map.html/map.html", 1, "Cannot write"),
        (f"{features} {folder} -o {out} --thumbnails 7", 2, "choose 16 to 256"),
        (f"{features} -o {out} --projection mds", 2, "choose one of"),
        (f"{features} -o {out} --index tree", 2, "exact or approximate"),
    ):
        done = run(f"explore {words}")
        assert done.exit_code == code, done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr


def test_a_path_with_features(photos: tuple[Path, Path], tmp_path: Path) -> None:
    features, folder = photos
    np.savez(tmp_path / "images.npz", image=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"?")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    (tmp_path / "adapted" / "encoder").mkdir(parents=True)
    (tmp_path / "adapted" / "encoder" / "config.json").write_text("{}")
    assert is_features(features) and is_features("inbatch/cifar10-fast")
    assert is_features(tmp_path / "run") and is_features(tmp_path / "adapted")
    for path in (folder, tmp_path / "images.npz", tmp_path / "broken.npz", tmp_path / "missing"):
        assert not is_features(path)
    assert explore.NEIGHBOURS == 12
