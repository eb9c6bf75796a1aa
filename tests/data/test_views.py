"""Views: each operation against torchvision's with the same parameters, each draw against torchvision's draws."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from inbatch import rng
from inbatch.batch import Batch
from inbatch.data.views import PRESETS, View, Views, colour, crop, filters, operation, pipeline
from inbatch.errors import ConfigError, DataError

CLOSE = dict(rtol=0, atol=2e-6)
"""Values lie in [0, 1]: a pixel of 8 bits is 4e-3, so this is a two-thousandth of one."""
SURE = 1e-3
"""A two-sample test with a fixed seed fails below this probability."""
MANY = torch.arange(4000)


def photos(n: int = 6, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    """Draw smooth random images, some of them grey or with equal channels, as uint8."""
    coarse = torch.rand(n, c, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic").mul(1.3).sub(0.15).clamp(0, 1)
    fine[0] = fine[0, :1]
    return (fine * 255).round().to(torch.uint8)


def values(n: int = 6, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    return photos(n, c, h, w).float() / 255


def batch(images: torch.Tensor, epoch: int = 0, index: torch.Tensor | None = None, **rest) -> Batch:
    index = torch.arange(len(images)) if index is None else index
    return Batch(index=index, label=torch.full_like(index, -1), seed=3, epoch=epoch, images=images, **rest)


def make(views, channels: int = 3, fused: Literal[False] | None = None) -> Views:
    return Views(views, [0.5] * channels, [0.25] * channels, fused=fused)


FUSED = pytest.mark.parametrize("fused", [None, False], ids=["kernel", "torch"])


def same_distribution(ours: torch.Tensor, theirs: list[float]) -> bool:
    return stats.ks_2samp(ours.double().numpy(), np.asarray(theirs, dtype=float)).pvalue > SURE


# Crops


def literal_box(u: list[float], height: int, width: int, scale, ratio) -> list[int]:
    """torchvision's RandomResizedCrop.make_params with its draws replaced by inbatch's."""
    for i in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[i])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        shape = math.exp(low + (high - low) * u[10 + i])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.14), (1.0, 1.0)])
def test_boxes_equal_a_literal_loop(scale):
    sizes = torch.tensor([[32, 32], [375, 500], [20, 200], [200, 20], [3, 4], [1, 1], [1, 7], [600, 450]])
    size, ratio = sizes.repeat(60, 1), (3 / 4, 4 / 3)
    u = rng.uniform(0, 0, torch.arange(len(size)), 0, crop.DRAWS)
    expected = [literal_box(d, h, w, scale, ratio) for d, (h, w) in zip(u.tolist(), size.tolist(), strict=True)]
    assert crop.random_boxes(u, size, scale, ratio).tolist() == expected


@pytest.mark.parametrize("height, width", [(32, 32), (375, 500), (40, 160)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    view = View(32, scale=(0.08, 1.0))
    size = torch.tensor([height, width]).expand(len(MANY), 2)
    top, left, h, w = make([view]).boxes(MANY, size, seed=0, epoch=0)[0].unbind(1)
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(32)
    blank = torch.zeros(3, height, width, dtype=torch.uint8)
    drawn = [theirs.make_params([blank]) for _ in range(len(MANY))]
    y, x, k, n = (np.array([d[name] for d in drawn], dtype=float) for name in ("top", "left", "height", "width"))
    assert same_distribution(h * w, k * n)
    assert same_distribution(w.double() / h, n / k)
    assert same_distribution(top, y)
    assert same_distribution(left, x)
    assert same_distribution(left + w, x + n)


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [8, 32, 57])
@pytest.mark.parametrize("large", [0, 10**9], ids=["one by one", "matrices"])
def test_resampling_equals_torchvision(monkeypatch, how, size, large):
    """Boxes of images of two sizes on one canvas; the padding is white and must not affect the views."""
    monkeypatch.setattr(crop, "_LARGE", large)
    images = photos(4, h=40, w=48)
    sizes = torch.tensor([[40, 48], [30, 25]]).repeat(2, 1)
    for image, (h, w) in zip(images, sizes.tolist(), strict=True):
        image[:, h:] = image[:, :, w:] = 255
    source = torch.tensor([0, 1, 2, 3, 1, 0, 0])
    u = rng.uniform(0, 1, torch.arange(6), 0, crop.DRAWS)
    boxes = crop.random_boxes(u, sizes[source[:6]], (0.02, 1.0), (0.5, 2.0))
    boxes = torch.cat([boxes, torch.tensor([[39, 47, 1, 1]])])
    flip = torch.tensor([0, 1, 0, 1, 0, 1, 1]).bool()
    ours = crop.resample(images, source, boxes, flip, size, how)
    for x, i, (t, left, h, w), mirrored in zip(ours, source, boxes.tolist(), flip, strict=True):
        cut = images[i].float() / 255
        mode = v2.InterpolationMode(how)
        theirs = tv.resized_crop(cut, t, left, h, w, [size, size], mode, antialias=True).clamp(0, 1)
        torch.testing.assert_close(x, theirs.flip(-1) if mirrored else theirs, rtol=0, atol=1e-5)


def test_centre_crop_is_the_largest_centred_square():
    sizes = torch.tensor([[375, 500], [32, 32], [20, 9]])
    assert crop.centre_boxes(sizes, 1.0).tolist() == [[0, 62, 375, 375], [0, 0, 32, 32], [5, 0, 9, 9]]
    assert crop.centre_boxes(sizes, 0.875)[0].tolist() == [23, 86, 328, 328]
    images = photos()
    drawn = make(PRESETS["plain"](size=32))(batch(images))
    torch.testing.assert_close(drawn.images[0] * 0.25 + 0.5, images.float() / 255, **CLOSE)
    assert not drawn.flipped.any()


# Colour


def per_image(function, x, *parameters):
    return torch.stack([function(image, *p) for image, *p in zip(x, *parameters, strict=True)])


FACTORS = [0.0, 0.3, 0.8, 1.0, 1.4, 2.0]


def test_brightness_contrast_saturation_equal_torchvisions():
    f, none = torch.tensor(FACTORS), torch.zeros(6)
    for theirs, luma, mean in (
        (tv.adjust_brightness, none, none),
        (tv.adjust_saturation, 1 - f, none),
        (tv.adjust_contrast, none, 1 - f),
    ):
        torch.testing.assert_close(colour.blend(values(), f, luma, mean), per_image(theirs, values(), FACTORS), **CLOSE)


def test_hue_equals_torchvisions_and_no_turn_changes_no_bit():
    turns = [-0.5, -0.1, 0.0, 0.07, 0.3, 0.5]
    x = values()
    x[1, :, :2] = torch.eye(3)[:, :2].repeat_interleave(16, 1)[:, :, None].mT  # pure colours, black
    ours = colour.rotate_hue(x.clone(), torch.tensor(turns))
    torch.testing.assert_close(ours, per_image(tv.adjust_hue, x, turns), **CLOSE)
    assert torch.equal(ours[2], x[2])


def test_jitter_in_drawn_order_equals_torchvision_in_that_order():
    """All 24 orders, on and off, against torchvision's four functions applied one after the other."""
    x, jitter = values(96), colour.Jitter(0.8, 0.8, 0.6, 0.7, 0.2)
    u = rng.uniform(0, 0, torch.arange(96), 0, 6)
    u[:, 5] = (torch.arange(96) % 24 + 0.5) / 24
    kind, factors, turns, order = jitter.settings_of(u)
    expected, orders = [], set()
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for i, image in enumerate(x):
        steps = [(functions[o], float(factors[i, o])) for o in order[i].tolist()]
        steps.insert(max(0, int(kind[i]) - 1), (tv.adjust_hue, float(turns[i])))
        orders.add(tuple(f.__name__ for f, _ in steps) if kind[i] else None)
        for function, value in steps if kind[i] else []:
            image = function(image, value)
        expected.append(image)
    assert len(orders) == 25
    ours = jitter(x.clone(), kind, factors, turns, order)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-5)
    assert torch.equal(ours[kind == 0], x[kind == 0])


def test_jitter_is_distributed_as_torchvisions():
    kind, factors, turns, order = colour.Jitter(0.8, 0.4, 1.2, 0.8, 0.2).settings_of(rng.uniform(0, 0, MANY, 0, 6))
    on = kind > 0
    assert stats.binomtest(int(on.sum()), len(MANY), 0.8).pvalue > SURE
    torch.manual_seed(0)
    theirs = v2.ColorJitter(0.4, 1.2, 0.8, 0.2)
    drawn = [theirs.make_params([]) for _ in range(len(MANY))]
    for ours, name in (*zip(factors.T, ("brightness", "contrast", "saturation"), strict=True), (turns[on], "hue")):
        assert same_distribution(ours, [float(d[f"{name}_factor"]) for d in drawn])
    # All orders are equally frequent, whether applied or not.
    number = (kind[on] - 1) * 9 + order[on, 0] * 3 + order[on, 1]
    counts = number.bincount(minlength=36)
    assert (counts > 0).sum() == 24 and stats.chisquare(counts[counts > 0].numpy()).pvalue > SURE


def test_grey_solarise_exposure():
    x, on = values(), torch.tensor([1, 0, 1, 0, 1, 1]).bool()
    grey = colour.Grey(0.2)(x.clone(), on)
    torch.testing.assert_close(grey[on], tv.rgb_to_grayscale(x[on], 3), **CLOSE)
    solarised = colour.Solarise(0.2, 0.5)(x.clone(), on)
    torch.testing.assert_close(solarised[on], tv.solarize(x[on], 0.5), **CLOSE)
    assert torch.equal(grey[~on], x[~on]) and torch.equal(solarised[~on], x[~on])
    exposed = colour.Exposure((0.5, 1.0), (0.0, 0.3))(x.clone(), on, torch.full((6,), 0.5), torch.full((6,), 0.6))
    torch.testing.assert_close(exposed, (x * 0.5 + 0.6).clamp(0, 1), **CLOSE)


def test_noise_is_normal_and_an_own_one_per_image():
    noise = colour.Noise(0.05)
    kind, key = noise.settings_of(rng.uniform(0, 0, torch.arange(64), 0, 2))
    added = noise(torch.full((64, 1, 20, 20), 0.5), kind, key) - 0.5
    assert stats.kstest(added.flatten().numpy() / 0.05, "norm").pvalue > SURE
    assert len({tuple(row) for row in added.flatten(1).tolist()}) == 64
    correlation = np.corrcoef(added.flatten(1).numpy())
    assert abs(correlation[~np.eye(64, dtype=bool)]).max() < 5 / 20


# Filters


@pytest.mark.parametrize("taps", [3, 9, 23])
def test_blur_equals_torchvisions(taps):
    sigma = [0.1, 0.3, 0.7, 1.0, 1.5, 2.0]
    ours = filters.gaussian_blur(values(), torch.tensor(sigma), taps)
    theirs = per_image(lambda image, s: tv.gaussian_blur(image, [taps, taps], [s, s]), values(), sigma)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (View(32, blur=0.5).taps, View(224, blur=0.5).taps, View(96, blur=0.5).taps) == (3, 23, 9)


def test_blur_is_distributed_as_torchvisions():
    on, sigma = filters.Blur(0.3, (0.1, 2.0), 3).settings_of(rng.uniform(0, 0, MANY, 0, 2))
    torch.manual_seed(0)
    theirs = v2.GaussianBlur(3, (0.1, 2.0))
    assert same_distribution(sigma, [theirs.make_params([])["sigma"][0] for _ in range(len(MANY))])
    assert stats.binomtest(int(on.sum()), len(MANY), 0.3).pvalue > SURE


def test_affine_equals_torchvisions():
    angle, shear, zoom = (
        [0.0, 30.0, -45.0, 10.0, 0.0, 5.0],
        [0.0, 0.0, 10.0, -15.0, 0.0, 3.0],
        [1.0, 1.0, 1.3, 0.7, 1.0, 1.1],
    )
    shift = [[0, 0], [3, -5], [-4, 0], [0, 7], [10, 10], [1, 2]]
    inverse = filters.inverse_map(
        torch.tensor(zoom), torch.tensor(zoom), torch.tensor(angle).deg2rad(), torch.tensor(shear).deg2rad().tan(),
        torch.tensor(shift) / 16,
    )  # fmt: skip
    bilinear = v2.InterpolationMode.BILINEAR

    def theirs(image, a, t, z, s):
        return tv.affine(image, a, t, z, [s, 0.0], interpolation=bilinear, fill=None)

    expected = per_image(theirs, values(), angle, shift, zoom, shear)
    torch.testing.assert_close(filters.affine(values(), inverse, "zeros"), expected, rtol=0, atol=2e-5)


def test_affine_map_inverts_its_formula_and_stays_in_range():
    ours = filters.Affine((0.75, 1.35), 1.2, 15.0, 10.0, 0.35, "zeros")
    _, inverse = ours.settings_of(rng.uniform(0, 0, MANY, 0, 6))
    forward = torch.linalg.inv(inverse[:, :, :2].double())
    assert 0.75 < forward.det().sqrt().min() < 0.76 and 1.34 < forward.det().sqrt().max() < 1.35
    shift = -(forward @ inverse[:, :, 2:].double())[:, :, 0] / 2
    assert same_distribution(shift[:, 0], np.random.default_rng(0).uniform(-0.35, 0.35, 4000))
    assert same_distribution(shift[:, 1], np.random.default_rng(1).uniform(-0.35, 0.35, 4000))
    turn = torch.atan2(forward[:, 1, 0], forward[:, 0, 0])  # the first column is rotated, not sheared
    assert same_distribution(turn.rad2deg(), np.random.default_rng(2).uniform(-15, 15, 4000))
    stretch = forward[:, :, 0].norm(dim=1).square() / forward.det()
    assert stretch.min() > 1 / 1.2 and stretch.max() < 1.2


# All operations together


def literal_views(view: View, number: int, b: Batch) -> torch.Tensor:
    """Compute one view of a batch by torchvision's functions, image by image, with the settings drawn for it."""
    u = rng.uniform(b.seed, b.epoch, b.index, number, pipeline.COLUMNS)
    box = crop.random_boxes(u[:, : crop.DRAWS], b.size, view.scale, view.ratio)
    settings = {type(step).__name__: step.settings_of(u[:, columns]) for step, columns in pipeline.operations(view)}
    out = []
    for i, image in enumerate(b.images):
        x = tv.resized_crop(
            image.float() / 255, *box[i].tolist(), [view.size] * 2, v2.InterpolationMode(view.interpolation)
        )
        x = tv.horizontal_flip(x).clamp(0, 1) if u[i, crop.DRAWS] < view.flip else x.clamp(0, 1)
        kind, factors, turns, order = (t[i] for t in settings["Jitter"])
        if kind:
            functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
            steps = [(functions[o], float(factors[o])) for o in order.tolist()]
            steps.insert(int(kind) - 1, (tv.adjust_hue, float(turns)))
            for function, value in steps:
                x = function(x, value)
        if settings["Grey"][0][i]:
            x = tv.rgb_to_grayscale(x, 3)
        if settings["Blur"][0][i]:
            x = tv.gaussian_blur(x, [view.taps] * 2, [float(settings["Blur"][1][i])] * 2)
        if settings["Solarise"][0][i]:
            x = tv.solarize(x, view.threshold)
        out.append(tv.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    return torch.stack(out)


@FUSED
def test_a_whole_view_equals_torchvisions_functions_in_its_order(fused):
    images = photos(64, h=40, w=48)
    sizes = torch.tensor([[40, 48], [33, 20]]).repeat(32, 1)
    views = [
        View(32, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5, solarise=0.2),
        View(24, interpolation="bicubic", jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2,
             blur=1.0, kernel=5, solarise=0.3),
    ]  # fmt: skip
    b = batch(images, size=sizes)
    drawn = Views(views, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], fused=fused)(b)
    for number, view in enumerate(views):
        error = (drawn.images[number] - literal_views(view, number, b)).abs()
        # A rounding error may put a pixel on the other side of the threshold of solarise.
        assert (error > 2e-4).float().mean() < 1e-4 and error.median() < 1e-5


@pytest.mark.slow
def test_the_accelerators_path_gives_the_same(monkeypatch):
    """There one piece holds the batch and no value is read; "meta" tensors raise if one is."""
    views, b = make(PRESETS["simclr"](size=32) + PRESETS["byol"](size=20, blur=0.0, blur_second=0.0)), batch(photos(40))
    ours = views(b)
    monkeypatch.setattr(operation, "can_branch", lambda x: False)
    monkeypatch.setattr(pipeline, "_CACHE", 10**9)
    for x, y in zip(ours.images, views(b).images, strict=True):
        assert ((x - y).abs() > 1e-5).float().mean() < 1e-4
    for preset in ("simclr", "byol", "swav", "digits_colour"):
        drawn = make(PRESETS[preset]())(batch(torch.empty(2, 3, 50, 60, dtype=torch.uint8)).to("meta"))
        assert [x.shape[-1] for x in drawn.images] == [view.size for view in PRESETS[preset]()]


@FUSED
def test_every_preset_draws_views_of_its_sizes(fused):
    for name, preset in PRESETS.items():
        views, channels = preset(), 1 if name == "digits" else 3
        drawn = make(views, channels, fused)(batch(photos(2, channels, 40, 36)))
        assert [tuple(x.shape) for x in drawn.images] == [(2, channels, v.size, v.size) for v in views], name
        assert all(torch.isfinite(x).all() and x.abs().max() <= 2.001 for x in drawn.images), name
        assert drawn.boxes.shape == (len(views), 2, 4) and drawn.flipped.shape == (len(views), 2), name


def test_preset_values():
    assert [v.size for v in PRESETS["swav"]()] == [224] * 2 + [96] * 6
    assert {v.scale for v in PRESETS["swav"]()} == {(0.14, 1.0), (0.05, 0.14)}
    first, second = PRESETS["barlow"]()
    assert (first.blur, second.blur, first.solarise, second.solarise) == (1.0, 0.1, 0.0, 0.2)
    cifar = PRESETS["simclr_cifar"]()[0]
    assert (cifar.size, cifar.brightness, cifar.hue, cifar.blur) == (32, 0.4, 0.1, 0.0)
    assert PRESETS["cc"]()[0] == PRESETS["simclr"](strength=0.5, blur=0.0)[0]
    assert PRESETS["mocov1"]()[0].jitter == 1.0 and PRESETS["wmse"](num_views=4)[3].grey == 0.1


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True)) and torch.equal(a.boxes, b.boxes)


def test_same_key_same_views_and_torchs_generator_is_left_alone():
    views, images = make(PRESETS["simclr"](size=32)), photos(16)
    state = torch.get_rng_state()
    first = views(batch(images))
    torch.manual_seed(99)
    assert equal(first, views(batch(images)))
    torch.set_rng_state(state)
    views(batch(images))
    assert torch.equal(state, torch.get_rng_state())


def test_draws_depend_on_epoch_view_seed_and_attempt():
    views, images = make(PRESETS["simclr"](size=32)), photos(16)
    b = batch(images)
    first = views(b)
    again = replace(b, attempt=torch.ones_like(b.index))
    for other in map(views, (batch(images, epoch=1), again, Batch(b.index, b.label, 4, 0, images))):
        assert not any(
            torch.isclose(x, y).flatten(1).all(1).any() for x, y in zip(first.images, other.images, strict=True)
        )
        assert (first.boxes != other.boxes).any(-1).all()
    assert (first.boxes[0] != first.boxes[1]).any(-1).all()


@FUSED
def test_a_sample_draws_the_same_in_any_batch(fused):
    """Permuted, split over ranks, or alone: the other samples of the batch have no influence."""
    views, images, index = make(PRESETS["byol"](size=32), fused=fused), photos(32), torch.arange(32) * 7
    whole = views(batch(images, index=index))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    permuted = views(batch(images[order], index=index[order]))
    half = views(batch(images[16:], index=index[16:]))
    alone = views(batch(images[5:6], index=index[5:6]))
    assert torch.equal(permuted.boxes, whole.boxes[:, order]) and torch.equal(permuted.flipped, whole.flipped[:, order])
    assert torch.equal(half.boxes, whole.boxes[:, 16:])
    for x, p, h, a in zip(whole.images, permuted.images, half.images, alone.images, strict=True):
        for got, expected in ((p, x[order]), (h, x[16:]), (a, x[5:6])):
            assert ((got - expected).abs() > 1e-5).float().mean() < 1e-4


def test_views_do_not_depend_on_their_neighbours_in_the_list():
    """Equal views are drawn in one pass; the result equals that of each alone at its number."""
    images, same, small = photos(8), View(24, grey=0.2), View(16)
    mixed = make([same, same, small, same])(batch(images))
    apart = make([same, small, small, same])(batch(images))
    for number in (0, 2, 3):
        torch.testing.assert_close(mixed.images[number], apart.images[number], **CLOSE)
    assert not torch.allclose(mixed.images[0], mixed.images[1])


def test_an_operations_draws_do_not_depend_on_which_others_are_done():
    images = photos(8)
    alone = make([View(24, blur=0.5, kernel=3)])(batch(images))
    before = make([View(24, blur=0.5, kernel=3, jitter=1e-9, hue=0.1)])(batch(images))  # applied to none of the eight
    torch.testing.assert_close(alone.images[0], before.images[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["supervised", "simclr"])
def test_streamed_crops_give_the_same_views(preset):
    """Workers crop with Views.boxes, sample by sample, and resize to uint8; all other operations run here."""
    images, sizes = photos(24, h=40, w=48), torch.tensor([[40, 48], [33, 20]]).repeat(12, 1)
    views = make(PRESETS[preset](size=32))
    resident = views(batch(images, size=sizes))
    boxes = torch.cat([views.boxes(torch.tensor([i]), sizes[i : i + 1], 3, 0) for i in range(24)], 1)
    assert torch.equal(boxes, resident.boxes)
    crops = tuple(
        per_image(lambda image, b: tv.resized_crop(image, *b, [32, 32]), images, where.tolist()) for where in boxes
    )
    streamed = views(Batch(torch.arange(24), torch.full((24,), -1), 3, 0, crops=crops, boxes=boxes))
    assert torch.equal(streamed.boxes, resident.boxes) and torch.equal(streamed.flipped, resident.flipped)
    error = torch.stack(streamed.images).sub(torch.stack(resident.images)).abs() * 0.25 * 255  # in 8-bit steps
    assert error.max() < 1.6 if preset == "supervised" else error.mean() < 1


@FUSED
def test_one_and_many_channels(fused):
    view = View(24, jitter=1.0, brightness=0.4, contrast=0.4, blur=0.5, kernel=3, solarise=0.2)
    for channels in (1, 2, 5):
        images = photos(8, channels)
        assert make([view], channels, fused)(batch(images)).images[0].shape == (8, channels, 24, 24)
    x, f = values(c=1), torch.tensor(FACTORS)
    theirs = per_image(tv.adjust_contrast, x, FACTORS)
    torch.testing.assert_close(colour.blend(x, f, torch.zeros(6), 1 - f), theirs, **CLOSE)


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match=r"1 channel.*grey"):
        make(PRESETS["simclr"](), channels=1)
    with pytest.raises(ConfigError, match="at least one view"):
        make([])
    for wrong in (
        dict(flip=1.5), dict(scale=(0.5, 0.2)), dict(scale=(0.0, 1.0)), dict(hue=0.6), dict(blur=0.5, kernel=4),
        dict(blur=0.5, size=8), dict(size=0), dict(centre=0.0), dict(noise=-1.0),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            View(**{"size": 32, **wrong})
    views = make([View(32), View(32)])
    with pytest.raises(DataError, match=r"3 channel\(s\)"):
        views(batch(photos(2, c=1)))
    with pytest.raises(DataError, match="uint8"):
        views(batch(photos(2).float()))
    with pytest.raises(DataError, match="uint8"):
        views(batch(None, index=torch.arange(2)))
    index, boxes = torch.arange(2), torch.zeros(2, 2, 4, dtype=torch.long)
    small = Batch(index, index, crops=(photos(2, h=16, w=16),) * 2, boxes=boxes)
    with pytest.raises(DataError, match="16"):
        views(small)
    with pytest.raises(DataError, match="boxes"):
        views(Batch(index, index, crops=(photos(2),) * 2))
