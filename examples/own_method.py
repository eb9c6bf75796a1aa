"""Train with a method of your own, without editing the package.

    python examples/own_method.py

A method is a loss over the projections of the whole batch, and the heads that compute them. Ranks, context groups,
schedules, checkpoints and evaluation come with the library: `docs/add-a-method.md` lists what a method can define. On
the command line: `inbatch pretrain --method own_method:Spectral --data FOLDER`, in the folder of this file.
"""

from torch import Tensor

import inbatch
from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.functional import normalize
from inbatch.nn.heads import Head, mlp


def spectral(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return attraction and repulsion of projections (2, N, D) (HaoChen et al. 2021, arXiv 2106.04156)."""
    a, b = normalize(z)
    n, own = len(a), (a * b).sum(-1)
    pairs = ((a.T @ a) * (b.T @ b)).sum()  # of squared products of all rows, without their matrix
    return -2 * own.mean(), (pairs - own.square().sum()) / (n * (n - 1))


class Spectral(Method):
    """Spectral contrastive loss. The arguments of the constructor are the method's settings."""

    def __init__(self, weight: float = 1.0, width: int = 64) -> None:
        super().__init__()
        self.weight, self.width = weight, width

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, width, self.width))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        attraction, repulsion = spectral(online["projection"])
        return {"loss": attraction + self.weight * repulsion, "attraction": attraction, "repulsion": repulsion}


if __name__ == "__main__":
    run = inbatch.pretrain("digits-canvas", method=Spectral(weight=5.0), epochs=1, quiet=True)
    for name in ("untrained", "evaluation"):
        print(f"{name}: k-NN accuracy {run.result[name]['knn']['top1']:.3f}")
    print(f"run directory: {run.directory}")
