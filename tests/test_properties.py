"""For any input, each part keeps its documented properties or raises an error of inbatch."""

import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from property_settings import examples

from inbatch import api, rng
from inbatch.data import Reading, cache, decoded_cache, open_data
from inbatch.data.decoding import jpeg
from inbatch.data.decoding.image_file import ImageFile
from inbatch.data.decoding.pillow import FORMATS, open_image
from inbatch.data.resident import hold
from inbatch.data.sources.parquet import ParquetSource
from inbatch.data.views import PRESETS
from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.evaluation import clustering, feature_std, knn, linear_probe, rankme
from inbatch.evaluation.embeddings import Embeddings
from inbatch.evaluation.linear_probe import Sgd
from inbatch.methods import METHODS
from inbatch.nn import schedules
from inbatch.nn.memory_bank import MemoryBank
from inbatch.training import checkpoint
from inbatch.training.metric_logger import _truncate
from inbatch.training.recipe import make
from inbatch.training.registry import PARTS
from inbatch.training.settings_file import parse_assignment

seeds = st.integers(0, 2**31)


# Regressions found by the properties below or while writing them


@pytest.mark.parametrize("key", ["temperature", "base_temperature"])
@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
def test_a_temperature_that_divides_nothing_is_refused(key: str, value: float) -> None:
    """A temperature of 0 ended a run with a traceback; a negative one trained in the opposite direction silently."""
    with pytest.raises(ConfigError, match=f"method.{key} = "):
        make({"data": "photos", "method.name": "supcon", f"method.{key}": value})


def test_a_classifier_of_fewer_classes_than_the_data_is_refused() -> None:
    options = {"subset": 80, "batch_size": 16, "precision": "float32", "settings": {"method.num_classes": 3}}
    with pytest.raises(ConfigError, match="classes = 3, but the data have 10"):
        api.prepare("digits-canvas", "supervised", **options, device="cpu")


def test_rank_of_nothing_and_of_no_numbers() -> None:
    assert float(rankme(torch.zeros(5, 3))) == pytest.approx(1, abs=1e-4)
    assert math.isnan(float(rankme(torch.tensor([[1.0, math.nan]]))))


def test_the_command_of_a_recipe_holds_long_values_whole() -> None:
    """Long values were cut after 80 letters."""
    long = {
        "method.num_clusters": list(range(1000, 1040)),
        "method.name": "pcl",
        "test": "a folder " * 15 + "\nof two lines",
    }
    assert survives({"data": "photos"} | long)


def test_an_image_column_that_holds_no_images(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, images in enumerate([[b"plain bytes"], [[1, 2]], [7], [{"bytes": [1, 2], "path": "a"}]]):
        parquet.write_table(pa.table({"image": images}), tmp_path / f"{number}.parquet")
        with pytest.raises(DataError, match=r"a column of encoded images|cannot be read"):
            open_data(tmp_path / f"{number}.parquet").image(0)


def test_a_parquet_file_that_goes_away(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [{"bytes": FILES["png"], "path": "a"}] * 2}), tmp_path / "a.parquet")
    source = open_data(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"image": [{"bytes": FILES["png"], "path": "a"}]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds 1 rows, not 2"):
        source.image(1)
    source = open_data(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.image(0)


# Evaluation


def features(kind: str, n: int, width: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return {
        "random": x, "zero": 0 * x, "constant": torch.ones_like(x), "large": x * 1e6, "tiny": x * 1e-20,
        "huge": x * 1e17, "one differs": torch.ones_like(x).index_fill(0, torch.tensor([0]), 2.0),
        "nan": x.index_fill(0, torch.tensor([n - 1]), torch.nan), "inf": x.index_fill(1, torch.tensor([0]), torch.inf),
    }[kind]  # fmt: skip


KINDS = ["random", "zero", "constant", "large", "tiny", "huge", "one differs", "nan", "inf"]
LABELS: dict[str, Callable[[int], list[int]]] = {
    "two": lambda n: [i % 2 for i in range(n)],
    "one": lambda n: [0] * n,
    "none": lambda n: [-1] * n,
    "some": lambda n: [i % 3 - 1 for i in range(n)],
    "far": lambda n: [i % 2 * 7 for i in range(n)],
}


@st.composite
def embeddings(ask: Callable) -> Embeddings:
    n, width = ask(st.integers(1, 9)), ask(st.sampled_from([1, 2, 5]))
    x = features(ask(st.sampled_from(KINDS)), n, width, ask(seeds))
    label = torch.tensor(LABELS[ask(st.sampled_from(list(LABELS)))](n))
    return Embeddings(x, label, tuple(map(str, range(n))), "the set", "features")


def shares(scores: dict[str, Any], *names: str) -> bool:
    return all(0 <= scores[name] <= 1 for name in names)


@examples(60)
@given(train=embeddings(), k=st.integers(-1, 12), distance=st.sampled_from(["cosine", "euclidean"]))
def test_knn(train: Embeddings, k: int, distance: str) -> None:
    try:
        assert shares(knn(train, train, k, distance=distance), "top1", "top5")
    except (ConfigError, DataError) as refused:
        known = int((train.labels >= 0).sum())
        bad = not train.vectors[train.labels >= 0].isfinite().all() or len(train.labels[train.labels >= 0].unique()) < 2
        assert bad or not 1 <= k <= known, refused


@examples(25)
@given(train=embeddings(), probe=st.sampled_from(["lbfgs", "sgd"]))
def test_linear(train: Embeddings, probe: str) -> None:
    try:
        scores = linear_probe(train, train, Sgd(lr=0.1, batch=4, epochs=3) if probe == "sgd" else probe)
    except DataError:
        known = train.vectors[train.labels >= 0]
        assert not known.isfinite().all() or len(train.labels[train.labels >= 0].unique()) < 2
    else:
        assert shares(scores, "top1", "top5")


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@examples(8)
@given(points=embeddings(), clusters=st.sampled_from([None, 1, 2, 5, 20]))
def test_clustering(points: Embeddings, clusters: int | None) -> None:
    try:
        assert shares(clustering(points, clusters, n_init=2), "nmi", "acc")
    except (ConfigError, DataError):
        known = points.vectors[points.labels >= 0]
        assert not known.isfinite().all() or len(known) < (clusters or 1)


@examples(40)
@given(points=embeddings())
def test_signs_of_collapse(points: Embeddings) -> None:
    """Each statistic is a number in its range, or nan if the embeddings are not finite."""
    x = points.vectors
    std, rank = float(feature_std(x)), float(rankme(x))
    if x.isfinite().all():
        assert 0 <= std <= 1.01 * x.shape[1] ** 0.5
        assert 0.99 <= rank <= 1.01 * min(x.shape)
    else:
        assert math.isnan(std) and math.isnan(rank)


# Schedules, memory bank, draws

shares_of_1, rates = st.floats(0, 1), st.floats(-1e6, 1e6)


@examples(100)
@given(p=shares_of_1, q=shares_of_1, start=rates, end=rates)
def test_schedules_stay_between_their_ends_and_never_turn(p: float, q: float, start: float, end: float) -> None:
    low, high, slack = min(start, end), max(start, end), 1e-9 * (abs(start) + abs(end)) + 1e-300
    for schedule in (schedules.linear, schedules.cosine):
        a, b = schedule(min(p, q), start, end), schedule(max(p, q), start, end)
        assert low - slack <= a <= high + slack
        assert (b - a) * (end - start) >= -slack * abs(end - start)
        assert abs(schedule(0, start, end) - start) <= slack and abs(schedule(1, start, end) - end) <= slack


ENDS = st.sampled_from(["start", "both", "end"])


@examples(100)
@given(
    step=st.floats(0, 1e6), total=st.floats(0, 1e6), warmup=st.floats(0, 1e6), base=st.floats(0, 1e3),
    end=st.floats(0, 1e3), ramp=ENDS, decay=ENDS,
)  # fmt: skip
def test_warm_up_and_cosine(
    step: float, total: float, warmup: float, base: float, end: float, ramp: Any, decay: Any
) -> None:
    if warmup > total:
        with pytest.raises(ConfigError, match="does not fit"):
            schedules.warmup_cosine(step, total, warmup, base, end)
        return
    rate = schedules.warmup_cosine(step, total, warmup, base, end, ramp=ramp, decay=decay)
    assert -1e-9 <= rate <= max(base, end) * (1 + 1e-9)
    assert 0 <= schedules.progress(step, total, ramp) <= 1


@examples(60)
@given(size=st.integers(1, 9), width=st.integers(1, 3), pushes=st.lists(st.integers(0, 20), max_size=8), seed=seeds)
def test_queue_equals_a_list_without_its_oldest_rows(size: int, width: int, pushes: list[int], seed: int) -> None:
    queue = MemoryBank(size, width)
    rows = queue.rows.tolist()
    for i, n in enumerate(pushes):
        new = torch.randn(n, width, generator=torch.Generator().manual_seed(seed + i))
        queue.push(new)
        rows = (rows + new.tolist())[-size:]
    pointer = int(queue.pointer)
    assert queue.rows.roll(-pointer, 0).tolist() == rows and int(queue.filled) == min(size, sum(pushes))


any_int = st.integers(-(2**70), 2**70)


@examples(60)
@given(seed=any_int, epoch=any_int, n=st.integers(0, 50), view=any_int, count=st.integers(0, 5))
def test_draws_of_any_key(seed: int, epoch: int, n: int, view: int, count: int) -> None:
    assert rng.permutation(seed, epoch, n).sort().values.tolist() == list(range(n))
    draws = rng.uniform(seed, epoch, torch.arange(n), view, count)
    assert draws.shape == (n, count) and bool(((draws >= 0) & (draws < 1)).all())


# Settings

KEYS = sorted(
    {"data", "split", "subset", "test", "channels", "classes", "levels", "size", "epochs", "batch", "context", "seed"}
    | {"precision", "loss_precision", "compile", "resident", "k", "preset", "crops", "evaluate_every"}
    | {f"schedule.{key}" for key in ("name", "warmup", "end", "milestones", "scaling")}
    | {f"{part}.name" for part in PARTS}
    | {"method.temperature", "method.queue_size", "method.out_dim", "method.num_clusters", "optimizer.lr",
    "optimizer.weight_decay"}
    | {"views.size", "views.min_scale", "views.blur", "views.num_views", "encoder.pretrained", "curate.rounds",
    "fuse.views"}
    | {"method", "optimizer", "schedule", "views.", ".name", "", "nonsense", "method.nonsense", "encoder.nonsense"}
)  # fmt: skip
NAMES = st.sampled_from([*METHODS, *PRESETS, "sgd", "adamw", "lars", "tiny", "resnet18", "cosine", "imagenet", "cifar"])
PLAIN = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=8) | NAMES
    | st.sampled_from(["digits-canvas", "auto", "none", "1e-3", "~", "nan"])
)  # fmt: skip
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)


def survives(settings: dict[str, Any]) -> bool:
    """Return whether the settings make a recipe; if so, check that its file and its command give the same recipe."""
    import shlex

    try:
        recipe = make(settings)
    except ConfigError as refused:
        assert str(refused)
        return False
    assert make(recipe.flat()) == recipe
    assert make({k: v for k, v in _flat(json.loads(json.dumps(recipe.nested()))).items()}) == recipe
    words = shlex.split(recipe.command())
    again: dict[str, Any] = {"method.name": words[2]}
    for flag, value in zip(words[3::2], words[4::2], strict=True):
        again |= parse_assignment(value) if flag == "--set" else {flag.removeprefix("--"): value}
    assert make(again) == recipe, recipe.command()
    return True


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= {f"{key}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
    return flat


@examples(60)
@given(settings=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_settings_make_a_recipe_or_are_refused(settings: dict[str, Any]) -> None:
    survives({"data": "photos"} | settings)


GOOD = {
    "image_size": st.integers(8, 300), "epochs": st.integers(1, 300), "batch_size": st.integers(2, 5000),
    "knn_k": st.integers(1, 300),
    "seed": st.integers(0, 2**40), "method.name": st.sampled_from(list(METHODS)), "context": st.sampled_from([None, 8]),
    "optimizer.name": st.sampled_from(["sgd", "adamw", "lars"]), "optimizer.lr": st.floats(1e-6, 10),
    "schedule.warmup_epochs": st.floats(0, 20), "schedule.milestones": st.lists(st.floats(0, 1), max_size=3),
    "views.name": st.sampled_from(list(PRESETS)), "precision": st.sampled_from(["auto", "float32", "bf16"]),
    "test": st.none() | st.text(max_size=12), "data": st.text(min_size=1, max_size=12),
    "encoder.name": st.text(min_size=1, max_size=6), "cache_on_device": st.sampled_from([None, True]),
    "preset": st.sampled_from(["cifar", "imagenet", "none", "digits"]),
    "levels": st.none() | st.lists(st.floats(0, 1e5), min_size=2, max_size=2),
    "curate.name": st.sampled_from([None, "curate"]), "channels": st.integers(1, 5), "split": st.text(max_size=6),
}  # fmt: skip


@examples(100)
@given(settings=st.fixed_dictionaries({"data": GOOD["data"]}, optional={k: v for k, v in GOOD.items() if k != "data"}))
def test_a_recipe_survives_its_file_and_its_command(settings: dict[str, Any]) -> None:
    survives(settings)


@examples(150)
@example("method.temperature=2026-02-30")
@example("a=0o9")
@example("a={b: [1}")
@given(text=st.text(max_size=30) | st.text(max_size=20).map("method.temperature=".__add__))
def test_any_assignment_is_read_or_refused(text: str) -> None:
    try:
        ((key, _),) = parse_assignment(text).items()
        assert key.strip() == key and key
    except ConfigError as refused:
        assert str(refused)


# Corrupted files


def image_bytes(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(23, 31, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_bytes("JPEG", exif=exif)


def heif() -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.open(io.BytesIO(image_bytes("PNG")))).save(file)
    return file.getvalue()


FILES = {
    "jpeg": image_bytes("JPEG"), "progressive": image_bytes("JPEG", progressive=True), "grey": image_bytes("JPEG", "L"),
    "cmyk": image_bytes("JPEG", "CMYK"), "turned": turned(), "png": image_bytes("PNG"),
    "palette": image_bytes("PNG", "P"), "webp": image_bytes("WEBP"), "tiff": image_bytes("TIFF"),
    "packed": image_bytes("TIFF", compression="tiff_lzw"),
    "bmp": image_bytes("BMP"), "ppm": image_bytes("PPM"), "avif": image_bytes("AVIF"), "heif": heif(),
}  # fmt: skip


def mutated(data: bytes, seed: int) -> bytes:
    """Change, delete, duplicate or truncate some bytes, most often near the beginning, where headers are."""
    chance, out = random.Random(seed), bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        if not out:
            break
        at = chance.randrange(min(len(out), chance.choice([16, 64, 256, len(out)])))
        what = chance.choice(["bit", "byte", "byte", "cut", "double", "end", "long"])
        if what == "bit":
            out[at] ^= 1 << chance.randrange(8)
        elif what == "byte":
            out[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        elif what == "cut":
            del out[at : at + chance.randrange(1, 9)]
        elif what == "double":
            out[at:at] = out[at : at + chance.randrange(1, 9)]
        elif what == "end":
            del out[at:]
        else:
            out[at : at + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
    return bytes(out)


def pixels_or_refusal(data: bytes, channels: int) -> None:
    try:
        with ImageFile(data, lambda: "it", channels) as picture:
            height, width = picture.size
            whole = picture.tensor()
            assert whole.shape == (channels, height, width) and whole.dtype == torch.uint8
        with ImageFile(data, lambda: "it", channels) as picture:
            small = picture.tensor(8)
            assert small.shape[0] == channels and max(small.shape[1:]) <= 8
        with ImageFile(data, lambda: "it", channels) as picture:
            box = torch.tensor([[height // 3, width // 3, max(1, height // 2), max(1, width // 2)]])
            assert picture.crops(box, [(6, "bicubic")])[0].shape == (channels, 6, 6)
    except DataError as refused:
        assert "'it' cannot be read" in str(refused)


@pytest.mark.parametrize("kind", FILES)
@examples(60)
@given(seed=seeds, channels=st.sampled_from([1, 3]))
@example(seed=6781, channels=1)  # a HEIF file with pixels of another size than its header states
@example(seed=2091, channels=3)  # a RuntimeError of the decoder of HEIF
@example(seed=49, channels=3)  # and of AVIF
def test_a_damaged_image_gives_pixels_or_is_refused(kind: str, seed: int, channels: int) -> None:
    pixels_or_refusal(mutated(FILES[kind], seed), channels)


HEADS = st.sampled_from([b"", *(data[:n] for data in FILES.values() for n in (2, 4, 12, 30))])


@examples(150)
@given(head=HEADS, data=st.binary(max_size=60))
def test_no_bytes_are_more_than_refused(head: bytes, data: bytes) -> None:
    header = jpeg.header(head + data)
    assert header is None or (header.height > 0 and header.width > 0 and header.components in (1, 3))
    pixels_or_refusal(head + data, 3)


def test_every_format_is_damaged_here() -> None:
    assert {open_image(data).format for data in FILES.values()} == {*FORMATS, "HEIF"}


@examples(60)
@given(seed=seeds, both=st.booleans())
def test_a_damaged_checkpoint_is_refused(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: tuple[bytes, bytes], seed: int, both: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    last, previous = checkpoints
    broken = mutated(last, seed)
    (folder / "last.pt").write_bytes(broken)
    (folder / "previous.pt").write_bytes(mutated(previous, seed + 1) if both else previous)
    try:
        loaded = checkpoint.load(folder)
        assert loaded.step == (2 if broken == last else 1)
        assert torch.equal(loaded.state["x"], torch.arange(50) + loaded.step)
        assert (loaded.note is None) == (broken == last)
    except InbatchError as refused:
        assert both and "Start a new run" in str(refused)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        checkpoint.save(folder, {"x": torch.arange(50) + step}, step=step)
    return (folder / "last.pt").read_bytes(), (folder / "previous.pt").read_bytes()


@examples(80)
@given(seed=seeds, end=st.sampled_from([60, 400, 10**9]))
def test_a_damaged_parquet_file_gives_images_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: int, end: int
) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.getbasetemp() / "some.parquet"
    images = [
        {"bytes": FILES["png"], "path": "a"},
        {"bytes": FILES["jpeg"], "path": None},
        {"bytes": None, "path": "c"},
    ]
    parquet.write_table(pa.table({"image": images, "label": [0, 1, None]}), path)
    data = path.read_bytes()
    path.write_bytes(data[:-end] + mutated(data[-end:], seed))  # the footer is at the end
    try:
        source = ParquetSource([path], "some", Reading())
    except DataError as refused:
        assert str(refused)
        return
    assert source.fingerprint() is None or len(source.fingerprint()) == 64
    assert len(source.labels) == len(source) and int(source.labels.max()) < max(1, len(source.classes))
    for i in range(min(3, len(source))):
        try:
            source.image(i)
        except DataError as refused:
            assert str(refused)


@examples(25)
@given(seed=seeds, which=st.sampled_from(["entry.json", "images.u8", "sizes.i32"]))
def test_damaged_cache_is_replaced(tmp_path_factory: pytest.TempPathFactory, seed: int, which: str) -> None:
    base = tmp_path_factory.getbasetemp()
    photos = base / "photos"
    if not photos.is_dir():
        photos.mkdir()
        for kind in ("png", "jpeg", "bmp"):
            (photos / f"{kind}.{kind}").write_bytes(FILES[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INBATCH_CACHE", str(base / "cache"))
        patch.setattr(decoded_cache, "WORTH", 0)
        whole = hold(open_data(photos), canvas=32)
        (path,) = [path for path in (base / "cache").iterdir() if not path.name.startswith(".")]
        file = path / which
        damaged = mutated(file.read_bytes(), seed)
        file.unlink()  # the mapping of `whole` must stay valid
        file.write_bytes(damaged)
        cache.entries()
        rebuilt = hold(open_data(photos), canvas=32)
        assert torch.equal(rebuilt.images, whole.images) and torch.equal(rebuilt.size, whole.size)
        assert rebuilt.dropped == whole.dropped and rebuilt.scaled == whole.scaled


@examples(100)
@given(
    lines=st.lists(
        st.binary(max_size=20)
        | st.integers(0, 9).map(lambda step: json.dumps({"step": step, "loss": 1}).encode())
        | st.sampled_from(
            [b"null", b"[]", b"3", b"{}", b'{"step": "x"}', b'{"step": null}', b'{"step": 1', b"\xff\xfe"]
        ),
        max_size=6,
    ),
    step=st.integers(0, 9),
)
def test_a_log_of_any_bytes_keeps_its_records(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], step: int
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    _truncate(path, step)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(0 < step >= record["step"] for record in kept)
    mine = [line for line in lines if line.startswith(b'{"step": ') and line.endswith(b', "loss": 1}')]
    expected = [json.loads(line) for line in mine if 0 < step >= json.loads(line)["step"]]
    assert [record for record in kept if record.get("loss") == 1] == expected
