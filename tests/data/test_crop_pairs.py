"""Crop geometry: the strict definitions, the sampler against enumeration and rejection, the views, the command."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner, Result

from inbatch import rng
from inbatch.apps.cli import app
from inbatch.apps.reports.crop_statistics import PAPER_AREA, PAPER_SHARES, _ours, count_configurations, parse_size
from inbatch.batch import Batch
from inbatch.data import Loader, open_data
from inbatch.data.views import PRESETS, View, Views, crop_pairs
from inbatch.data.views.crop_pairs import ADJACENT, CROPS, GLOBAL_LOCAL, INTERSECTION, arrange, configuration
from inbatch.data.views.pipeline import PAIR
from inbatch.errors import ConfigError

PLAIN = View(32), View(32)
EVERY = pytest.mark.parametrize("code", [GLOBAL_LOCAL, ADJACENT, INTERSECTION], ids=crop_pairs.CONFIGURATIONS)
DEFAULT = ((0.08, 1.0),) * 2, ((3 / 4, 4 / 3),) * 2


def pair(name: str, n: int, height: int, width: int, seed: int = 0, views=PLAIN) -> torch.Tensor:
    """Draw the boxes (2, n, 4) of n images of one size."""
    arranged, pairs = arrange(name, views)
    size = torch.tensor([height, width]).expand(n, 2)
    draw = Views(arranged, [0.5] * 3, [0.25] * 3, pairs)
    return torch.cat([draw.boxes(i, size[i], seed, 0) for i in torch.arange(n).split(1024)], 1)


def area(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[..., 2:].prod(-1).double()


# Definitions


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((0, 0, 10, 10), (1, 1, 8, 8), GLOBAL_LOCAL),
        ((0, 0, 10, 10), (0, 1, 8, 8), INTERSECTION),  # equal top edges
        ((0, 0, 10, 10), (1, 1, 9, 8), INTERSECTION),  # equal bottom edges
        ((0, 0, 10, 10), (0, 0, 10, 10), INTERSECTION),
        ((0, 0, 10, 10), (2, 5, 3, 10), INTERSECTION),
        ((2, 0, 3, 10), (0, 2, 10, 3), INTERSECTION),  # a cross: each inside along one axis
        ((0, 0, 10, 10), (11, 0, 5, 5), ADJACENT),  # row 10 lies between
        ((0, 0, 10, 10), (10, 0, 5, 5), INTERSECTION),  # they touch
        ((0, 0, 10, 10), (3, 11, 5, 5), ADJACENT),
        ((0, 0, 10, 10), (10, 10, 5, 5), INTERSECTION),  # at a corner
        ((0, 0, 10, 10), (20, 20, 5, 5), ADJACENT),
    ],
)
def test_definitions_are_strict(first, second, expected):
    for a, b in ((first, second), (second, first)):
        turned = [[x[1], x[0], x[3], x[2]] for x in (a, b)]
        boxes = torch.tensor([[a, turned[0]], [b, turned[1]]])
        assert configuration(boxes).tolist() == [expected, expected]


# Sampler against enumeration


def positions(extent: int, a: int, b: int, nested: bool) -> list[tuple[int, int, int]]:
    """Enumerate all pairs of starts of two intervals, each with its relation: 0 apart, 1 across, 2 inside."""
    pairs = []
    for s, t in itertools.product(range(extent - a + 1), range(extent - b + 1)):
        apart = s + a < t or t + b < s
        inside = nested and ((s < t and t + b < s + a) or (t < s and s + a < t + b))
        pairs.append((s, t, 0 if apart else 2 if inside else 1))
    return pairs


SIZES = [((5, 7), (2, 3)), ((2, 3), (6, 6)), ((6, 2), (2, 6)), ((9, 12), (9, 12)), ((1, 1), (3, 3)), ((4, 4), (5, 5))]


@pytest.mark.parametrize("a, b", SIZES)
def test_counts_and_chances_equal_enumeration(a, b):
    extent = 9, 12
    nested = (a[0] - b[0]) * (a[1] - b[1]) > 0
    axes = [positions(extent[i], a[i], b[i], nested) for i in (0, 1)]
    tensors = [torch.tensor([x]) for x in (extent, a, b)]
    counted = torch.stack(crop_pairs.relations(*tensors))[:, 0]
    for i in (0, 1):
        assert counted[:, i].tolist() == [sum(kind == k for *_, kind in axes[i]) for k in range(3)]
    boxes = torch.tensor([[(y[k], x[k], *box) for y in axes[0] for x in axes[1]] for k, box in ((0, a), (1, b))])
    shares = configuration(boxes).bincount(minlength=3).double() / boxes.shape[1]
    for code in range(3):
        chance = crop_pairs.chances(torch.tensor([code]), tensors[0], tensors[1][:, None], tensors[2][:, None])
        assert chance.item() == pytest.approx(shares[code].item(), abs=1e-6)
        assert (chance > 0).item() == (shares[code] > 0).item()


@pytest.mark.parametrize("a, b", SIZES)
def test_every_position_of_a_kind_is_drawn_equally_often(a, b):
    """Evenly spaced uniform numbers give each of the n positions once, along y and along x."""
    extent = 9, 12
    nested = (a[0] - b[0]) * (a[1] - b[1]) > 0
    for axis, kind in itertools.product((0, 1), range(3)):
        expected = sorted((s, t) for s, t, k in positions(extent[axis], a[axis], b[axis], nested) if k == kind)
        if expected:
            n = len(expected)
            u = (torch.arange(n).double() + 0.5).div(n)[:, None].expand(n, 2)
            shape = [torch.tensor([x]).expand(n, 2) for x in (extent, a, b)]
            first, second = crop_pairs._place(u, *shape, torch.full((n, 2), kind))
            assert sorted(zip(first[:, axis].tolist(), second[:, axis].tolist(), strict=True)) == expected


# Distribution of the pairs


@EVERY
@pytest.mark.parametrize(
    "height, width", [(32, 32), (8, 8), (224, 224), (375, 500), (500, 333), (20, 200), (200, 20), (4000, 3000)]
)
def test_every_pair_has_its_configuration_and_lies_in_the_image(code, height, width):
    boxes = pair(crop_pairs.CONFIGURATIONS[code], 200, height, width)
    assert (configuration(boxes) == code).all()
    top, left, h, w = boxes.unbind(-1)
    assert min(top.min(), left.min()) >= 0 and min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height and (left + w).max() <= width
    share, shape = area(boxes) / (height * width), w.double() / h
    coarse = 1 + 2 / min(h.min(), w.min())  # sides are whole pixels
    assert share.min() > 0.08 / coarse and shape.min() > 3 / 4 / coarse and shape.max() < 4 / 3 * coarse


def test_views_that_differ_keep_their_own_areas_and_shapes():
    views = View(32, scale=(0.3, 0.9)), View(32, scale=(0.05, 0.2), ratio=(1.0, 1.0))
    for code in range(3):
        boxes = pair(crop_pairs.CONFIGURATIONS[code], 500, 200, 260, views=views)
        assert (configuration(boxes) == code).all()
        share = area(boxes) / (200 * 260)
        assert share[0].min() > 0.29 and share[0].max() < 0.91 and share[1].min() > 0.048 and share[1].max() < 0.21
        assert torch.equal(boxes[1, :, 2], boxes[1, :, 3])


def test_default_pairs_have_the_shares_of_figure_3():
    statistics = count_configurations("default", (32, 32), 100_000)
    for ours, paper in zip(statistics.shares, PAPER_SHARES, strict=True):
        assert abs(ours - paper) < 0.003  # 2.5 standard errors of 100,000 pairs, which are fixed
    assert abs(statistics.area - PAPER_AREA["default"]) < 0.01


@pytest.mark.parametrize("name", CROPS)
def test_average_areas_are_those_of_table_1(name):
    statistics = count_configurations(name, (32, 32), 3000)
    assert abs(statistics.area - PAPER_AREA[name]) < 0.015
    configurations = CROPS[name].configurations
    for code, share in enumerate(statistics.shares):
        if configurations:
            expected = (code in configurations) / len(configurations)
            assert abs(share - expected) < 0.02 * (0 < expected < 1) + 1e-12


def rejected(code: int) -> torch.Tensor:
    """Return those of many default pairs that have a configuration: 14,000 are adjacent, 20,000 otherwise."""
    drawn = pair("default", 1_000_000 if code == ADJACENT else 125_000, 32, 32, seed=7)
    return drawn[:, configuration(drawn) == code][:, :20_000]


def histogram(boxes: torch.Tensor) -> torch.Tensor:
    """Return the shares of the cells (smaller area, larger area), a tenth of the image each."""
    low, high = (area(boxes) / 1024 * 10).long().clamp(max=9).sort(0).values
    return (low * 10 + high).bincount(minlength=100).double() / len(low)


@pytest.mark.slow
@EVERY
def test_pairs_are_distributed_as_if_drawn_until_one_fits(code):
    """Areas of both boxes jointly, shapes and positions, 32 x 32 pixels, agree with rejection sampling.

    Total variation of noise alone is about 0.014 here (adjacent); 13 candidates instead of 34 give 0.07.
    """
    theirs = rejected(code)
    ours = pair(crop_pairs.CONFIGURATIONS[code], 20_000, 32, 32)
    assert (histogram(ours) - histogram(theirs)).abs().sum() / 2 < 0.03
    for measure in (
        area,
        lambda b: b[..., 3].double() / b[..., 2],
        lambda b: b[..., 0].double(),
        lambda b: b[..., 1].double() + b[..., 3].double() / 2,
    ):
        x, y = (measure(b).flatten() for b in (ours, theirs))
        assert abs(x.mean() - y.mean()) < 0.02 * y.std() and abs(x.std() / y.std() - 1) < 0.02
    x, y = ((b[0, :, :2] - b[1, :, :2]).double().abs() for b in (ours, theirs))
    assert all(stats.ks_2samp(x[:, i].numpy(), y[:, i].numpy()).pvalue > 1e-3 for i in (0, 1))


@EVERY
def test_neither_view_is_preferred(code):
    first, second = area(pair(crop_pairs.CONFIGURATIONS[code], 3000, 224, 224))
    assert stats.binomtest(int((first > second).sum()), int((first != second).sum()), 0.5).pvalue > 1e-3


def test_an_image_too_small_is_cut_as_by_default():
    for height, width in ((1, 1), (2, 2), (1, 9)):
        default = pair("default", 50, height, width)
        assert torch.equal(pair("global-local", 50, height, width), default)
    codes = configuration(pair("equal", 3000, 2, 2))
    assert not (codes == GLOBAL_LOCAL).any()
    assert torch.equal(pair("global-local-big", 50, 20, 200), pair("big", 50, 20, 200)), "big and inside: no room"


# Purity


def test_same_numbers_same_boxes_in_any_batch():
    pairs = crop_pairs.CropPairs((0, 1, 2), *DEFAULT)
    size = torch.tensor([[32, 32], [375, 500], [20, 200], [2, 2]]).repeat(4, 1)
    u = rng.uniform(3, 1, torch.arange(16), PAIR, pairs.draws)
    whole, state = pairs(u, size), torch.get_rng_state()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pairs(u[order], size[order]), whole[:, order])
    assert torch.equal(torch.cat([pairs(u[i : i + 1], size[i : i + 1]) for i in range(16)], 1), whole)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_depend_on_seed_epoch_and_attempt():
    views, pairs = arrange("adjacent", PRESETS["simclr"](size=32))
    draw, index, size = Views(views, [0.5] * 3, [0.5] * 3, pairs), torch.arange(64), torch.full((64, 2), 224)
    first = draw.boxes(index, size, 0, 0)
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert (draw.boxes(index, size, *key) != first).any(-1).all()


def test_drawing_needs_no_synchronisation_with_an_accelerator():
    pairs = crop_pairs.CropPairs((0, 1, 2), *DEFAULT)
    u, size = torch.empty(8, pairs.draws, device="meta"), torch.empty(8, 2, dtype=torch.long, device="meta")
    assert pairs(u, size).shape == (2, 8, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_boxes_on_a_gpu():
    pairs = crop_pairs.CropPairs((0, 1, 2), *DEFAULT)
    size = torch.tensor([[32, 32], [375, 500]]).repeat(2000, 1)
    u = rng.uniform(0, 0, torch.arange(4000), PAIR, pairs.draws)
    there = pairs(u.cuda(), size.cuda()).cpu()
    assert (there == pairs(u, size)).all(-1).double().mean() > 0.999  # exp may differ in its last bit


class Operations(TorchDispatchMode):
    """Count the operations of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_depend_on_the_number_of_pairs():
    pairs, counts = crop_pairs.CropPairs((0, 1, 2), *DEFAULT), []
    for n in (16, 256):
        u, size = rng.uniform(0, 0, torch.arange(n), PAIR, pairs.draws), torch.full((n, 2), 224)
        with Operations() as operations:
            pairs(u, size)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0


# Views


def batch(n: int = 24) -> Batch:
    images = torch.randint(0, 256, (n, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(n)
    return Batch(
        index, torch.full((n,), -1), 3, 0, images=images, size=torch.tensor([[40, 48], [33, 20]]).repeat(12, 1)
    )


@pytest.mark.parametrize("preset", ["simclr", "byol"])
def test_flip_and_colour_are_drawn_as_without_pairs(preset, monkeypatch):
    """If the boxes are forced to be equal, the views are equal bit for bit."""
    views, b = PRESETS[preset](size=32), batch()
    plain = Views(views, [0.5] * 3, [0.25] * 3)
    arranged, pairs = arrange("intersection", views)
    paired = Views(arranged, [0.5] * 3, [0.25] * 3, pairs)
    ours, default = paired(b), plain(b)
    assert (configuration(ours.boxes) == INTERSECTION).all() and not torch.equal(ours.boxes, default.boxes)
    assert torch.equal(ours.flipped, default.flipped)
    monkeypatch.setattr(plain, "_boxes", lambda *drawn: ours.boxes)
    assert all(torch.equal(x, y) for x, y in zip(plain(b).images, ours.images, strict=True))
    again = paired(replace(b, attempt=torch.ones_like(b.index)))
    assert (configuration(again.boxes) == INTERSECTION).all() and (again.boxes != ours.boxes).any(-1).all()


@pytest.mark.parametrize("name", ["equal", "adjacent"])
def test_resident_and_streamed_boxes_agree(tmp_path: Path, name):
    random = np.random.default_rng(0)
    for i in range(24):
        pixels = random.integers(0, 256, (24 + i % 2 * 30, 20 + i % 3 * 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    arranged, pairs = arrange(name, PRESETS["simclr_cifar"]())
    views = Views(arranged, [0.5] * 3, [0.25] * 3, pairs)
    shared = dict(batch=8, views=views, seed=1)
    resident = Loader(open_data(str(tmp_path)), resident=True, **shared)
    streamed = Loader(open_data(str(tmp_path)), resident=False, workers=1, **shared)
    seen = []
    for here, there in zip(resident.epoch(2), streamed.epoch(2), strict=True):
        assert torch.equal(here.index, there.index) and there.crops is not None
        drawn = views(here)
        assert torch.equal(drawn.boxes, there.boxes) and torch.equal(drawn.flipped, views(there).flipped)
        seen.append(configuration(drawn.boxes))
    wanted = set(CROPS[name].configurations)
    assert len(seen) == 3 and set(torch.cat(seen).tolist()) == wanted


def test_scales_change_every_view_and_default_none():
    swav = PRESETS["swav"]()
    assert arrange("default", swav) == (swav, None)
    assert arrange("default", PRESETS["digits"]()) == (PRESETS["digits"](), None)
    for name, scale in (("big", (0.5, 1.0)), ("small", (0.08, 0.5))):
        views, pairs = arrange(name, swav)
        assert pairs is None and views == tuple(replace(view, scale=scale) for view in swav)
    views, pairs = arrange("global-local-big", PRESETS["byol"](min_scale=0.2))
    assert pairs.scale == ((0.5, 1.0),) * 2 == tuple(view.scale for view in views)
    assert arrange("equal", PRESETS["byol"](min_scale=0.2))[1].scale == ((0.2, 1.0),) * 2


def test_errors_say_what_to_do():
    for name, views, message in (
        ("globallocal", PRESETS["simclr"](), "global-local, adjacent"),
        ("adjacent", PRESETS["digits"](), "cut at random"),
        ("big", PRESETS["digits"](), "cut at random"),
        ("equal", PRESETS["swav"](), "8 views"),
        ("global-local-big", PRESETS["supervised"](), "1 views"),
    ):
        with pytest.raises(ConfigError, match=message):
            arrange(name, views)
    with pytest.raises(ConfigError, match="two views"):
        Views((View(32),) * 3, [0.5] * 3, [0.5] * 3, crop_pairs.CropPairs((0,), *DEFAULT))


# Command


def run(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_coverage_equals_a_literal_count():
    statistics = count_configurations("adjacent", (7, 11), 200, seed=5)
    expected = torch.zeros(7, 11)
    for top, left, h, w in pair("adjacent", 200, 7, 11, seed=5).flatten(0, 1).tolist():
        expected[top : top + h, left : left + w] += 1
    torch.testing.assert_close(statistics.coverage, expected / expected.max())


def test_chunks_change_nothing(monkeypatch):
    whole = count_configurations("equal", (20, 30), 100)
    monkeypatch.setattr("inbatch.apps.reports.crop_statistics._CHUNK", 7)
    parts = count_configurations("equal", (20, 30), 100)
    assert (whole.shares, whole.area) == (parts.shares, parts.area) and torch.equal(whole.coverage, parts.coverage)


def test_pairs_are_numbered_when_they_are_drawn():
    """The numbers of all pairs took 8 bytes each, before the first one was drawn."""
    assert next(_ours("default", (32, 32), 10**14, 0)).shape == (2, 1024, 4)


def test_torchvision_draws_the_same_shares_and_leaves_its_generator_alone():
    state = torch.get_rng_state()
    theirs, again = (count_configurations("small", (32, 32), 1500, sampler="torchvision") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and theirs.shares == again.shares
    ours = count_configurations("small", (32, 32), 1500)
    assert all(abs(x - y) < 0.025 for x, y in zip(ours.shares, theirs.shares, strict=True))
    assert abs(ours.area - theirs.area) < 0.008


@pytest.mark.slow
def test_command_counts_prints_and_draws(tmp_path: Path):
    done = run(f"crops --pairs 500 -o {tmp_path / 'crops.png'}")
    assert done.exit_code == 0 and "17.27%" in done.stdout and "global-local" in done.stdout
    assert Image.open(tmp_path / "crops.png").format == "PNG"
    done = run(f"crops --crops all --size 24x48 --pairs 100 --seed 1 --json -o {tmp_path / 'all.png'}")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and list(report["crops"]) == list(CROPS) and report["size"] == [24, 48]
    assert report["crops"]["adjacent"]["adjacent"] == 1.0 and (tmp_path / "all.png").stat().st_size > 10_000
    assert report["crops"]["big"]["area"] == count_configurations("big", (24, 48), 100, 1).area
    assert "17.27%" not in run("crops --pairs 100 --size 33").stdout, "the paper's shares are those of 32 pixels"
    assert run("crops --sampler torchvision --pairs 50 --crops big").exit_code == 0


def test_the_help_s_examples_are_valid_command_lines(monkeypatch):
    shown = run("crops --help").stdout.partition("Examples:")[2]
    examples = [line.strip() for line in shown.splitlines() if line.strip().startswith("inbatch crops")]
    drawn = []

    def cut(*arguments):
        drawn.append(arguments[:3])
        raise ConfigError("parsed")

    monkeypatch.setattr("inbatch.apps.reports.crop_statistics.count_configurations", cut)
    assert all(run(line.removeprefix("inbatch ")).exit_code == 2 for line in examples)
    assert drawn == [
        ("default", (32, 32), 1_000_000),
        ("default", (224, 224), 100_000),
        ("default", (375, 500), 20_000),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--size 1", "from 2 to"),
        ("--size 32x", "--size 32x"),
        ("--size 100000", "from 2 to"),
        ("--pairs 0", "at least one"),
        ("--crops sideways", "global-local"),
        ("--sampler mine", "ours, torchvision"),
        ("--sampler torchvision --crops equal", "default, big, small"),
    ],
)
def test_bad_input_ends_in_a_sentence(line: str, message: str):
    done = run(f"crops {line}")
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and message in done.stderr and not done.stdout
    assert json.loads(run(f"crops {line} --json").stdout)["exit_code"] == 2


def test_sizes_are_height_and_width():
    assert parse_size("32") == (32, 32) and parse_size("375x500") == (375, 500)
