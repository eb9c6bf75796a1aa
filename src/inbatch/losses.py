"""All losses as plain functions of tensors, under their usual names.

A loss is computed from the rows of the whole batch. In a training loop of several processes, pass
`inbatch.distributed.gather_rows(rows)`; a loss that compares the samples of a batch warns once if it gets rows that one
process computed alone.
"""

from inbatch.distributed import compares_samples
from inbatch.methods import align_uniform as _align_uniform
from inbatch.methods import barlow, cc, mocov3, pcl, simclr
from inbatch.methods import dcl as _dcl
from inbatch.methods import hcl as _hcl
from inbatch.methods import isogclr as _isogclr
from inbatch.methods import lejepa as _lejepa
from inbatch.methods import mmcr as _mmcr
from inbatch.methods import nnclr as _nnclr
from inbatch.methods import relation as _relation
from inbatch.methods import sigmoid as _sigmoid
from inbatch.methods import sogclr as _sogclr
from inbatch.methods import supcon as _supcon
from inbatch.methods import tico as _tico
from inbatch.methods import vicreg as _vicreg
from inbatch.methods import visreg as _visreg
from inbatch.methods import wmse as _wmse
from inbatch.methods.byol import byol
from inbatch.methods.dino import dino
from inbatch.methods.simsiam import simsiam
from inbatch.methods.supervised import cross_entropy
from inbatch.methods.swav import swapped_prediction
from inbatch.nn import functional, slicing
from inbatch.nn.functional import info_nce

align_uniform = compares_samples(_align_uniform.align_uniform)
barlow_twins = compares_samples(barlow.barlow_twins)
cluster_contrast = compares_samples(cc.cluster_contrast)
ctr = compares_samples(mocov3.ctr)
dcl = compares_samples(_dcl.dcl)
koleo = compares_samples(functional.koleo)
lejepa = compares_samples(_lejepa.lejepa)
hcl = compares_samples(_hcl.hcl)
isogclr = compares_samples(_isogclr.isogclr)
mmcr = compares_samples(_mmcr.mmcr)
nnclr = compares_samples(_nnclr.nnclr)
nt_xent = compares_samples(simclr.nt_xent)
pairwise_sigmoid = compares_samples(_sigmoid.pairwise_sigmoid)
proto_nce = compares_samples(pcl.proto_nce)
relation = compares_samples(_relation.relation)
sigreg = compares_samples(slicing.sigreg)
sinkhorn = compares_samples(functional.sinkhorn)
sogclr = compares_samples(_sogclr.sogclr)
supcon = compares_samples(_supcon.supcon)
tico = compares_samples(_tico.tico)
vicreg = compares_samples(_vicreg.vicreg)
visreg = compares_samples(_visreg.visreg)
wmse = compares_samples(_wmse.wmse)

__all__ = [
    "align_uniform", "barlow_twins", "byol", "cluster_contrast", "cross_entropy", "ctr", "dcl", "dino", "hcl",
    "info_nce", "isogclr", "koleo", "lejepa", "mmcr", "nnclr", "nt_xent", "pairwise_sigmoid", "proto_nce",
    "relation", "sigreg", "simsiam", "sinkhorn", "sogclr", "supcon", "swapped_prediction", "tico", "vicreg",
    "visreg", "wmse",
]  # fmt: skip
