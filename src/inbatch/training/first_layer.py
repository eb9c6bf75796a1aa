"""Filters of a first layer of whitened patches, computed from the images before training."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inbatch.data import Source
from inbatch.errors import DataError
from inbatch.models import Encoder, Prepare
from inbatch.models.whitened_patches import WhitenedPatches
from inbatch.runtime import distributed
from inbatch.runtime.spacing import spaced

_SAMPLE = 256
"""Largest number of images from which a first layer of whitened patches is computed."""
_SAMPLES: WeakKeyDictionary[Source, dict[Prepare, Tensor]] = WeakKeyDictionary()
"""These images by source, which a calibration would otherwise decode for each candidate."""


def fit_first_layer(encoder: Encoder, source: Source) -> None:
    """Compute the filters of a first layer of whitened patches from the images, if the encoder has such a layer.

    It draws no random numbers. Every rank must call it, and all get the same filters. If none of the images can be
    read the layer stays as it is: the loader reports that.
    """
    for layer in (m for m in encoder.modules() if isinstance(m, WhitenedPatches)):
        images = _sample(source, encoder.prepare)
        if len(images):
            layer.fit(images, encoder.std)
        layer.weight.copy_(distributed.broadcast_object(layer.weight))


def _sample(source: Source, prepare: Prepare) -> Tensor:
    """Return evenly spaced images of a source as uint8, in the size that the encoder takes: (N, C, size, size).

    Images that cannot be read are left out; N may be 0.
    """
    samples = _SAMPLES.setdefault(source, {})
    if prepare not in samples:
        images: list[Tensor] = []
        for i in spaced(len(source), _SAMPLE).tolist():
            try:
                with source.open(i) as picture:
                    images.append(picture.tensor(2 * prepare.size))
            except DataError:
                continue  # counted and reported when all images are read
        squares = prepare.squares(images) if images else torch.empty(0, prepare.channels, prepare.size, prepare.size)
        samples[prepare] = squares.round().to(torch.uint8)
    return samples[prepare]
