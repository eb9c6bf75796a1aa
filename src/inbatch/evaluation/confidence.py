"""Calibration of class probabilities: expected calibration error, and temperature scaling on held-out images."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from inbatch.rng import permutation

BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""
LEAST = 20
"""Least number of held-out images from which a temperature is fitted."""
_RANGE = (0.02, 50.0)
"""Smallest and largest temperature."""


def calibration_error(confidence: Float[Tensor, "n"], correct: Shaped[Tensor, "n"], bins: int = BINS) -> float:
    """Return the expected calibration error in [0, 1] (Guo et al. 2017, equation 3).

    It is the mean over the images of the difference between confidence and accuracy in a bin of similar confidence.

    Args:
        confidence: probability of the predicted class.
        correct: whether the prediction is correct, 0 or 1.
        bins: number of bins of equal width.
    """
    confidence, correct = confidence.double().cpu(), correct.double().cpu()
    place = (confidence * bins).ceil().sub(1).clamp(0, bins - 1).long()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence - correct)
    return (gaps.abs().sum() / max(1, len(confidence))).item()


def fit_temperature(logits: Float[Tensor, "n c"], labels: Int[Tensor, "n"]) -> float:
    """Return the T for which softmax(logits / T) has the smallest cross-entropy (Guo et al. 2017, section 4.2).

    As in Platt (1999), the targets are smoothed by one image, so that T stays above 0 if every image is classified
    correctly.
    """
    from scipy.optimize import minimize_scalar

    logits, count = logits.double().cpu(), logits.shape[1]
    shifted = logits - logits.amax(1, keepdim=True)
    doubt = 1 / (len(logits) + 2)
    own = shifted.gather(1, labels.cpu()[:, None])[:, 0]
    others = (shifted.sum(1) - own) / max(1, count - 1)
    target = ((1 - doubt) * own + doubt * others).mean().item()

    def cross_entropy(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return (shifted * inverse).logsumexp(1).mean().item() - target * inverse

    bounds = tuple(math.log(value) for value in _RANGE)
    return math.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x)


def calibrate(logits: Float[Tensor, "n c"], labels: Int[Tensor, "n"]) -> dict[str, Any]:
    """Return the temperature for held-out images, and what it changes.

    The figures after calibration are cross-fitted: those of each half of the images use the temperature of the other
    half.

    Returns:
        "temperature": fitted on all images; 1 for fewer than `LEAST`. "images". "bins". "before" and "after":
        "calibration_error" and "cross_entropy" of the two; "after" is None for fewer than `LEAST` images.
    """
    logits, labels = logits.double().cpu(), labels.cpu()
    result: dict[str, Any] = {"temperature": 1.0, "images": len(logits), "bins": BINS, "after": None}
    result["before"] = _figures(logits, labels)
    if len(logits) < LEAST:
        return result
    halves = permutation(0, 0, len(logits)).tensor_split(2)
    scaled = torch.empty_like(logits)
    for part, other in (halves, halves[::-1]):
        scaled[part] = logits[part] / fit_temperature(logits[other], labels[other])
    return result | {"temperature": fit_temperature(logits, labels), "after": _figures(scaled, labels)}


def _figures(logits: Float[Tensor, "n c"], labels: Int[Tensor, "n"]) -> dict[str, float]:
    confidence, predicted = logits.softmax(1).max(1)
    error = calibration_error(confidence, predicted == labels)
    return {"calibration_error": error, "cross_entropy": F.cross_entropy(logits, labels).item()}
