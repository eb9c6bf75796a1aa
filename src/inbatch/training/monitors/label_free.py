"""Measure without labels whether an encoder has learned something, compared with the encoder before training.

Alignment and uniformity: Wang and Isola 2020 (arXiv 2005.10242), equations 1 and 2 with alpha = 2 and t = 2.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from inbatch.batch import Batch
from inbatch.data import Resident, Source, Subset, decode_all
from inbatch.data.source import LazyImage
from inbatch.data.sources.arrays import Pixels
from inbatch.data.views import AnyViews
from inbatch.errors import DataError
from inbatch.evaluation import alpha_req, feature_std, lidar, rankme, sigreg_distance
from inbatch.evaluation.embed import encode
from inbatch.models import Encoder
from inbatch.models.readout import Readout
from inbatch.rng import permutation
from inbatch.runtime import shared_work
from inbatch.runtime.spacing import spaced
from inbatch.training.monitors.neighbour_grid import SIDE

IMAGES = 2_000
"""Number of images that are embedded without augmentation; for half of them, two views are embedded as well."""
LIDAR_IMAGES, LIDAR_VIEWS = 100, 10
"""Numbers of images and of views of each for LiDAR; the paper's 1000 and 50 would take longer than an epoch of it."""
_CHUNK = 128

Rows = Float[Tensor, "n f"]
Viewed = Float[Tensor, "n q f"]


class Chosen(Subset):
    """A sample of a source's images, read from memory if they are held there decoded.

    Attributes:
        viewed: Number of images, from the first, of which two views are also embedded.
        keys: Place of each image in the sample as drawn, with the images that cannot be read: their views are drawn by
            it, so that they are the same whether these images were left out before or are found now.
        drawn: Number of images of the sample as drawn.
    """

    def __init__(self, source: Source, held: Resident | None, seed: int, most: int = IMAGES) -> None:
        order = permutation(seed, 0, len(source.whole))[:most]
        half, self.drawn, self.held = most // 2, len(order), held
        numbers = source.numbers_here(torch.cat([part.sort().values for part in (order[:half], order[half:])]))
        self.keys = (numbers >= 0).nonzero().flatten()
        self.viewed = int((self.keys < half).sum())
        super().__init__(source, numbers[self.keys], "drawn by the seed")

    def open(self, i: int) -> LazyImage:
        """Return an image, from memory if it is held there decoded."""
        if self.held is None:
            return super().open(i)
        at = int(self.indices[i])
        height, width = self.held.size[at].tolist()
        return Pixels(self.held.images[at, :, :height, :width].cpu())

    def image(self, i: int) -> Tensor:
        """Return an image in the small size of the neighbour grid."""
        with self.open(i) as picture:
            return picture.tensor(SIDE)

    def only(self, numbers: Tensor) -> "Chosen":
        """Return the subset with these indices."""
        part = copy.copy(self)
        part.indices, part.labels, part.keys = self.indices[numbers], self.labels[numbers], self.keys[numbers]
        return part

    def spaced(self, images: int) -> "Chosen":
        """Return at most this many evenly spaced images, whose keys count them: the source may be sorted by class."""
        places = spaced(self.drawn, images)
        part = self.only(torch.isin(self.keys, places).nonzero().flatten())
        part.keys = torch.searchsorted(places, part.keys)
        return part


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a sample of images by an encoder, before whitening of its features if there is any.

    Attributes:
        clean: Features of the images.
        first, second: Features of two views of some of the images.
        number: Indices of the readable images.
        readout: Whitening of the returned features; None without whitening.
        viewed: Features of several views of some of the images, for LiDAR; None if they were not computed.
    """

    clean: Rows
    first: Rows
    second: Rows
    number: Tensor
    readout: Readout | None = None
    viewed: Viewed | None = None

    def neighbour_rows(self, rows: Rows) -> Rows:
        """Return the features in which nearest neighbours are searched."""
        if self.readout is None or not int(self.readout.images):
            return rows
        return self.readout.whitened(rows.to(self.readout.mean.device)).cpu()


def embed_all(
    encoders: Mapping[str, Encoder], views: AnyViews, source: Chosen, seed: int, viewed: bool = True
) -> dict[str, Embedded]:
    """Embed images, and views of some of them, with several encoders.

    All computation is on the device of the encoders. The views are the same for each encoder and determined by the
    seed. Unreadable images are omitted. An image is decoded once for all encoders. Inside `shared_work.sharing`, each
    rank embeds a part of the images.

    Args:
        encoders: The encoders by name.
        views: The views: two of the first half of the images, and `LIDAR_VIEWS` of `LIDAR_IMAGES` images.
        source: The images.
        seed: Seed of the views.
        viewed: Whether to embed the views for LiDAR.

    Raises:
        DataError: If fewer than two images are readable.
    """
    rows: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in encoders}
    numbers = []
    device = next(iter(encoders.values())).device
    for number, batch in _decoded(source, 2 * max(view.size for view in views.views), seed):
        numbers.append(number)
        assert batch.images is not None and batch.size is not None
        sizes = batch.size.tolist()
        images = [image[:, :h, :w] for image, (h, w) in zip(batch.images, sizes, strict=True)]
        count = int((number < source.viewed).sum())
        pair = two_views(views, batch.take(slice(count)).to(device)) if count else ()
        for name, encoder in encoders.items():
            clean = encoder.prepare(images)
            with encoder.plain():
                parts = [encode(encoder, x).float().cpu() for x in (clean, *pair)]
            rows[name].append(tuple(parts) if pair else (parts[0], parts[0][:0], parts[0][:0]))
    number = shared_work.joined(torch.cat(numbers) if numbers else torch.zeros(0).long())
    if len(number) < 2:
        raise DataError(f"{source.name} has {len(number)} images that can be read: two are needed to compare features")
    order = number.argsort()  # ranks have embedded chunks in turn
    pairs = number[number < source.viewed].argsort()
    number = number[order]
    whole = {
        name: [
            shared_work.joined(torch.cat([part[i] for part in parts]) if parts else torch.zeros(0, 0))[place]
            for i, place in enumerate((order, pairs, pairs))
        ]
        for name, parts in rows.items()
    }
    several = embed_views(encoders, views, source, seed) if viewed else {}
    return {
        name: Embedded(clean, first, second, number, encoders[name].readout, several.get(name))
        for name, (clean, first, second) in whole.items()
    }


def embed_views(
    encoders: Mapping[str, Encoder], views: AnyViews, source: Chosen, seed: int, images: int | None = None,
    count: int | None = None, precision: torch.dtype = torch.float32,
) -> dict[str, Viewed]:  # fmt: skip
    """Return the features, before whitening, of several views of some of a source's images that can be read.

    The views are the same for each encoder and determined by the seed; no random state is changed.

    Args:
        encoders: The encoders by name.
        views: The views; those with the size of the first are used.
        source: The images.
        seed: Seed of the views.
        images: Number of images; `LIDAR_IMAGES` if None.
        count: Number of views of each; `LIDAR_VIEWS` if None.
        precision: torch.float32, or torch.bfloat16 / float16 for autocast.
    """
    images, count = images or LIDAR_IMAGES, count or LIDAR_VIEWS
    rows: dict[str, list[Tensor]] = {name: [] for name in encoders}
    device = next(iter(encoders.values())).device
    numbers = []
    for number, batch in _decoded(source.spaced(images), 2 * max(view.size for view in views.views), seed):
        numbers.append(number)
        drawn = several_views(views, batch.to(device), count)
        for name, encoder in encoders.items():
            with encoder.plain():
                parts = [encode(encoder, x, precision).float().cpu() for x in drawn]
            rows[name].append(torch.stack(parts, 1))
    order = shared_work.joined(torch.cat(numbers) if numbers else torch.zeros(0).long()).argsort()
    return {
        name: shared_work.joined(torch.cat(parts) if parts else torch.zeros(0, count, 1))[order]
        for name, parts in rows.items()
    }


def lidar_of(viewed: Viewed | None) -> float:
    """Return LiDAR of the features of views; nan if there are fewer than two images or two views."""
    return math.nan if viewed is None or min(viewed.shape[:2]) < 2 else float(lidar(viewed))


def _decoded(source: Chosen, canvas: int, seed: int) -> Iterator[tuple[Tensor, Batch]]:
    """Yield the readable images in chunks, with their indices in the sample: of several ranks, each gets others."""
    parts = torch.arange(len(source)).split(_CHUNK)
    for part in (parts[i] for i in shared_work.own_tasks(len(parts))):
        shared_work.check()
        chunk = Subset(source, part, "a chunk")
        try:
            decoded = decode_all(chunk, canvas=canvas, max_bad=1.0)
        except DataError:  # no image of the chunk is readable
            continue
        left = decoded.source
        number = part[left.indices] if isinstance(left, Subset) and left is not chunk else part
        yield number, Batch(source.keys[number], left.labels, seed, 0, images=decoded.images, size=decoded.size)


def two_views(views: AnyViews, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the first two views of a batch if they have one size, else two draws of the first view."""
    drawn = views(batch).images
    if len(drawn) > 1 and drawn[0].shape == drawn[1].shape:
        return drawn[0], drawn[1]
    return drawn[0], views(replace(batch, epoch=1)).images[0]


def several_views(views: AnyViews, batch: Batch, count: int) -> list[Tensor]:
    """Return this many views of a batch that have the size of the first: those of successive epochs."""
    drawn: list[Tensor] = []
    while len(drawn) < count:
        images = views(replace(batch, epoch=batch.epoch + len(drawn))).images
        drawn += [x for x in images if x.shape == images[0].shape]
    return drawn[:count]


def measures(embedded: Embedded) -> dict[str, float]:
    """Return every measure by name."""
    first, second = (F.normalize(rows, dim=1) for rows in (embedded.first, embedded.second))
    return {
        "same_image": same_image(
            *(F.normalize(embedded.neighbour_rows(x), dim=1) for x in (embedded.first, embedded.second))
        ),
        "rankme": float(rankme(embedded.clean)),
        "lidar": lidar_of(embedded.viewed),
        "alpha": float(alpha_req(embedded.clean)),
        "sigreg_distance": float(sigreg_distance(embedded.clean)),
        "feature_std": float(feature_std(embedded.clean)),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
        "alignment": alignment(first, second),
    }


def same_image(first: Rows, second: Rows) -> float:
    """Return the share of rows with the same image's row as nearest of the other view (cosine); rows have length 1."""
    return float(((first @ second.T).argmax(1) == torch.arange(len(first))).double().mean())


def alignment(first: Rows, second: Rows) -> float:
    """Return the mean squared distance of two views of an image; rows have length 1."""
    return float((first - second).square().sum(1).mean())


def uniformity(rows: Rows) -> float:
    """Return the logarithm of the mean of exp(-2 d^2) over all pairs of rows at distance d; rows have length 1."""
    return float(torch.pdist(rows.double()).square().mul(-2).exp().mean().log())


def described(images: int, viewed: int, several: int, width: int) -> dict[str, tuple[str, str]]:
    """Return measure -> (which values are better, description)."""
    return {
        "same_image": (
            "higher", f"share of {viewed:,} images whose second view is the nearest of all {viewed:,} to the first",
        ),
        "rankme": ("higher", f"effective rank (RankMe) of the features of {images:,} images, at most {width:,}"),
        "lidar": (
            "higher", f"effective rank of the variance between {several:,} images over that within their "
            f"{LIDAR_VIEWS} views (LiDAR), at most {width:,}",
        ),
        "alpha": ("near 1", f"exponent of the decay of the spectrum of {images:,} images (alpha-ReQ)"),
        "sigreg_distance": (
            "lower", f"distance of the features of {images:,} images from an isotropic normal distribution (SIGReg)",
        ),
        "feature_std": ("higher", f"spread of the features of {images:,} images: 1 uniform on the sphere, 0 all equal"),
        "uniformity": ("lower", "log mean exp(-2 d^2) of pairs of images at distance d; 0: all equal"),
        "alignment": ("lower", "mean squared distance of two views of an image; 0 also if all features are equal"),
    }  # fmt: skip


def compared(before: Embedded | None, after: Embedded) -> dict[str, Any]:
    """Return every measure with its direction, before and after training; "untrained" is None without that encoder."""
    several = 0 if after.viewed is None else len(after.viewed)
    descriptions = described(len(after.clean), len(after.first), several, after.clean.shape[1])
    counts = {"rankme": len(after.clean), "feature_std": len(after.clean), "alpha": len(after.clean),
              "sigreg_distance": len(after.clean), "lidar": several}  # fmt: skip
    old, new = None if before is None else measures(before), measures(after)
    return {
        name: {"untrained": old and old[name], "trained": new[name], "better": better, "what": what}
        | {"images": counts.get(name, len(after.first))}
        for name, (better, what) in descriptions.items()
    }
