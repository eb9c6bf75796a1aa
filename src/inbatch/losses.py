"""All losses as plain functions of tensors, under their usual names."""

from inbatch.methods.barlow import barlow_twins
from inbatch.methods.byol import byol
from inbatch.methods.cc import cluster_contrast
from inbatch.methods.dcl import dcl
from inbatch.methods.dino import dino
from inbatch.methods.mocov3 import ctr
from inbatch.methods.nnclr import nnclr
from inbatch.methods.pcl import proto_nce
from inbatch.methods.simclr import nt_xent
from inbatch.methods.simsiam import simsiam
from inbatch.methods.supcon import supcon
from inbatch.methods.supervised import cross_entropy
from inbatch.methods.swav import swapped_prediction
from inbatch.methods.vicreg import vicreg
from inbatch.methods.wmse import wmse
from inbatch.nn.functional import info_nce, sinkhorn

__all__ = [
    "barlow_twins", "byol", "cluster_contrast", "cross_entropy", "ctr", "dcl", "dino", "info_nce", "nnclr", "nt_xent",
    "proto_nce", "simsiam", "sinkhorn", "supcon", "swapped_prediction", "vicreg", "wmse",
]  # fmt: skip
