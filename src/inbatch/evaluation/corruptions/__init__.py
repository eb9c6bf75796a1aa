"""The fifteen common corruptions of Hendrycks and Dietterich 2019, computed on batches, and robustness to them."""

from inbatch.evaluation.corruptions.image_rng import Chance
from inbatch.evaluation.corruptions.protocol import check, corruptions
from inbatch.evaluation.corruptions.registry import CORRUPTIONS, SEVERITIES, Corruption

__all__ = ["CORRUPTIONS", "SEVERITIES", "Chance", "Corruption", "check", "corruptions"]
