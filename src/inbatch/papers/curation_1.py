"""Batch curation, Table 1: SimCLR with pairs of crops that lie to each other in one way only, or are large or small."""

from inbatch.papers import curation
from inbatch.papers.table import Row, Table

DEFAULT = "default"
VARIANTS = {
    DEFAULT: (90.67, 86.29, 49),
    "global-local": (87.32, 81.95, 51),
    "adjacent": (64.59, 65.96, 17),
    "intersection": (90.72, 86.63, 49),
    "equal": (88.60, 83.95, 39),
    "big": (89.17, 85.99, 70),
    "small": (23.24, 76.31, 29),
    "global-local-big": (86.50, 82.87, 73),
}
"""Our name of the crops -> the paper's linear, k-NN and mean area, in percent."""

ROWS = tuple(
    Row(
        name,
        {**curation.SIMCLR, "crops": name},
        dict(zip(curation.HEADINGS, figures, strict=True)),
        against=None if name == DEFAULT else DEFAULT,
    )
    for name, figures in VARIANTS.items()
)

TABLE = Table(
    name="curation-1",
    title="How the two crops of an image lie to each other",
    source=f"{curation.SOURCE}, Table 1",
    asks="Which pairs of crops does SimCLR learn most from?",
    headings=curation.HEADINGS,
    rows=ROWS,
    scales=curation.scales("linear", "k-NN", patch=True),
)
