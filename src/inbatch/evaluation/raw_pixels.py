"""Pixels as features: the baseline that every encoder must exceed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inbatch.evaluation.embed import as_source, join_chunks, readable, stream_chunks
from inbatch.evaluation.embeddings import Embeddings
from inbatch.runtime import shared_work
from inbatch.runtime.isolation import usual_state


@usual_state()
def raw_pixels(source: Any, *, size: int | None = None, batch: int = 512, workers: int = 0) -> Embeddings:
    """Return the pixels, in [0, 1] and flattened: the baseline that every feature must exceed.

    Images are resized (bilinear, antialiased) to size x size: by default their own size up to 32 pixels.
    """
    source = as_source(source)
    shapes = (image.shape[1:] for image in readable(source, range(len(source))))
    size = size or min((32, *next(shapes, ())))  # without a readable image, an error follows
    resize, bad = _Flatten(size), dict[int, str]()
    stream = stream_chunks(source, resize, lambda x: x, f"raw pixels, {size}x{size}", batch, workers, bad)
    with shared_work.alone():
        return join_chunks(stream, bad, source)


class _Flatten:
    def __init__(self, size: int):
        self.shape = (size, size)

    def __call__(self, images: Iterable[Tensor]) -> Tensor:
        return torch.stack([self._fit(i.float() / 255).flatten() for i in images])

    def _fit(self, x: Tensor) -> Tensor:
        if x.shape[1:] == self.shape:
            return x
        return nn.functional.interpolate(x[None], self.shape, mode="bilinear", antialias=True)[0]
