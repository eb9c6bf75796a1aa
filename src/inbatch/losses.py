"""Every equation as a plain function of tensors, under its usual name."""

from inbatch.methods.moco import info_nce
from inbatch.methods.simclr import nt_xent
from inbatch.methods.supcon import supcon
from inbatch.methods.supervised import cross_entropy

__all__ = ["cross_entropy", "info_nce", "nt_xent", "supcon"]
