"""Pictures with the detail of photographs."""

import torch
from torch.nn import functional as F


def scene(seed: int, size: int = 96) -> torch.Tensor:
    """Return a picture (1, size, size) with detail at all scales, as photographs have."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 1, size, size)
    for side in (3, 6, 12, 24):
        noise = torch.randn(1, 1, side, side, generator=draw)
        image += F.interpolate(noise, (size, size), mode="bicubic") * (24 / side) ** 0.5
    return (image[0] - image.min()) / (image.max() - image.min()) * 255
