"""Every method with its own settings for small images, where features are learned."""

from dataclasses import replace

from inbatch.apps.papers.scales import laptop, published, usual
from inbatch.apps.papers.spec import Row, Scale, Settings, Table
from inbatch.methods import METHODS

FIRST = "simclr"
SUPERVISED: Settings = {"views.name": "supervised"}
TEACHER = "inbatch/cifar10-fast"
"""Teacher of `relation` at the scale laptop: SimCLR for twice as many epochs, on the same images of CIFAR-10."""

LAPTOP = (
    "options of each method for small images; optimiser, learning rate and views, which were chosen with SimCLR, of "
    "the preset fast for all",
    f"relation learns from the teacher {TEACHER} (SimCLR, 8 epochs)",
)


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
    findings={
        "laptop": "With one seed and an optimiser that was chosen with SimCLR, four methods with sums over negatives "
        "lie within a point of SimCLR by k-NN (68.8 %): SogCLR 69.8, iSogCLR 69.3, HCL 69.1, alignment and uniformity "
        "68.8 %. MMCR has 68.0, sigmoid and VISReg 67.2, LeJEPA 66.6, TiCo 63.4, BYOL 62.8 %. Differences below a "
        "point are within the spread of seeds (SimCLR: 68.3 to 69.2 %). Relation has 68.3 % after one epoch already, "
        "its teacher 70.5 %, and gains nothing in three more. SupCon has labels and 68.5 %, still "
        "rising at the end. The methods without a figure have not been run.",
    },
    rows=tuple(map(_row, sorted(METHODS, key=lambda name: (name != FIRST, name)))),
    scales={name: _one_seed(scale) for name, scale in usual().items()}
    | {"laptop": _one_seed(laptop(differs=LAPTOP))}
    | {"paper": published("as many runs of ImageNet-1k with ResNet-50 as there are methods")},
)
