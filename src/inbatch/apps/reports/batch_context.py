"""Effects of a run's plug-ins on a batch: images and measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from inbatch.apps.reports.attention_picture import attended
from inbatch.apps.reports.mixed_picture import mixed
from inbatch.apps.reports.picture_sheet import Row, column, pixels, sheet, tile
from inbatch.apps.reports.view_grid import grid
from inbatch.batch import Batch
from inbatch.context.curation import violating
from inbatch.context.grouped import as_group
from inbatch.data.views import Drawn
from inbatch.errors import ConfigError, DataError, InbatchError, Unwritten, not_a_run
from inbatch.runtime.device import device_for
from inbatch.runtime.files import cannot_write, replacing
from inbatch.runtime.isolation import isolated
from inbatch.runtime.paths import path_of
from inbatch.runtime.picture_mark import is_marked, png_mark
from inbatch.runtime.text import printable
from inbatch.training import checkpoint
from inbatch.training.build import RunComponents, build
from inbatch.training.checkpoint_recipe import check_recipe
from inbatch.training.data_places import located
from inbatch.training.monitors.context_leak import leak, sign
from inbatch.training.recipe import make
from inbatch.training.run import source_of
from inbatch.training.run_encoder import kept_initial
from inbatch.training.settings_file import read_file
from inbatch.training.side_files import report_of
from inbatch.training.train_state import TrainState

PICTURES = ("views.png", "fused.png", "redrawn.png", "attention.png", "mixed.png")
"""Images that `draw_report` may write, named after their content."""


def draw_report(built: RunComponents, epoch: int, out: Path, count: int = 8) -> dict[str, Any]:
    """Draw the effects of a run's plug-ins on the first batch of an epoch; nothing is trained.

    Args:
        built: Components of the run.
        epoch: The run's next epoch; if curation starts later, its first curated epoch is used.
        out: Folder of the images (`PICTURES`); those of an earlier report are removed.
        count: Number of samples per image.

    Returns:
        The measurements, for JSON and `report_rows`.

    Raises:
        Unwritten: If the images cannot be written; the error holds the measurements.
    """
    curator = built.step.curator
    report: dict[str, Any] = {"epoch": epoch if curator is None else max(epoch, curator.starts)}
    built.step.resize(min(report["epoch"] * built.loader.steps, built.total - 1))  # a finished run has no next epoch
    batch = next(iter(built.loader.epoch(report["epoch"], stop=1))).to(built.loader.device)
    drawn = built.views(batch)
    pictures = {"views.png": _views(built, batch, drawn, count)}
    leakage = leak(built, report["epoch"])
    report["leak"] = leakage | {"told_apart": sign(leakage, built.recipe.shuffle_groups)} if leakage else None
    images: Sequence[Tensor] = drawn.images
    if curator is not None:
        images, report["curate"], picture = redrawn(built, batch, count)
        report["curate"]["begun"] = epoch >= curator.starts
        if picture is not None:
            pictures["redrawn.png"] = picture
    group = [view[: built.context] for view in images]
    if built.network.fuse is not None:
        report["fuse"], pictures["fused.png"] = fused(built, group, count)
    if built.step.mixer is not None:
        report["mix"], pictures["mixed.png"] = mixed(built, group, report["epoch"] * built.loader.steps, count)
    if built.recipe.attend is not None:
        report["attend"], attention = attended(built, group, count)
        if attention is not None:
            pictures["attention.png"] = attention
    try:
        _write(out, pictures)
    except InbatchError as error:
        raise Unwritten(str(error), report | {"pictures": []}) from error
    return report | {"pictures": [str(out / name) for name in pictures]}


def _views(built: RunComponents, batch: Batch, drawn: Drawn, count: int) -> Image.Image:
    few = range(min(count, len(batch)))
    return _grid(built, [_original(built, batch, i) for i in few], drawn, slice(len(few)))


@torch.no_grad()
def fused(built: RunComponents, group: Sequence[Tensor], count: int) -> tuple[dict[str, Any], Image.Image]:
    """Compare plain and fused images of a context group, with the model as in training.

    `change` is the mean absolute difference of fused and plain images, and `added` that of the fused images and `own`
    times the plain ones, where `own` is the least-squares factor; both are in standard deviations of a pixel. `common`
    is the share of the added part (of its squares) that is the same for all images of the group.

    Args:
        built: Components of the run.
        group: V views (G, C, H, W) of one context group, normalised.
        count: Number of images to draw.

    Returns:
        The measurements, and an image.
    """
    network = built.network
    fuse, number = network.fuse, min(network.fused & set(built.method.online_views(len(group))))
    assert fuse is not None
    plain = group[number]
    with network.autocast(plain), as_group(network):
        mixed = fuse(plain).float()
    centred = plain - plain.mean()
    own = float((mixed * centred).sum() / centred.square().sum().clamp_min(1e-12))
    added = mixed - mixed.mean() - own * centred
    measurements = {
        "name": built.recipe.fuse.name if built.recipe.fuse else "",
        "view": number,
        "change": float((mixed - plain).abs().mean()),
        "own": own,
        "added": float(added.abs().mean()),
        "common": float(added.mean(0).square().mean() / added.square().mean().clamp_min(1e-12)),
    }

    shown = pixels(built, mixed[:count])
    low, high = float(shown.min()), float(shown.max())
    rest = added[:count].cpu() * column(built.views.std)
    most = float(np.quantile(rest.abs().numpy(), 0.99))
    times = float(f"{0.5 / most:.2g}") if most > 1e-6 else 1.0
    columns = (
        ("plain", pixels(built, plain[:count])),
        ("fused", (shown - low) / max(high - low, 1e-6)),
        (f"added x {times:g}", 0.5 + times * rest),
    )
    title = (
        f"View {number} as the encoder gets it in training, fused ({measurements['name']}) in a group of {len(plain)}.",
        f"Fused: values from {low:.2f} to {high:.2f} ; plain pixels are from 0 (black) to 1 (white).",
        f"Added: fused - {own:.2f} x plain, amplified {times:g} times; grey is 0.",
    )
    drawn = [Row([(tile(column[i]), name) for name, column in columns]) for i in range(len(shown))]
    return measurements, sheet(title, drawn)


def redrawn(
    built: RunComponents, batch: Batch, count: int
) -> tuple[Sequence[Tensor], dict[str, Any], Image.Image | None]:
    """Return the curated views of a batch, measurements, and an image of the worst violators if there are any."""
    curator = built.step.curator
    assert curator is not None
    distances: list[Tensor] = []

    def record(x: Tensor, dim: int) -> Tensor:
        """Record the own and nearest distances of every judgement."""
        if dim == 0:
            distances.append(x.cpu())
        return x

    curated, figures = curator(batch, record)
    assert curated.attempt is not None
    images = built.views(curated).images
    (own, nearest), (own_after, nearest_after) = distances[:2], distances[-2:]
    measurements: dict[str, Any] = {name.removeprefix("curate_"): value for name, value in figures.items()}
    measurements |= {"rule": curator.rule, "distance": curator.distance, "where": curator.where, "samples": len(own)}
    bad, still = (
        violating(*pair, curator.rule, curator.margin) for pair in ((own, nearest), (own_after, nearest_after))
    )
    if not bad.any():
        return images, measurements, None
    worst = (own - nearest).masked_fill(~bad, -torch.inf).argsort(descending=True)[: min(count, int(bad.sum()))]

    chosen = worst.to(batch.index.device)
    subset, first = batch.take(chosen), built.views(batch.take(chosen))
    last = built.views(curated.take(chosen))
    lines = []
    for i, sample in enumerate(worst.tolist()):
        original = _original(built, subset, i)
        before, after = (_grid(built, [original], views, slice(i, i + 1)) for views in (first, last))
        verdict = "still violates" if still[sample] else "kept"
        lines.append(
            Row(
                [
                    (before, f"own {own[sample]:.3f}, nearest other {nearest[sample]:.3f}"),
                    (after, f"{verdict}: own {own_after[sample]:.3f}, nearest other {nearest_after[sample]:.3f}"),
                ]
            )
        )
    title = (
        f"As drawn (left), as learned from (right): the worst of {int(bad.sum())} violators among {len(own)} samples.",
        f"{curator.distance} distance of the model's {curator.where}; own: between the views of the image,",
        "nearest other: to the closest view of another image of the batch.",
    )
    return images, measurements, sheet(title, lines)


def _original(built: RunComponents, batch: Batch, i: int) -> UInt8[Tensor, "c h w"]:
    """Return the image of a sample at the size that its boxes refer to."""
    pictures = batch.take(slice(i, i + 1)).pictures()
    if pictures is None:  # the workers cropped the image, so the batch does not contain it
        return built.loader.source.image(int(batch.index[i]))
    (image,) = pictures
    if batch.size is None:
        return image
    height, width = batch.size[i].tolist()
    return image[:, :height, :width]


def _grid(built: RunComponents, originals: Sequence[Tensor], drawn: Drawn, which: slice) -> Image.Image:
    """Draw images with their boxes and the selected views."""
    selected = Drawn(tuple(view[which] for view in drawn.images), drawn.boxes[:, which], drawn.flipped[:, which])
    return Image.fromarray(grid(originals, selected, built.views.mean, built.views.std))


def _check_pictures(out: Path) -> None:
    """Raise ConfigError for a picture in the folder that inbatch has not drawn, which would be removed."""
    for name in PICTURES:
        if (out / name).exists() and not is_marked(str(out / name)):
            raise ConfigError(f"{out / name} is not a picture of inbatch and would be replaced: choose another --out")


def _write(out: Path, pictures: dict[str, Image.Image]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in PICTURES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    for name, picture in pictures.items():
        with replacing(out / name) as file:
            picture.save(file, format="PNG", pnginfo=png_mark())


@isolated
def inspect_run(
    path: str | Path, data: Any = None, *, out: str | Path | None = None, count: int = 8, seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Draw and measure the effects of the plug-ins of a finished or stopped run on a batch.

    Args:
        path: Run directory.
        data: Current location of the run's images, by default that of the recipe.
        out: Folder of the images, RUN/inspect by default.
        count: Number of samples per image.
        seed: Seed of the choice of images and of the views.
        device: Device to use.

    Raises:
        ConfigError: If there is no run or no checkpoint, or `out` holds a picture of that name that is not of inbatch.
        DataError: If the images cannot be read.
        Unwritten: If the pictures cannot be written; the error holds the measurements.
    """
    folder = path_of(path)
    if not (folder / "recipe.json").is_file():
        raise not_a_run(folder)
    pictures = folder / "inspect" if out is None else path_of(out, "out")
    if out is not None:
        _check_pictures(pictures)
    if count < 1 or seed < 0:
        raise ConfigError(f"count must be at least 1 and seed at least 0, not {count} and {seed}")
    saved, settings = checkpoint.load(folder / "checkpoints"), read_file(folder / "recipe.json")
    check_recipe(saved, make(settings), folder / "recipe.json")
    settings |= {"seed": seed, "compile": False}
    # a run of several processes stores its context group size
    if context := (saved.run or report_of(folder)).get("context"):
        settings["context"] = context
    recipe = located(folder, make(settings))
    try:
        source = source_of(recipe, data)
    except DataError as error:
        raise DataError(f"cannot read the images of the run in {path}: {error}. Pass --data") from None
    built, progress = build(recipe, source, device=device_for(device), init=kept_initial(folder)), TrainState()
    checkpoint.restore(built.parts() | {"progress": progress}, saved.state)
    where = {"run": str(path), "step": progress.step, "note": saved.note, "data": printable(source.report())}
    try:
        return where | draw_report(built, progress.step // built.loader.steps, pictures, count)
    except Unwritten as error:
        raise Unwritten(str(error), where | error.result) from error
