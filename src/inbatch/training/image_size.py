"""Choose the size of the images of a run by the data."""

import torch

from inbatch.data import Source
from inbatch.errors import DataError
from inbatch.runtime.spacing import spaced


def natural_size(source: Source) -> int:
    """Return the side of the images if they are squares of one size of at most 96 pixels, else 224."""
    sizes = set()
    for i in spaced(len(source), 16).tolist():
        try:
            with source.open(i) as picture:
                sizes.add(tuple(picture.size))
        except DataError:
            continue  # counted and reported when all images are read
    height, width = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    return height if height == width and height <= 96 else 224


def small_size(source: Source, device: torch.device) -> int:
    """Return the image side for a budget on a CPU: the natural size up to 64 pixels, else 64."""
    natural = natural_size(source)
    return natural if natural <= 64 or device.type != "cpu" else 64
