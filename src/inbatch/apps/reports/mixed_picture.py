"""Images of a context group, and what mixing makes of them."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from inbatch.apps.reports.picture_sheet import Row, pixels, sheet, tile
from inbatch.context.mixing import Mixer
from inbatch.rng import fold
from inbatch.training.build import RunComponents
from inbatch.training.mixing import MIXING, StepMixing, compared_views


def mixed(built: RunComponents, group: Sequence[Tensor], step: int, count: int) -> tuple[dict[str, Any], Image.Image]:
    """Draw mixed images of the first context group of a batch with the two images that each contains.

    Args:
        built: Components of the run.
        group: V views (G, C, H, W) of the context group, normalised.
        step: Number of the step.
        count: Number of mixed images to draw.

    Returns:
        The mean share of the first image, for JSON, and an image.
    """
    mixer = built.step.mixer
    assert mixer is not None and built.recipe.mix is not None
    view = next(iter(compared_views(mixer, built.method, len(group))))
    rows, shares = mixed_rows(built, mixer, group, step, count)
    report = {"name": built.recipe.mix.name, "view": view, "share": sum(shares) / len(shares)}
    title = (
        f"View {view} as the encoder gets it in training, mixed ({report['name']}) in a group of {len(group[view])}:",
        "the first image, the second image, and the mixture, with their shares in pixels and target.",
    )
    return report, sheet(title, rows)


def mixed_rows(
    built: RunComponents, mixer: Mixer, group: Sequence[Tensor], step: int, count: int
) -> tuple[list[Row], list[float]]:
    """Return a row of pictures for each mixed image, and the share of the first image in every one of the group.

    Args:
        built: Components of the run.
        mixer: The rule.
        group: V views (G, C, H, W) of the context group, normalised.
        step: Number of the step.
        count: Number of mixed images to draw.
    """
    view = next(iter(compared_views(mixer, built.method, len(group))))
    plain = group[view]
    mixing = StepMixing(mixer, built.method, len(group), fold(built.recipe.seed, step, MIXING), 1, len(plain), False)
    images = pixels(built, mixing.images(view, 0, plain))
    mixture, plain = mixing.mixture(view, plain), pixels(built, plain)
    rows = []
    for i in range(min(count, len(images))):
        (a, b), (own, other) = mixture.positive[:, i].tolist(), mixture.weight[:, i].tolist()
        cells = (plain[a], f"{own:.2f}"), (plain[b], f"{other:.2f}"), (images[i], "mixed")
        rows.append(Row([(tile(image), text) for image, text in cells]))
    return rows, mixture.weight[0].tolist()
