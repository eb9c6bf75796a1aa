"""What the study in docs/choose.md found: how well measures without labels order runs by k-NN."""

from collections.abc import Sequence
from dataclasses import dataclass

# Kendall's tau-b with k-NN between runs of one method, its 95 % interval and the number of runs. Written by
# scripts/choose_tables.py; a test compares it with the records.
BETWEEN: dict[str, dict[str, tuple[float, float, float, int]]] = {
    "rankme": {
        "simclr": (0.0, -0.12, 0.17, 178),
        "moco": (0.57, 0.38, 0.67, 75),
        "byol": (0.2, -0.11, 0.33, 45),
        "simsiam": (0.15, -0.25, 0.3, 36),
        "barlow": (0.2, -0.67, 1.0, 6),
        "vicreg": (-0.07, -1.0, 1.0, 6),
        "supervised": (-0.07, -0.36, 0.2, 58),
        "all": (0.08, -0.02, 0.19, 408),
    },
    "lidar": {
        "simclr": (-0.24, -0.65, 0.18, 28),
        "moco": (-0.1, -0.61, 0.11, 15),
        "byol": (-0.37, -0.7, -0.3, 15),
        "simsiam": (0.07, -1.0, 1.0, 6),
        "barlow": (0.2, -1.0, 1.0, 6),
        "vicreg": (-0.2, -1.0, 0.64, 6),
        "all": (-0.21, -0.5, 0.04, 76),
    },
    "alpha": {
        "simclr": (0.12, -0.46, 0.53, 28),
        "moco": (0.41, -0.59, 0.83, 15),
        "byol": (0.29, -0.9, 0.64, 15),
        "simsiam": (-0.2, -0.64, 0.23, 6),
        "barlow": (0.33, -0.54, 1.0, 6),
        "vicreg": (-0.2, -1.0, 0.67, 6),
        "all": (0.17, -0.2, 0.44, 76),
    },
    "std": {
        "simclr": (-0.28, -0.39, -0.14, 178),
        "moco": (-0.03, -0.3, 0.18, 75),
        "byol": (-0.61, -0.81, -0.53, 45),
        "simsiam": (-0.49, -0.68, -0.25, 36),
        "barlow": (-0.07, -1.0, 1.0, 6),
        "vicreg": (0.2, -0.64, 1.0, 6),
        "supervised": (-0.24, -0.48, 0.1, 58),
        "all": (-0.26, -0.36, -0.15, 408),
    },
    "loss": {
        "simclr": (0.5, 0.32, 0.62, 100),
        "moco": (0.21, -0.04, 0.5, 57),
        "byol": (0.19, -0.18, 0.48, 27),
        "simsiam": (0.02, -0.33, 0.26, 18),
        "barlow": (-0.2, -1.0, 0.64, 6),
        "vicreg": (0.07, -1.0, 1.0, 6),
        "supervised": (0.33, -0.11, 0.55, 28),
        "all": (0.4, 0.28, 0.51, 242),
    },
    "same_image": {
        "simclr": (0.41, -0.34, 1.0, 6),
        "moco": (0.55, -0.09, 1.0, 6),
        "byol": (0.41, -0.38, 1.0, 6),
        "simsiam": (0.41, -0.3, 1.0, 6),
        "barlow": (0.54, -0.43, 1.0, 6),
        "vicreg": (0.64, -0.11, 1.0, 6),
        "all": (0.5, 0.22, 0.75, 36),
    },
}


@dataclass(frozen=True)
class Reliability:
    """How well a measure ordered the runs of the study.

    Attributes:
        sentence: The figures for the user.
        supported: Whether the interval over all methods lies above 0.
    """

    sentence: str
    supported: bool


NAMES = {"rankme": "RankMe", "lidar": "LiDAR", "alpha": "alpha-ReQ", "std": "feature std", "loss": "the loss"}
NAMES["same_image"] = "finding the second view of an image (same_image)"
"""Measure -> its name in a sentence."""


def reliability(by: str, methods: Sequence[str] = ()) -> Reliability:
    """Return how reliable a measure was between runs of one method: over all methods, and for those of the user's runs.

    Args:
        by: The measure.
        methods: Methods of the runs to choose from.
    """
    tau, low, high, runs = BETWEEN[by]["all"]
    how = "cannot be relied on" if low <= 0 else "is a weak guide" if tau < 0.5 else "is a fair guide"
    parts = [f"{NAMES[by]} {how}: in our study Kendall's tau with k-NN is {_text(tau, low, high)} between {runs} runs"]
    for method in methods:
        if method in BETWEEN[by]:
            tau_of, low_of, high_of, count = BETWEEN[by][method]
            parts.append(f"{method}: {_text(tau_of, low_of, high_of)}, {count} runs")
        else:
            parts.append(f"{method}: not studied")
    return Reliability("; ".join(parts) + " (1: same order, 0: none, -1: reverse; docs/choose.md)", low > 0)


def _text(tau: float, low: float, high: float) -> str:
    return f"{tau:+.2f} ({low:+.2f} to {high:+.2f})"
