"""Draw the nearest neighbours of images in an embedding."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from inbatch.data.source import Source
from inbatch.errors import DataError
from inbatch.runtime.files import replacing
from inbatch.runtime.picture_mark import MARK
from inbatch.runtime.text import printable

RIGHT, WRONG, UNKNOWN = "#0072b2", "#d55e00", "#999999"  # distinguishable with any colour vision
BLACK = "#000000"

SIDE, FRAME = 96, 4
"""Side of an image in the grid, and width of its frame, in pixels."""
GAP, NAME, HEAD = 8, 14, 48
"""Gap between images, height of the name above an image, and height of the header, in pixels."""
_DPI = 100


class Cell(NamedTuple):
    """An image in a grid, the colour of its frame, and the text above it; None if the grid has no texts."""

    image: UInt8[Tensor, "c h w"]
    colour: str
    name: str | None


def save_neighbour_grid(
    source: Source, vectors: Float[Tensor, "n f"], png: Path, queries: int = 8, neighbours: int = 8,
    before: Float[Tensor, "n g"] | None = None,
) -> None:  # fmt: skip
    """Draw query images and, in the same row, their most similar images of the source (cosine similarity).

    The queries are spread evenly over the classes, or over the order if nothing is labelled. If query and neighbour are
    labelled, the colour of the frame shows whether the labels agree.

    Args:
        source: The images.
        vectors: One vector per image of `source`, in its order.
        png: File to write.
        queries: Number of query images.
        neighbours: Number of neighbours of each query.
        before: The vectors before training; their neighbours are drawn between the query and those of `vectors`.

    Raises:
        DataError: If vectors and images differ in number, or there are too few.
    """
    sides = {"before training": before, "after training": vectors} if before is not None else {"": vectors}
    for rows in sides.values():
        if len(rows) != len(source):
            raise DataError(f"{len(rows):,} vectors do not belong to the {len(source):,} images of {source.name}.")
    if len(source) <= neighbours:
        raise DataError(
            f"{source.name} has {len(source)} images: too few for {neighbours} neighbours of each; pass more."
        )
    queries = min(queries, len(source))
    order = source.labels.argsort(stable=True)
    chosen = order[(torch.arange(queries) + 0.5).mul(len(order) / queries).long()]
    nearest = [_nearest(rows, chosen, neighbours) for rows in sides.values()]

    named = bool((source.labels >= 0).any())
    table, right, known = [], dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
    for row, query in enumerate(chosen.tolist()):
        table.append([[_cell(source, query, BLACK, named)]])
        for title, indices in zip(sides, nearest, strict=True):
            images, label = indices[row].tolist(), int(source.labels[query])
            colours = [agreement(label, int(source.labels[image])) for image in images]
            right[title] += colours.count(RIGHT)
            known[title] += len(images) - colours.count(UNKNOWN)
            table[-1].append([_cell(source, *pair, named) for pair in zip(images, colours, strict=True)])
    counts = [f"{title}: " * bool(title) + f"{right[title]} of {known[title]}" for title in sides if known[title]]
    same_class = f"; of the query's class (blue): {', '.join(counts)}; others orange" if counts else ""
    draw_grid(png, f"Nearest neighbours by cosine similarity{same_class}", ["query", *sides], table)


def agreement(label: int, other: int) -> str:
    """Return the colour of the frame that shows whether two labels agree; -1 is unknown."""
    return UNKNOWN if label < 0 or other < 0 else RIGHT if label == other else WRONG


def _cell(source: Source, image: int, colour: str, named: bool) -> Cell:
    label = int(source.labels[image])
    return Cell(source.image(image), colour, source.classes[label] if label >= 0 else "" if named else None)


def draw_grid(png: Path, title: str, headings: Sequence[str], table: Sequence[Sequence[Sequence[Cell]]]) -> None:
    """Draw rows of images in groups: the query, then one or more groups of its neighbours.

    Args:
        png: File to write.
        title: Line at the top.
        headings: Name of each group.
        table: Groups of cells of each row; the first group has one cell.
    """
    named = any(cell.name is not None for groups in table for group in groups for cell in group)
    cell, line = SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + GAP + NAME * named
    columns = max((len(group) for groups in table for group in groups[1:]), default=0)
    starts = [GAP, *(cell + GAP + side * (columns * cell + 2 * GAP) for side in range(len(headings) - 1))]
    width, height = starts[-1] + columns * cell + GAP, HEAD + len(table) * line
    sheet = torch.full((height, width, 3), 255, dtype=torch.uint8)
    texts = [(start, HEAD - 4, heading) for start, heading in zip(starts, headings, strict=True)]
    for row, groups in enumerate(table):
        top = HEAD + row * line + NAME * named
        for start, group in zip(starts, groups, strict=True):
            for column, one in enumerate(group):
                left = start + column * cell
                _place(sheet, top, left, one.image, one.colour)
                if one.name:
                    texts.append((left, top - 3, shorten(printable(one.name), 18, placeholder="…")))
    _write(png, sheet, [*texts, (GAP, 20, title)])


def _nearest(vectors: Tensor, chosen: Int[Tensor, "q"], neighbours: int) -> Int[Tensor, "q k"]:
    vectors = F.normalize(vectors.float(), dim=1)
    similarity = vectors[chosen] @ vectors.T
    similarity[torch.arange(len(chosen)), chosen] = -torch.inf
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :neighbours]  # equal ones in source order


def _place(sheet: UInt8[Tensor, "h w 3"], top: int, left: int, image: UInt8[Tensor, "c h w"], colour: str) -> None:
    """Draw an image in its frame, with its longer side scaled to the side of a cell."""
    from matplotlib.colors import to_rgb

    side = SIDE + 2 * FRAME
    frame = (torch.tensor(to_rgb(colour)) * 255).round().byte()
    sheet[top : top + side, left : left + side] = frame
    shown = (image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1))[None].float()
    height, width = (max(1, round(length * SIDE / max(image.shape[1:]))) for length in image.shape[1:])
    if SIDE % max(image.shape[1:]) == 0:  # integer factor: keep sharp pixels
        shown = F.interpolate(shown, (height, width), mode="nearest")
    else:
        shown = F.interpolate(shown, (height, width), mode="bilinear", antialias=True)
    inside = sheet[top + FRAME : top + FRAME + SIDE, left + FRAME : left + FRAME + SIDE]
    inside.fill_(255)
    down, right = (SIDE - height) // 2, (SIDE - width) // 2
    inside[down : down + height, right : right + width] = shown[0].round().clamp(0, 255).byte().permute(1, 2, 0)


def _write(png: Path, sheet: UInt8[Tensor, "h w 3"], texts: list[tuple[int, int, str]]) -> None:
    """Write the grid as one image: with a panel per image, matplotlib takes seconds for the layout."""
    from matplotlib.figure import Figure

    height, width, _ = sheet.shape
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    figure.figimage(sheet.numpy(), resize=False)
    for left, top, text in texts:
        size = 7 if top > HEAD else 9
        figure.text(left / width, 1 - top / height, text, fontsize=size, va="bottom", parse_math=False)
    with replacing(png) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # characters without a glyph are drawn as boxes
        figure.savefig(file, dpi=_DPI, format="png", metadata=MARK, pil_kwargs={"compress_level": 3})
