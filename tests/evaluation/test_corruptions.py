"""Corruptions: their effect on images, and the robustness of features against them."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from bars_data import bars, bars_run, command
from feature_sets import Pictures, clouds, encoder, pictures
from PIL import Image
from scipy import ndimage

from inbatch.apps.cli.output import conditions, figures
from inbatch.errors import ConfigError
from inbatch.evaluation import CORRUPTIONS, Chance, corruptions, embed, evaluate, knn, linear_probe
from inbatch.evaluation.corruptions import blur, digital, linear_maps, noise, weather
from inbatch.rng import fold

EVERY = pytest.mark.parametrize("name", CORRUPTIONS)
SIZES = {"small": (24, 32), "large": (2, 224)}
UNEVEN = {
    **dict.fromkeys(("frost", "elastic_transform", "glass_blur"), SIZES),
    **dict.fromkeys(("snow", "fog"), ("large",)),
    "motion_blur": ("small",),
}
"""Corruptions whose published parameters do not increase in every respect with the severity.

They exchange image for more ice, rotation for more bending, blur for more swaps, use a longer kernel with the same
sigma, fewer flakes, or rougher fog.
"""


def scenes(n=6, height=32, width=32, channels=3):
    """Draw smooth random images with roughly the spectrum of photographs."""
    draw = torch.Generator().manual_seed(0)
    x = sum(
        torch.nn.functional.interpolate(
            torch.randn(n, channels, size, size, generator=draw) / size**0.5, (height, width), mode="bicubic"
        )
        for size in (2, 4, 8, 16, 32)
    )
    return (x * 60 + 110).clamp(0, 255).to(torch.uint8)


def chance(n, seed=1):
    return Chance(seed, torch.arange(n))


@pytest.mark.grid(35)
@EVERY
@pytest.mark.parametrize(
    "shape", [(3, 3, 32, 32), (2, 1, 20, 20), (2, 1, 1, 1), (2, 3, 1, 1), (2, 3, 17, 40), (1, 1, 2, 3), (1, 3, 70, 66)]
)
def test_corruptions_keep_shape_type_and_input(name, shape):
    images = scenes(shape[0], *shape[2:], shape[1])
    before = images.clone()
    for severity in (1, 5):
        corrupted = CORRUPTIONS[name](images, severity, chance(len(images)))
        assert corrupted.shape == images.shape and corrupted.dtype == torch.uint8 and corrupted is not images
        assert torch.equal(images, before)


@EVERY
def test_corruption_depends_on_number_and_seed_but_not_on_the_batch(name):
    images = scenes(5)
    for severity in (2, 5):
        together = CORRUPTIONS[name](images, severity, chance(5))
        assert torch.equal(together, CORRUPTIONS[name](images, severity, chance(5)))
        for chosen in ([3], [4, 1]):
            alone = CORRUPTIONS[name](images[chosen], severity, Chance(1, torch.tensor(chosen)))
            assert torch.equal(alone, together[chosen])
    same = images[:1].expand(5, -1, -1, -1)
    corrupted = CORRUPTIONS[name](same, 5, chance(5))
    random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(corrupted[0], corrupted[1]) != random
    assert torch.equal(corrupted, CORRUPTIONS[name](same, 5, chance(5, seed=2))) != random


@pytest.mark.grid(10)
@EVERY
@pytest.mark.parametrize("size", SIZES)
def test_change_grows_with_severity(name, size):
    count, side = SIZES[size]
    images = scenes(count, side, side)
    change = [
        (CORRUPTIONS[name](images, severity, chance(len(images))).float() - images.float()).abs().mean().item()
        for severity in range(1, 6)
    ]
    assert min(change) > 0.5
    if size not in UNEVEN.get(name, ()):
        assert change == sorted(change) and change[4] > 1.2 * change[0], change


@EVERY
def test_constant_grey_images(name):
    grey = torch.full((2, 1, 24, 24), 128, dtype=torch.uint8)
    corrupted = CORRUPTIONS[name](grey, 3, chance(2))
    alone = ("gaussian_noise", "shot_noise", "impulse_noise", "snow", "frost", "fog", "brightness")
    assert torch.equal(corrupted, grey) == (name not in alone)


def test_invalid_images_and_severities_are_refused():
    blurred = CORRUPTIONS["zoom_blur"]
    for images in (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ConfigError, match="1 or 3 channels"):
            blurred(images, 1, chance(1))
    for severity in (0, 6):
        with pytest.raises(ConfigError, match="from 1 to 5"):
            blurred(scenes(1), severity, chance(1))
    with pytest.raises(TypeError):
        CORRUPTIONS["rain"] = blurred


def test_fifteen_corruptions_of_four_kinds():
    kinds = [c.kind for c in CORRUPTIONS.values()]
    assert [kinds.count(k) for k in ("noise", "blur", "weather", "digital")] == [3, 4, 4, 4]
    assert all(len(c.small) == len(c.large) == 5 for c in CORRUPTIONS.values())


# Parts, compared with slow or well-known versions


def test_chance_is_uniform_and_normal():
    u, z = chance(50).uniform(0, 400), chance(50).normal(1, 400)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02 and abs(z.pow(4).mean() - 3) < 0.2
    assert not torch.equal(chance(50).uniform(1, 400), u)


@pytest.mark.parametrize("rate", [3.0, 60.0, 500.0])
def test_shot_noise_is_poisson(rate):
    for level in (0, 5, 128, 255):
        x = torch.full((4, 1, 100, 100), level / 255)
        counts = noise.shot(x, rate, chance(4)) * rate
        mean = level / 255 * rate
        assert (counts - counts.round()).abs().max() < 1e-3
        assert abs(counts.mean() - mean) <= 0.02 * mean + 0.01 * mean**0.5
        assert abs(counts.var() - mean) <= 0.05 * mean


@pytest.mark.parametrize("side", [1, 2, 9, 32])
def test_lines_are_scipy_s_and_pillow_s(side):
    x, device = np.random.default_rng(0).random((side, 3)), torch.device("cpu")
    for edge, mode in (("edge", "nearest"), ("symmetric", "reflect"), ("mirror", "mirror")):
        for sigma in (0.4, 1.5, 6.0):
            mine = linear_maps.smoothing(side, sigma, edge, 3.0, device).double().numpy() @ x
            assert np.allclose(mine, ndimage.gaussian_filter1d(x, sigma, axis=0, mode=mode, truncate=3), atol=1e-5)
    for factor in (1.0, 1.07, 1.26, 2.25, 4.5):
        kept = int(np.ceil(side / factor))
        top = (side - kept) // 2
        zoomed = ndimage.zoom(x[top : top + kept], (factor, 1), order=1)
        trim = (len(zoomed) - side) // 2
        if kept > 1:
            mine = linear_maps.zooming(side, factor, device).double().numpy() @ x
            assert np.allclose(mine, zoomed[trim : trim + side], atol=1e-5)
    picture = Image.fromarray((x * 255).astype(np.float32), "F")
    for size in {1, max(1, int(side * 0.65)), side, 2 * side + 1}:
        mine = linear_maps.boxes(side, size, device).double().numpy() @ (x * 255)
        assert np.allclose(mine, np.asarray(picture.resize((3, size), Image.Resampling.BOX)), atol=1e-3)


def test_pixelate_and_jpeg_are_pillow_s():
    images = scenes(2)
    for image, coarse, written in zip(
        images,
        CORRUPTIONS["pixelate"](images, 5, chance(2)),
        CORRUPTIONS["jpeg_compression"](images, 5, chance(2)),
        strict=True,
    ):
        picture, file = Image.fromarray(image.permute(1, 2, 0).numpy()), BytesIO()
        resized = picture.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        difference = np.asarray(resized).astype(int) - coarse.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 1
        picture.save(file, "JPEG", quality=40)
        assert np.array_equal(np.asarray(Image.open(file)), written.permute(1, 2, 0).numpy())


def test_motion_blur_pixel_by_pixel():
    x = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(0))
    blurred = blur.smear(x, (3, 1.5), torch.tensor([30.0, -100.0]))
    for image, out, degrees in zip(x[:, 0].tolist(), blurred[:, 0], (30, -100), strict=True):
        weight = np.exp(-(np.arange(7) ** 2) / (2 * 1.5**2))
        for i in range(9):
            for j in range(12):
                value = 0.0
                for t, w in enumerate(weight / weight.sum()):
                    down, right = (int(np.ceil(t * f(np.deg2rad(degrees)) - 0.5)) for f in (np.sin, np.cos))
                    value += w * image[min(max(i + down, 0), 8)][min(max(j + right, 0), 11)]
                assert out[i, j].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("reach", [1, 3])
def test_glass_swaps_pixels_with_near_ones(reach):
    x = torch.arange(30 * 26).view(1, 1, 30, 26).float().expand(3, -1, -1, -1)
    swapped = blur.glass(x, (0.01, reach, 1), chance(3))
    where = swapped.round().long().flatten(1)
    assert all(row.sort().values.tolist() == list(range(30 * 26)) for row in where)
    moved = (where != torch.arange(30 * 26)).view(3, 30, 26)
    inner = moved[:, reach + 1 : 31 - reach, reach + 1 : 27 - reach]
    assert inner.float().mean() > 0.6 and not moved[:, 0, 0].any()
    far = (where // 26 - torch.arange(780) // 26).abs()
    assert far.max() >= 1 and far.float().mean() < 2 * reach


def slow_plasma(drawn, size, decay):
    """Compute diamond-square point by point; drawn: the noise of every level, squares and the two kinds of diamonds."""
    field, step, swing = np.zeros((size, size)), size, 1.0
    for u in drawn:
        half = step // 2
        cells = [(i, j) for i in range(0, size, step) for j in range(0, size, step)]
        for i, j in cells:
            around = sum(field[(i + a) % size, (j + b) % size] for a in (0, step) for b in (0, step))
            field[i + half, j + half] = around / 4 + swing * u[0, i // step, j // step]
        for kind, (a, b) in ((1, (0, half)), (2, (half, 0))):
            for i, j in cells:
                y, x = i + a, j + b
                beside = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                around = sum(field[p % size, q % size] for p, q in beside)
                field[y, x] = around / 4 + swing * u[kind, i // step, j // step]
        step, swing = half, swing / decay**2
    return (field - field.min()) / (field.max() - field.min())


def test_plasma_point_by_point():
    mine = weather.plasma(chance(2, seed=5), (13, 16), 1.75)
    drawn = [2 * chance(2, seed=5).uniform(level, 3, 2**level, 2**level)[1].double().numpy() - 1 for level in range(4)]
    assert mine.shape == (2, 1, 13, 16)
    assert np.allclose(mine[1, 0].numpy(), slow_plasma(drawn, 16, 1.75)[:13], atol=1e-5)


def test_brightness_is_that_of_hsv():
    import colorsys

    x = torch.rand(1, 3, 5, 5)
    x[..., 0, 0] = 0
    brighter = weather.brightness(x, 0.3, chance(1))[0].flatten(1).T.tolist()
    for before, after in zip(x[0].flatten(1).T.tolist(), brighter, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(1, v + 0.3)), abs=1e-5)


def test_elastic_maps_take_the_three_points_back():
    inverse = digital.affine(chance(3), 40, 30, 4.0)
    shift = 4.0 * (2 * chance(3).uniform(0, 3, 2) - 1)
    corners = torch.tensor([[25.0, 30.0], [25.0, 10.0], [5.0, 10.0]])
    moved = torch.cat([corners + shift, torch.ones(3, 3, 1)], -1)
    assert torch.allclose(moved @ inverse, corners.expand(3, 3, 2), atol=1e-4)
    x = torch.rand(2, 1, 8, 6)
    y, across = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    place = torch.stack([across, y], -1).expand(2, -1, -1, -1)
    for mirror, mode in ((True, "mirror"), (False, "reflect")):
        assert torch.allclose(digital.sample(x, place, mirror), x, atol=1e-5)
        off = place + 5 * torch.randn(2, 8, 6, 2)
        theirs = ndimage.map_coordinates(
            x[1, 0].double().numpy(), off[1].flip(-1).permute(2, 0, 1).double().numpy(), order=1, mode=mode
        )
        assert np.allclose(digital.sample(x, off, mirror)[1, 0].numpy(), theirs, atol=1e-4)


# Protocol


def test_figures_are_those_of_the_protocols_on_corrupted_images():
    net, train, test = encoder(), bars(40), bars(8, seed=1)
    clean = embed(net, train), embed(net, test)
    result = corruptions(net, *clean, test, k=9, seed=3, batch=7)
    assert result["clean"] == {"knn": knn(*clean, k=9)["top1"], "linear": linear_probe(*clean)["top1"]}
    images, names = torch.stack(test.images), list(CORRUPTIONS)
    for name, severity in (("fog", 4), ("pixelate", 5), ("gaussian_noise", 1)):
        corrupted = CORRUPTIONS[name](images, severity, Chance(fold(3, names.index(name)), torch.arange(8)))
        shown = embed(net, Pictures(list(corrupted), test.labels))
        for protocol, top1 in (
            ("knn", knn(clean[0], shown, k=9)["top1"]),
            ("linear", linear_probe(clean[0], shown)["top1"]),
        ):
            assert result["each"][name][protocol]["severities"][severity - 1] == pytest.approx(top1)
    for protocol in ("knn", "linear"):
        each = [result["each"][name][protocol] for name in names]
        assert all(one["top1"] == pytest.approx(sum(one["severities"]) / 5) for one in each)
        assert result[protocol]["top1"] == pytest.approx(sum(one["top1"] for one in each) / 15)
        assert result[protocol]["drop"] == pytest.approx(1 - result[protocol]["top1"] / result["clean"][protocol])
        assert result["kinds"]["noise"][protocol]["top1"] == pytest.approx(sum(one["top1"] for one in each[:3]) / 3)
    assert (result["images"], result["parameters"], result["side"]) == (8, "CIFAR-10-C", 20)
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(corruptions(net, *clean, test, k=9, seed=3)))


@pytest.mark.slow
def test_only_some_test_images_the_same_each_time():
    net, train, test = encoder(), bars(20), bars(12, seed=1)
    seen, image = [], test.image
    clean = embed(net, train), embed(net, test)
    test.image = lambda i: seen.append(i) or image(i)
    result = corruptions(net, *clean, test, most=3)
    corruptions(net, *clean, test, most=3, seed=1)
    assert result["images"] == 3 and len(set(seen)) == 3 and seen[:3] == seen[3:] == sorted(seen[:3])
    with pytest.raises(ConfigError, match="not 0"):
        corruptions(net, *clean, test, most=0)


@pytest.mark.slow
def test_evaluate_needs_images_of_one_or_three_channels():
    net, train, test = encoder(), bars(20), bars(10, seed=1)
    with pytest.raises(ConfigError, match="corruptions are shown to an encoder with images, and clouds holds"):
        evaluate(net, train, clouds(9), protocols=["corruptions"])
    with pytest.raises(ConfigError, match="there is none: pass encoder"):
        evaluate(None, train, test, protocols=["corruptions"])
    two = pictures(9, channels=2)
    with pytest.raises(ConfigError, match="this encoder takes 2"):
        evaluate(encoder(channels=2), two, two, protocols=["corruptions"])
    evaluation = evaluate(net, train, test, protocols=["corruptions"], k=5, most=4)
    rows = conditions(evaluation)
    assert [row for row, _ in rows] == ["corrupted", "by noise", "by blur", "by weather", "by digital"]
    assert all(set(figures(entry)) == {"k-NN", "linear"} for _, entry in rows)


@pytest.mark.slow
def test_the_command_line_and_another_set(tmp_path):
    """Evaluate a run of colour images of 20 pixels on grey ones of 33 pixels with other classes."""
    folder = bars_run(tmp_path, channels=3)
    result = command(f"evaluate {folder} --protocol corruptions --most 3")
    assert result.exit_code == 0 and "by weather" in result.stdout
    assert json.loads((folder / "evaluation.json").read_text())["corruptions"]["images"] == 3
    grey = pictures(45, sizes=((33, 33),))
    np.savez(tmp_path / "grey.npz", images=torch.stack(grey.images).numpy(), labels=grey.labels.numpy())
    line = f"evaluate {folder} --data {tmp_path / 'grey.npz'} --protocol knn,linear,few,corruptions --most 4 --json"
    evaluation = json.loads(command(line).stdout)
    assert evaluation["knn"]["classes"] == 3 and evaluation["test"]["images"] == 4 and "tenth" in evaluation["held_out"]
    assert evaluation["encoder"]["channels"] == 3 and evaluation["corruptions"]["images"] == 4
