"""Read the images of a collection for a comparison: digests, sizes and thumbnails."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.apps.collection.features import Collection
from inbatch.apps.collection.images import by_threads, numbered
from inbatch.apps.reports.image_statistics import chunks, repeated, total
from inbatch.errors import DataError
from inbatch.evaluation.near_duplicates import SIDE, thumbnail
from inbatch.runtime.terminal import counted


@dataclass
class ImageContents:
    """What was read of the images of a collection.

    Attributes:
        readable: Positions of the readable images in the collection.
        pixels: Number of pixels of each of these.
        thumbnails: Their grey values.
        copies: Positions in `readable` of identical images, by the first of them.
        unreadable: A message for each of the others.
    """

    readable: Int[Tensor, "m"]
    pixels: Int[Tensor, "m"]
    thumbnails: UInt8[Tensor, "m s s"]
    copies: dict[int, list[int]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def read_contents(collection: Collection, quiet: bool) -> ImageContents:
    """Read every image once for its digest and size, and once for its thumbnail."""
    place = numbered(collection)
    tallies, sizes, bad = [], {}, dict[int, str]()
    for split, source in collection.sources.items():
        indices = sorted(place[split])
        tally = total(chunks(source, indices, pixels=False))
        tallies.append(tally)
        for i, number in enumerate(tally.numbers):
            sizes[place[split][number]] = tally.sizes[2 * i] * tally.sizes[2 * i + 1]
        bad |= {place[split][number]: why for number, why in tally.unreadable}
    thumbnails = torch.zeros(len(collection), SIDE, SIDE, dtype=torch.uint8)
    parts = by_threads(lambda i: _thumbnail(collection, i), sorted(sizes))
    for part in parts if quiet else counted(parts, len(sizes), "read"):
        for i, value in part:
            if isinstance(value, str):
                bad[i] = value
            else:
                thumbnails[i] = value
    readable = torch.tensor(sorted(sizes.keys() - bad.keys()), dtype=torch.long)
    where = {int(i): at for at, i in enumerate(readable.tolist())}
    splits = list(collection.sources)
    copies = {}
    for group in repeated(*tallies):
        rows = sorted(where[i] for which, number in group if (i := place[splits[which]][number]) in where)
        if len(rows) > 1:
            copies[rows[0]] = rows[1:]
    pixels = torch.tensor([sizes[i] for i in readable.tolist()], dtype=torch.long)
    unreadable = [*collection.unreadable, *(bad[i] for i in sorted(bad))]
    if len(readable) < len(thumbnails):  # else a copy of a gigabyte for a million images
        thumbnails = thumbnails[readable]
    return ImageContents(readable, pixels, thumbnails, copies, unreadable)


def _thumbnail(collection: Collection, i: int) -> Tensor | str:
    try:
        with collection.open(i) as picture:
            height, width = picture.size
            return thumbnail(picture.crops(torch.tensor([[0, 0, height, width]]), [(SIDE, "bilinear")])[0])
    except DataError as error:
        return str(error)
