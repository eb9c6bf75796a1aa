"""Whether an encoder has learned something, measured without labels, beside the encoder before training.

Alignment and uniformity: Wang and Isola 2020 (arXiv 2005.10242), equations 1 and 2 with alpha = 2 and t = 2.
"""

import copy
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
from inbatch.data.views import Views
from inbatch.errors import DataError
from inbatch.evaluation import feature_std, rankme
from inbatch.evaluation.embed import encode
from inbatch.models import Encoder
from inbatch.models.readout import Readout
from inbatch.rng import permutation
from inbatch.training.monitors.neighbour_grid import SIDE

IMAGES = 2_000
"""How many images are embedded as they are; of half as many two views are embedded, too."""
_CHUNK = 128

Rows = Float[Tensor, "n f"]


class Chosen(Subset):
    """Some images of a source, from memory if they are held there decoded.

    viewed: of the first so many two views are embedded, too.
    """

    def __init__(self, source: Source, held: Resident | None, seed: int, most: int = IMAGES) -> None:
        order, self.viewed = permutation(seed, 0, len(source))[:most], most // 2
        parts = (order[: self.viewed], order[self.viewed :])  # each in the order in which the images lie
        super().__init__(source, torch.cat([part.sort().values for part in parts]), "drawn by the seed")
        self.held = held

    def open(self, i: int) -> LazyImage:
        if self.held is None:
            return super().open(i)
        at = int(self.indices[i])
        height, width = self.held.size[at].tolist()
        return Pixels(self.held.images[at, :, :height, :width].cpu())

    def image(self, i: int) -> Tensor:
        """Small, as it is drawn."""
        with self.open(i) as picture:
            return picture.tensor(SIDE)

    def only(self, numbers: Tensor) -> "Chosen":
        """Those of these numbers."""
        some = copy.copy(self)
        some.indices, some.labels = self.indices[numbers], self.labels[numbers]
        return some


@dataclass(frozen=True)
class Embedded:
    """What an encoder makes of some images, before its features are whitened if that is done to them.

    clean: features of the images; first, second: of two views of each of some; number: which images could be read.
    readout: what whitens the features that are handed out; None if nothing does.
    """

    clean: Rows
    first: Rows
    second: Rows
    number: Tensor
    readout: Readout | None = None

    def handed_out(self, rows: Rows) -> Rows:
        """The features that nearest neighbours are found by."""
        if self.readout is None or not int(self.readout.images):
            return rows
        return self.readout.whitened(rows.to(self.readout.mean.device)).cpu()


def embed_all(encoders: Mapping[str, Encoder], views: Views, source: Chosen, seed: int) -> dict[str, Embedded]:
    """Embed images, and two views of the first of them, with several encoders; decode each image once.

    All on the device of the encoders; the views are the same for each encoder, and for the same seed. An image that
    cannot be read is left out; DataError if fewer than two are left.
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
    number = torch.cat(numbers) if numbers else torch.zeros(0).long()
    if len(number) < 2:
        raise DataError(f"{source.name} has {len(number)} images that can be read: two are needed to compare features")
    whole = {name: [torch.cat(x) for x in zip(*parts, strict=True)] for name, parts in rows.items()}
    return {
        name: Embedded(clean, first, second, number, encoders[name].readout)
        for name, (clean, first, second) in whole.items()
    }


def _decoded(source: Source, canvas: int, seed: int) -> Iterator[tuple[Tensor, Batch]]:
    """The images in chunks, those that cannot be read left out, each with its number in the source."""
    for part in torch.arange(len(source)).split(_CHUNK):
        chunk = Subset(source, part, "a chunk")
        try:
            decoded = decode_all(chunk, canvas=canvas, max_bad=1.0)
        except DataError:  # not one of them can be read
            continue
        left = decoded.source
        number = part[left.indices] if isinstance(left, Subset) and left is not chunk else part
        yield number, Batch(number, left.labels, seed, 0, images=decoded.images, size=decoded.size)


def two_views(views: Views, batch: Batch) -> tuple[Tensor, Tensor]:
    """The first two views of a batch if they are of one size, else the first one drawn twice."""
    drawn = views(batch).images
    if len(drawn) > 1 and drawn[0].shape == drawn[1].shape:
        return drawn[0], drawn[1]
    return drawn[0], views(replace(batch, epoch=1)).images[0]


def measures(found: Embedded) -> dict[str, float]:
    """Every measure by its name."""
    first, second = (F.normalize(rows, dim=1) for rows in (found.first, found.second))
    return {
        "same_image": same_image(*(F.normalize(found.handed_out(x), dim=1) for x in (found.first, found.second))),
        "rankme": float(rankme(found.clean)),
        "feature_std": float(feature_std(found.clean)),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
        "alignment": alignment(first, second),
    }


def same_image(first: Rows, second: Rows) -> float:
    """Share of the rows whose nearest row of the others (cosine) is that of the same image; rows have length 1."""
    return float(((first @ second.T).argmax(1) == torch.arange(len(first))).double().mean())


def alignment(first: Rows, second: Rows) -> float:
    """Mean squared distance of two views of an image; rows have length 1."""
    return float((first - second).square().sum(1).mean())


def uniformity(rows: Rows) -> float:
    """Logarithm of the mean of exp(-2 d^2) over all pairs of rows at a distance d; rows have length 1."""
    return float(torch.pdist(rows.double()).square().mul(-2).exp().mean().log())


def described(images: int, viewed: int, width: int) -> dict[str, tuple[str, str]]:
    """Measure -> whether higher or lower is better, and what it is."""
    return {
        "same_image": (
            "higher", f"share of {viewed:,} images whose second view is the nearest of all {viewed:,} to the first",
        ),
        "rankme": ("higher", f"effective rank (RankMe) of the features of {images:,} images, at most {width:,}"),
        "feature_std": ("higher", f"spread of the features of {images:,} images: 1 over the sphere, 0 all the same"),
        "uniformity": ("lower", "log mean exp(-2 d^2) of pairs of images at distance d; 0: all the same"),
        "alignment": ("lower", "mean squared distance of two views of an image; 0 also if all features are the same"),
    }  # fmt: skip


def compared(before: Embedded | None, after: Embedded) -> dict[str, Any]:
    """Every measure with its direction, before and after training; "untrained" is None without that encoder."""
    told = described(len(after.clean), len(after.first), after.clean.shape[1])
    old, new = None if before is None else measures(before), measures(after)
    return {
        name: {"untrained": old and old[name], "trained": new[name], "better": better, "what": what}
        | {"images": len(after.clean if name in ("rankme", "feature_std") else after.first)}
        for name, (better, what) in told.items()
    }
