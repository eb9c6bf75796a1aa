"""Statistics of the relation between the two crops of an image (Welle et al. 2021, Figure 3, Table 1)."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.data.views import View, Views
from inbatch.data.views.crop_pairs import CONFIGURATIONS, CROPS, arrange, configuration
from inbatch.errors import ConfigError
from inbatch.runtime.files import replacing
from inbatch.runtime.picture_mark import MARK

SAMPLERS = ("ours", "torchvision")
PAPER_SIZE = (32, 32)
PAPER_SHARES = (0.1727, 0.0140, 0.8133)
"""Figure 3: shares for default crops of 32 x 32 pixels, in the order of CONFIGURATIONS."""
PAPER_AREA = {
    "default": 0.49, "global-local": 0.51, "adjacent": 0.17, "intersection": 0.49, "equal": 0.39,
    "big": 0.70, "small": 0.29, "global-local-big": 0.73,
}  # fmt: skip
"""Table 1, last column: mean area of a crop as a fraction of the image."""

_CHUNK = 1024  # pairs drawn at once
_MOST = 4096  # maximum side of an image in pixels
_BLUE, _ORANGE = "#0072b2", "#d55e00"


HEADINGS = ("crops", *CONFIGURATIONS, "mean area", "paper's, 32 px", "seconds")


@dataclass(frozen=True)
class CropStatistics:
    """Statistics of the crop pairs of one name.

    Attributes:
        name: Key of `CROPS`.
        shares: Shares of the configurations among the pairs, in the order of CONFIGURATIONS.
        area: Mean area of all boxes as a fraction of the image.
        coverage: (height, width): number of boxes that cover a pixel, divided by its maximum.
        seconds: Duration of the count.
    """

    name: str
    shares: tuple[float, ...]
    area: float
    coverage: Float[Tensor, "h w"]
    seconds: float

    def json(self) -> dict[str, Any]:
        """Return all fields except the coverage."""
        shares = dict(zip(CONFIGURATIONS, self.shares, strict=True))
        return shares | {"area": self.area, "paper_area": PAPER_AREA[self.name], "seconds": self.seconds}


def parse_size(text: str) -> tuple[int, int]:
    """Parse height and width from "32" or "375x500"; raise ConfigError if invalid."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text.strip())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (2 <= height <= _MOST and 2 <= width <= _MOST):
        raise ConfigError(
            f"--size {text} is not the size of an image: give a side, like 32, or height x width, like 375x500, "
            f"from 2 to {_MOST:,} pixels."
        )
    return height, width


def choose_crops(name: str, sampler: str) -> list[str]:
    """Return the names to count: one of CROPS, or all; raise ConfigError if unknown or not supported by the sampler."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"Unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
    if name != "all" and name not in CROPS:
        raise ConfigError(f"Unknown crops {name!r}: choose one of {', '.join(CROPS)}, or all.")
    names = list(CROPS) if name == "all" else [name]
    if sampler == "torchvision":
        drawn = [one for one in CROPS if not CROPS[one].configurations]
        if set(names) - set(drawn):
            raise ConfigError(
                f"torchvision draws each crop on its own: it has no {name!r}. Choose one of {', '.join(drawn)}, "
                "or --sampler ours."
            )
    return names


def count_configurations(
    name: str,
    size: tuple[int, int],
    pairs: int,
    seed: int = 0,
    sampler: str = "ours",
    notice: Callable[[str], None] = lambda text: None,
) -> CropStatistics:
    """Draw pairs of crops of images of one size and count their configurations; memory use is constant.

    Args:
        name: Key of `CROPS`.
        size: Height and width of the images in pixels.
        pairs: Number of pairs.
        seed: Seed of the crops.
        sampler: `"ours"`, or `"torchvision"` for its RandomResizedCrop, box by box.
        notice: Called with a message if the count will take long.

    Raises:
        ConfigError: If `pairs` is less than one.
    """
    if pairs < 1:
        raise ConfigError(f"{pairs} pairs cannot be counted: draw at least one.")
    height, width = size
    begin, done = time.perf_counter(), 0
    codes, area = torch.zeros(len(CONFIGURATIONS), dtype=torch.long), 0
    corners = torch.zeros((height + 1) * (width + 1), dtype=torch.long)
    draw = _torchvision if sampler == "torchvision" else _ours
    for number, boxes in enumerate(draw(name, size, pairs, seed)):
        codes += configuration(boxes).bincount(minlength=len(codes))
        area += int(boxes[..., 2:].prod(-1).sum())
        corners += _corners(boxes.flatten(0, 1), width + 1, len(corners))
        done += boxes.shape[1]
        if number == 0:
            warm = time.perf_counter()  # the first chunk includes imports and initialisation
        elif number == 1 and (left := (time.perf_counter() - warm) * (pairs - done) / boxes.shape[1]) > 5:
            notice(f"{name}: {pairs:,} pairs will take about {left:,.0f} s")
    covered = corners.view(height + 1, width + 1).cumsum(0).cumsum(1)[:height, :width]
    return CropStatistics(
        name,
        tuple((codes.double() / pairs).tolist()),
        area / (2 * pairs * height * width),
        covered / covered.max(),
        time.perf_counter() - begin,
    )


def _ours(name: str, size: tuple[int, int], pairs: int, seed: int) -> Iterator[Int[Tensor, "2 b 4"]]:
    views, together = arrange(name, (View(32), View(32)))  # only the boxes of these views are used
    draw = Views(views, (0.5,), (0.5,), together)
    for first in range(0, pairs, _CHUNK):
        index = torch.arange(first, min(first + _CHUNK, pairs))
        yield draw.boxes(index, torch.tensor(size).expand(len(index), 2), seed, 0)


def _torchvision(name: str, size: tuple[int, int], pairs: int, seed: int) -> Iterator[Int[Tensor, "2 b 4"]]:
    from torchvision.transforms import RandomResizedCrop

    (view, _), _ = arrange(name, (View(32), View(32)))
    scale, ratio = list(view.scale), list(view.ratio)
    image = torch.zeros(()).expand(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, pairs, _CHUNK):
            count = 2 * min(_CHUNK, pairs - first)
            drawn = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
            yield torch.tensor(drawn).view(-1, 2, 4).transpose(0, 1)


def _corners(boxes: Int[Tensor, "n 4"], stride: int, length: int) -> Int[Tensor, " length"]:
    """Return +1, -1, -1, +1 at the corners of each box.

    Cumulative sums along y and x count the boxes over each pixel.
    """
    top, left, height, width = boxes.unbind(1)
    begin, end = top * stride + left, (top + height) * stride + left
    plus, minus = torch.cat([begin, end + width]), torch.cat([begin + width, end])
    return plus.bincount(minlength=length) - minus.bincount(minlength=length)


def table_rows(statistics: Sequence[CropStatistics], size: tuple[int, int]) -> list[tuple[str, ...]]:
    """Return the table rows: name, shares in percent, mean area, the paper's area.

    The paper's shares follow if known.
    """
    cells = []
    for t in statistics:
        shares = (f"{share:.2%}" for share in t.shares)
        cells.append((t.name, *shares, f"{t.area:.1%}", f"{PAPER_AREA[t.name]:.0%}", f"{t.seconds:.1f}"))
        if t.name == "default" and size == PAPER_SIZE:
            cells.append(("  the paper's", *(f"{share:.2%}" for share in PAPER_SHARES), "49%", "", ""))
    return cells


def plot(statistics: Sequence[CropStatistics], size: tuple[int, int], pairs: int, png: Path) -> None:
    """Plot for each name the heat map of coverage and the bars of the shares, as in Figure 3.

    The paper's shares are shown for comparison if known: default, 32 x 32 pixels.
    """
    from matplotlib.figure import Figure

    several = len(statistics) > 1
    wide, high = (2.1 * len(statistics), 4.6) if several else (7.2, 3.0)
    figure = Figure(figsize=(wide, high), layout="constrained")
    panels = figure.subplots(*((2, len(statistics)) if several else (1, 2)), squeeze=False)
    columns = panels.T if several else panels
    for t, (heat, bars) in zip(statistics, columns, strict=True):
        shown = heat.imshow(t.coverage.numpy(), cmap="viridis", vmin=0, vmax=1)
        heat.set(xticks=[], yticks=[])
        area = f"mean area {t.area:.1%}" + (f" (paper {PAPER_AREA[t.name]:.0%})" if size == PAPER_SIZE else "")
        heat.set_title(f"{t.name}\n{area}" if several else f"coverage; {area}", fontsize=8)
        compared = t.name == "default" and size == PAPER_SIZE
        _bars(bars, t.shares, PAPER_SHARES if compared else None, small=several)
    figure.colorbar(shown, ax=panels[0, :] if several else panels[0, 0], shrink=0.8)
    what = f"crops {statistics[0].name}, " if not several else ""
    figure.suptitle(f"{what}{pairs:,} pairs of {size[0]} x {size[1]} pixels", fontsize=9)
    with replacing(png) as file:
        figure.savefig(file, dpi=100, format="png", metadata=MARK)


def _bars(panel: Any, shares: Sequence[float], paper: Sequence[float] | None, small: bool) -> None:
    wide = 0.8 if paper is None else 0.4
    sets = [("ours", shares, _BLUE)] + ([] if paper is None else [("paper", paper, _ORANGE)])
    for k, (label, values, colour) in enumerate(sets):
        places = [i + wide * (k - (len(sets) - 1) / 2) for i in range(len(values))]
        drawn = panel.bar(places, [100 * v for v in values], wide, color=colour, label=label)
        panel.bar_label(
            drawn, [f"{v:.0%}" if small and paper is None else f"{100 * v:.1f}" for v in values], fontsize=6
        )
    panel.set_xticks(range(len(shares)), CONFIGURATIONS, fontsize=6 if small else 8, rotation=20 if small else 0)
    panel.set_ylim(0, 115)
    panel.set_ylabel("% of pairs", fontsize=7)
    panel.tick_params(axis="y", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    if paper is not None:
        panel.legend(fontsize=7, frameon=False, loc="upper left")
