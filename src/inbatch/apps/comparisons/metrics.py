"""The figures that a comparison can test."""

from dataclasses import dataclass
from typing import Any

from inbatch.apps.papers.results import Record
from inbatch.training.registry import check_known


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        heading: Heading of its column.
        path: Place of the figure in the evaluation of a record.
        percent: The figure is a share, shown in percent; differences are points of percent.
        higher: A higher figure is better.
        labels: The figure needs labels.
        protocol: Evaluation that is run for it, in addition to k-NN, linear probe and clustering.
    """

    heading: str
    path: str
    percent: bool = True
    higher: bool = True
    labels: bool = True
    protocol: str | None = None

    @property
    def unit(self) -> str:
        """Unit of a difference in a sentence."""
        return " points" if self.percent else ""

    @property
    def digits(self) -> int:
        """Decimal places."""
        return 1 if self.percent else 3

    def value(self, record: Record) -> float | None:
        """Return the figure of a run, in percent if it is a share; None if the record does not contain it."""
        value = self._at(self.path, record)
        return None if value is None else self._shown(value)

    def halves(self, record: Record) -> tuple[float, float] | None:
        """Return the figure on each half of the test images; None if the record does not contain both."""
        group, _, name = self.path.rpartition(".")
        values = self._at(f"{group}.halves", record) if name in ("top1", "map") else None
        if not isinstance(values, list) or len(values) != 2 or None in values:
            return None
        return self._shown(values[0]), self._shown(values[1])

    @staticmethod
    def _at(path: str, record: Record) -> Any:
        value: Any = record.evaluation
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def _shown(self, value: float) -> float:
        return round(float(value) * (100 if self.percent else 1), 9)

    def text(self, value: float, sign: bool = False) -> str:
        """Return a figure or a difference as text."""
        return f"{value:{'+' if sign else ''}.{self.digits}f}"


UNLABELLED = "unlabelled"
"""Part of a record's evaluation with the measures that need no labels."""

METRICS = {
    "knn": Metric("k-NN", "knn.top1"),
    "probe": Metric("linear probe", "linear.top1"),
    "clustering": Metric("clustering, NMI", "clustering.nmi"),
    "acc": Metric("clustering, ACC", "clustering.acc"),
    "ari": Metric("clustering, ARI", "clustering.ari"),
    "balanced": Metric("k-NN, balanced", "knn.balanced"),
    "few": Metric("linear probe, 1 % of labels", "few.shares.1%.linear.top1", protocol="few"),
    "map": Metric("retrieval, mAP", "retrieval.map", protocol="retrieval"),
    "finetune": Metric("fine-tuned", "finetune.top1", protocol="finetune"),
    "corruptions": Metric("linear probe, corrupted", "corruptions.linear.top1", protocol="corruptions"),
    "same_image": Metric("same image found", f"{UNLABELLED}.same_image", labels=False),
    "rankme": Metric("RankMe", f"{UNLABELLED}.rankme", labels=False, percent=False),
    "feature_std": Metric("feature std", f"{UNLABELLED}.feature_std", labels=False, percent=False),
    "uniformity": Metric("uniformity", f"{UNLABELLED}.uniformity", labels=False, percent=False, higher=False),
    "alignment": Metric("alignment", f"{UNLABELLED}.alignment", labels=False, percent=False, higher=False),
}  # fmt: skip
"""Name of --metric -> figure."""
SHOWN = ("knn", "probe", "clustering", "same_image", "rankme")
"""Figures of which the table shows mean and deviation, without a test, in addition to the tested one."""


def metric_named(name: str) -> Metric:
    """Return a metric; raise ConfigError, with the names, for an unknown one."""
    check_known("metric", name, METRICS)
    return METRICS[name]
