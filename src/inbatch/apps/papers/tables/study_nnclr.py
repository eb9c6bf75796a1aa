"""Claim of the survey: NNCLR, which uses neighbours as positives, needs augmentation less than SimCLR does."""

from inbatch.apps.papers.scales import SOURCE, published, usual
from inbatch.apps.papers.spec import Row, Table

METHODS = {"SimCLR": {"method.name": "simclr"}, "NNCLR": {"method.name": "nnclr"}}
WEAK = {"views.strength": 0.0, "views.grey": 0.0}
"""Crop and flip, no colour augmentation."""

TABLE = Table(
    name="study-nnclr",
    title="Neighbours as positives, and weaker augmentation",
    source=f"{SOURCE}, on NNCLR",
    question="Which method loses less without colour augmentation?",
    rows=tuple(Row(name, method) for name, method in METHODS.items())
    + tuple(Row(f"{name}, crop and flip only", {**method, **WEAK}, against=name) for name, method in METHODS.items()),
    scales=usual(views="simclr_cifar")
    | {"paper": published("100 to 1000 epochs of ImageNet-1k with ResNet-50", settings={"views.name": "simclr"})},
)
