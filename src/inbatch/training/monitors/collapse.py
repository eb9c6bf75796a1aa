"""Detect collapse during training: measure whether the outputs of clean images still differ."""

from collections.abc import Mapping

from torch import Tensor

from inbatch.evaluation import feature_std, rankme
from inbatch.models.network import Network

LOW_STD = 0.25
"""Lowest standard deviation of a head's rows (1: spread over the sphere); below it they have one direction."""
LOW_RANK = 0.25
"""Lowest share of the highest rank so far; below it the rows of a head span few dimensions."""
LOW_FEATURE = 0.25
"""Lowest share of the highest value so far, for features: after a ReLU they never spread over the sphere."""
SETTLED = 50
"""Number of steps after which the running statistics of norm layers (momentum 0.1) no longer depend on their start."""

_TRY = (
    "Is what keeps samples apart still on (predictor, stop-gradient, momentum, variance term, negatives)? If it is, "
    "try a lower optimizer.lr, a longer schedule.warmup_epochs, a larger batch or context"
)


def output_diversity(network: Network, images: Tensor) -> dict[str, float]:
    """Return how different the outputs of clean images (N, C, H, W) are, per dimension and in rank, in evaluation mode.

    "features_std" and "features_rank" are those of the encoder's output, with the same for every head that reads it. A
    head on another head (a predictor) is excluded: its rank is determined by itself. std is `feature_std`, rank is
    `rankme`.
    """
    with network.evaluating():  # batch statistics of these images would amplify small differences
        rows = network.outputs(images)
    seen = ["features", *(name for name, source in network.sources.items() if source == "features")]
    deviations = {f"{name}_std": float(feature_std(rows[name])) for name in seen}
    return deviations | {f"{name}_rank": float(rankme(rows[name])) for name in seen}


def signs(now: Mapping[str, float], most: Mapping[str, float], classes: bool = False) -> dict[str, str]:
    """Return what has collapsed: measure -> a sentence.

    Args:
        now: Current values.
        most: Highest values so far.
        classes: The method pulls classes together, so that a rank falls to their number and is not evaluated.
    """
    sentences = {}
    for measure, value in now.items():
        whose, _, kind = measure.rpartition("_")
        lowest = LOW_STD if kind == "std" else 0.0 if classes else LOW_RANK * most[measure]
        if whose == "features":
            lowest = LOW_FEATURE * most[measure]
        if not value >= lowest:  # includes nan
            what = "features" if whose == "features" else f"rows of {whose}"
            how = (
                f"standard deviation per dimension is {value:.2g} (1: uniform on the sphere, 0: all equal)"
                if kind == "std"
                else f"effective rank (RankMe) is {value:.3g}"
            )
            sentences[measure] = f"the {what} collapse: their {how}, and was {most[measure]:.3g} at best. {_TRY}."
    return sentences
