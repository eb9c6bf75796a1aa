"""The fifteen common corruptions of Hendrycks and Dietterich 2019, computed on batches, and how features stand them."""

from inbatch.evaluate.corruptions.chance import Chance
from inbatch.evaluate.corruptions.protocol import check, corruptions
from inbatch.evaluate.corruptions.table import CORRUPTIONS, SEVERITIES, Corruption

__all__ = ["CORRUPTIONS", "SEVERITIES", "Chance", "Corruption", "check", "corruptions"]
