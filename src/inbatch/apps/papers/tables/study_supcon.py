"""Claim of the survey: SupCon is more accurate than cross-entropy, and more robust to corruptions."""

from dataclasses import replace

from inbatch.apps.papers.scales import SOURCE, published, usual
from inbatch.apps.papers.spec import Column, Row, Scale, Table

ENTROPY = "cross-entropy"
ROWS = (
    Row(ENTROPY, {"method.name": "supervised"}),
    Row("SupCon", {"method.name": "supcon"}, against=ENTROPY),
)


def _with_corruptions(scale: Scale) -> Scale:
    """Return the scale with a column of the mean accuracy over 15 corruptions at 5 severities."""
    names = {column.data: column.name.partition(",")[0] for column in scale.columns}
    more = tuple(Column(f"{name}, corrupted", data, "corruptions.linear.top1") for data, name in names.items())
    return replace(scale, columns=scale.columns + more, protocols=("corruptions",))


# Both use the views of contrastive learning: SupCon's authors use them for cross-entropy as well.
_USUAL = usual(("linear",))
TABLE = Table(
    name="study-supcon",
    title="Supervised contrastive learning and cross-entropy",
    source=f"{SOURCE}, on SupCon",
    question="Is contrasting classes more accurate than classification, on clean and on corrupted images?",
    rows=ROWS,
    scales={name: _with_corruptions(scale) for name, scale in _USUAL.items()}
    | {"paper": _with_corruptions(published("ImageNet-1k with ResNet-50; the paper used ResNet-200 for 81.4 %"))},
)
