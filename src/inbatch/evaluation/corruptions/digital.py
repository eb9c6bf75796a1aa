"""Digital: contrast, elastic maps, coarse pixels, JPEG. Images are float32 in [0, 1], (N, C, H, W)."""

from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as Pillow
from torch import Tensor

from inbatch.evaluation.corruptions.image_rng import Chance
from inbatch.evaluation.corruptions.linear_maps import along, boxes, smoothing
from inbatch.evaluation.corruptions.noise import Image


def contrast(x: Image, factor: float, chance: Chance) -> Image:
    """Multiply the differences from each channel's mean by this factor."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def elastic(x: Image, setting: tuple[float, float, float], chance: Chance) -> Image:
    """Apply a random affine map, then a smooth random shift of every pixel; all as shares of the shorter side.

    setting: amplitude of the shift, sigma of its smoothing, largest shift of the affine map's three points.
    """
    amplitude, sigma, most = (share * min(x.shape[2:]) for share in setting)
    height, width = x.shape[2:]
    y = torch.arange(height, device=x.device, dtype=torch.float32)[:, None].expand(height, width)
    across = torch.arange(width, device=x.device, dtype=torch.float32).expand(height, width)
    place = torch.stack([across, y, torch.ones_like(y)], -1)
    x = sample(x, place @ affine(chance, height, width, most)[:, None], mirror=True)
    if amplitude == 0:
        return x
    maps = [smoothing(side, sigma, "symmetric", 3.0, x.device) for side in (height, width)]
    shift = amplitude * along(2 * chance.uniform(1, 2, height, width) - 1, *maps)
    return sample(x, place[..., :2] + shift.permute(0, 2, 3, 1), mirror=False)


def affine(chance: Chance, height: int, width: int, most: float) -> Float[Tensor, "n 3 2"]:
    """Return the map from (x, y, 1) of the output to (x, y) of the image; three points move up to `most` pixels."""
    arm = max(1, min(height, width) // 3)
    centre = torch.tensor([width // 2, height // 2], device=chance.index.device, dtype=torch.float64)
    corners = centre + arm * torch.tensor([[1, 1], [1, -1], [-1, -1]], device=centre.device)
    moved = corners + most * (2 * chance.uniform(0, 3, 2).double() - 1)
    moved = torch.cat([moved, torch.ones_like(moved[..., :1])], -1)
    return torch.linalg.solve(moved, corners.expand(len(moved), 3, 2)).float()


def sample(x: Image, place: Float[Tensor, "n h w 2"], mirror: bool) -> Image:
    """Return the images at (x, y) in pixels, bilinear; mirrored at the edge, without the edge's pixel or with it."""
    side = torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    grid = 2 * place / (side - 1).clamp(min=1) - 1 if mirror else (2 * place + 1) / side - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=mirror)


def pixelate(x: Image, share: float, chance: Chance) -> Image:
    """Reduce the sides to this share by means over boxes, and enlarge them again."""
    small = [max(1, int(side * share)) for side in x.shape[2:]]
    there = [boxes(side, size, x.device) for side, size in zip(x.shape[2:], small, strict=True)]
    back = [boxes(size, side, x.device) for side, size in zip(x.shape[2:], small, strict=True)]
    return along(along(x, *there), *back)


def jpeg(x: Image, quality: int, chance: Chance) -> Image:
    """Write as JPEG of this quality by Pillow, and read again; one by one, on the CPU."""
    images = (x * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).squeeze(-1).numpy()
    read = []
    for image in images:
        file = BytesIO()
        Pillow.fromarray(image).save(file, "JPEG", quality=quality)
        read.append(torch.from_numpy(np.array(Pillow.open(file))))
    return torch.stack(read).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2).to(x.device).float() / 255
