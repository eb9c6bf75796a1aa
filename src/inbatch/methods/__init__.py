"""The whole registry of methods."""

from inbatch.methods.base import Method
from inbatch.methods.moco import MoCo
from inbatch.methods.simclr import SimCLR
from inbatch.methods.supcon import SupCon
from inbatch.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "supcon": SupCon,
    "supervised": Supervised,
}
