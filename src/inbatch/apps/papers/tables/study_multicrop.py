"""Claim of the survey and of SwAV's paper: small crops in addition to the large ones make training more efficient."""

from inbatch.apps.papers.scales import CIFAR10, SOURCE, TINY, columns, published, usual
from inbatch.apps.papers.spec import Row, Scale, Table

TWO = "2 crops"
SWAV = {"method.name": "swav"}
# Four crops of half the side: twice the views, a third more work in the encoder's first layers.
FOUR = {**SWAV, "views.name": "swav_cifar", "views.num_large_crops": 2, "views.num_small_crops": 4}

_USUAL = usual(views="simclr_cifar")
TABLE = Table(
    name="study-multicrop",
    title="SwAV with small crops and without",
    source=f"{SOURCE}, on SwAV",
    question="Do small crops help at the same number of epochs?",
    rows=(
        Row(TWO, SWAV, at={"paper": {"views.name": "swav", "views.num_small_crops": 0}}),
        Row("2 + 4 crops", FOUR, against=TWO, at={"paper": {"views.name": "swav", "views.num_small_crops": 6}}),
    ),
    scales={
        "smoke": _USUAL["smoke"],
        "cpu": _USUAL["cpu"],
        "laptop": _USUAL["laptop"],
        "gpu": Scale(
            columns({"cifar10": "CIFAR-10", "tiny": "tiny-imagenet-100"}, ("linear", "k-NN")),
            {"cifar10": {**CIFAR10, "views.name": "simclr_cifar"}, "tiny": {**TINY, "views.name": "simclr_cifar"}},
            {"epochs": 200, "batch_size": 256, "encoder.name": "resnet18", "evaluate_every": 20},
        ),
        "paper": published("200 epochs of ImageNet-1k with ResNet-50; SwAV's: 75.3 % after 800"),
    },
)
