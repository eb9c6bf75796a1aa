"""Every method with its own settings for small images, where features are learned."""

from dataclasses import replace

from inbatch.apps.papers.scales import published, usual
from inbatch.apps.papers.spec import Row, Scale, Settings, Table
from inbatch.methods import METHODS

FIRST = "simclr"
SUPERVISED: Settings = {"views.name": "supervised"}


def _one_seed(scale: Scale) -> Scale:
    """Return the scale with one seed: the table orders the methods; it does not compare neighbours in this order."""
    return replace(scale, seeds=(0,), effects=False)


TABLE = Table(
    name="study-methods",
    title="Every method with its own settings for small images",
    source="this library; the papers of the methods have no such table",
    question="How accurate are the features of each method after the same number of epochs with the same encoder?",
    rows=tuple(
        Row(name, {"method.name": name}, at={"laptop": SUPERVISED} if name == "supervised" else {})
        for name in sorted(METHODS, key=lambda name: (name != FIRST, name))
        if name != "relation"  # learns from a teacher
    ),
    scales={name: _one_seed(scale) for name, scale in usual().items()}
    | {"paper": published("as many runs of ImageNet-1k with ResNet-50 as there are methods")},
)
