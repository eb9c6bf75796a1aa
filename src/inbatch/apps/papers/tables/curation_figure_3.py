"""Batch curation, Figure 3: relative positions of two crops of an image, counted over a million pairs."""

from inbatch.apps.papers.spec import Column, Row, Scale, Table
from inbatch.apps.papers.tables import curation

SHARES = {"global-local": 17.27, "adjacent": 1.40, "intersection": 81.33}

MAP = "the heat map of Figure 3 is drawn by inbatch crops -o crops.png (docs/context/crops.md)"
WHOLE = ("cpu", "laptop", "gpu", "paper")
_COLUMNS = tuple(Column(f"{name}, counted", curation.COUNTED, f"crops.{name}", name) for name in SHARES)


def _scale(pairs: int, seeds: tuple[int, ...], cost: str) -> Scale:
    return Scale(_COLUMNS, {curation.COUNTED: {"size": 32, "pairs": pairs}}, seeds=seeds, cost=cost, differs=(MAP,))


TABLE = Table(
    name="curation-figure-3",
    title="Relative positions of two crops of an image",
    source=f"{curation.SOURCE}, Figure 3",
    question="How often is one crop inside the other, apart from it, or partially overlapping?",
    headings=tuple(SHARES),
    digits=2,
    findings=dict.fromkeys(
        WHOLE,
        "The figure is reproduced exactly: at every seed the three shares lie within a tenth of a point of the "
        "paper's, where crops are compared as integer boxes and touching edges do not count as containment.",
    ),
    rows=(Row("default", {"crops": "default"}, SHARES),),
    scales={
        "smoke": _scale(10_000, (0, 1), "a second"),
        **{name: _scale(1_000_000, (0, 1, 2), "seconds; no images are needed") for name in WHOLE},
    },
)
