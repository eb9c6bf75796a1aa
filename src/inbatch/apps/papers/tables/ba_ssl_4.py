"""BA-SSL, Table 4: number of embedding layers that fuse a batch."""

from inbatch.apps.papers.scales import IMAGENET, usual
from inbatch.apps.papers.spec import Column, Row, Scale, Table
from inbatch.apps.papers.tables import ba_ssl

BARE = "0 layers (MoCo-v2)"
LAYERS = {1: 53.35, 2: 52.62, 3: 53.17}

ROWS = (
    Row(BARE, ba_ssl.SYMMETRIC, {"Top1": 52.50}),
    *(
        Row(
            f"{n} layer{'s' * (n > 1)}",
            {**ba_ssl.SYMMETRIC, **ba_ssl.FUSED, "fuse.layers": n},
            {"Top1": top1},
            against=BARE,
        )
        for n, top1 in LAYERS.items()
    ),
)

TABLE = Table(
    name="ba-ssl-4",
    title="How many embedding layers",
    source=f"{ba_ssl.SOURCE}, Table 4",
    question="Is one embedding layer the right number?",
    headings=("Top1",),
    findings={
        "cpu": "One layer is the best number here, too: both probes fall with each layer more. That any helps "
        "(0.85 points in the paper) does not hold: on photographs one layer is level with none (-0.4 and +0.2 "
        "points, both within chance), two and three are below it by k-NN, and on the digits every layer costs: 9.4, "
        "19.1 and 29.2 points by the probe. Three hundred steps train the layers themselves little, and the more "
        "they change the fused view, the less the learned features may suit plain images; that was not measured."
    },
    rows=ROWS,
    scales=usual(differs=(ba_ssl.INTERPRETATION, "MoCo v2 with the symmetric loss of Algorithm 1"))
    | {
        "paper": Scale(
            (Column("ImageNet-1k, linear", "ImageNet-1k", "linear.top1", "Top1"),),
            {"ImageNet-1k": IMAGENET},
            ba_ssl.PUBLISHED,
            seeds=(0,),
            cost="300 epochs of ImageNet-1k; the paper: four RTX 3090, no time given",
            differs=(ba_ssl.INTERPRETATION, "MoCo v2 with the symmetric loss of Algorithm 1"),
        )
    },
)
