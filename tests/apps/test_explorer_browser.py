"""The page of `inbatch explore` in Chromium: drawn, hovered, clicked, lassoed, exported, without a request."""

import csv
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import chromium
import numpy as np
import pytest
import torch
from PIL import Image

import inbatch
from inbatch.apps.collection.features import open_collection
from inbatch.apps.collection.output_files import write_list
from inbatch.data import open_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium"),
    pytest.mark.skipif(sys.platform != "linux", reason="drives Chromium over inherited pipes"),
]

NAMES = [
    'a"b<c>.png',
    "comma, and 'quote.png",
    "ümläut 图.png",
    b"bytes\xff\xfe.png",
    "line\nend.png",
    " space.png",
    "%41#?.png",
]
COUNT = 60
COLOURED = """(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
  .filter((value, at) => at % 4 === 3 && value).length"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a folder of images in three classes with odd names, and two files of features of them."""
    root = tmp_path_factory.mktemp("explore")
    folder, draw = root / "photos", np.random.default_rng(0)
    for i in range(COUNT):
        place = folder / ("<i>one</i>".replace("/", ""), "two", "three")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        name = NAMES[i] if i < len(NAMES) else f"image-{i:02}.png"
        with open(bytes(place) + b"/" + (name if isinstance(name, bytes) else name.encode()), "wb") as file:
            Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8)).save(file, "PNG")
    source = open_data(folder)
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        rows = 2.0 * torch.eye(3, 6)[source.labels] + torch.randn(COUNT, 6, generator=generator)
        np.savez(
            root / f"features{number}.npz", vector=rows.numpy(), label=source.labels.numpy(), index=np.arange(COUNT),
            path=np.array([source.identity(i) for i in range(COUNT)]), split=np.array(["train"] * COUNT),
            **{"class": np.array(source.classes)[source.labels]},
        )  # fmt: skip
    return folder, root / "features0.npz", root / "features1.npz"


@pytest.fixture(scope="module")
def webgl() -> Iterator[chromium.Page]:
    with chromium.chromium(*chromium.SOFTWARE_GL) as page:
        page.size(1400, 900)
        yield page


@pytest.fixture(params=["webgl", "canvas"])
def renderer(request: pytest.FixtureRequest) -> str:
    return request.param


def open_map(page: chromium.Page, file: Path, renderer: str) -> None:
    """Open a map that is drawn in this way: without a GPU, a page draws with WebGL only if its address requests it."""
    page.open(f"{file.as_uri()}#{renderer}")
    assert page.run("document.documentElement.dataset.renderer") == renderer


def place(page: chromium.Page, i: int, number: int = 0) -> tuple[float, float]:
    """Return where image i is on the screen."""
    x, y = page.run(f"explorer.views[{number}].map.position({i})")
    left, top = page.run(
        f"(() => {{ const b = explorer.views[{number}].figure.getBoundingClientRect(); return [b.left, b.top]; }})()"
    )
    return left + x, top + y


def pixels(page: chromium.Page, folder: Path) -> np.ndarray:
    page.screenshot(folder / "screen.png")
    return np.asarray(Image.open(folder / "screen.png").convert("RGB")).astype(int)


def around(page: chromium.Page, margin: float = 0.0, number: int = 0) -> list[tuple[float, float]]:
    """Return a rectangle around the whole map, as the way of a lasso."""
    left, top, width, height = page.run(
        f"(() => {{ const b = explorer.views[{number}].figure.getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    (x0, y0), (x1, y1) = (left + 6 + margin, top + 6), (left + width - 6, top + height - 6)
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0 + 20)]
    return [
        (a[0] + (b[0] - a[0]) * t / 5, a[1] + (b[1] - a[1]) * t / 5)
        for a, b in zip(corners, corners[1:], strict=False)
        for t in range(5)
    ]


@pytest.mark.parametrize("inside", [30.0, 0.0])
def test_map_is_drawn_and_requests_nothing(
    webgl: chromium.Page, photos: tuple[Path, Path, Path], tmp_path: Path, inside: float
) -> None:
    folder, features, _ = photos
    out = tmp_path / 'a "map" #1.html'
    result = inbatch.explore_features(features, folder, out=out, projection="pca", inside=inside)
    open_map(webgl, out, "webgl" if inside else "canvas")
    before = pixels(webgl, tmp_path)
    for i in (0, 17, COUNT - 1):  # each point has the colour of its class, on a white map
        x, y = place(webgl, i)
        spot = before[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4].reshape(-1, 3)
        assert (np.ptp(spot, axis=1) > 60).any()
    webgl.key("p")  # images on the map
    webgl.wait("explorer.thumbnails.copies.size && [...explorer.thumbnails.copies.values()].every((c) => c.picture)")
    time.sleep(0.3)
    assert (np.abs(pixels(webgl, tmp_path) - before) > 40).any(2).sum() > 5000
    assert not webgl.errors
    allowed = [out.as_uri()]
    if result["thumbnails"]["folder"]:
        allowed += [file.as_uri() for file in Path(result["thumbnails"]["folder"]).iterdir()]
    assert set(webgl.requests) == set(allowed)
    blocked = webgl.run("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))")
    assert "fetch" in blocked  # the policy of the page; nothing listens there either
    assert any("Content Security Policy" in text for text in webgl.errors)


def test_hover_click_search_and_keys(
    webgl: chromium.Page, photos: tuple[Path, Path, Path], tmp_path: Path, renderer: str
) -> None:
    folder, features, _ = photos
    out = tmp_path / "map.html"
    inbatch.explore_features(features, folder, out=out, projection="pca")
    open_map(webgl, out, renderer)
    collection = open_collection(features, folder)
    i = next(i for i in range(COUNT) if collection.paths[i].endswith('a"b<c>.png'))
    x, y = place(webgl, i)
    webgl.run(f"explorer.select([{i}])")  # a click on a selected image is a click all the same
    webgl.mouse("mouseMoved", x + 200, y)
    webgl.mouse("mouseMoved", x, y)
    webgl.wait(f"explorer.hovered === {i} || explorer.hovered >= 0")
    hovered = webgl.run("explorer.hovered")
    text = webgl.run("document.getElementById('tooltip').innerText")
    assert Path(collection.paths[hovered]).name.replace("\n", "\\u000a") in text
    webgl.run(f"explorer.focus({i})")
    assert 'a"b<c>.png' in webgl.run("document.getElementById('image').innerText")
    assert webgl.run("document.querySelectorAll('#image b, #image c, #image i').length") == 0  # text, not elements
    webgl.click(*place(webgl, i))
    assert webgl.run("explorer.focused") == hovered
    near = webgl.run(f"explorer.data.neighbours(0, {hovered})")
    rows = torch.nn.functional.normalize(collection.vectors, dim=1)
    expected = (rows @ rows[hovered]).argsort(descending=True)[1:13].tolist()
    assert near == expected
    assert webgl.run("document.querySelectorAll('#neighbours .tile').length") == 12
    webgl.run("document.querySelectorAll('#neighbours .tile')[2].click()")
    assert webgl.run("explorer.focused") == near[2]
    webgl.key("/")
    for letter in "MAGE-1":  # any case
        webgl.key(letter)
    webgl.key("Enter")
    matches = [i for i in range(COUNT) if "image-1" in collection.paths[i]]
    assert webgl.run("explorer.selection") == matches
    webgl.key("Escape")
    webgl.run("document.activeElement.blur()")
    theme = webgl.run("document.documentElement.dataset.theme")
    webgl.key("d")
    assert webgl.run("document.documentElement.dataset.theme") != theme
    keys = webgl.run("[...document.getElementById('colour').options].map((option) => option.value)")
    assert keys == ["class", "cluster", "outlier", "duplicate"]
    for key in (*keys[1:], keys[0]):
        webgl.key("c")
        assert webgl.run("explorer.key") == key
        assert webgl.run("document.querySelectorAll('#legends li').length") >= 2
    webgl.key("?")
    assert webgl.run("document.getElementById('help').open")
    assert not webgl.errors


def test_lasso_and_export(webgl: chromium.Page, photos: tuple[Path, Path, Path], tmp_path: Path, renderer: str) -> None:
    folder, features, _ = photos
    out = tmp_path / "map.html"
    inbatch.explore_features(features, folder, out=out, projection="pca")
    open_map(webgl, out, renderer)
    webgl.drag(around(webgl), shift=True)
    webgl.wait(f"explorer.selection.length === {COUNT}")
    webgl.key("l")
    webgl.drag(around(webgl, margin=400))
    webgl.wait(f"explorer.selection.length < {COUNT} && explorer.selection.length > 0")
    left = webgl.run("document.querySelector('figure').getBoundingClientRect().left") + 406
    selection = webgl.run("explorer.selection")
    assert all(
        (place(webgl, i)[0] > left) == (i in selection) for i in range(COUNT) if abs(place(webgl, i)[0] - left) > 3
    )
    webgl.run("document.querySelectorAll('#legends button')[1].click()")  # only one class
    webgl.run("explorer.drawing")
    webgl.drag(around(webgl), shift=True)
    webgl.wait("explorer.selection.length === 20")
    assert webgl.run("new Set(explorer.selection.map((i) => explorer.data.labels[i])).size") == 1
    for chosen in (webgl.run("explorer.selection"), list(range(COUNT))):
        webgl.run(f"explorer.select({chosen})")
        saved = download(webgl, tmp_path / str(len(chosen)))
        collection = open_collection(features, folder)
        write_list(tmp_path / "expected.csv", collection, chosen)
        assert rows_of(saved) == rows_of(tmp_path / "expected.csv")
        source = open_data(saved)
        assert len(source) == len(chosen) and set(source.classes) == {collection.class_of(i) for i in chosen}
        assert all(torch.equal(source.image(at), collection.image(i)) for at, i in enumerate(chosen))


def download(page: chromium.Page, folder: Path) -> Path:
    folder.mkdir()
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.run("document.getElementById('export').click()")
    file, until = folder / "selection.csv", time.monotonic() + 30
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    return file


def rows_of(file: Path) -> list[list[str]]:
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        return list(csv.reader(lines))


def test_two_runs(webgl: chromium.Page, photos: tuple[Path, Path, Path], tmp_path: Path, renderer: str) -> None:
    folder, first, second = photos
    out = tmp_path / "map.html"
    inbatch.explore_features(first, folder, other=second, out=out, projection="pca")
    open_map(webgl, out, renderer)
    assert webgl.run("document.querySelectorAll('figure').length") == 2
    assert webgl.run("explorer.key") == "shared"
    webgl.key("p")  # the images are drawn on both maps, whose sheet is loaded once
    webgl.wait(f"[0, 1].every((view) => ({COLOURED})(explorer.views[view].overlay.canvas) > 500)")
    webgl.key("p")
    webgl.drag(around(webgl, number=1), shift=True)
    webgl.wait(f"explorer.selection.length === {COUNT}")
    for view in (0, 1):
        script = {"webgl": "plot.get('selectedPoints').length", "canvas": "selected.reduce((a, b) => a + b)"}[renderer]
        assert webgl.run(f"explorer.views[{view}].map.{script}") == COUNT
    x, y = place(webgl, 3)
    webgl.mouse("mouseMoved", x + 100, y + 100)
    webgl.mouse("mouseMoved", x, y)
    webgl.wait("explorer.hovered >= 0")
    assert webgl.run("explorer.views[1].overlay.hovered === explorer.hovered")
    webgl.run("explorer.focus(3)")
    near = [webgl.run(f"explorer.data.neighbours({view}, 3)") for view in (0, 1)]
    common = len(set(near[0]) & set(near[1]))
    assert webgl.run("explorer.data.shared[3]") == common
    assert webgl.run("document.querySelectorAll('#neighbours .changed').length") == 2 * (12 - common)
    assert webgl.run("document.querySelectorAll('#list .tile').length") == COUNT
    least = webgl.run("explorer.data.shared[explorer.data.changed[0]]")
    assert least == webgl.run("Math.min(...explorer.data.shared)")
    assert not webgl.errors and webgl.requests == [out.as_uri()]


def test_page_without_webgl_shows_a_message(photos: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, features, _ = photos
    out = tmp_path / "map.html"
    inbatch.explore_features(features, folder, out=out, projection="pca")
    with chromium.chromium(*chromium.WITHOUT_WEBGL) as page:
        page.size(1400, 900)
        page.open(out)
        assert page.run("document.documentElement.dataset.renderer") == "canvas"
        screen = pixels(page, tmp_path)
        x, y = (round(value) for value in place(page, 5))
        assert (np.ptp(screen[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3), axis=1) > 60).any()
        page.click(*place(page, 5))
        page.wait("explorer.focused >= 0")
        page.drag(around(page), shift=True)
        page.wait(f"explorer.selection.length === {COUNT}")
        page.run("explorer.select([2, 5])")
        merged = "explorer.views[0].map.merged([5, 7], {{ {}Key: true }})"
        assert [page.run(merged.format(key)) for key in ("ctrl", "alt", "shift")] == [[2, 5, 7], [2], [5, 7]]
        before = place(page, 5)
        page.mouse("mouseWheel", 700, 450, deltaX=0, deltaY=-200)
        page.wait(f"Math.abs(explorer.views[0].map.position(5)[0] - {before[0]}) > 1")
        assert not page.errors and page.requests == [out.as_uri()]


def test_narrow_and_dark(webgl: chromium.Page, photos: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, features, _ = photos
    out = tmp_path / "map.html"
    inbatch.explore_features(features, folder, out=out, projection="pca")
    try:
        webgl.size(400, 800, prefers_color_scheme="dark")
        webgl.open(out)
        assert webgl.run("document.documentElement.dataset.theme") == "dark"
        assert webgl.run("document.documentElement.scrollWidth") == 400  # nothing to scroll sideways
        left, width = webgl.run(
            "(({ left, width }) => [left, width])(document.querySelector('figure').getBoundingClientRect())"
        )
        assert (left, width) == (0, 400)
        assert all(0 < place(webgl, i)[0] < 400 for i in range(COUNT))
        dark = np.asarray(Image.open(BytesIO(_shot(webgl, tmp_path))).convert("L"))
        assert np.median(dark) < 60
    finally:
        webgl.size(1400, 900, prefers_color_scheme="light")


def _shot(page: chromium.Page, folder: Path) -> bytes:
    page.screenshot(folder / "screen.png")
    return (folder / "screen.png").read_bytes()
