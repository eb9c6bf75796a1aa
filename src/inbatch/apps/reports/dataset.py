"""Data set report: contents of a data set, and problems that would prevent training (`inbatch data`)."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inbatch.apps.reports.image_statistics import ImageStatistics, chunks, repeated, total
from inbatch.apps.reports.view_grid import check_picture, check_place, save_sheet
from inbatch.data import Source, find_split, open_data, splits
from inbatch.data.resident import allowing, estimate, resides
from inbatch.data.views import make_views
from inbatch.data.views.crop_pairs import arrange
from inbatch.errors import ConfigError, InbatchError, Unwritten
from inbatch.runtime.device import device_for
from inbatch.runtime.isolation import isolated
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.paths import path_of
from inbatch.runtime.terminal import counted
from inbatch.runtime.text import one_line, printable
from inbatch.training.recipe import Recipe
from inbatch.training.resolve import resolve_recipe

_FEW = 3  # number of duplicate groups that are listed, and of members of each
_ROWS, _COLUMNS = 8, 8  # size of the image grid


@isolated
def survey_data(
    data: Any, *, split: str | None = None, sample: int | None = None, out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None, device: str = "auto", quiet: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Read every image of a data set once and return the report of `inbatch data`, ready for JSON.

    Names in the report are printable. `problems` lists everything that would prevent a run; it is empty for usable
    data.

    Args:
        data: As in `open_data`.
        split: Split to report on, the first by default; the other splits are compared with it.
        sample: Read only this many images of each split, evenly spaced.
        out: Image file to write with some images, one row per class.
        settings: Reading options as in a recipe (channels, levels, classes, subset).
        device: Device on which a run would hold the images.
        quiet: Show no progress on stderr.

    Raises:
        DataError: If there is no image.
        ConfigError: If a setting is invalid, or `out` has an unknown file extension.
        Unwritten: If the picture cannot be written; the error holds the report.
    """
    if out is not None:
        check_picture(out)
    if sample is not None and sample < 1:
        raise ConfigError(f"a sample of {sample} images shows nothing: give 1 or more")
    if out is not None:
        check_place(out, data)
    options = dict(settings or {})
    every = splits(data, **{key: options.get(key) for key in ("image_column", "label_column")})
    chosen = every[0] if split is None else find_split(split, every) or split
    options |= {} if chosen == every[0] else {"split": chosen}
    recipe, source = resolve_recipe(data, {"split": chosen} | options)
    indices = _spaced(len(source), sample)
    stats = total(_counted(chunks(source, indices), len(indices), "looked at", quiet))
    counts = np.bincount(source.labels[source.labels >= 0].numpy(), minlength=len(source.classes)).tolist()
    report: dict[str, Any] = {
        "data": recipe.data,
        "split": chosen,
        "report": printable(source.report()),
        "images": len(source),
        "looked_at": len(indices),
        "channels": source.channels,
        "classes": [{"name": one_line(c), "images": n} for c, n in zip(source.classes, counts, strict=True)],
        "unlabelled": int((source.labels < 0).sum()),
        "imbalance": max(counts) / min(counts) if counts and min(counts) else None,
        "skipped": {one_line(kind): n for kind, n in source.skipped().items()},
        "formats": dict(stats.kinds.most_common()),
        "bits": {str(bits): n for bits, n in sorted(stats.bits.items())},
        "pages": {str(pages): n for pages, n in sorted(stats.pages.items())},
        "alpha": _alpha(source, stats),
        "sizes": _sizes(stats),
        "pixels": _pixels(stats),
        "warnings": _warnings(source, stats),
        "unreadable": [{"image": one_line(source.identity(i)), "why": one_line(why)} for i, why in stats.unreadable],
        "duplicates": _duplicates(source, stats),
        "splits": {chosen: len(source)},
        "leaks": {},
    }
    for other in every:
        if other != chosen:
            report["splits"][other], report["leaks"][other] = _leak(data, other, recipe, source, stats, sample, quiet)
    report["memory"] = _memory(recipe, source, device)
    report["batch"], report["steps"] = recipe.batch_size, len(source) // recipe.batch_size
    report["problems"] = _problems(source, stats, report, recipe.max_unreadable)
    report["levels"] = _levels(stats) if recipe.levels is None else None
    report["picture"] = None
    what = shlex.quote(recipe.data)
    how = "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in options.items())
    after = [f"inbatch views {what} -o views.png{how}", f"inbatch pretrain --data {what}{how}"]
    report["next"] = [] if report["problems"] else after
    if out is not None and stats.numbers:
        try:
            report["picture"] = _draw(source, stats, path_of(out, "out"))
        except InbatchError as error:
            raise Unwritten(str(error), report) from error
    return report


def _spaced(n: int, sample: int | None) -> list[int]:
    """Return all numbers below n, or `sample` of them, evenly spaced."""
    return (
        list(range(n)) if sample is None or sample >= n else np.linspace(0, n - 1, sample).round().astype(int).tolist()
    )


def _counted(tallies: Any, n: int, what: str, quiet: bool) -> Any:
    return tallies if quiet else counted(tallies, n, what)


def _sizes(stats: ImageStatistics) -> dict[str, Any]:
    """Summarise the sizes of the readable images in pixels; shorter_side: counts by power of two."""
    if not stats.sizes:
        return {"distinct": 0}
    sizes = np.array(stats.sizes).reshape(-1, 2)
    common = Counter(zip(*sizes.T.tolist(), strict=True))
    bins = Counter(1 << math.ceil(math.log2(side)) for side in sizes.min(1).tolist())

    def middle(sides: np.ndarray) -> dict[str, float]:
        return {"min": int(sides.min()), "median": float(np.median(sides)), "max": int(sides.max())}

    return {
        "height": middle(sizes[:, 0]),
        "width": middle(sizes[:, 1]),
        "distinct": len(common),
        "most": [{"height": h, "width": w, "images": n} for (h, w), n in common.most_common(5)],
        "shorter_side": [{"up_to": side, "images": bins[side]} for side in sorted(bins)],
    }


def _pixels(stats: ImageStatistics) -> dict[str, list[float]]:
    """Summarise the pixel values by channel, 1 is white; every pixel has the same weight."""
    mean, deviation = stats.mean_and_deviation()
    ends = [np.ravel(x).tolist() if stats.pixels else [] for x in (stats.lowest, stats.highest)]
    return {"mean": mean, "std": deviation, "lowest": [x / 255 for x in ends[0]], "highest": [x / 255 for x in ends[1]]}


def _levels(stats: ImageStatistics) -> list[int] | None:
    """Return the range of values that contains all pixels, as far as their upper 8 bits show.

    None if no image has more than 8 bits, or one is inverted: its pixels do not show the range.
    """
    if max(stats.bits, default=8) <= 8 or stats.inverted:
        return None
    step = (stats.white + 1) / 256
    return [int(step * int(np.min(stats.lowest))), math.ceil(step * (int(np.max(stats.highest)) + 1)) - 1]


def _alpha(source: Source, stats: ImageStatistics) -> dict[str, Any]:
    """Summarise the images with alpha: `not_opaque` are fractions of their pixels."""
    shares = [share for _, share in stats.transparent]
    return {
        "images": len(shares),
        "not_opaque": sum(shares) / len(shares) if shares else 0.0,
        "files": [{"image": one_line(source.identity(i)), "not_opaque": share} for i, share in stats.transparent],
    }


def _warnings(source: Source, stats: ImageStatistics) -> dict[str, Any]:
    """Count the images that Pillow warned about, by text; numbers in a text are left out of the count."""
    texts = Counter(text for _, lines in stats.warned for text in {re.sub(r"\d+", "N", one_line(t)) for t in lines})
    return {
        "images": len(stats.warned),
        "texts": dict(texts.most_common()),
        "files": [{"image": one_line(source.identity(i)), "texts": list(map(one_line, t))} for i, t in stats.warned],
    }


def _duplicates(source: Source, stats: ImageStatistics) -> dict[str, Any]:
    groups = repeated(stats)
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "first": [[one_line(source.identity(i)) for _, i in group[:_FEW]] for group in groups[:_FEW]],
    }


def _leak(
    data: Any, other: str, recipe: Recipe, source: Source, stats: ImageStatistics, sample: int | None, quiet: bool
) -> tuple[int, dict[str, Any]]:
    """Return the number of images of another split, and those that also occur in this one."""
    compared = open_data(data, other, **recipe.reading)
    indices = _spaced(len(compared), sample)
    also = total(_counted(chunks(compared, indices, pixels=False), len(indices), f"of {other} compared", quiet))
    both = [group for group in repeated(stats, also) if {which for which, _ in group} == {0, 1}]
    pairs = [(group[0][1], next(i for which, i in group if which)) for group in both[:_FEW]]
    return len(compared), {
        "images": sum(which for group in both for which, _ in group),
        "first": [[one_line(source.identity(a)), one_line(compared.identity(b))] for a, b in pairs],
    }


def _memory(recipe: Recipe, source: Source, device: str) -> dict[str, Any]:
    """Return where a run on these data would hold its images, by the size of its largest view."""
    views, _ = arrange(recipe.crops, make_views(recipe.views.name, recipe.views.options, 3))
    canvas = 2 * max(view.size for view in views)
    needed, free = estimate(source, canvas), free_bytes(device_for(device))
    return {"decoded_bytes": needed, "free_bytes": free, "resident": resides(needed, free, None), "canvas": canvas}


def _problems(source: Source, stats: ImageStatistics, report: Mapping[str, Any], max_bad: float) -> list[str]:
    """Return the reasons why a run could not start, as sentences."""
    bad, count = len(stats.unreadable), report["looked_at"]
    if bad > max_bad * count:
        most = f"{100 * max_bad:g}%"
        fix = f", or pass --set max_unreadable={allowing(bad, count)} to the run" if bad < count else ""
        return [f"{bad:,} of {count:,} images cannot be read, and a run leaves out at most {most}: remove them{fix}"]
    if count - bad > 1 and report["duplicates"]["images"] == count and report["duplicates"]["groups"] == 1:
        return [f"all {count:,} images are identical: at least two different images are needed"]
    return (
        [] if len(source) - bad > 1 else ["there is one image: samples learn from each other, so at least 2 are needed"]
    )


def _draw(source: Source, stats: ImageStatistics, out: Path) -> dict[str, Any]:
    """Write an image file with some readable images: one row for each of some classes, or in order if unlabelled."""
    numbers, rows = torch.tensor(stats.numbers, dtype=torch.long), [""]
    labels = source.labels[numbers]
    classes = labels[labels >= 0].unique()
    if len(classes):
        selected = classes[_spaced(len(classes), _ROWS)].tolist()
        picked, rows = [numbers[labels == c] for c in selected], [one_line(source.classes[c]) for c in selected]
    else:
        picked = [numbers[_spaced(len(numbers), _ROWS * _COLUMNS)]]
    shown = []
    for row in picked:
        few = row[_spaced(len(row), _COLUMNS)] if len(classes) else row
        images = []
        for i in few.tolist():
            with source.open(i) as picture:
                images.append(picture.tensor(192))
        shown += [images[at : at + _COLUMNS] for at in range(0, len(images), _COLUMNS)]
    save_sheet(out, shown)
    return {"out": str(out), "rows": rows}
