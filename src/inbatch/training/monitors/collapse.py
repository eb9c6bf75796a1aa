"""Collapse, noticed while it happens: are the outputs of some clean images still different from each other?"""

from collections.abc import Mapping

from torch import Tensor

from inbatch.evaluation import feature_std, rankme
from inbatch.models.network import Network

LOW_STD = 0.25
"""Of 1 for rows spread over the sphere: below it the rows of a head all point the same way."""
LOW_RANK = 0.25
"""Of the highest rank so far: below it the rows of a head have fallen into few dimensions."""
LOW_FEATURE = 0.25
"""Of the highest value so far, for the encoder's features: behind a ReLU they never spread over the sphere."""
SETTLED = 50
"""Steps after which the running statistics of norm layers (momentum 0.1) have forgotten where they started."""

_TRY = (
    "Is what keeps samples apart still on (predictor, stop-gradient, momentum, variance term, negatives)? If it is, "
    "try a lower optimizer.lr, a longer schedule.warmup, a larger batch or context"
)


def spread(network: Network, images: Tensor) -> dict[str, float]:
    """How different the outputs of clean images (N, C, H, W) are, per dimension and in rank, in evaluation mode.

    "features_std" and "features_rank" of the encoder's output, and the same of every head that stands on it; a head
    on another head, a predictor, has a rank of its own making. std is `feature_std`, rank `rankme`.
    """
    with network.evaluating():  # the statistics of these images would blow up what little is left of a difference
        rows = network.outputs(images)
    seen = ["features", *(name for name, source in network.sources.items() if source == "features")]
    found = {f"{name}_std": float(feature_std(rows[name])) for name in seen}
    return found | {f"{name}_rank": float(rankme(rows[name])) for name in seen}


def signs(now: Mapping[str, float], most: Mapping[str, float], classes: bool = False) -> dict[str, str]:
    """What has collapsed, by the name of the measure, each in a sentence; most: the highest values so far.

    classes: the method pulls classes together, so that a rank falls to their number and is no sign.
    """
    found = {}
    for measure, value in now.items():
        whose, _, kind = measure.rpartition("_")
        lowest = LOW_STD if kind == "std" else 0.0 if classes else LOW_RANK * most[measure]
        if whose == "features":
            lowest = LOW_FEATURE * most[measure]
        if not value >= lowest:  # nan, too, is no variety
            what = "features" if whose == "features" else f"rows of {whose}"
            how = (
                f"standard deviation per dimension is {value:.2g} (1: spread over the sphere, 0: all the same)"
                if kind == "std"
                else f"effective rank (RankMe) is {value:.3g}"
            )
            found[measure] = f"the {what} collapse: their {how}, and was {most[measure]:.3g} at best. {_TRY}."
    return found
