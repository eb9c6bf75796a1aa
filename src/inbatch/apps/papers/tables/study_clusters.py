"""Claim of the survey: grouping images during training gives features that cluster better (CC, PCL, SwAV)."""

from inbatch.apps.papers.scales import CIFAR10, SOURCE, published, usual
from inbatch.apps.papers.spec import Row, Table

CONTRAST, MEMORY = "SimCLR", "MoCo-v2"
ROWS = (
    Row(CONTRAST, {"method.name": "simclr"}),
    Row("CC", {"method.name": "cc"}, against=CONTRAST),
    Row("SwAV", {"method.name": "swav"}, against=CONTRAST),
    Row(MEMORY, {"method.name": "moco", "method.layers": 2}),
    Row("PCL", {"method.name": "pcl"}, against=MEMORY),
)
# Clusters of k-means on the features, compared with the classes, for all rows; those that CC's head assigns are among
# the figures of docs/methods/cc.md.
FIGURES = ("NMI", "ACC", "linear")

TABLE = Table(
    name="study-clusters",
    title="Learning with clusters, and clusters of the learned features",
    source=f"{SOURCE}, on Contrastive Clustering, PCL and SwAV",
    question="Do features that were learned by grouping images fall into better groups?",
    rows=ROWS,
    scales=usual(FIGURES)
    | {
        "paper": published(
            "1,000 epochs a run of CIFAR-10 with ResNet-34",
            ("images of 32 pixels: CC's authors enlarge them to 224 (preset cifar224)",),
            {"encoder.name": "resnet34", "epochs": 1000},
            data=CIFAR10,
            figures=FIGURES,
        )
    },
)
