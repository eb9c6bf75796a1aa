"""Claim of the survey: methods with negatives need large batches, others less. Accuracy against batch size."""

from math import sqrt

from inbatch.apps.papers.scales import CIFAR10, DIGITS, SOURCE, columns, laptop
from inbatch.apps.papers.spec import Row, Scale, Settings, Table

FAMILIES: dict[str, Settings] = {
    "SimCLR": {"method.name": "simclr"},
    "DCL": {"method.name": "dcl"},
    "MoCo-v2": {"method.name": "moco", "method.layers": 2},
    "SwAV": {"method.name": "swav"},
    "BYOL": {"method.name": "byol"},
    "Barlow Twins": {"method.name": "barlow"},
    "VICReg": {"method.name": "vicreg"},
}
USUAL = 128
SIZES: dict[int, tuple[str, ...]] = {
    32: ("smoke", "cpu", "gpu", "paper"), 64: (), 128: (), 256: ("smoke", "cpu", "gpu", "paper"), 512: (),
    2048: ("laptop", "gpu", "paper"),
}  # fmt: skip
"""Batch size -> scales at which it is run; none: all."""


def _rows() -> tuple[Row, ...]:
    """Return the rows; AdamW's rate scales with the root of the batch, that of the gpu presets with the batch."""
    return tuple(
        Row(
            f"{name}, {batch}",
            {**family, "batch_size": batch},
            against=None if batch == USUAL else f"{name}, {USUAL}",
            at={
                "digits": {"optimizer.lr": 2e-3 * sqrt(batch / USUAL)},
                "laptop": {"optimizer.lr": 3e-3 * sqrt(batch / USUAL)},
            },
            scales=scales,
        )
        for name, family in FAMILIES.items()
        for batch, scales in SIZES.items()
    )


TABLE = Table(
    name="study-batch-size",
    title="Accuracy against batch size",
    source=f"{SOURCE}, on SimCLR, MoCo, SwAV, BYOL and Barlow Twins",
    question="How much accuracy does each family lose with small batches?",
    rows=_rows(),
    scales={
        "smoke": Scale(
            columns({"digits": "digits"}, ("k-NN",)), {"digits": {**DIGITS, "subset": 600, "epochs": 1}}, seeds=(0,)
        ),
        "cpu": Scale(
            columns({"digits": "digits"}, ("linear", "k-NN")),
            {"digits": {**DIGITS, "epochs": 30, "evaluate_every": 3}},
            differs=(
                "batches of 32 to 512 of 1,297 images, 30 epochs at every batch size; rate proportional to its root",
            ),
        ),
        "laptop": laptop(differs=("AdamW's rate is proportional to the root of the batch size",)),
        "gpu": Scale(
            columns({"cifar10": "CIFAR-10"}, ("linear", "k-NN")),
            {"cifar10": CIFAR10},
            {"epochs": 200, "encoder.name": "resnet18", "evaluate_every": 20},
        ),
        "paper": Scale(
            columns({"imagenet": "ImageNet-1k"}, ("linear",)),
            {"imagenet": {"data": "imagenet", "preset": "imagenet", "image_size": 224}},
            {"encoder.name": "resnet50"},
            seeds=(0,),
            cost="100 to 200 epochs of ImageNet-1k with ResNet-50",
        ),
    },
)
