"""Every method with its own settings for small images, where features are learned."""

from dataclasses import replace

from inbatch.apps.papers.scales import laptop, published, usual
from inbatch.apps.papers.spec import Row, Scale, Settings, Table
from inbatch.methods import METHODS

FIRST = "simclr"
SUPERVISED: Settings = {"views.name": "supervised"}
TEACHER = "inbatch/cifar10-fast"
"""Teacher of `relation` at the scale laptop: SimCLR for twice as many epochs, on the same images of CIFAR-10."""


def _one_seed(scale: Scale) -> Scale:
    """Return the scale with one seed: the table orders the methods; it does not compare neighbours in this order."""
    return replace(scale, seeds=(0,), effects=False)


def _row(method: str) -> Row:
    if method == "relation":
        return Row(method, {"method.name": method, "teacher": TEACHER}, scales=("laptop",))
    return Row(method, {"method.name": method}, at={"laptop": SUPERVISED} if method == "supervised" else {})


TABLE = Table(
    name="study-methods",
    title="Every method with its own settings for small images",
    source="this library; the papers of the methods have no such table",
    question="How accurate are the features of each method after the same number of epochs with the same encoder?",
    rows=tuple(map(_row, sorted(METHODS, key=lambda name: (name != FIRST, name)))),
    scales={name: _one_seed(scale) for name, scale in usual().items()}
    | {"laptop": _one_seed(laptop(differs=(f"relation learns from the teacher {TEACHER} (SimCLR, 8 epochs)",)))}
    | {"paper": published("as many runs of ImageNet-1k with ResNet-50 as there are methods")},
)
