"""Views by the user's own transforms: any callable from a uint8 image to an image, with keyed random numbers."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from inbatch.batch import REPEATED, Batch
from inbatch.data.views.pipeline import Drawn, Views
from inbatch.data.views.view import View
from inbatch.errors import ConfigError, reason, type_name
from inbatch.rng import fold
from inbatch.runtime import own_parts

Transform = Callable[[Any], Any]


class TransformedViews:
    """Draw views by callables that get one uint8 image (C, h, w), at most twice as large as the largest view.

    Before each call the generators of torch, NumPy and `random` are seeded from (seed, epoch, sample, view, attempt),
    so a view depends neither on the batch, nor on ranks, workers or a resume.

    Args:
        transforms: One per view.
        sizes: Side of each view in pixels.
        mean: Mean per channel, of values in [0, 1].
        std: Standard deviation per channel.
        name: Name of the views, for messages.
    """

    whole = True

    def __init__(
        self, transforms: Sequence[Transform], sizes: Sequence[int], mean: Sequence[float], std: Sequence[float],
        name: str,
    ) -> None:  # fmt: skip
        self.transforms, self.mean, self.std, self.name = tuple(transforms), tuple(mean), tuple(std), name
        self.views = placeholders(sizes)

    def __len__(self) -> int:
        return len(self.views)

    def boxes(self, index: Tensor, size: Tensor, seed: int, epoch: int, attempt: int | Tensor = 0) -> Tensor:
        """Return the boxes (V, B, 4) of the whole images: a transform crops by itself."""
        return torch.cat([torch.zeros_like(size), size], 1).expand(len(self), -1, -1)

    def compile(self, **options: Any) -> None:
        """Leave the transforms as they are; torch.compile is for networks, and for our own views."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Drawn:
        """Draw the views of a batch of uncropped images."""
        index, at = batch.index, batch.at
        images = batch.images
        assert images is not None
        size = torch.tensor([images.shape[2:]]).repeat(len(index), 1) if batch.size is None else batch.size
        redrawn = batch.attempt is not None and bool((batch.attempt % REPEATED).any())
        drawn = None if redrawn else batch.crops  # drawn by workers
        if drawn is None:
            places = range(len(index)) if at is None else at.tolist()
            attempts = [0] * len(index) if batch.attempt is None else batch.attempt.tolist()
            pictures = [images[i, :, :h, :w] for i, (h, w) in zip(places, size.tolist(), strict=True)]
            drawn = self.draw(index.tolist(), pictures, batch.seed, batch.epoch, attempts)
        flipped = torch.zeros(len(self), len(index), dtype=torch.bool, device=index.device)
        views = tuple(self._normalised(x.to(index.device)) for x in drawn)
        return Drawn(views, self.boxes(index, size, 0, 0), flipped)

    @torch.no_grad()
    def draw(
        self, index: Sequence[int], pictures: Sequence[UInt8[Tensor, "c h w"]], seed: int, epoch: int,
        attempts: Sequence[int] | None = None,
    ) -> tuple[Float[Tensor, "b c s s"], ...]:  # fmt: skip
        """Return the views of images with values in [0, 1], before normalisation; the same in every process."""
        attempts = [0] * len(index) if attempts is None else attempts
        drawn = []
        with kept_generators():
            for v, (transform, view) in enumerate(zip(self.transforms, self.views, strict=True)):
                rows = [
                    self._draw(transform, picture, view.size, fold(seed, epoch, i, v, attempt))
                    for i, picture, attempt in zip(index, pictures, attempts, strict=True)
                ]
                drawn.append(torch.stack(rows))
        return tuple(drawn)

    def _draw(self, transform: Transform, picture: Tensor, side: int, key: int) -> Tensor:
        seed_generators(key)
        view = applied(transform, picture, self.name)
        if tuple(view.shape) != (len(self.mean), side, side):
            raise ConfigError(
                f"views {self.name}: an image of {'x'.join(map(str, picture.shape))} became "
                f"{'x'.join(map(str, view.shape))}, but the views of this run are {len(self.mean)}x{side}x{side}: a "
                "transform must return one size"
            )
        return view

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


AnyViews = Views | TransformedViews


def placeholders(sizes: Sequence[int]) -> tuple[View, ...]:
    """Return views of these sides; only their sides are of use."""
    return tuple(View(size, scale=None, flip=0.0) for size in sizes)


def applied(transform: Transform, picture: UInt8[Tensor, "c h w"], name: str) -> Tensor:
    """Return a view of an image, float (C, s, s) with values in [0, 1]; ConfigError if the transform fails."""
    try:
        view = transform(picture.clone())
    except Exception as error:  # of any code
        raise ConfigError(
            f"views {name} failed on an image, a uint8 tensor of {'x'.join(map(str, picture.shape))}: {reason(error)}. "
            "Leave out steps for Pillow images, such as ToTensor"
        ) from error
    if isinstance(view, Image.Image | np.ndarray):
        pixels = np.asarray(view)
        view = torch.from_numpy(np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)))
    if not isinstance(view, Tensor):
        raise ConfigError(
            f"views {name} return {type_name(view)} for an image, not one image: two transforms make two views, [A, B]"
        )
    if not (view.dtype == torch.uint8 or view.is_floating_point()) or view.ndim != 3:
        raise ConfigError(f"views {name} return {view.dtype} {tuple(view.shape)}, not uint8 or float (C, s, s)")
    return view.to(torch.float32) / 255 if view.dtype == torch.uint8 else view.to(torch.float32)


def resolved(value: Any, is_maker: bool, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the views, or one transform per view, of what a user passes as views.

    Args:
        value: A View or a transform, for two views; several of either; or what makes one of these from `options`.
        is_maker: Whether it makes them.
        options: Options of the recipe.

    Raises:
        ConfigError: If it makes something else.
    """
    if is_maker:
        try:
            value = value(**{key: option for key, option in options.items() if key not in ("sizes", "object")})
        except Exception as error:  # of any code
            raise ConfigError(f"the views cannot be made with these settings: {reason(error)}") from error
    several = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if not several or not (all(isinstance(one, View) for one in several) or all(map(callable, several))):
        raise ConfigError(f"views must be a Views object or transforms of images, not {value!r:.80}")
    return several


def own_views(name: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the Views or transforms of the user's own views; if these are not in use, views with the sides alone.

    Raises:
        ConfigError: If they are not in use, and the recipe does not state the sides.
    """
    own = own_parts.find("views", name)
    if own is not None:
        return resolved(own.maker, own_parts.is_maker("views", own.maker), options)
    if "sizes" not in options:
        raise own_parts.demand("views", name)
    return placeholders(options["sizes"])


def sizes_of(views: Sequence[Any], picture: UInt8[Tensor, "c h w"], name: str) -> list[int]:
    """Return the side of each view, of a transform by trying it; ConfigError if it does not give a square image."""
    sizes = []
    with kept_generators():
        for v, view in enumerate(views):
            if isinstance(view, View):
                sizes.append(view.size)
                continue
            seed_generators(v)
            drawn = applied(view, picture, name)
            if drawn.shape[1] != drawn.shape[2] or drawn.shape[0] != picture.shape[0]:
                shape = "x".join(map(str, drawn.shape))
                raise ConfigError(
                    f"views {name} give {shape}, not a square of {picture.shape[0]} channels: end with a crop of one "
                    "size, such as RandomResizedCrop(96)"
                )
            if not bool(((drawn >= -1e-3) & (drawn <= 1 + 1e-3)).all()):
                raise ConfigError(
                    f"views {name} give values from {float(drawn.min()):.3g} to {float(drawn.max()):.3g}, not from 0 "
                    "to 1: leave out Normalize, the run normalises with the mean and std of its encoder"
                )
            sizes.append(drawn.shape[1])
    return sizes


def seed_generators(key: int) -> None:
    """Seed the generators that transforms draw from."""
    torch.default_generator.manual_seed(key)  # torch.manual_seed would take a millisecond for GPUs that are not in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the state of these generators after the context."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # a worker must not start CUDA
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
