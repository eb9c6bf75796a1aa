"""Shared definitions of the tables: data sets by name, and the default scales smoke, cpu, laptop and gpu."""

from collections.abc import Mapping, Sequence

from inbatch.apps.papers.spec import Column, Scale, Settings

SOURCE = "the survey Deep Learning Feature Extraction with Batch Context"

FIGURES = {
    "linear": "linear.top1",
    "k-NN": "knn.top1",
    "NMI": "clustering.nmi",
    "ACC": "clustering.acc",
}
"""Heading -> location of the figure in an evaluation."""

DIGITS: Settings = {"data": "digits-canvas-colour", "preset": "digits-colour", "image_size": 32}
PHOTOS: Settings = {
    "data": "cifar10", "subset": 10_000, "preset": "digits", "image_size": 32, "knn_k": 200,
    "views.name": "simclr_cifar",
}  # fmt: skip
"""A fifth of CIFAR-10, with the small encoder, heads, optimiser and batch of the digits."""
FAST: Settings = {"preset": "fast", "encoder.width": 24, "image_size": 32}
FAST_CIFAR10: Settings = {"data": "cifar10", **FAST}
FAST_TINY: Settings = {"data": "tiny-imagenet-100", **FAST}
"""Whole data sets with the encoder `fast` at its narrowest width, which is the most accurate in minutes."""
CIFAR10: Settings = {"data": "cifar10", "preset": "cifar", "image_size": 32}
CIFAR100: Settings = {"data": "cifar100", "preset": "cifar", "image_size": 32}
TINY: Settings = {"data": "tiny-imagenet-100", "preset": "cifar", "image_size": 64}
IMAGENET100: Settings = {"data": "imagenet-100", "preset": "imagenet", "image_size": 224}
IMAGENET: Settings = {"data": "imagenet", "preset": "imagenet", "image_size": 224}

WHERE = {
    "cifar10": "torchvision/CIFAR10",
    "cifar100": "torchvision/CIFAR100",
    "tiny-imagenet-100": None,
    "imagenet-100": None,
    "imagenet": None,
}
"""Default location of images without --data NAME=PATH; None: there is no default."""

SHORT = (
    "digits: 1,297 embedded images of 32 pixels, 30 epochs, encoder tiny (74,400 parameters), batch 128, AdamW, k = 20",
    "photos: 10,000 images of CIFAR-10, the same encoder and batch, 4 epochs, k = 200; evaluated on 10,000 test images",
    "the linear probe is logistic regression on features of clean images",
)

LAPTOP = (
    "CIFAR-10: 50,000 images, encoder fast of width 24, batch 128, AdamW, 4 epochs (16 pixels for the first 66 %), "
    "k = 200; evaluated on 10,000 test images",
    "tiny-imagenet-100: 50,000 images at 32 pixels, otherwise the same; evaluated on 5,000",
    "features are whitened by statistics of training images without labels, for all rows (docs/fast.md)",
)


def columns(
    names: Mapping[str, str], figures: Sequence[str], paper: Mapping[str, str] | None = None
) -> tuple[Column, ...]:
    """Return a column for every figure on every data set.

    Args:
        names: Data set -> name in the table.
        figures: Names of the figures.
        paper: Figure -> column of the paper.
    """
    return tuple(
        Column(f"{shown}, {figure}", data, FIGURES[figure], (paper or {}).get(figure))
        for data, shown in names.items()
        for figure in figures
    )


def usual(
    figures: Sequence[str] = ("linear", "k-NN"), *, views: str | None = None, gpu: Settings | None = None,
    differs: Sequence[str] = (), protocols: tuple[str, ...] = (),
) -> dict[str, Scale]:  # fmt: skip
    """Return smoke, cpu, laptop and gpu as in most tables.

    Args:
        figures: Names of the figures.
        views: Name of the views; None uses those of the digits and of the photographs.
        gpu: Additional settings at scale gpu.
        differs: Additional differences from the paper.
        protocols: Additional protocols.
    """
    drawn = {} if views is None else {"views.name": views}
    digits, photos = {**DIGITS, **drawn}, {**PHOTOS, **drawn}
    return {
        "smoke": Scale(
            columns({"digits": "digits"}, figures),
            {"digits": digits | {"subset": 192}},
            {"epochs": 1, "batch_size": 64, "evaluate_every": 1},
            seeds=(0, 1),
            protocols=protocols,
            cost="seconds a run: a functional check, not a result",
            differs=("192 images, one epoch: its figures mean nothing",),
        ),
        "cpu": Scale(
            columns({"digits": "digits", "photos": "photos"}, figures),
            {
                "digits": digits | {"epochs": 30, "evaluate_every": 3},
                "photos": photos | {"epochs": 4, "evaluate_every": 1},
            },
            protocols=protocols,
            differs=(*SHORT, *differs),
        ),
        "laptop": laptop(figures, views=views, differs=differs, protocols=protocols),
        "gpu": Scale(
            columns({"cifar10": "CIFAR-10", "tiny": "tiny-imagenet-100"}, figures),
            {"cifar10": CIFAR10, "tiny": TINY},
            {"epochs": 200, "batch_size": 256, "encoder.name": "resnet18", "evaluate_every": 20, **(gpu or {})},
            protocols=protocols,
            cost="not measured yet",
            differs=("tiny-imagenet-100 (64 pixels) stands for ImageNet-100", "200 epochs", *differs),
        ),
    }  # fmt: skip


def laptop(
    figures: Sequence[str] = ("linear", "k-NN"), *, views: str | None = None, differs: Sequence[str] = (),
    protocols: tuple[str, ...] = (),
) -> Scale:  # fmt: skip
    """Return the scale at which features are learned, in ten minutes of training on one core; arguments of `usual`."""
    drawn = {} if views is None else {"views.name": views}
    return Scale(
        columns({"cifar10": "CIFAR-10", "tiny": "tiny-imagenet-100"}, figures),
        {"cifar10": {**FAST_CIFAR10, **drawn}, "tiny": {**FAST_TINY, **drawn}},
        {"epochs": 4, "evaluate_every": 1, "knn_k": 200},
        protocols=protocols,
        differs=(*LAPTOP, *differs),
        curve="knn",
        effects=True,
    )


def published(
    cost: str, differs: Sequence[str] = (), settings: Settings | None = None, data: Settings = IMAGENET,
    figures: Sequence[str] = ("linear",),
) -> Scale:  # fmt: skip
    """Return the original scale of a claim: ImageNet-1k, ResNet-50, each method with its authors' settings."""
    name = str(data["data"])
    return Scale(
        columns({name: name}, figures),
        {name: data},
        {"encoder.name": "resnet50", **(settings or {})},
        seeds=(0,),
        cost=cost,
        differs=("each method by its authors' preset", *differs),
    )
