"""Signs of broken images: one colour, extreme exposure, blur, a border, a small or nearly empty file."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

LONGEST = 256
"""Longer side, in pixels, to which an image is scaled before its measures are taken, if it is larger."""


@dataclass(frozen=True)
class Limit:
    """Limit of a measure: the image is listed if the measure is `below` or, with below=False, above the value."""

    measure: str
    value: float
    below: bool
    text: str


LIMITS: Mapping[str, Limit] = {
    "one colour": Limit("spread", 8, True, "grey values differ by {:.0f} of 255 (1st to 99th percentile)"),
    "nearly empty file": Limit("bytes_per_pixel", 0.02, True, "{:.4f} bytes per pixel"),
    "tiny": Limit("side", 16, True, "the shorter side has {:.0f} pixels"),
    "small for this collection": Limit("relative_side", 0.25, True, "{:.0%} of the usual shorter side"),
    "dark": Limit("dark", 0.97, False, "{:.1%} of the pixels are black (16 of 255 or less)"),
    "overexposed": Limit("bright", 0.97, False, "{:.1%} of the pixels are white (239 of 255 or more)"),
    "blurred": Limit("sharpness", 0.15, True, "detail of the finest octave is {:.2f} times that of the next"),
    "border": Limit("border", 0.75, False, "{:.0%} of the area is a border of one colour"),
}
"""Reasons for which an image is listed, in the order in which they are tested: the first that holds is given."""

_DARK, _BRIGHT = 16, 239
_EVEN = 12  # grey values within which a row or column is of one colour
_LEAST = 1.0  # grey values of detail in an image whose sharpness can be measured
_PICTURE = 64  # least spread of an image that would have detail if it were sharp


def measures(image: UInt8[Tensor, "c h w"]) -> dict[str, float]:
    """Return the measures of an image's pixels: spread, dark, bright, sharpness and border.

    spread: difference of the 1st and 99th percentile of the grey values. dark, bright: fraction of such pixels.
    sharpness: energy of the finest octave relative to that of the next one. Without detail in either, it is 0 if the
    spread shows that there is a picture, else 1, as nothing is known.
    border: fraction of the area in rows and columns at the edges that have one colour.
    """
    grey = image[:3].float().mean(0)
    low, high = _percentiles(grey)
    return {
        "spread": high - low,
        "dark": float((grey <= _DARK).float().mean()),
        "bright": float((grey >= _BRIGHT).float().mean()),
        "sharpness": _sharpness(grey, high - low),
        "border": _border(grey),
    }


def reason(values: Mapping[str, float]) -> tuple[str, str] | None:
    """Return the first reason of `LIMITS` that holds for the measures, and its text with the value; None if none does.

    Measures that are missing hold no reason.
    """
    for name, limit in LIMITS.items():
        value = values.get(limit.measure)
        if value is not None and (value < limit.value if limit.below else value > limit.value):
            return name, limit.text.format(value)
    return None


def _percentiles(grey: Float[Tensor, "h w"]) -> tuple[float, float]:
    flat = grey.flatten()
    count = len(flat)
    low, high = (flat.kthvalue(1 + round(share * (count - 1))).values for share in (0.01, 0.99))
    return float(low), float(high)


def _sharpness(grey: Float[Tensor, "h w"], spread: float) -> float:
    if min(grey.shape) < 8:
        return 1.0
    fine, coarse = _detail(grey), _detail(F.avg_pool2d(grey[None, None], 2)[0, 0])
    if coarse < _LEAST**2:
        return 0.0 if spread >= _PICTURE else 1.0
    return fine / coarse


def _detail(grey: Float[Tensor, "h w"]) -> float:
    """Return the mean energy of an image without its low frequencies."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    low = F.conv2d(grey[None, None], torch.outer(kernel, kernel)[None, None])[0, 0]
    return float((grey[1:-1, 1:-1] - low).square().mean())


def _border(grey: Float[Tensor, "h w"]) -> float:
    height, width = grey.shape
    content = (grey - grey[0, 0]).abs() > _EVEN
    rows, columns = (content.any(side).nonzero()[:, 0] for side in (1, 0))
    if not len(rows):
        return 1.0
    inside = (int(rows[-1]) - int(rows[0]) + 1) * (int(columns[-1]) - int(columns[0]) + 1)
    return 1 - inside / (height * width)
