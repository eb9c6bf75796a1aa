"""Claim of the survey and of VICReg's paper: its variance term stabilises other methods, such as BYOL and SimCLR."""

from inbatch.apps.papers.scales import SOURCE, published, usual
from inbatch.apps.papers.spec import Row, Settings, Table

WEIGHT = 1.0
# BYOL's "norm" on the digits has the effect intended by this term; with it off, there is an instability to reduce.
PLAIN: dict[str, Settings] = {
    "BYOL": {"method.name": "byol", "method.norm": False},
    "SimCLR": {"method.name": "simclr"},
    "SimSiam": {"method.name": "simsiam"},
}

TABLE = Table(
    name="study-variance",
    title="VICReg's variance term added to other methods",
    source=f"{SOURCE}, on VICReg",
    question="Does keeping every feature's spread help methods that have other means against collapse?",
    rows=tuple(Row(name, method) for name, method in PLAIN.items())
    + tuple(
        Row(f"{name} + variance", {**method, "variance_weight": WEIGHT}, against=name) for name, method in PLAIN.items()
    )
    + (Row("VICReg", {"method.name": "vicreg"}),),
    scales=usual() | {"paper": published("100 epochs of ImageNet-1k with ResNet-50")},
)
