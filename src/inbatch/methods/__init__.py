"""Registry of the methods."""

from inbatch.methods.align_uniform import AlignUniform
from inbatch.methods.barlow import BarlowTwins
from inbatch.methods.base import Method
from inbatch.methods.byol import BYOL
from inbatch.methods.cc import CC
from inbatch.methods.dcl import DCL
from inbatch.methods.dino import DINO
from inbatch.methods.hcl import HCL
from inbatch.methods.isogclr import ISogCLR
from inbatch.methods.lejepa import LeJEPA
from inbatch.methods.mmcr import MMCR
from inbatch.methods.moco import MoCo
from inbatch.methods.mocov3 import MoCoV3
from inbatch.methods.nnclr import NNCLR
from inbatch.methods.pcl import PCL
from inbatch.methods.relation import Relation
from inbatch.methods.sigmoid import Sigmoid
from inbatch.methods.simclr import SimCLR
from inbatch.methods.simsiam import SimSiam
from inbatch.methods.sogclr import SogCLR
from inbatch.methods.supcon import SupCon
from inbatch.methods.supervised import Supervised
from inbatch.methods.swav import SwAV
from inbatch.methods.tico import TiCo
from inbatch.methods.vicreg import VICReg
from inbatch.methods.visreg import VISReg
from inbatch.methods.wmse import WMSE

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "dcl": DCL,
    "hcl": HCL,
    "sogclr": SogCLR,
    "isogclr": ISogCLR,
    "align_uniform": AlignUniform,
    "moco": MoCo,
    "mocov3": MoCoV3,
    "nnclr": NNCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "lejepa": LeJEPA,
    "visreg": VISReg,
    "wmse": WMSE,
    "tico": TiCo,
    "mmcr": MMCR,
    "swav": SwAV,
    "dino": DINO,
    "cc": CC,
    "pcl": PCL,
    "relation": Relation,
    "sigmoid": Sigmoid,
    "supcon": SupCon,
    "supervised": Supervised,
}
