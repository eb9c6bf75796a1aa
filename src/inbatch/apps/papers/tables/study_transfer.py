"""Claim of the survey and of MoCo's paper: features learned without labels transfer as well as those with labels."""

from dataclasses import replace

from inbatch.apps.papers.scales import SOURCE, published, usual
from inbatch.apps.papers.spec import Column, Row, Scale, Table

LABELS = "supervised"
ROWS = (
    Row(
        LABELS,
        {"method.name": "supervised"},
        at={place: {"views.name": "supervised"} for place in ("photos", "laptop", "gpu")},
    ),
    Row("MoCo-v2", {"method.name": "moco", "method.layers": 2}, against=LABELS),
    Row("SimCLR", {"method.name": "simclr"}, against=LABELS),
    Row("BYOL", {"method.name": "byol"}, against=LABELS),
)
OTHERS = ("digits-canvas-colour", "cifar10")


def _with_transfer(scale: Scale, others: tuple[str, ...] = OTHERS) -> Scale:
    """Return the scale with a column of a linear probe on each of these data sets, with all of their labels."""
    names = {column.data: column.name.partition(",")[0] for column in scale.columns}
    more = tuple(
        Column(f"learned from {name}, linear on {other}", data, f"on-{other}.linear.top1")
        for data, name in names.items()
        for other in others
    )
    return replace(scale, columns=scale.columns + more, protocols=tuple(f"on-{other}" for other in others))


_USUAL = usual(("linear",))
TABLE = Table(
    name="study-transfer",
    title="Features evaluated on other data sets than the one of their training",
    source=f"{SOURCE}, on MoCo",
    question="Do features that were learned without labels serve other images better than those learned with?",
    rows=ROWS,
    scales={name: _with_transfer(scale) for name, scale in _USUAL.items() if name != "smoke"}
    | {
        "smoke": _with_transfer(_USUAL["smoke"], OTHERS[:1]),  # always available
        "paper": _with_transfer(published("100 to 200 epochs of ImageNet-1k with ResNet-50")),
    },
)
