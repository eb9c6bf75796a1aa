"""BA2M (Cheng et al. 2021) against SE and CBAM in a classifier: the survey's example of attention over a batch."""

from inbatch.apps.papers.scales import CIFAR100, published, usual
from inbatch.apps.papers.spec import Row, Table

NONE = "no attention"
BLOCKS = {"SE": "se", "CBAM": "cbam", "BA2M": "ba2m"}
PLAIN = {"method.name": "supervised"}
RESNET = {"encoder.name": "resnet10", "encoder.stem": "imagenet", "views.name": "supervised"}
AT = {
    "photos": RESNET,
    "cifar10": {"views.name": "supervised"},
    "tiny": {"views.name": "supervised"},
    "cifar100": {"views.name": "supervised"},
}

TABLE = Table(
    name="study-ba2m",
    title="Attention over the samples of a batch, and attention within one",
    source="Cheng et al. 2021, arXiv 2103.15099; its figures are not in the survey",
    question="Does weighing the samples of a batch help a classifier more than SE or CBAM?",
    findings={
        "cpu": "The claim, that weighing the samples of a batch lifts a classifier above SE and CBAM, cannot be "
        "seen at this size: BA2M is within half a point of the classifier without attention in all four columns and "
        "never apart from it beyond chance; SE is level, too. Above CBAM it is everywhere (+0.1 against -0.8 by "
        "k-NN on photographs), because CBAM loses: by 2.5 points by k-NN on the digits, at p 0.07 at best. The "
        "networks are small, the digits nearly solved, and the photographs seen four times."
    },
    rows=(
        Row(NONE, PLAIN, at=AT),
        *(Row(name, {**PLAIN, "attend.name": block}, against=NONE, at=AT) for name, block in BLOCKS.items()),
        Row("BatchFormer", {**PLAIN, "attend.name": "batchformer"}, against=NONE, at=AT, scales=("laptop", "gpu")),
    ),
    scales=usual(
        differs=(
            "no code of BA2M is public: it is our interpretation of it (docs/context/attend.md)",
            "figures are of a probe on the features, as everywhere here, not of the classifier itself",
            "photos: encoder resnet10 with ImageNet's stem",
        )
    )
    | {
        "paper": published(
            "CIFAR-100 with ResNet-50",
            data=CIFAR100,
            settings={"epochs": 200, "batch_size": 128},
        )
    },
)
