"""Near duplicates and outliers on small numbers: what is confirmed, what is not, and which image of a group is kept."""

import numpy as np
import pytest
import torch
from scenes import scene
from torch.nn import functional as F

from inbatch.errors import DataError
from inbatch.evaluation import thumbnail_alignment
from inbatch.evaluation.image_defects import LIMITS, measures, reason
from inbatch.evaluation.near_duplicates import (
    SIDE,
    described,
    descriptors,
    open_pairs,
    representatives,
    similar_pairs,
    thumbnail,
)
from inbatch.evaluation.outliers import distribution_distance, outlier_scores
from inbatch.evaluation.thumbnail_alignment import THRESHOLD, compare


def small(image: torch.Tensor) -> torch.Tensor:
    values = F.interpolate(image[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return thumbnail(values.round().clamp(0, 255).byte())


def changed(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return copies of an image as people make them."""
    text = image.clone()
    text[:, 84:92, 20:60] = 255
    turned = F.affine_grid(torch.tensor([[[0.9986, 0.0523, 0], [-0.0523, 0.9986, 0]]]), (1, 1, 96, 96), False)
    return {
        "brighter": image * 0.7 + 60,
        "cropped": image[:, 12:, :80],
        "mirrored": image.flip(-1),
        "mirrored and cropped": image.flip(-1)[:, 8:90, 10:],
        "turned by 3 degrees": F.grid_sample(image[None], turned, padding_mode="border", align_corners=False)[0],
        "noisy": image + 4 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1)),
        "with a text": text,
    }


def test_copies_are_confirmed_and_other_images_are_not() -> None:
    originals = [scene(seed) for seed in range(12)]
    copies = changed(originals[0])
    thumbnails = torch.stack([small(image) for image in (*originals, *copies.values())])
    places, similarity = similar_pairs(thumbnails, 5)
    comparison = compare(thumbnails, places)
    confirmed = {tuple(pair) for pair in places[comparison.check >= THRESHOLD].tolist()}
    assert {(0, 12 + i) for i in range(len(copies))} <= confirmed
    assert all(first == 0 or first >= 12 for first, _ in confirmed)
    assert similarity.shape == comparison.check.shape and (similarity <= 1 + 1e-6).all()
    mirror = dict(zip(map(tuple, places.tolist()), comparison.mirrored.tolist(), strict=True))
    assert [mirror[0, 12 + i] for i in range(4)] == [False, False, True, True]


def test_flat_and_inverted_images_are_not_duplicates() -> None:
    flat, image = torch.full((SIDE, SIDE), 128.0), small(scene(3)).float()
    slope = flat + torch.linspace(-1, 1, SIDE)
    thumbnails = torch.stack([flat, slope, image, 255 - image]).byte()
    assert (compare(thumbnails, torch.tensor([[0, 1], [0, 2], [2, 3]])).check < THRESHOLD).all()
    assert compare(thumbnails, torch.zeros(0, 2, dtype=torch.long)).check.shape == (0,)
    with pytest.raises(DataError, match="32 x 32 pixels, not 16 x 16"):
        compare(torch.zeros(2, 16, 16, dtype=torch.uint8), torch.tensor([[0, 1]]))


def test_the_start_is_the_best_crop_of_either_image(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails = torch.stack([small(image) for image in (scene(0), scene(1), *changed(scene(0)).values())])
    pairs = torch.tensor([[0, 3], [3, 0], [1, 2], [8, 5], [0, 5], [4, 4]])
    monkeypatch.setattr(thumbnail_alignment, "_IMAGES", 3)
    monkeypatch.setattr(thumbnail_alignment, "_PRODUCTS", 2)
    best, number = thumbnail_alignment._started(thumbnails, pairs)
    spans = [(start * 0.15, 0.85) for start in (0, 0.5, 1)]
    windows = [((0.0, 1.0), (0.0, 1.0)), *((row, column) for row in spans for column in spans)]
    whole = descriptors(thumbnails)
    mirror = descriptors(thumbnails, mirrored=True)
    for pair, value, start in zip(pairs.tolist(), best.tolist(), number.tolist(), strict=True):
        expected = [
            described(thumbnails[pair[side], None].float(), [row], [column])[0, 0] @ other[pair[1 - side]]
            for side in (0, 1)
            for other in (whole, mirror)
            for row, column in windows
        ]
        assert value == pytest.approx(float(max(expected)), abs=1e-5)
        assert expected[start] == pytest.approx(value, abs=1e-5)
    maps = torch.tensor(thumbnail_alignment._maps())[number[:2]]
    assert maps[0, 0, 0] * maps[1, 0, 0] == pytest.approx(1), "a crop of the first image, and of the second"


def test_no_pair_is_aligned_on_all_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails = torch.stack([small(scene(3))] * 2)
    monkeypatch.setattr(thumbnail_alignment, "_HALF", 2.0)
    assert compare(thumbnails, torch.tensor([[0, 1]])).check.tolist() == pytest.approx([1.0], abs=0.05)


def test_every_image_is_a_duplicate_of_the_one_that_is_kept_for_it() -> None:
    chain = torch.tensor([[0, 1], [1, 2], [2, 3], [5, 6]])
    assert representatives(8, chain, torch.arange(8)).tolist() == [0, 0, 2, 2, 4, 5, 5, 7]
    largest_first = torch.tensor([1, 6, 0, 2, 3, 4, 5, 7])
    assert representatives(8, chain, largest_first).tolist() == [1, 1, 1, 3, 4, 6, 6, 7]
    assert open_pairs(8, chain).tolist() == [[0, 2], [0, 3], [1, 3]]
    assert open_pairs(8, chain, most=3).shape == (0, 2)


def test_outlier_scores_agree_with_scikit_learn() -> None:
    from sklearn.neighbors import LocalOutlierFactor

    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 8, generator=draw) + torch.tensor([4.0] + [0] * 7)
    rows[0] = torch.tensor([-4.0] + [0] * 7)
    scores, unit = outlier_scores(rows, 10), F.normalize(rows)
    expected = -LocalOutlierFactor(n_neighbors=10).fit(unit.numpy()).negative_outlier_factor_
    assert np.allclose(scores.density, expected, rtol=1e-4)
    near = torch.cdist(unit.double(), unit.double()).topk(11, largest=False).values[:, 1:].mean(1)
    assert torch.allclose(scores.distance.double(), near, atol=1e-4)
    assert all(values.argmax() == 0 for values in (scores.distribution, scores.distance, scores.density))
    centred = unit.double() - unit.double().mean(0)
    inverse = torch.linalg.inv(centred.T @ centred / 200)
    expected = ((centred @ inverse) * centred).mean(1).sqrt()
    assert torch.allclose(distribution_distance(rows, 8).double(), expected, rtol=1e-3)
    assert (distribution_distance(torch.ones(5, 3)) == 0).all(), "identical rows"


def test_distribution_distance_of_similar_directions() -> None:
    """Features of an encoder that has hardly trained differ by 1e-5: their differences outweigh rounding."""
    rows = torch.ones(300, 32) + 1e-4 * torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    rows[7, :16] += 1e-2
    unit = F.normalize(rows.double())
    centred = unit - unit.mean(0)
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    expected = (centred @ axes[:, -8:] / variance[-8:].sqrt()).square().mean(1).sqrt()
    assert torch.allclose(distribution_distance(rows, 8).double(), expected, rtol=0.02) and expected.argmax() == 7


def test_broken_images_are_listed_with_a_reason() -> None:
    image = scene(5)
    frame = torch.full((3, 96, 96), 255.0)
    frame[:, 30:60, 30:60] = image[:, :30, :30]
    blurred = F.interpolate(F.interpolate(image[None], (12, 12), mode="area"), (96, 96), mode="bicubic")[0]
    noisy = image + 8 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    pictures = {
        "": noisy, "one colour": torch.full((1, 40, 40), 90.0), "dark": noisy / 20, "overexposed": 242 + noisy / 20,
        "blurred": blurred, "border": frame,
    }  # fmt: skip
    for name, picture in pictures.items():
        verdict = reason(measures(picture.clamp(0, 255).byte()) | {"side": 96, "relative_side": 1.0})
        assert (verdict or ("", ""))[0] == name, measures(picture.clamp(0, 255).byte())
    for name, values in {"tiny": {"side": 8}, "small for this collection": {"relative_side": 0.2},
                         "nearly empty file": {"bytes_per_pixel": 0.001}}.items():  # fmt: skip
        verdict = reason(values)
        assert verdict is not None and verdict[0] == name
    assert reason({}) is None and len(LIMITS) == 8
    assert measures(torch.zeros(3, 1, 1, dtype=torch.uint8))["border"] == 1.0
