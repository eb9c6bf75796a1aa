"""Train with a method of your own, without editing the package.

    python examples/own_method.py

A method is a loss over the projections of the whole batch, and the heads that compute them. Ranks, context groups,
schedules, checkpoints and evaluation come with the library: `docs/add-a-method.md` lists what a method can define. On
the command line: `inbatch pretrain --method own_method:AlignUniform --data FOLDER`, in the folder of this file.
"""

import torch
from torch import Tensor

import inbatch
from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.functional import normalize
from inbatch.nn.heads import Head, mlp


def align_uniform(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return alignment and uniformity of projections (2, N, D) (Wang and Isola 2020, arXiv 2005.10242)."""
    u = normalize(z)
    alignment = (u[0] - u[1]).square().sum(-1).mean()
    uniformity = torch.stack([torch.pdist(view).square().mul(-t).exp().mean().log() for view in u]).mean()
    return alignment, uniformity


class AlignUniform(Method):
    """Alignment and uniformity on the hypersphere. The arguments of the constructor are the method's settings."""

    def __init__(self, t: float = 2.0, weight: float = 1.0, width: int = 64) -> None:
        super().__init__()
        self.t, self.weight, self.width = t, weight, width

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, width, self.width))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        alignment, uniformity = align_uniform(online["projection"], self.t)
        return {"loss": alignment + self.weight * uniformity, "alignment": alignment, "uniformity": uniformity}


if __name__ == "__main__":
    run = inbatch.pretrain("digits-canvas", method=AlignUniform(weight=0.5), epochs=1, quiet=True)
    for name in ("untrained", "evaluation"):
        print(f"{name}: k-NN accuracy {run.result[name]['knn']['top1']:.3f}")
    print(f"run directory: {run.directory}")
