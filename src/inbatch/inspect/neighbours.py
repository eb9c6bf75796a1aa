"""Which images a representation takes for similar."""

import warnings
from pathlib import Path
from textwrap import shorten

import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from inbatch.data.source import Source
from inbatch.errors import DataError
from inbatch.files import replacing
from inbatch.show import printable

RIGHT, WRONG, UNKNOWN = "#0072b2", "#d55e00", "#999999"  # told apart with any colour vision


def neighbour_grid(
    source: Source, vectors: Float[Tensor, "n f"], png: Path, queries: int = 8, neighbours: int = 8
) -> None:
    """Draw some images and, in the same row, the most similar others of the source (cosine similarity).

    vectors: one per image of `source`, in its order. The queries are spread evenly over the classes, or over the
    order where nothing is labelled. Where query and neighbour are labelled, the frame says whether they agree.
    Raises DataError where vectors and images differ in number, or there are too few.
    """
    if len(vectors) != len(source):
        raise DataError(f"{len(vectors):,} vectors do not belong to the {len(source):,} images of {source.name}.")
    if len(source) <= neighbours:
        raise DataError(f"{source.name} has {len(source)} images: too few for {neighbours} neighbours of each.")
    queries = min(queries, len(source))
    order = source.labels.argsort(stable=True)
    chosen = order[(torch.arange(queries) + 0.5).mul(len(order) / queries).long()]
    vectors = torch.nn.functional.normalize(vectors.float(), dim=1)
    similarity = vectors[chosen] @ vectors.T
    similarity[torch.arange(queries), chosen] = -torch.inf
    nearest = similarity.topk(neighbours, dim=1).indices

    figure = Figure(figsize=(1.1 * (neighbours + 1) + 0.3, 1.25 * queries + 0.5), layout="constrained")
    panels = figure.subplots(queries, neighbours + 1, squeeze=False)
    right = known = 0
    for row, query in enumerate(chosen.tolist()):
        label = int(source.labels[query])
        for column, image in enumerate([query, *nearest[row].tolist()]):
            panel, other = panels[row, column], int(source.labels[image])
            panel.imshow(_displayed(source.image(image)).numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
            name = shorten(printable(source.classes[other]), 20, placeholder="…") if other >= 0 else ""
            name = name if row or column else f"query\n{name}"
            panel.set_title(name, fontsize=7, pad=2, parse_math=False)
            colour = UNKNOWN
            if column and label >= 0 and other >= 0:
                colour = RIGHT if label == other else WRONG
                right, known = right + (label == other), known + 1
            panel.spines[:].set(color="black" if column == 0 else colour, linewidth=2.5)
    said = f": {right} of {known} of the query's class (blue), the others orange" if known else ""
    figure.suptitle(f"Nearest neighbours by cosine similarity{said}", fontsize=9)
    with replacing(png) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks shows boxes
        figure.savefig(file, dpi=120, format="png")


def _displayed(image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "h w 3"] | UInt8[Tensor, "h w"]:
    """What can be shown of any number of channels: the first three, or the first."""
    return image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
