"""All losses as plain functions of tensors, under their usual names.

A loss is computed from the rows of the whole batch. In a training loop of several processes, pass
`inbatch.distributed.gather_rows(rows)`; a loss that compares the samples of a batch warns once if it gets rows that one
process computed alone.
"""

from inbatch.distributed import compares_samples
from inbatch.methods import barlow, cc, mocov3, pcl, simclr
from inbatch.methods import dcl as _dcl
from inbatch.methods import nnclr as _nnclr
from inbatch.methods import relation as _relation
from inbatch.methods import sigmoid as _sigmoid
from inbatch.methods import supcon as _supcon
from inbatch.methods import vicreg as _vicreg
from inbatch.methods import wmse as _wmse
from inbatch.methods.byol import byol
from inbatch.methods.dino import dino
from inbatch.methods.simsiam import simsiam
from inbatch.methods.supervised import cross_entropy
from inbatch.methods.swav import swapped_prediction
from inbatch.nn import functional
from inbatch.nn.functional import info_nce

barlow_twins = compares_samples(barlow.barlow_twins)
cluster_contrast = compares_samples(cc.cluster_contrast)
ctr = compares_samples(mocov3.ctr)
dcl = compares_samples(_dcl.dcl)
nnclr = compares_samples(_nnclr.nnclr)
nt_xent = compares_samples(simclr.nt_xent)
pairwise_sigmoid = compares_samples(_sigmoid.pairwise_sigmoid)
proto_nce = compares_samples(pcl.proto_nce)
relation = compares_samples(_relation.relation)
sinkhorn = compares_samples(functional.sinkhorn)
supcon = compares_samples(_supcon.supcon)
vicreg = compares_samples(_vicreg.vicreg)
wmse = compares_samples(_wmse.wmse)

__all__ = [
    "barlow_twins", "byol", "cluster_contrast", "cross_entropy", "ctr", "dcl", "dino", "info_nce", "nnclr", "nt_xent",
    "pairwise_sigmoid", "proto_nce", "relation", "simsiam", "sinkhorn", "supcon", "swapped_prediction", "vicreg",
    "wmse",
]  # fmt: skip
